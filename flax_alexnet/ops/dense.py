"""The product of a dense layer and its gradients, in the forms that are fastest where they run."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops import onednn
from flax_alexnet.ops.choices import Product, choose


@jax.custom_vjp
def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The matrix product of float[n, i] and float[i, o]; `choices` says how it is computed."""
    return _compute("forward", jnp.matmul, onednn.product, x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return multiply(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    by_onednn = functools.partial(onednn.product, transpose_b=True)
    dx = _compute("input gradient", lambda g, kernel: g @ kernel.T, by_onednn, g, kernel)
    return dx, x.T @ g


multiply.defvjp(_forward, _backward)


def _compute(
    direction: str,
    by_xla: Callable[..., jax.Array],
    by_onednn: Callable[..., jax.Array],
    a: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    rows = a.shape[0] if isinstance(a.shape[0], int) else 1  # symbolic in an exported program
    if choose(f"dense {direction}", "cpu", Product(rows, a.dtype)) == "xla":
        return by_xla(a, kernel)
    return lax.platform_dependent(a, kernel, cpu=by_onednn, default=by_xla)
