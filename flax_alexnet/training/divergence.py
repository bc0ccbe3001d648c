"""What ails a model that does not train: the layer that explodes, the units that are dead."""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.models.architectures import Conv, Dense, activation_names, architecture
from flax_alexnet.training.step import TrainState
from flax_alexnet.utils.errors import UserError

# Share of ln(classes) within which a loss has not moved from it. In quickstart with the notebook's
# own initial values it is within 0.03 % after one epoch and two, with He et al.'s 20 % below.
PLATEAU = 0.01
PLATEAU_EPOCHS = 5  # in which a loss that does not move is worth a warning
LEAST_BACKOFF = 1 / 8  # of the rate: after three halvings a run that diverges ends
REMEDY = (
    "start again in a new --workdir with a lower --optimizer.learning-rate or with "
    "--optimizer.clip-norm"
)
LARGE_SCALE = 0.1  # of grey levels: more, and what the model sees is far from a deviation of 1


# From a state to its parameters and to images float[b, h, w, 3] as the model sees them.
Inspect = Callable[[TrainState], tuple[Mapping[str, Any], jax.Array]]


class DivergenceMonitor:
    """Looks for losses that are not finite, and decides what follows.

    Args:
      model: the model that is trained.
      inspect: what its activations are computed from; it is called only after divergence.
      stops: whether the run then ends at once, and does not go back.
    """

    def __init__(self, model: AlexNet, inspect: Inspect, *, stops: bool):
        self._model, self._inspect, self._stops = model, inspect, stops
        self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def add(self, step: int, loss: jax.Array) -> None:
        """The loss of a step, which need not be computed yet."""
        self._pending.append((step, loss))

    def first_not_finite(self, keep: int) -> int:
        """The first step without a finite loss, or 0; the last `keep` are looked at later."""
        while len(self._pending) > keep:
            step, loss = self._pending.popleft()
            if not math.isfinite(float(loss)):
                return step
        return 0

    def explain(
        self, step: int, rate: float, state: TrainState, saved: int | None, lowered: jax.Array
    ) -> str:
        """What to say of a step that has diverged, where the run goes back and tries again.

        Args:
          step: that could not be made.
          rate: the learning rate.
          state: before that step.
          saved: the newest step that is saved.
          lowered: the share of the rate that the run would go on with.

        Raises:
          UserError: the run is to end, or has gone back three times.
        """
        self._pending.clear()
        largest = largest_activation(self._model, *self._inspect(state))
        message = divergence(step, rate, *largest, saved)
        if self._stops:
            raise UserError(f"{message}: {REMEDY}, or go on with --on-divergence rollback")
        if float(lowered) < LEAST_BACKOFF:
            raise UserError(
                f"{message}; it went back three times, down to 1/8 of the rate: {REMEDY}"
            )
        return message


class PlateauMonitor:
    """Notices once in a run that its loss stays at that of equal chances.

    Args:
      model: the model that is trained.
      inspect: what its activations are computed from; it is called only on the plateau.
      classes: of the data.
      evaluations: (epoch, loss) of those made before.
      remedies: what may help, see `plateau_remedies`.
    """

    def __init__(
        self,
        model: AlexNet,
        inspect: Inspect,
        classes: int,
        evaluations: Sequence[tuple[float, float]],
        remedies: Sequence[str],
    ):
        self._model, self._inspect, self._classes = model, inspect, classes
        self._evaluations, self._remedies = list(evaluations), remedies

    def look(self, epoch: float, loss: float, state: TrainState) -> list[str]:
        """The warning, if there is one, after an evaluation with this loss."""
        self._evaluations.append((epoch, loss))
        if not new_plateau(self._evaluations, self._classes):
            return []
        dead = dead_units(self._model, *self._inspect(state))
        return [plateau_warning(self._classes, dead, self._remedies)]


def largest_activation(
    model: AlexNet, params: Mapping[str, Any], images: jax.Array
) -> tuple[str, float]:
    """The name of the activation with the largest absolute value, and that value.

    One that is not finite is larger than any; of several the first counts, which the others come
    from.

    Args:
      model: the model.
      params: its parameters.
      images: float[b, h, w, 3] as it sees them.
    """
    largest = {
        name: float(jnp.nan_to_num(jnp.abs(values).max(), nan=jnp.inf, posinf=jnp.inf))
        for name, values in zip(_names(model), _activations(model, params, images), strict=True)
    }
    name = max(largest, key=lambda name: largest[name])
    return name, largest[name]


