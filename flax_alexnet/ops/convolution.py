"""Convolution that computes each of its three directions in the form fastest on the platform.

The forward pass, the gradient of the kernel and the gradient of the input are products of the same
three arrays. Each has these forms:

- "xla": XLA's own convolution. On a CPU it reaches 5 to 95 % of the rate of a matrix product; on a
  GPU it is slow if there are few channels.
- "patches": a matrix product with the values under each position of the window side by side
  (im2col; Chellapilla et al. 2006, and Caffe).
- "space_to_depth": for a stride of s, a convolution of stride 1 over blocks of s × s pixels, with
  s² times the channels.
- "onednn": oneDNN's convolution, where it is available. The gradients are convolutions too; the
  gradient of the input takes one for each position within a stride.
- "onednn_patches": the same, but the gradient of the kernel is oneDNN's product of patches.

`flax_alexnet.ops.dispatch` chooses the form.
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
Form = Callable[..., jax.Array]  # takes two arrays, the shape of the result, stride and padding
DIRECTIONS = (Direction.FORWARD, Direction.INPUT_GRADIENT, Direction.KERNEL_GRADIENT)
PARTS = 4  # the parts that a batch is split into; see `_side_by_side`
# Outside of `jit`, JAX would compile a loop again at each call.
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
      groups: number of equal groups; the features of a group depend on its input channels only.
      implementation: one form for the result and both gradients; with None,
        `flax_alexnet.ops.dispatch` chooses a form for each by the platform of the compilation.

    Returns:
      float[b, h', w', features].
    """
    # Each group is computed as a separate convolution. XLA's gradients of a grouped convolution are
    # up to ten times slower on a CPU; on an H200 the paper's conv2 takes 6.2 ms forward and
    # backward as a grouped convolution, and 3.7 ms as separate ones.
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
        """Computes a direction in the requested form, or in the fastest one on the platform."""
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

    The end of each axis is filled up with zeros, or cut off, to fit.
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
    """The forms of a convolution, with the gradients that JAX derives from `function`."""

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
    """Sums for each pixel its values in all patches that contain it (col2im)."""
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

    # Without this loop, XLA repeats the sums wherever a later operation reads a pixel.
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

    # The parts are computed in turn: a product keeps all cores busy, the patches of one part take a
    # quarter of the memory, and the body of the loop is compiled once.
    parts = math.gcd(x.shape[0], PARTS)
    x, g = (a.reshape(parts, a.shape[0] // parts, *a.shape[1:]) for a in (x, g))
    zero = jnp.zeros((math.prod(shape[:-1]), shape[-1]), x.dtype)
    return lax.scan(add, zero, (x, g))[0].reshape(shape)


def _side_by_side(
    part: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, g: jax.Array
) -> jax.Array:
    """The sum of the results of `part` over parts of the batch.

    Several parts keep more cores busy than one does, for a product that has far more rows than the
    kernel has numbers, or for a convolution of three maps. What a single core computes for one part
    overlaps with another part.
    """
    parts = math.gcd(x.shape[0], PARTS)
    return functools.reduce(jnp.add, map(part, jnp.split(x, parts), jnp.split(g, parts)))


def _rows(
    x: jax.Array, g: jax.Array, window: Shape, stride: int, padding: Pads
) -> tuple[jax.Array, jax.Array]:
    """The values under the window and the gradients, a row for each position: float[n, ...]."""
    patches = _patches(x, window[:2], stride, padding)
    return patches.reshape(-1, patches.shape[-1]), g.reshape(-1, g.shape[-1])


def _patches(x: jax.Array, window: Sequence[int], stride: int, padding: Pads) -> jax.Array:
    """The values under each position of the window: float[b, h', w', kh · kw · c]."""
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
    # Without this barrier, XLA computes the patches again for each product that reads them.
    return lax.optimization_barrier(jnp.concatenate(slices, axis=-1))


def _onednn_forward(
    x: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    del shape
    return onednn.convolution(x, kernel, stride, padding)


def _onednn_input_gradient(
    g: jax.Array, kernel: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    """Convolutions of g with the flipped kernel, one for each position within a stride.

    The gradient of pixel row place + i · stride needs only the kernel rows first + m · stride for
    m = 0, 1, …, each multiplied by row i + shift − m of g. The same holds for columns.
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
        if 0 in part.shape:  # the stride skips these pixels
            continue
        y = _onednn_padded(g, jnp.flip(part, (0, 1)).swapaxes(2, 3), pads)
        result = result + lax.pad(y, jnp.zeros((), y.dtype), ((0, 0, 0), *apart, (0, 0, 0)))
    return jnp.broadcast_to(result, shape)


def _onednn_kernel_gradient(
    x: jax.Array, g: jax.Array, shape: Shape, stride: int, padding: Pads
) -> jax.Array:
    """A convolution of x with g in which the images of the batch are the channels."""
    pads = [
        (before, (places - 1) * stride + side - before - size)
        for size, places, side, (before, _) in zip(
            x.shape[1:3], g.shape[1:3], shape[:2], padding, strict=True
        )
    ]

    def part(x: jax.Array, g: jax.Array) -> jax.Array:
        maps, kernels = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
        return _onednn_padded(maps, kernels, pads, stride).transpose(1, 2, 0, 3)

    # The channels of x are the batch of that convolution, and three are too few for all cores.
    return _side_by_side(part, x, g) if x.shape[-1] < PARTS else part(x, g)


def _onednn_padded(
    x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]], dilation: int = 1
) -> jax.Array:
    """A convolution by oneDNN with a stride of 1; negative padding crops pixels."""
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
