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
    return _compute("forward", x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return multiply(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    return _compute("input gradient", g, kernel), _compute("kernel gradient", x, g)


multiply.defvjp(_forward, _backward)


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
