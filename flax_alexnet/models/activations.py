"""Features of a trained model (its named activations), and Grad-CAM for a class."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.models.architectures import Conv, Dense, activation_names, architecture
from flax_alexnet.utils.errors import UserError, unknown


def features(
    model: AlexNet, params: Mapping[str, Any], images: jax.Array, layers: Sequence[str]
) -> dict[str, jax.Array]:
    """The activations called `layers` for a batch of images.

    A pure function, to be jitted (with `model` and `layers` static), vmapped and differentiated.
    Nothing after the last of the layers is computed, and parameters of later layers may be missing,
    so a trunk without dense layers will do for `conv5`.

    Args:
      model: the model, such as `flax_alexnet.load(path).model`.
      params: its parameters, {"conv1": {"kernel", "bias"}, …}.
      images: float[b, h, w, 3] as the model was trained on, such as `Pretrained.preprocess` gives.
      layers: names of activations, such as ("conv5", "fc7"): layers after their activation
        function, `norm1`, `pool1`, …, and `logits`.

    Returns:
      {name: float[b, …]} in the order of `layers`; maps are (b, h, w, c).

    Raises:
      UserError: no layers, or one that the variant does not have; the nearest name is said.
    """
    names = activation_names(architecture(model.variant).layers)
    for layer in layers:
        if layer not in names:
            raise UserError(unknown("layer", layer, names))
    if not layers:
        raise UserError(f"no layers; choose some of {', '.join(names)}")
    last = max(layers, key=names.index)
    _, state = model.apply({"params": params}, images, last=last, mutable=["intermediates"])
    return {layer: state["intermediates"][layer] for layer in layers}


def map_names(variant: str) -> tuple[str, ...]:
    """The names of the activations that are maps, (b, h, w, c), in their order."""
    layers = architecture(variant).layers
    maps = [layer.name for layer in layers if not isinstance(layer, Dense)]
    return tuple(name for name in activation_names(layers) if name in maps)


def grad_cam(
    model: AlexNet,
    params: Mapping[str, Any],
    images: jax.Array,
    labels: jax.Array,
    layer: str | None = None,
) -> jax.Array:
    """Where in an image a layer speaks for a class: Grad-CAM.

    Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, "Grad-CAM: Visual Explanations from Deep
    Networks via Gradient-based Localization" (2017), equations 1 and 2: each channel of a layer is
    weighted with the mean, over its pixels, of the derivative of the class's logit by it; of the
    sum, what is above zero is kept. A pure function, to be jitted (`model` and `layer` static).

    Args:
      model: the model, such as `flax_alexnet.load(path).model`.
      params: the parameters of all its layers.
      images: float[b, h, w, 3] as the model was trained on, such as `Pretrained.preprocess` gives.
      labels: int[b], the class asked about for each image, in [0, num_classes).
      layer: name of an activation that is a map; none: the last convolution, `conv5`.

    Returns:
      float32[b, h', w'], ≥ 0, with the pixels of the layer; it covers the image from edge to edge.
      All zero where nothing in the layer speaks for the class.

    Raises:
      UserError: a layer that is not a map of this variant; the nearest name is said.
    """
    layers, maps = architecture(model.variant).layers, map_names(model.variant)
    if layer is None:
        layer = [layer.name for layer in layers if isinstance(layer, Conv)][-1]
    if layer not in maps:
        raise UserError(unknown("map", layer, maps))

    def score(activation: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, activation, first=layer)
        return jnp.take_along_axis(logits, labels[:, None], axis=1).sum()

    activation: Any = model.apply({"params": params}, images, last=layer)
    weights = jax.grad(score)(activation).mean((1, 2), jnp.float32, keepdims=True)
    return nn.relu((weights * activation.astype(jnp.float32)).sum(-1))
