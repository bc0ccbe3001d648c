"""Arrays for oneDNN, which is not with every jaxlib."""

import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.ops import onednn

here = pytest.mark.skipif(not onednn.usable(jnp.float32), reason="not with this jaxlib")


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_close(actual, expected, tolerance=1e-5):
    assert jnp.abs(actual - expected).max() <= tolerance * jnp.abs(expected).max()
