"""The product of a dense layer and its gradients, in the forms that are fastest where they run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops import onednn
from flax_alexnet.ops.dispatch import Product, choose
from flax_alexnet.ops.linear import bilinear


@jax.custom_jvp
def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The matrix product of float[n, i] and float[i, o]; `choices` says how it is computed."""
    return _compute("forward", x, kernel)


@functools.partial(multiply.defjvp, symbolic_zeros=True)
def _derivative(
    arrays: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    return multiply(*arrays), bilinear(_operator, arrays, tangents)


def _operator(direction: str, fixed: jax.Array, varied: jax.Array) -> jax.Array:
    """All directions of the product, for `linear`."""
    match direction:
        case "forward, of x":
            return _compute("forward", varied, fixed)
        case "input gradient":
            return _compute(direction, varied, fixed)
        case "forward" | "kernel gradient":
            return _compute(direction, fixed, varied)
    raise ValueError(f"a product has no direction {direction!r}")


def _compute(direction: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A direction of the product; `a` has a row for each image."""
    rows = a.shape[0] if isinstance(a.shape[0], int) else 1  # symbolic in an exported program
    facts = Product(rows, a.dtype)
    cpu, default = (
        _FORMS[choose(f"dense {direction}", platform, facts)][direction]
        for platform in ("cpu", "any")
    )
    if cpu is default:
        return cpu(a, b)
    return lax.platform_dependent(a, b, cpu=cpu, default=default)


_FORMS: dict[str, dict[str, Callable[[jax.Array, jax.Array], jax.Array]]] = {
    "xla": {
        "forward": jnp.matmul,
        "input gradient": lambda g, kernel: g @ kernel.T,
        "kernel gradient": lambda x, g: x.T @ g,
    },
    "onednn": {
        "forward": onednn.product,
        "input gradient": functools.partial(onednn.product, transpose_b=True),
        "kernel gradient": functools.partial(onednn.product, transpose_a=True),
    },
}
