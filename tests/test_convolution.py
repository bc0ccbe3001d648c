"""The convolution for few channels agrees with XLA's own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_alexnet.ops.convolution import convolve

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("padding", [((2, 2), (2, 2)), ((0, 0), (1, 3))])
@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_a_convolution(channels, padding, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 9, 11, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((5, 3, channels, 6)), jnp.float32)

    def ours(x, kernel):
        return convolve(x, kernel, stride, padding)

    def theirs(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT
        )

    y, transpose = jax.vjp(ours, x, kernel)
    expected, expected_transpose = jax.vjp(theirs, x, kernel)
    np.testing.assert_array_equal(y, expected)
    g = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    for a, b in zip(transpose(g), expected_transpose(g), strict=True):
        assert jnp.abs(a - b).max() <= 1e-6 * jnp.abs(b).max()
