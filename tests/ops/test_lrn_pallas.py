"""The kernel for GPUs, interpreted here; test_lrn.py compares it in more cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet import local_response_normalization
from flax_alexnet.ops.lrn_pallas import MAX_RADIUS, window_kernel


@pytest.mark.parametrize("channels", [1, 7, 32])
@pytest.mark.parametrize("radius", [0, 2, MAX_RADIUS])
def test_it_normalizes_and_gives_the_gradient(channels, radius):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((3, 5, channels), np.float32)) for _ in range(2))
    expected, pullback = jax.vjp(
        lambda x: local_response_normalization(
            x, radius, 2.0, 0.3, 0.75, implementation="reference"
        ),
        x,
    )
    kernel = window_kernel(radius, 2.0, 0.3, 0.75)
    np.testing.assert_allclose(kernel(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kernel(x, g), pullback(g)[0], rtol=1e-5, atol=1e-6)


def test_no_images_are_no_work():
    assert window_kernel(2, 1.0, 1.0, 0.5)(jnp.zeros((0, 4))).shape == (0, 4)
