"""The product of a dense layer and its gradients, in the form fastest on the platform."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_alexnet.ops import onednn
from flax_alexnet.ops.dispatch import Operation, Product, dispatch
from flax_alexnet.ops.linear import Direction, bilinear


@jax.custom_jvp
def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The matrix product of float[n, i] and float[i, o]; `dispatch` says how it is computed."""
    return _compute(Direction.FORWARD, x, kernel)


@functools.partial(multiply.defjvp, symbolic_zeros=True)
def _derivative(
    arrays: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    return multiply(*arrays), bilinear(_operator, arrays, tangents)


def _operator(direction: Direction, fixed: jax.Array, varied: jax.Array) -> jax.Array:
    """All directions of the product, for `linear`."""
    match direction:
        case Direction.FORWARD_OF_INPUT:
            return _compute(Direction.FORWARD, varied, fixed)
        case Direction.INPUT_GRADIENT:
            return _compute(direction, varied, fixed)
    return _compute(direction, fixed, varied)


def _compute(direction: Direction, a: jax.Array, b: jax.Array) -> jax.Array:
    """A direction of the product; `a` has a row for each image."""
    rows = a.shape[0] if isinstance(a.shape[0], int) else 1  # symbolic in an exported program
    return dispatch(Operation.DENSE, direction, Product(rows, a.dtype), _FORMS[direction], a, b)


_FORMS: dict[Direction, dict[str, Callable[[jax.Array, jax.Array], jax.Array]]] = {
    Direction.FORWARD: {"xla": jnp.matmul, "onednn": onednn.product},
    Direction.INPUT_GRADIENT: {
        "xla": lambda g, kernel: g @ kernel.T,
        "onednn": functools.partial(onednn.product, transpose_b=True),
    },
    Direction.KERNEL_GRADIENT: {
        "xla": lambda x, g: x.T @ g,
        "onednn": functools.partial(onednn.product, transpose_a=True),
    },
}
