"""Shared parts of the operators: the type of a padding, and how a primitive runs on its own."""

from collections.abc import Callable
from typing import Any

import jax

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros ((top, bottom), (left, right)), in pixels


def compiled(function: Callable[..., jax.Array], *static: str) -> Callable[..., jax.Array]:
    """`function` as a primitive that is called outside of a program runs it: compiled once.

    Args:
      function: of arrays, and of the parameters of the primitive by name.
      static: the names of these parameters.
    """
    program = jax.jit(function, static_argnames=static)

    def run(*arrays: jax.Array, **parameters: Any) -> jax.Array:
        with jax.disable_jit(False):  # it is one operation, as JAX's own are under `disable_jit`
            return program(*arrays, **parameters)

    return run
