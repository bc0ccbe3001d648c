"""LPIPS: how different two images look, by the features of a trained AlexNet."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.models.activations import features
from flax_alexnet.models.alexnet import AlexNet

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
# What ImageNet's mean and standard deviation are for images in [-1, 1] (`ScalingLayer` of the
# original code; rounded there, and the heads were trained with the rounded values).
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
SLACK = 1e-3  # of rounding, by which values may lie outside [-1, 1]
EPSILON = 1e-10  # added to the length of a feature vector, as there


def lpips(
    params: Mapping[str, Any],
    heads: Mapping[str, jax.Array],
    a: jax.Array,
    b: jax.Array,
    *,
    spatial: bool = False,
) -> jax.Array:
    """The learned perceptual distance of pairs of images, version 0.1, with the AlexNet trunk.

    Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a
    Perceptual Metric" (2018), equation 1: the features of each convolution layer are scaled to unit
    length at each pixel; their squared differences, weighted by the layer's head and averaged over
    the pixels, are added up over the layers. A pure function, to be jitted and differentiated.

    Args:
      params: {"conv1" … "conv5": {"kernel", "bias"}} of torchvision's model, which the heads were
        trained on, such as `flax_alexnet.load(path).params`; other layers are not looked at.
      heads: {"lin0" … "lin4": float32[1, 1, c, 1]}, such as `flax_alexnet.load(path).lpips_heads`.
      a: float[n, h, w, 3], RGB in [-1, 1], sides of at least 31 pixels.
      b: likewise, of the same shape.
      spatial: whether to return a map, in which each layer's distances are brought to the images'
        size (bilinear), instead of their means.

    Returns:
      float32[n], or float32[n, h, w] with `spatial`; 0 for equal images, up to rounding.

    Raises:
      ValueError: images of different shapes, of whole numbers, or with values outside [-1, 1],
        which can be seen only where they are not traced (`jax.jit`, `jax.grad`).
      UserError: images that are too small for the model.

    Warns:
      UserWarning: neither image has a value below 0, so both are probably in [0, 1].
    """
    if a.shape != b.shape:
        raise ValueError(f"images of the same shape are compared, not {a.shape} and {b.shape}")
    _check_signed(a, b)
    model = AlexNet(variant="torchvision")
    images = (jnp.concatenate([a, b]).astype(jnp.float32) - _row(SHIFT)) / _row(SCALE)
    activations = features(model, params, images, LAYERS)
    total = jnp.zeros(a.shape[:3] if spatial else a.shape[:1], jnp.float32)
    for stage, layer in enumerate(LAYERS):
        of_a, of_b = jnp.split(_unit_length(activations[layer]), 2)
        head = jnp.asarray(heads[f"lin{stage}"]).reshape(-1)
        distances = jnp.square(of_a - of_b) @ head
        if spatial:
            total += jax.image.resize(distances, total.shape, "linear")
        else:
            total += distances.mean(axis=(1, 2))
    return total


def signed(pixels: np.ndarray) -> jax.Array:
    """uint8[n, h, w, 3] as `lpips` takes it: float32 in [-1, 1]."""
    return jnp.asarray(pixels.astype(np.float32) / 127.5 - 1)


def _check_signed(*images: jax.Array) -> None:
    """Raises ValueError for images that are not in [-1, 1], as far as can be seen."""
    remedy = "take images / 127.5 - 1 of grey levels 0 … 255, or 2 * images - 1 of [0, 1]"
    for x in images:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"lpips takes floats in [-1, 1], not {x.dtype}: {remedy}")
    if any(isinstance(x, jax.core.Tracer) or x.size == 0 for x in images):
        return
    low, high = min(float(x.min()) for x in images), max(float(x.max()) for x in images)
    if low < -1 - SLACK or high > 1 + SLACK:
        raise ValueError(f"lpips takes [-1, 1], not {low:.5g} … {high:.5g}: {remedy}")
    if low >= 0:
        warnings.warn(f"lpips takes [-1, 1], and no value is below 0: {remedy}", stacklevel=3)


def _row(values: np.ndarray) -> np.ndarray:
    return values.reshape(1, 1, 1, 3)


def _unit_length(x: jax.Array) -> jax.Array:
    """Feature vectors over their length; the gradient at a vector of zeros is finite."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # Where all features are zero the square root has no derivative, and the vector stays zero.
    length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return x / (length + EPSILON)
