"""One step of training and one of evaluation: pure functions over `TrainState`."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from flax_alexnet.ops.fusion import apart_on_cpu
from flax_alexnet.training.metrics import cross_entropy, top_k_correct
from flax_alexnet.training.optimizer import only_finite

Totals = dict[str, jax.Array]  # sums over images, float32[]; "images" counts them


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint holds, and all that the next step depends on but its batch."""

    step: jax.Array  # int32[]: updates made so far
    params: Any
    opt_state: optax.OptState
    mean: (
        jax.Array
    )  # float32[h, w, 3], grey levels: part of the model, since it was trained with it
    totals: Totals  # of training since they were last reported


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
) -> TrainState:
    """The state before the first step, for `train_step`.

    Args:
      key: for the parameters that are drawn.
      mean: float32[h, w, 3], in grey levels, as `augment` takes it.
      initial: {"conv1": {"kernel", "bias"}, …}: values of layers that are not to be drawn.
      model: the model, such as an `AlexNet`.
      optimizer: of `flax_alexnet.create_optimizer`, or any other of optax.
      crop_size: side in pixels of what the model sees.
      frozen: layers that `train_step` leaves as they are; they have no optimizer state.
    """
    drawn = model.init(key, jnp.zeros((1, crop_size, crop_size, 3)))["params"]
    params = {layer: (initial or {}).get(layer, values) for layer, values in drawn.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(_without(frozen, params)),
        mean=mean,
        totals=zero_totals(),
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    frozen: Collection[str] = (),
) -> tuple[TrainState, jax.Array]:
    """The state after one update, and the mean loss of the batch before it (float32[]).

    No number of the state is ever infinite or NaN. Where the loss or an element of a gradient is
    not finite, the state comes back as it was, to the bit, and the loss is NaN. A number that
    overflows in the update although they are finite becomes the largest finite one.

    Args:
      state: before it.
      batch: "image" uint8[b, h, w, 3] and "label" int32[b], the global batch.
      key: the run's; all that is drawn derives from it and `state.step`.
      model: maps float[b, c, c, 3] to logits.
      optimizer: of `flax_alexnet.create_optimizer`, or another of optax, to which the loss is
        given as `value`; not one that searches along a line, such as `optax.lbfgs`.
      augment: (key, images, mean) to what the model sees.
      frozen: layers that stay as they are, to the bit.

    Raises:
      ValueError: totals that are not those of `zero_totals`.
    """
    if state.totals.keys() != zero_totals().keys():
        raise ValueError(
            f"state.totals has {sorted(state.totals)}; expected those of flax_alexnet.zero_totals, "
            "as flax_alexnet.create_state makes them"
        )
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = augment(augment_key, batch["image"], state.mean)

    trained = _without(frozen, state.params)

    def loss_fn(trained: Any) -> tuple[jax.Array, Totals]:
        variables, rngs = {"params": {**state.params, **trained}}, {"dropout": dropout_key}
        logits: Any = model.apply(variables, images, train=True, rngs=rngs)
        losses = cross_entropy(logits, batch["label"])
        return losses.mean(), _totals(logits, losses, batch["label"], jnp.ones(losses.shape, bool))

    (loss, totals), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    # Or XLA fuses them with what follows, and on a CPU the last bits of some biases change.
    gradients = jax.lax.optimization_barrier(gradients)
    finite = all_finite((loss, gradients))
    updates, opt_state = only_finite(optimizer).update(
        gradients, state.opt_state, trained, finite=finite, value=loss
    )
    updates = apart_on_cpu(updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.nan_to_num(a + b)

    state = state.replace(
        step=keep(state.step + 1, state.step),
        params={**state.params, **keep(jax.tree.map(add, trained, updates), trained)},
        opt_state=opt_state,
        totals=keep(jax.tree.map(add, state.totals, totals), state.totals),
    )
    return state, jnp.where(finite, loss, jnp.nan)


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree of floats, and their sum, are finite: bool[].

    Only the sum is looked at: an infinite number or NaN stays in it, over any number of devices,
    and finite ones make it overflow only where they are beyond all use. XLA on a CPU reads what is
    added up once and writes nothing; for `isfinite` of each element it writes them all down.
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
    """`totals` with those images of the batch added that "mask" (bool[b]) marks."""
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
