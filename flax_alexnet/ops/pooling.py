"""Pooling with the paddings of the original models."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_alexnet.ops.dispatch import Operation, Pooling, choose, current_platform, dispatch
from flax_alexnet.ops.fusion import written_on_cpu
from flax_alexnet.ops.linear import Direction, linear
from flax_alexnet.ops.primitives import Pads

Implementation = Literal["xla", "slices"]
# A function that combines two values, and its neutral element, which is the value of padding.
Reduction = tuple[Callable[[Any, Any], jax.Array], float]
LARGEST: Reduction = (lax.max, -jnp.inf)
SUM: Reduction = (lax.add, 0.0)


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
      padding: ((top, bottom), (left, right)); padded pixels count as minus infinity.
      implementation: "xla" is XLA's `reduce_window`, whose gradient a CPU scatters pixel by pixel;
        "slices" takes the pixels at one position of all windows at once. Both give the same values
        and, to the bit, the same gradient, which goes to the first of equal values, row by row.
        With None, `flax_alexnet.ops.dispatch` chooses for each of them by the platform.
    """
    facts = Pooling(window, stride, x.dtype)
    gradient = Operation.MAX_POOLING, Direction.GRADIENT
    if (implementation or choose(*gradient, current_platform(), facts)) == "xla":
        return _reduce(x, window, stride, padding, LARGEST, "xla")
    return _max_pool(x, window, stride, padding, implementation)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _max_pool(
    x: jax.Array, window: int, stride: int, padding: Pads, implementation: str | None
) -> jax.Array:
    return _chosen(x, window, stride, padding, LARGEST, Operation.MAX_POOLING, implementation)


def _chosen(
    x: jax.Array,
    window: int,
    stride: int,
    padding: Pads,
    reduction: Reduction,
    operation: Operation,
    implementation: str | None,
) -> jax.Array:
    """`_reduce` by `implementation`, or else by the table's choice for `operation`."""
    settings = window, stride, padding, reduction
    forms = {
        "xla": lambda x: _reduce(x, *settings, "xla"),
        "slices": lambda x: _reduce(x, *settings, "slices"),
    }
    facts = Pooling(window, stride, x.dtype)
    forward = Direction.FORWARD
    return dispatch(operation, forward, facts, forms, x, implementation=implementation)


def _reduce(
    x: jax.Array, window: int, stride: int, padding: Pads, reduction: Reduction, chosen: str
) -> jax.Array:
    """Reduces the values of each window with `reduction`: float[b, h', w', c]."""
    combine, neutral = reduction
    if chosen == "slices":
        return functools.reduce(combine, _places(x, window, stride, padding, neutral).values())
    return lax.reduce_window(x, neutral, combine, *_window(window, stride, padding))


def _places(
    x: jax.Array, window: int, stride: int, padding: Pads, outside: float
) -> dict[tuple[int, int], jax.Array]:
    """For each position in the window, row by row, its pixels in all windows: [b, h', w', c]."""
    filled = jnp.array(outside, x.dtype)
    x = lax.pad(x, filled, ((0, 0, 0), *((*pads, 0) for pads in padding), (0, 0, 0)))
    rows, columns = (max(size - window + 1, 0) for size in x.shape[1:3])  # where windows can begin
    return {
        (top, left): x[:, top : top + rows : stride, left : left + columns : stride]
        for top in range(window)
        for left in range(window)
    }


@_max_pool.defjvp
def _derivative_of_max_pool(
    window: int,
    stride: int,
    padding: Pads,
    implementation: str | None,
    arrays: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    y = _max_pool(*arrays, window, stride, padding, implementation)
    operator = _MaxPool(window, stride, padding)
    directions = Direction.DERIVATIVE, Direction.GRADIENT
    return y, linear(operator, *directions, (*arrays, y), *tangents)


@dataclasses.dataclass(frozen=True)
class _MaxPool:
    """The derivative of max-pooling of x to y, and its transpose, for `linear`."""

    window: int
    stride: int
    padding: Pads

    def __call__(
        self, direction: Direction, x: jax.Array, y: jax.Array, varied: jax.Array
    ) -> jax.Array:
        if direction is Direction.GRADIENT:
            return self.gradient(x, y, varied)
        return self.derivative(x, y, varied)

    def winners(self, x: jax.Array, y: jax.Array) -> dict[tuple[int, int], jax.Array]:
        """For each position in the window, whether the first largest value is there: bool."""
        taken = jnp.zeros(y.shape, bool)
        result = {}
        for place, here in self.places(x, -jnp.inf).items():
            result[place] = (here == y) & ~taken
            taken = taken | result[place]
        return result

    def places(self, x: jax.Array, outside: float) -> dict[tuple[int, int], jax.Array]:
        return _places(x, self.window, self.stride, self.padding, outside)

    def derivative(self, x: jax.Array, y: jax.Array, dx: jax.Array) -> jax.Array:
        places, zero = self.places(dx, 0.0), jnp.zeros((), dx.dtype)
        taken = [jnp.where(wins, places[at], zero) for at, wins in self.winners(x, y).items()]
        return functools.reduce(jnp.add, taken)

    def gradient(self, x: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
        g = written_on_cpu(g)  # since each place reads it
        shape, padding = x.shape[1:3], self.padding
        sizes = [size + sum(pads) for size, pads in zip(shape, padding, strict=True)]
        dx, zero = jnp.zeros((), g.dtype), jnp.zeros((), g.dtype)
        # The last position comes first, since a pixel has that position in its first window: this
        # is the order in which XLA adds, and gives the same bits.
        for place, wins in reversed(self.winners(x, y).items()):
            edges = [
                (start, size - start - max((windows - 1) * self.stride + 1, 0), self.stride - 1)
                for start, size, windows in zip(place, sizes, y.shape[1:3], strict=True)
            ]
            dx = dx + lax.pad(jnp.where(wins, g, zero), zero, ((0, 0, 0), *edges, (0, 0, 0)))
        (top, _), (left, _) = padding
        return dx[:, top : top + shape[0], left : left + shape[1]]


def average_pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: Pads,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The mean of each window over the pixels inside the image, as cuda-convnet takes it.

    Arguments and shapes as for `max_pool`; padding is left out of the sum and of the count.
    """
    total = _chosen(x, window, stride, padding, SUM, Operation.AVERAGE_POOLING, implementation)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / _reduce(ones, window, stride, padding, SUM, "xla")


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means over `size` × `size` cells: float[b, h, w, c] → float[b, size, size, c].

    Cell i covers the pixels from floor(i·n / size) up to ceil((i + 1)·n / size). Cells may overlap,
    and they repeat pixels if the image is smaller (PyTorch's `AdaptiveAvgPool2d`).
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
