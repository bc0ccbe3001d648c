"""Linear functions whose transposes are written by hand, for derivatives in both modes.

An operator with a faster gradient of its own could use `jax.custom_vjp`, but JAX then rejects
forward mode. Here it declares with `jax.custom_jvp` that its derivative is `linear`: forward mode
computes that function, and reverse mode its transpose, which is the gradient.

Inside `jax.shard_map` this needs `check_vma=False`, as `flax_alexnet.parallel.layouts` sets it.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_alexnet.ops.primitives import compiled


class Direction(enum.StrEnum):
    """The functions that an operator can compute."""

    FORWARD = "forward"  # of x and a kernel, as a function of the kernel
    FORWARD_OF_INPUT = "forward, of the input"  # of a kernel and x, as a function of x
    INPUT_GRADIENT = "input gradient"
    KERNEL_GRADIENT = "kernel gradient"
    DERIVATIVE = "derivative"  # of an operator of one array, in forward mode
    GRADIENT = "gradient"  # of such an operator: the transpose of the derivative


# Maps (direction, *fixed, x) to an array. It must be hashable, and equal to any operator with the
# same settings, so that JAX finds the compiled program again.
Operator = Callable[..., jax.Array]


def linear(
    operator: Operator,
    direction: Direction,
    transpose: Direction,
    fixed: Sequence[jax.Array],
    x: jax.Array,
) -> jax.Array:
    """`operator(direction, *fixed, x)`, which is linear in x, with a transpose of its own.

    Args:
      operator: has a function for each direction.
      direction: the one to compute.
      transpose: the one that maps (*fixed, g), with g of the shape of the result, to an array of
        the shape of x.
      fixed: arrays that both functions read; JAX itself differentiates with respect to them.
      x: the array in which the function is linear.
    """
    return _linear.bind(*fixed, x, operator=operator, direction=direction, transpose=transpose)


def bilinear(
    operator: Operator, arrays: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> jax.Array:
    """The derivative of a product of `arrays`, x and a kernel; for `defjvp` with `symbolic_zeros`.

    Args:
      operator: has the directions FORWARD of (x, kernel), FORWARD_OF_INPUT of (kernel, x),
        INPUT_GRADIENT of (kernel, g) and KERNEL_GRADIENT of (x, g).
      arrays: x and the kernel.
      tangents: the tangents of x and the kernel. Nothing is computed for a symbolic zero, such as
        the tangent of the images that the first layer reads.
    """
    x, kernel = arrays
    of_x, of_kernel = tangents
    parts = []
    if not isinstance(of_x, SymbolicZero):
        directions = Direction.FORWARD_OF_INPUT, Direction.INPUT_GRADIENT
        parts.append(linear(operator, *directions, [kernel], of_x))
    if not isinstance(of_kernel, SymbolicZero):
        directions = Direction.FORWARD, Direction.KERNEL_GRADIENT
        parts.append(linear(operator, *directions, [x], of_kernel))
    return functools.reduce(jnp.add, parts)


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """An operator under `vmap`."""

    operator: Operator
    axes: tuple[int | None, ...]

    def __call__(self, direction: Direction, *arrays: jax.Array) -> jax.Array:
        return jax.vmap(functools.partial(self.operator, direction), self.axes)(*arrays)


def _compute(
    *arrays: jax.Array, operator: Operator, direction: Direction, transpose: Direction
) -> jax.Array:
    del transpose
    return operator(direction, *arrays)


def _abstract(*arrays: Any, **parameters: Any) -> Any:
    result = jax.eval_shape(functools.partial(_compute, **parameters), *arrays)
    return arrays[-1].update(shape=result.shape, dtype=result.dtype)


def _derivative(
    arrays: Sequence[Any], tangents: Sequence[Any], **parameters: Any
) -> tuple[jax.Array, jax.Array]:
    *fixed, x = arrays
    *of_fixed, of_x = tangents
    parts = []
    if not isinstance(of_x, ad.Zero):
        parts.append(_linear.bind(*fixed, of_x, **parameters))
    if not all(isinstance(tangent, ad.Zero) for tangent in of_fixed):
        of_fixed = [ad.instantiate_zeros(tangent) for tangent in of_fixed]
        parts.append(jax.jvp(lambda *fixed: _compute(*fixed, x, **parameters), fixed, of_fixed)[1])
    return _linear.bind(*arrays, **parameters), functools.reduce(jnp.add, parts)


def _transposed(
    g: Any, *arrays: Any, operator: Operator, direction: Direction, transpose: Direction
) -> Any:
    *fixed, x = arrays
    del direction
    # The operator is called directly and not through a primitive, which would hide its operations:
    # JAX searches a program for operations that must know its devices, such as GPU kernels.
    of_x = ad.Zero(x.aval) if isinstance(g, ad.Zero) else operator(transpose, *fixed, g)
    return [None] * len(fixed) + [of_x]


def _batched(
    arrays: Sequence[Any],
    axes: Sequence[int | None],
    *,
    operator: Operator,
    direction: Direction,
    transpose: Direction,
) -> tuple[jax.Array, int]:
    pairs = list(zip(arrays, axes, strict=True))
    size = next(array.shape[axis] for array, axis in pairs if axis is not None)
    x = batching.bdim_at_front(*pairs[-1], size)  # even where all share it, as their results differ
    mapped = _Mapped(operator, (*axes[:-1], 0))
    return linear(mapped, direction, transpose, arrays[:-1], x), 0


_linear = Primitive("linear")
_linear.def_impl(compiled(_compute, "operator", "direction", "transpose"))
_linear.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear] = _derivative
ad.primitive_transposes[_linear] = _transposed
batching.primitive_batchers[_linear] = _batched
mlir.register_lowering(_linear, mlir.lower_fun(_compute, multiple_results=False))
