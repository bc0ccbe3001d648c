"""Barriers that keep XLA from fusing operations on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops.dispatch import by_platform


def written_on_cpu(x: jax.Array) -> jax.Array:
    """Returns x unchanged, but a CPU computes and stores it once, before anything reads it.

    XLA fuses a cheap operator into each operator that reads it, and so computes it several times.
    For a gradient that is a sum of nine arrays it then stores all nine: the backward pass from the
    paper's first pooling to its first norm takes 195 ms, and 89 ms with this function. On other
    platforms nothing changes, since their fusions save more than they cost.
    """
    if 0 in x.shape or jax.device_count() > 1:  # several devices would have to agree on a branch
        return x
    return by_platform(x, cpu=_through_a_branch, default=lambda x: x)


def apart_on_cpu(updates: Any) -> Any:
    """Returns the same updates, but a CPU computes them before it adds them to the parameters.

    XLA then updates velocities and parameters in place (119 ms for the notebook's fc6); otherwise
    it first writes velocities to a new buffer (244 ms). On a GPU one pass over both is faster.
    """
    return by_platform(updates, cpu=lax.optimization_barrier, default=lambda updates: updates)


def _through_a_branch(x: jax.Array) -> jax.Array:
    # XLA does not fuse across a branch, but it does across its own `optimization_barrier`. The
    # compiler cannot know that this condition is always true.
    first = x[(0,) * x.ndim]
    yes = jnp.isnan(first) | (first <= jnp.inf)
    return lax.cond(yes, lambda x: x, jnp.zeros_like, x)
