"""Numbers that are written down before they are read are the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.ops.fusion import written_on_cpu
from flax_alexnet.ops.lrn import local_response_normalization
from flax_alexnet.ops.pooling import max_pool


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As where a run has one: over several, nothing is written down."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("first", [1.0, -0.0, jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)])
def test_whatever_the_first_number_is_all_come_through(shape, first):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[(0,) * x.ndim] = first
    np.testing.assert_array_equal(written_on_cpu(jnp.asarray(x)), x)
    np.testing.assert_array_equal(jax.jit(jax.vmap(written_on_cpu))(jnp.stack([x, x]))[1], x)


def test_an_empty_array_has_no_first_number():
    assert written_on_cpu(jnp.zeros((0, 3))).shape == (0, 3)


def test_it_is_written_down_on_one_device_alone(monkeypatch):
    def compiled():
        function = jax.jit(lambda x: written_on_cpu(2 * x) + 1)
        return function.lower(jnp.ones((4, 4))).compile().as_text()

    assert "conditional(" in compiled()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "conditional(" not in compiled()


@pytest.mark.slow
def test_gradients_are_the_same_to_the_bit_and_can_be_differentiated(monkeypatch):
    def loss(x):
        x = local_response_normalization(jax.nn.relu(x), 2, 2.0, 1e-2, 0.75, groups=2)
        return jnp.sum(jnp.sin(max_pool(x, 3, 2, ((0, 0), (0, 0)))))

    def norm_of_gradient(x):
        return jnp.sum(jax.grad(loss)(x) ** 2)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 9, 8)), jnp.float32)
    found = jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(norm_of_gradient))(x)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    expected = jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(norm_of_gradient))(x)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
