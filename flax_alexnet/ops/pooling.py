"""Pooling in the paddings of the original nets."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_alexnet.ops.choices import choose

Pads = tuple[tuple[int, int], tuple[int, int]]
Implementation = Literal["xla", "slices"]


def max_pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: Pads,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The largest value of each window: float[b, h, w, c] → float[b, h', w', c].

    Args:
      x: images.
      window: pixels a side.
      stride: along both axes.
      padding: ((top, bottom), (left, right)); it never wins, since it counts as minus infinity.
      implementation: how the gradient is computed, which goes to the first of equal values, row by
        row, and is the same to the bit: "xla" scatters pixel by pixel on a CPU, "slices" adds a
        masked, dilated copy for each place in the window; None: see `flax_alexnet.ops.choices`.
    """
    if (implementation or choose("max-pooling", jax.default_backend())) == "xla":
        return _largest(x, window, stride, padding)
    return _max_pool(x, window, stride, padding)


def _largest(x: jax.Array, window: int, stride: int, padding: Pads) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, *_window(window, stride, padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: int, stride: int, padding: Pads) -> jax.Array:
    return _largest(x, window, stride, padding)


def _max_pool_forward(
    x: jax.Array, window: int, stride: int, padding: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _max_pool(x, window, stride, padding)
    return y, (x, y)


def _max_pool_backward(
    window: int, stride: int, padding: Pads, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array]:
    x, y = residuals
    lowest, zero = jnp.array(-jnp.inf, x.dtype), jnp.zeros((), g.dtype)
    x = lax.pad(x, lowest, ((0, 0, 0), *((*pads, 0) for pads in padding), (0, 0, 0)))
    batch, height, width, channels = x.shape
    rows, columns = ((size - 1) * stride + 1 for size in y.shape[1:3])  # from first to last window
    places = [(top, left) for top in range(window) for left in range(window)]
    taken = jnp.zeros(y.shape, bool)
    winners = []
    for top, left in places:
        here = lax.slice(
            x,
            (0, top, left, 0),
            (batch, top + rows, left + columns, channels),
            (1, stride, stride, 1),
        )
        winners.append((here == y) & ~taken)
        taken = taken | winners[-1]
    dx = jnp.zeros(x.shape, g.dtype)
    # From the last place on, since a pixel lies at it in the first of its windows: so they are
    # added in XLA's order, to the same bits.
    for (top, left), wins in reversed(list(zip(places, winners, strict=True))):
        edges = (
            (0, 0, 0),
            (top, height - top - rows, stride - 1),
            (left, width - left - columns, stride - 1),
            (0, 0, 0),
        )
        dx = dx + lax.pad(jnp.where(wins, g, zero), zero, edges)
    (top, bottom), (left, right) = padding
    return (dx[:, top : height - bottom, left : width - right],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def average_pool(x: jax.Array, window: int, stride: int, padding: Pads) -> jax.Array:
    """The mean of each window over the pixels inside the image, as cuda-convnet takes it.

    Shapes as for `max_pool`; padding is left out of the sum and of the count.
    """
    where = _window(window, stride, padding)
    ones = np.ones((1, *x.shape[1:3], 1), x.dtype)
    total = lax.reduce_window(x, 0.0, lax.add, *where)
    return total / lax.reduce_window(ones, np.zeros((), x.dtype), lax.add, *where)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means over `size` × `size` cells: float[b, h, w, c] → float[b, size, size, c].

    Cell i covers the pixels from floor(i·n / size) up to ceil((i + 1)·n / size), which may overlap
    and which repeats pixels where the image is smaller (PyTorch's `AdaptiveAvgPool2d`).
    """
    if x.shape[1:3] == (size, size):
        return x

    def cells(n: int) -> jax.Array:
        matrix = np.zeros((size, n), np.float32)
        for i in range(size):
            start, stop = i * n // size, -(-(i + 1) * n // size)
            matrix[i, start:stop] = 1 / (stop - start)
        return jnp.asarray(matrix, x.dtype)

    return jnp.einsum("ih,jw,bhwc->bijc", cells(x.shape[1]), cells(x.shape[2]), x)


def _window(
    window: int, stride: int, padding: Pads
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    return (1, window, window, 1), (1, stride, stride, 1), ((0, 0), *padding, (0, 0))