def dead_units(model: AlexNet, params: Mapping[str, Any], images: jax.Array) -> dict[str, float]:
    """By layer, the share of its units (or channels) that are above zero nowhere in any image.

    Such a unit gets no gradient from these images. The last layer, which is linear, is left out,
    and so are all of a model whose activation function is another than ReLU.
    """
    if model.activation is not nn.relu:
        return {}
    layers = [
        layer.name
        for layer in architecture(model.variant).layers
        if isinstance(layer, Conv | Dense)
    ]
    activations = dict(zip(_names(model), _activations(model, params, images), strict=True))
    return {
        name: float((activations[name].reshape(-1, activations[name].shape[-1]) <= 0).all(0).mean())
        for name in layers[:-1]
    }


def on_plateau(loss: float, classes: int) -> bool:
    """Whether a loss has not moved from that of equal chances for all classes, ln(classes)."""
    return abs(loss - math.log(classes)) <= PLATEAU * math.log(classes)


def new_plateau(evaluations: Sequence[tuple[float, float]], classes: int) -> bool:
    """Whether the last of these (epoch, loss) is the first that is worth a warning.

    Those that count are the evaluations from epoch 1 to 5, and the first from epoch 1 on where it
    comes later.
    """
    counting = [(epoch, loss) for epoch, loss in evaluations if epoch >= 1]
    places = [
        place
        for place, (epoch, loss) in enumerate(counting)
        if (place == 0 or epoch <= PLATEAU_EPOCHS) and on_plateau(loss, classes)
    ]
    return bool(counting) and places == [len(counting) - 1]


def plateau_warning(classes: int, dead: Mapping[str, float], remedies: Sequence[str]) -> str:
    """What to say of a loss that `on_plateau`, with what `dead_units` found and what may help."""
    shares = ", ".join(f"{layer} {share:.0%}" for layer, share in dead.items())
    return (
        f"warning: the loss has not moved from ln({classes}) = {math.log(classes):.3f}; "
        f"dead units: {shares or 'not looked for'}. It may help to take {', or '.join(remedies)}"
    )


def plateau_remedies(
    *,
    pretrained: bool,
    frozen: bool,
    initialization: str,
    scale: float | Sequence[float],
) -> list[str]:
    """What may bring a run off the plateau, of what it does not have yet.

    Args:
      pretrained: whether it started from a trained model, whose preprocessing is to stay.
      frozen: whether any layers keep their values.
      initialization: "published" or "he".
      scale: what grey levels are multiplied with.
    """
    if pretrained:
        thaw = ["fewer layers with --freeze"] if frozen else []
        return [*thaw, "a higher --optimizer.learning-rate", "more epochs"]
    initial = ["--model.initialization he"] if initialization != "he" else []
    if np.max(scale) > LARGE_SCALE:
        initial.append("--augment.scale 0.015625")
    together = [" with ".join(initial)] if initial else []
    return [*together, "another --optimizer.learning-rate", "more epochs"]


def divergence(step: int, rate: float, layer: str, largest: float, saved: int | None) -> str:
    """What to say where the loss or a gradient is not finite.

    Args:
      step: that could not be made.
      rate: the learning rate.
      layer: of the largest activation.
      largest: its value; see `largest_activation`.
      saved: the newest step that is saved.
    """
    return (
        f"the loss or a gradient is not finite at step {step:,}, at a learning rate of {rate:.3g}; "
        f"the largest activation is {largest:.3g}, in {layer}; the last good checkpoint is "
        f"{'none' if saved is None else f'that of step {saved:,}'}"
    )


@functools.partial(jax.jit, static_argnums=0)
def _activations(
    model: AlexNet, params: Mapping[str, Any], images: jax.Array
) -> tuple[jax.Array, ...]:
    """All named activations, in their order."""
    logits, state = model.apply({"params": params}, images, mutable=["intermediates"])
    activations = {**state["intermediates"], "logits": logits}
    return tuple(activations[name] for name in _names(model))


def _names(model: AlexNet) -> tuple[str, ...]:
    return activation_names(architecture(model.variant).layers)
