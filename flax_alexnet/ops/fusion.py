"""Where XLA is not to fuse what it would."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops.dispatch import by_platform


def written_on_cpu(x: jax.Array) -> jax.Array:
    """The same numbers, which a CPU computes and writes down once, before anything reads them.

    XLA fuses cheap operators with all that read them, several times if there are several readers.
    For a gradient that is a sum of nine arrays it then writes all nine: the paper's first norm,
    pool and what is between take 195 ms backward, and 89 so. Nothing changes on other platforms,
    whose fusions save more than they cost.
    """
    if 0 in x.shape or jax.device_count() > 1:  # which would have to agree on the branch
        return x
    return by_platform(x, cpu=_through_a_branch, default=lambda x: x)


def apart_on_cpu(updates: Any) -> Any:
    """The same updates, computed before the parameters that they are added to.

    On a CPU XLA then writes both to where they lie (119 ms for the notebook's fc6; else it writes
    velocities to a new place first, 244 ms); on a GPU one pass over both is faster.
    """
    return by_platform(updates, cpu=lax.optimization_barrier, default=lambda updates: updates)


def _through_a_branch(x: jax.Array) -> jax.Array:
    # Nothing is fused across a branch; across XLA's own `optimization_barrier` it is. No compiler
    # knows of this question that the answer is yes.
    first = x[(0,) * x.ndim]
    yes = jnp.isnan(first) | (first <= jnp.inf)
    return lax.cond(yes, lambda x: x, jnp.zeros_like, x)
