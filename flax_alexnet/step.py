"""One step of training and one of evaluation: pure functions over `TrainState`."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from flax_alexnet.metrics import cross_entropy, top_k_correct

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
    given: Mapping[str, Any] | None = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    crop_size: int,
    frozen: Collection[str] = (),
) -> TrainState:
    """The state before the first step; `mean` is float32[h, w, 3] in grey levels.

    Layers of `given`, {"conv1": {"kernel", "bias"}, …}, have those values; `frozen` ones have no
    optimizer state.
    """
    drawn = model.init(key, jnp.zeros((1, crop_size, crop_size, 3)))["params"]
    params = {layer: (given or {}).get(layer, values) for layer, values in drawn.items()}
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

    Args:
      state: before it.
      batch: "image" uint8[b, h, w, 3] and "label" int32[b], the global batch.
      key: the run's; all that is drawn derives from it and `state.step`.
      model: maps float[b, c, c, 3] to logits.
      optimizer: as `flax_alexnet.create_optimizer` makes it.
      augment: (key, images, mean) to what the model sees.
      frozen: layers that stay as they are, to the bit.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = augment(augment_key, batch["image"], state.mean)

    trained = _without(frozen, state.params)

    def loss_fn(trained: Any) -> tuple[jax.Array, Totals]:
        variables, rngs = {"params": {**state.params, **trained}}, {"dropout": dropout_key}
        logits: Any = model.apply(variables, images, train=True, rngs=rngs)
        losses = cross_entropy(logits, batch["label"])
        return losses.mean(), _totals(logits, losses, batch["label"], jnp.ones(losses.shape, bool))

    (loss, totals), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    state = state.replace(
        step=state.step + 1,
        params={**state.params, **optax.apply_updates(trained, updates)},
        opt_state=opt_state,
        totals=jax.tree.map(jnp.add, state.totals, totals),
    )
    return state, loss


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
