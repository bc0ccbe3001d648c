"""The notebook's optimizer with TensorFlow's own MomentumOptimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.training.optimizer import create_optimizer

tf = pytest.importorskip("tensorflow")


def test_the_notebooks_rule_is_tensorflows_momentum_with_its_added_decay():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((20, 30)).astype(np.float32)
    # The decay is far larger than the notebook's, or fifty steps would not show it.
    rate, decay = 0.01, 50.0

    variable = tf.Variable(weights)
    momentum = tf.compat.v1.train.MomentumOptimizer(learning_rate=rate, momentum=0.9)
    params = {"fc6": {"kernel": jnp.asarray(weights)}}
    optimizer = create_optimizer(rate, 0.9, decay, rule="notebook")
    state = optimizer.init(params)

    for step in range(50):
        gradient = np.cos(step + np.arange(600).reshape(20, 30)).astype(np.float32)
        momentum.apply_gradients([(gradient + decay * rate * variable, variable)])
        updates, state = optimizer.update({"fc6": {"kernel": jnp.asarray(gradient)}}, state, params)
        params = jax.tree.map(jnp.add, params, updates)

    ours, theirs = np.asarray(params["fc6"]["kernel"]), variable.numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= 1e-5
