"""Convolution whose three directions are each computed in the form that is fastest where it runs.

Forward, gradient of the kernel and gradient of the input are products of the same three arrays:

- "xla": as XLA computes a convolution. On a CPU that reaches from 5 to 95 % of the rate of a matrix
  product, on a GPU little where there are few channels.
- "patches": as a matrix product with the values under each place of the window side by side
  (im2col; Chellapilla et al. 2006, and Caffe).
- "space_to_depth": with a stride of s, as a convolution of stride 1 over blocks of s × s pixels, of
  s² times the channels.
- "onednn": as oneDNN computes a convolution, where it is there; the gradients are convolutions too,
  that of the input one for each place in a stride.
- "onednn_patches": the same, but the gradient of the kernel is oneDNN's product of patches.

`dispatch` says which is used where.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops import onednn
from flax_alexnet.ops.dispatch import Convolution, Operation, dispatch
from flax_alexnet.ops.linear import Direction, bilinear
from flax_alexnet.ops.primitives import Pads

Implementation = Literal["xla", "patches", "space_to_depth", "onednn", "onednn_patches"]
Shape = tuple[int, ...]
Form = Callable[..., jax.Array]  # of two arrays, the shape of the result, stride and padding
DIRECTIONS = (Direction.FORWARD, Direction.INPUT_GRADIENT, Direction.KERNEL_GRADIENT)
PARTS = 4  # of a batch: see `_side_by_side`
# Outside of a program JAX would compile a loop again at each call.
_compiled_once = functools.partial(jax.jit, static_argnames=("shape", "stride", "padding"))


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: Pads,
    groups: int = 1,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Cross-correlation of NHWC images with HWIO kernels, as `lax.conv_general_dilated` has it.

    Args:
      x: float[b, h, w, c].
      kernel: float[kh, kw, c / groups, features].
      stride: along both axes.
      padding: pixels of zeros ((top, bottom), (left, right)).
      groups: output features of each of so many equal groups see only their own input channels.
      implementation: one of the above for the result and both gradients; None takes for each what
        `flax_alexnet.ops.dispatch` says of the platform it is compiled for.

    Returns:
      float[b, h', w', features].
    """
    # Each group is a convolution of its own: XLA's gradients of one with groups are up to ten times
    # slower on a CPU; on an H200 the paper's conv2 takes 6.2 ms both ways so, and 3.7 ms apart.
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    results = [_convolve(x, k, stride, padding, implementation) for x, k in parts]
    return results[0] if groups == 1 else jnp.concatenate(results, axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Pads, implementation: str | None
) -> jax.Array:
    operator = _Operator(x.shape, kernel.shape, stride, padding, implementation)
    return operator(Direction.FORWARD, x, kernel)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _derivative(
    stride: int,
    padding: Pads,
    implementation: str | None,
    arrays: tuple[jax.Array, jax.Array],
    tangents: tuple[Any, Any],
) -> tuple[jax.Array, jax.Array]:
    x, kernel = arrays
    operator = _Operator(x.shape, kernel.shape, stride, padding, implementation)
    derivative = bilinear(operator, arrays, tangents)
    return _convolve(x, kernel, stride, padding, implementation), derivative


@dataclasses.dataclass(frozen=True)
class _Operator:
    """All directions of a convolution, for `linear`."""

    images: Shape
    kernel: Shape
    stride: int
    padding: Pads
    implementation: str | None

    def __call__(self, direction: Direction, fixed: jax.Array, varied: jax.Array) -> jax.Array:
        match direction:
            case Direction.FORWARD_OF_INPUT:
                return self._compute(Direction.FORWARD, varied, fixed, ())
            case Direction.INPUT_GRADIENT:
                return self._compute(direction, varied, fixed, self.images)
            case Direction.KERNEL_GRADIENT:
                return self._compute(direction, fixed, varied, self.kernel)
        return self._compute(direction, fixed, varied, ())

    def _compute(self, direction: Direction, a: jax.Array, b: jax.Array, shape: Shape) -> jax.Array:
        """By what is asked for or what is best on the platform."""
        settings = {"shape": shape, "stride": self.stride, "padding": self.padding}
        forms = {
            name: functools.partial(form[direction], **settings) for name, form in _FORMS.items()
        }
        side, _, channels, features = self.kernel
        facts = Convolution(channels, features, side, self.stride, a.dtype)
        return dispatch(
            Operation.CONVOLUTION, direction, facts, forms, a, b, implementation=self.implementation
        )


