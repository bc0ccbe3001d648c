"""One step of training and one of evaluation: pure functions over `TrainState`."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from flax_alexnet.data.augment import mixup
from flax_alexnet.ops.fusion import apart_on_cpu
from flax_alexnet.training.metrics import cross_entropy, top_k_correct
from flax_alexnet.training.optimizer import only_finite

Totals = dict[str, jax.Array]  # sums over images, float32[]; "images" counts them


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint holds, and all that the next step needs besides its batch."""

    step: jax.Array  # int32[]: updates made so far
    params: Any
    opt_state: optax.OptState
    mean: jax.Array  # float32[h, w, 3], in grey levels; the model is trained with it
    totals: Totals  # sums over the training images since the last report

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated, and used after the training."""
        return self.params


class AveragedState(TrainState):
    """A state with a moving average of the parameters, which is evaluated instead of them."""

    average: Any  # as params

    @property
    def evaluated(self) -> Any:
        """The average."""
        return self.average


def zero_totals() -> Totals:
    """Totals over no images."""
    return {name: jnp.zeros((), jnp.float32) for name in ("images", "loss", "top1", "top5")}


def create_state(
    key: jax.Array,
    mean: jax.Array,
    initial: Mapping[str, Any] | None = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    crop_size: int,
    frozen: Collection[str] = (),
    averaged: bool = False,
) -> TrainState:
    """The state before the first step, for `train_step`.

    Args:
      key: the PRNG key for the parameters that are drawn.
      mean: the mean image, float32[h, w, 3], in grey levels, as `augment` takes it.
      initial: {"conv1": {"kernel", "bias"}, …}: values for layers that are not drawn.
      model: the model, such as an `AlexNet`.
      optimizer: one from `flax_alexnet.create_optimizer`, or any other optax optimizer.
      crop_size: side in pixels of the crop that the model sees.
      frozen: layers that `train_step` leaves as they are; they have no optimizer state.
      averaged: whether the state is an `AveragedState`, whose average begins as the parameters do.
    """
    drawn = model.init(key, jnp.zeros((1, crop_size, crop_size, 3)))["params"]
    params = {layer: (initial or {}).get(layer, values) for layer, values in drawn.items()}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(_without(frozen, params)),
        mean=mean,
        totals=zero_totals(),
    )
    # The average is a copy, so that both can be donated to a step.
    copy = jax.tree.map(jnp.copy, params)
    return AveragedState(**vars(state), average=copy) if averaged else state


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    frozen: Collection[str] = (),
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    mixup_alpha: float = 0.0,
    average_decay: float = 0.0,
) -> tuple[TrainState, jax.Array]:
    """Returns the state after one update, and the batch's mean loss before it (float32[]).

    The state never holds an infinite number or NaN. If the loss or an element of a gradient is not
    finite, the state is returned unchanged, to the bit, and the loss is NaN. If they are finite but
    a number overflows in the update, it becomes the largest finite number.

    Args:
      state: the state before the update.
      batch: "image" uint8[b, h, w, 3] and "label" int32[b], the global batch.
      key: the PRNG key of the run; the keys of a step derive from it and `state.step`.
      model: maps float[b, c, c, 3] to logits.
      optimizer: one from `flax_alexnet.create_optimizer`, or another optax optimizer, which gets
        the loss as `value`; line searches, such as `optax.lbfgs`, do not work.
      augment: maps (key, images, mean) to the images that the model sees.
      frozen: layers whose parameters do not change, to the bit.
      loss: maps logits and labels to a loss for each image, float32[b].
      mixup_alpha: see `flax_alexnet.data.augment.mixup`; 0: images are not mixed.
      average_decay: d in average ← d · average + (1 − d) · params, for an `AveragedState`.

    Raises:
      ValueError: `state.totals` has other names than `zero_totals`.
    """
    if state.totals.keys() != zero_totals().keys():
        raise ValueError(
            f"state.totals has {sorted(state.totals)}; expected those of flax_alexnet.zero_totals, "
            "as flax_alexnet.create_state makes them"
        )
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images, labels = augment(augment_key, batch["image"], state.mean), batch["label"]
    share = None
    if mixup_alpha:
        images, share = mixup(jax.random.fold_in(augment_key, 1), images, mixup_alpha)

    trained = _without(frozen, state.params)

    def loss_fn(trained: Any) -> tuple[jax.Array, Totals]:
        variables, rngs = {"params": {**state.params, **trained}}, {"dropout": dropout_key}
        logits: Any = model.apply(variables, images, train=True, rngs=rngs)
        losses = loss(logits, labels)
        if share is not None:
            losses = share * losses + (1 - share) * loss(logits, labels[::-1])
        return losses.mean(), _totals(logits, losses, labels, jnp.ones(losses.shape, bool))

    (mean_loss, totals), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    # Without this barrier XLA fuses the gradients with later operations, which changes the last
    # bits of some biases on a CPU.
    gradients = jax.lax.optimization_barrier(gradients)
    finite = all_finite((mean_loss, gradients))
    updates, opt_state = only_finite(optimizer).update(
        gradients, state.opt_state, trained, finite=finite, value=mean_loss
    )
    updates = apart_on_cpu(updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.nan_to_num(a + b)

    params = {**state.params, **keep(jax.tree.map(add, trained, updates), trained)}
    if isinstance(state, AveragedState):
        average = optax.incremental_update(params, state.average, 1 - average_decay)
        state = state.replace(average=keep(average, state.average))
    state = state.replace(
        step=keep(state.step + 1, state.step),
        params=params,
        opt_state=opt_state,
        totals=keep(jax.tree.map(add, state.totals, totals), state.totals),
    )
    return state, jnp.where(finite, mean_loss, jnp.nan)


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree of floats, and their sum, are finite: bool[].

    Only the sum is tested. It is infinite or NaN if any number is, on any number of devices, and
    finite numbers make it overflow only if they are far too large to be useful. For a sum, XLA on a
    CPU reads the numbers once and writes nothing; for `isfinite` of each, it writes an array.
    """
    sums = [jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.isfinite(functools.reduce(jnp.add, sums))


def eval_step(
    totals: Totals,
    params: Any,
    mean: jax.Array,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    preprocess: Callable[[jax.Array, jax.Array], jax.Array],
) -> Totals:
    """Returns `totals` plus those of the images of the batch that "mask" (bool[b]) marks."""
    logits: Any = model.apply({"params": params}, preprocess(batch["image"], mean))
    losses = cross_entropy(logits, batch["label"])
    return jax.tree.map(jnp.add, totals, _totals(logits, losses, batch["label"], batch["mask"]))


def _without(frozen: Collection[str], params: Any) -> Any:
    return {layer: values for layer, values in params.items() if layer not in frozen}


def _totals(logits: jax.Array, losses: jax.Array, labels: jax.Array, mask: jax.Array) -> Totals:
    of_images = {
        "images": mask,
        "loss": losses,
        "top1": top_k_correct(logits, labels, 1),
        "top5": top_k_correct(logits, labels, 5),
    }
    return {name: jnp.sum(v.astype(jnp.float32), where=mask) for name, v in of_images.items()}
