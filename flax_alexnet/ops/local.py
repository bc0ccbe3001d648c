"""Locally connected layers: a convolution of stride 1 with another kernel at each place."""

import jax
import jax.numpy as jnp

from flax_alexnet.ops.primitives import Pads


def locally_connect(x: jax.Array, kernels: jax.Array, padding: Pads) -> jax.Array:
    """Multiplies the values under each position of a window with the kernel of that position.

        y[b, i, j, o] = Σ_{m, n, c} x[b, i + m, j + n, c] · kernels[i, j, m, n, c, o]

    Args:
      x: float[b, h, w, c].
      kernels: float[h', w', kh, kw, c, features], a kernel for each pixel of the result.
      padding: pixels of zeros ((top, bottom), (left, right)).

    Returns:
      float[b, h', w', features].

    Raises:
      ValueError: the kernels do not fit to the size of x.

    References:
      The layer `local` of cuda-convnet (`layer.py`, `LocalUnsharedLayerParser`).
    """
    rows, columns, height, width, channels, features = kernels.shape
    sizes = [size + sum(pads) for size, pads in zip(x.shape[1:3], padding, strict=True)]
    if sizes != [rows + height - 1, columns + width - 1] or x.shape[3] != channels:
        raise ValueError(f"kernels {kernels.shape} do not fit {x.shape} with padding {padding}")
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    patches = jnp.concatenate(
        [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)], axis=-1
    )
    kernels = kernels.reshape(rows, columns, height * width * channels, features)
    return jnp.einsum("bijk,ijko->bijo", patches, kernels)