def _xla(x: jax.Array, kernel: jax.Array, stride: int, padding: Pads) -> jax.Array:
    layout, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _space_to_depth(x: jax.Array, kernel: jax.Array, stride: int, padding: Pads) -> jax.Array:
    window = [-(-side // stride) for side in kernel.shape[:2]]  # in blocks
    sizes = [size + sum(pads) for size, pads in zip(x.shape[1:3], padding, strict=True)]
    counts = [
        (size - side) // stride + blocks
        for size, side, blocks in zip(sizes, kernel.shape[:2], window, strict=True)
    ]
    starts = [before for before, _ in padding]
    blocks = _blocks(x, stride, counts, starts)
    kernels = _blocks(kernel.transpose(3, 0, 1, 2), stride, window, (0, 0))
    return _xla(blocks, kernels.transpose(1, 2, 3, 0), 1, ((0, 0), (0, 0)))


def _blocks(x: jax.Array, side: int, counts: Sequence[int], starts: Sequence[int]) -> jax.Array:
    """[b, h, w, c] to [b, counts[0], counts[1], side² · c], after `starts` zeros along each axis.

    What is missing at the end is zeros, and what is too much is cut off.
    """
    ends = [
        count * side - size - start
        for count, size, start in zip(counts, x.shape[1:3], starts, strict=True)
    ]
    edges = [(start, end, 0) for start, end in zip(starts, ends, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    batch, _, _, channels = x.shape
    x = x.reshape(batch, counts[0], side, counts[1], side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, *counts, side * side * channels)


def _directions(function: Callable[..., jax.Array]) -> dict[Direction, Form]:
    """What a convolution gives, and its gradients as JAX derives them."""

    def forward(
        x: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
    ) -> jax.Array:
        del shape
        return function(x, kernel, stride, padding)

    def input_gradient(
        g: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
    ) -> jax.Array:
        x = jax.ShapeDtypeStruct(shape, g.dtype)
        return jax.linear_transpose(lambda x: function(x, kernel, stride, padding), x)(g)[0]

    def kernel_gradient(
        x: jax.Array, g: jax.Array, shape: Shape, stride: int, padding: Pads
    ) -> jax.Array:
        kernel = jax.ShapeDtypeStruct(shape, g.dtype)
        transpose = jax.linear_transpose(lambda k: function(x, k, stride, padding), kernel)
        return transpose(g)[0]

    return dict(zip(DIRECTIONS, (forward, input_gradient, kernel_gradient), strict=True))


def _product_forward(
    x: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    del shape
    patches = _patches(x, kernel.shape[:2], stride, padding)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


@_compiled_once
def _product_input_gradient(
    g: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    """Each pixel gets what all patches that it is in have for it (col2im)."""
    rows, columns = kernel.shape[:2]
    sizes = [size + sum(pads) for size, pads in zip(shape[1:3], padding, strict=True)]
    ends = [(size - 1) * stride + 1 for size in g.shape[1:3]]  # from the first place to the last
    (top, bottom), (left, right) = padding

    def part(g: jax.Array) -> jax.Array:
        patches = g @ kernel.reshape(-1, kernel.shape[-1]).T
        patches = patches.reshape(*g.shape[:3], rows, columns, shape[-1])
        zero = result = jnp.zeros((), g.dtype)
        for i in range(rows):
            for j in range(columns):
                edges = [
                    (start, size - start - end, stride - 1)
                    for start, size, end in zip((i, j), sizes, ends, strict=True)
                ]
                there = lax.pad(patches[:, :, :, i, j], zero, ((0, 0, 0), *edges, (0, 0, 0)))
                result = result + there
        return result[:, top : sizes[0] - bottom, left : sizes[1] - right]

    # A loop, or XLA adds them all up once more wherever what follows reads a pixel.
    parts = math.gcd(shape[0], PARTS)
    return lax.map(part, g.reshape(parts, -1, *g.shape[1:])).reshape(shape)


def _product_kernel_gradient(
    x: jax.Array, g: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    def part(x: jax.Array, g: jax.Array) -> jax.Array:
        patches, g = _rows(x, g, shape, stride, padding)
        return patches.T @ g

    return _side_by_side(part, x, g).reshape(shape)


@_compiled_once
def _onednn_product_kernel_gradient(
    x: jax.Array, g: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    def add(total: jax.Array, images: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        patches, g = _rows(*images, shape, stride, padding)
        return total + onednn.product(patches, g, transpose_a=True), None

    # In turn: the product keeps all cores busy, one part's patches take a quarter of the memory,
    # and a loop's body is compiled once.
    parts = math.gcd(x.shape[0], PARTS)
    x, g = (a.reshape(parts, a.shape[0] // parts, *a.shape[1:]) for a in (x, g))
    zero = jnp.zeros((math.prod(shape[:-1]), shape[-1]), x.dtype)
    return lax.scan(add, zero, (x, g))[0].reshape(shape)


def _side_by_side(
    part: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, g: jax.Array
) -> jax.Array:
    """What `part` gives for some of the images, added up.

    That keeps more cores busy, where one part does not: a product that has far more rows than the
    kernel has numbers, or a convolution of three maps. What one core does for a part goes on beside
    another part.
    """
    parts = math.gcd(x.shape[0], PARTS)
    return functools.reduce(jnp.add, map(part, jnp.split(x, parts), jnp.split(g, parts)))


def _rows(
    x: jax.Array, g: jax.Array, window: Shape, stride: int, padding: Pads
) -> tuple[jax.Array, jax.Array]:
    """By place of the window, what lies under it and its gradient: float[n, ...] both."""
    patches = _patches(x, window[:2], stride, padding)
    return patches.reshape(-1, patches.shape[-1]), g.reshape(-1, g.shape[-1])


def _patches(x: jax.Array, window: Sequence[int], stride: int, padding: Pads) -> jax.Array:
    """What lies under each place of the window: float[b, h', w', kh · kw · c]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, height, width, channels = x.shape
    rows, columns = (
        (size - side) // stride * stride + 1
        for size, side in zip((height, width), window, strict=True)
    )
    slices = [
        lax.slice(x, (0, i, j, 0), (batch, i + rows, j + columns, channels), (1, stride, stride, 1))
        for i in range(window[0])
        for j in range(window[1])
    ]
    # Or XLA computes them once more wherever a product reads them.
    return lax.optimization_barrier(jnp.concatenate(slices, axis=-1))


def _onednn_forward(
    x: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    del shape
    return onednn.convolution(x, kernel, stride, padding)


def _onednn_input_gradient(
    g: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    """Convolutions of g with the kernel upside down, one for each place in a stride.

    Pixels that are `place` rows from the first, and each stride-th from there on, meet only each
    stride-th row of the kernel, from `first` on; of `g` they meet the row `shift` places further
    with the first of these, and earlier ones with the others. With columns it is the same.
    """
    result = jnp.zeros((), g.dtype)
    for places in itertools.product(*(range(min(stride, size)) for size in shape[1:3])):
        firsts, pads, apart = [], [], []
        for place, size, side, outputs, (before, _) in zip(
            places, shape[1:3], kernel.shape[:2], g.shape[1:3], padding, strict=True
        ):
            shift, first = divmod(place + before, stride)
            rows, count = len(range(first, side, stride)), len(range(place, size, stride))
            firsts.append(first)
            pads.append((rows - 1 - shift, count + shift - outputs))
            apart.append((place, size - place - (count - 1) * stride - 1, stride - 1))
        part = kernel[firsts[0] :: stride, firsts[1] :: stride]
        if 0 in part.shape:  # the stride passes over these pixels
            continue
        y = _onednn_padded(g, jnp.flip(part, (0, 1)).swapaxes(2, 3), pads)
        result = result + lax.pad(y, jnp.zeros((), y.dtype), ((0, 0, 0), *apart, (0, 0, 0)))
    return jnp.broadcast_to(result, shape)


def _onednn_kernel_gradient(
    x: jax.Array, g: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    """A convolution of x with g, whose channels are the images."""
    pads = [
        (before, (places - 1) * stride + side - before - size)
        for size, places, side, (before, _) in zip(
            x.shape[1:3], g.shape[1:3], shape[:2], padding, strict=True
        )
    ]

    def part(x: jax.Array, g: jax.Array) -> jax.Array:
        maps, kernels = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        return _onednn_padded(maps, kernels, pads, stride).transpose(1, 2, 0, 3)

    # Three channels, as images of that convolution, are too few to share among cores.
    return _side_by_side(part, x, g) if x.shape[-1] < PARTS else part(x, g)


def _onednn_padded(
    x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]], dilation: int = 1
) -> jax.Array:
    """With a stride of 1; negative padding leaves pixels out."""
    edges = [(min(before, 0), min(after, 0), 0) for before, after in pads]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    rows, columns = ((max(before, 0), max(after, 0)) for before, after in pads)
    return onednn.convolution(x, kernel, 1, (rows, columns), dilation)


_ONEDNN = (_onednn_forward, _onednn_input_gradient, _onednn_kernel_gradient)
_PATCHES = (_product_forward, _product_input_gradient, _product_kernel_gradient)
_FORMS: dict[str, dict[Direction, Form]] = {
    "xla": _directions(_xla),
    "space_to_depth": _directions(_space_to_depth),
    "patches": dict(zip(DIRECTIONS, _PATCHES, strict=True)),
    "onednn": dict(zip(DIRECTIONS, _ONEDNN, strict=True)),
    "onednn_patches": dict(
        zip(DIRECTIONS, (*_ONEDNN[:2], _onednn_product_kernel_gradient), strict=True)
    ),
}
