"""Diagnoses of a model that does not train: exploding activations and dead units."""

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
from flax_alexnet.models.architectures import Weighted, activation_names, architecture
from flax_alexnet.training.step import TrainState
from flax_alexnet.utils.errors import UserError

# A loss within this share of ln(classes) counts as not moved. In quickstart with the notebook's own
# initial values it is within 0.03 % after one and two epochs; with He et al.'s it is 20 % below.
PLATEAU = 0.01
PLATEAU_EPOCHS = 5  # the last epoch in which a loss that does not move causes a warning
LEAST_BACKOFF = 1 / 8  # least factor of the rate: a run that diverges after three halvings ends
REMEDY = (
    "start again in a new --workdir with a lower --optimizer.learning-rate or with "
    "--optimizer.clip-norm"
)
LARGE_SCALE = 0.1  # of grey levels: above it, inputs have a standard deviation far above 1


# Maps a state to its parameters and to preprocessed images, float[b, h, w, 3].
Inspect = Callable[[TrainState], tuple[Mapping[str, Any], jax.Array]]


class DivergenceMonitor:
    """Checks whether losses are finite, and decides whether a diverged run ends or goes back.

    Args:
      model: the model that is trained.
      inspect: gives the inputs of the activations; it is called only after divergence.
      stops: whether a diverged run ends at once instead of going back to a checkpoint.
    """

    def __init__(self, model: AlexNet, inspect: Inspect, *, stops: bool):
        self._model, self._inspect, self._stops = model, inspect, stops
        self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def add(self, step: int, loss: jax.Array) -> None:
        """Adds the loss of a step; the device may still be computing it."""
        self._pending.append((step, loss))

    def first_not_finite(self, keep: int) -> int:
        """The first step whose loss is not finite, or 0; the last `keep` are checked later."""
        while len(self._pending) > keep:
            step, loss = self._pending.popleft()
            if not math.isfinite(float(loss)):
                return step
        return 0

    def explain(
        self, step: int, rate: float, state: TrainState, saved: int | None, lowered: float
    ) -> str:
        """The message about a diverged step, for a run that goes back and tries again.

        Args:
          step: the step that diverged.
          rate: the learning rate.
          state: the state before that step.
          saved: the newest step that is saved.
          lowered: the factor of the rate with which the run would continue.

        Raises:
          UserError: `stops` is set, or the run has gone back three times.
        """
        self._pending.clear()
        largest = largest_activation(self._model, *self._inspect(state))
        message = divergence(step, rate, *largest, saved)
        if self._stops:
            raise UserError(f"{message}: {REMEDY}, or go on with --on-divergence rollback")
        if lowered < LEAST_BACKOFF:
            raise UserError(
                f"{message}; the run went back three times, down to 1/8 of the rate: {REMEDY}"
            )
        return message


class PlateauMonitor:
    """Warns once in a run if its loss stays at that of a uniform prediction.

    Args:
      model: the model that is trained.
      inspect: gives the inputs of the activations; it is called only on the plateau.
      classes: the number of classes of the data.
      evaluations: (epoch, loss) of the evaluations so far.
      remedies: changes that may help; see `plateau_remedies`.
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
        """Adds an evaluation with this loss; returns the warning in a list, or an empty list."""
        self._evaluations.append((epoch, loss))
        if not new_plateau(self._evaluations, self._classes):
            return []
        dead = dead_units(self._model, *self._inspect(state))
        return [plateau_warning(self._classes, dead, self._remedies)]


def largest_activation(
    model: AlexNet, params: Mapping[str, Any], images: jax.Array
) -> tuple[str, float]:
    """The name of the activation with the largest absolute value, and that value.

    A value that is not finite counts as the largest. If several activations have one, the first
    is named, since the others follow from it.

    Args:
      model: the model.
      params: its parameters.
      images: preprocessed images, float[b, h, w, 3].
    """
    largest = {
        name: float(jnp.nan_to_num(jnp.abs(values).max(), nan=jnp.inf, posinf=jnp.inf))
        for name, values in zip(_names(model), _activations(model, params, images), strict=True)
    }
    name = max(largest, key=lambda name: largest[name])
    return name, largest[name]


def dead_units(model: AlexNet, params: Mapping[str, Any], images: jax.Array) -> dict[str, float]:
    """For each layer, the share of its units (or channels) that no image makes positive.

    Such a unit gets no gradient from these images. The last layer is left out, since it is linear.
    The result is empty for a model whose activation function is not ReLU.
    """
    if model.activation is not nn.relu:
        return {}
    layers = [
        layer.name for layer in architecture(model.variant).layers if isinstance(layer, Weighted)
    ]
    activations = dict(zip(_names(model), _activations(model, params, images), strict=True))
    return {
        name: float((activations[name].reshape(-1, activations[name].shape[-1]) <= 0).all(0).mean())
        for name in layers[:-1]
    }


def on_plateau(loss: float, classes: int) -> bool:
    """Whether a loss is still that of a uniform prediction over all classes, ln(classes)."""
    return abs(loss - math.log(classes)) <= PLATEAU * math.log(classes)


def new_plateau(evaluations: Sequence[tuple[float, float]], classes: int) -> bool:
    """Whether the last of these (epoch, loss) pairs is the first that calls for a warning.

    The evaluations from epoch 1 to epoch 5 count, or the first later one if there are none.
    """
    counting = [(epoch, loss) for epoch, loss in evaluations if epoch >= 1]
    places = [
        place
        for place, (epoch, loss) in enumerate(counting)
        if (place == 0 or epoch <= PLATEAU_EPOCHS) and on_plateau(loss, classes)
    ]
    return bool(counting) and places == [len(counting) - 1]


def plateau_warning(classes: int, dead: Mapping[str, float], remedies: Sequence[str]) -> str:
    """The warning about a loss on the plateau, with the result of `dead_units` and remedies."""
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
    """The settings that may bring a run off the plateau and that it does not use yet.

    Args:
      pretrained: whether the run started from a trained model, whose preprocessing must stay.
      frozen: whether any layers keep their values.
      initialization: "published" or "he".
      scale: the factor by which grey levels are multiplied.
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
    """The message about a loss or a gradient that is not finite.

    Args:
      step: the step that diverged.
      rate: the learning rate.
      layer: the layer with the largest activation.
      largest: the value of that activation; see `largest_activation`.
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
