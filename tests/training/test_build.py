"""From a configuration to optimizer, compiled steps and state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.config.schema import Config, ModelConfig, OptimizerConfig
from flax_alexnet.data.dataset import Batch
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.alexnet import make_model
from flax_alexnet.models.architectures import architecture
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.training import build
from flax_alexnet.training.optimizer import applied_rate
from flax_alexnet.training.step import create_state


@pytest.fixture(scope="module")
def parts():
    """Optimizer, steps and state of a tiny run."""
    model_config = ModelConfig("cuda_convnet_19pct", 10)
    rule = Preprocessing(20, "paper", 16, np.zeros(3), 1 / 64)
    config = Config(model=model_config).with_preprocessing(rule)
    layers = architecture(model_config.variant).scaled(10, 1.0)
    layout = make_layout("data", layers)
    model = make_model(**vars(model_config))
    optimizer = build.make_optimizer(config.optimizer, steps_per_epoch=10)
    init_fn = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=16)
    template = build.state_template(init_fn, 20, layout)
    steps = build.compile_steps(config, model, optimizer, layout, template)
    return layout, init_fn, template, steps


def batch() -> Batch:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (8, 20, 20, 3), np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }


def test_the_state_lies_as_its_template_says(parts):
    layout, init_fn, template, _ = parts
    state = build.initialize(
        init_fn, jax.random.key(0), np.zeros((20, 20, 3), np.float32), template
    )
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    for value in jax.tree.leaves(build.gather_params(state.params, layout)):
        assert isinstance(value, np.ndarray)


def test_values_that_are_given_are_not_drawn(parts):
    _, init_fn, template, _ = parts
    mean = np.zeros((20, 20, 3), np.float32)
    given = {"conv1": {"kernel": jnp.ones((5, 5, 3, 32)), "bias": jnp.zeros(32)}}
    state = build.initialize(init_fn, jax.random.key(0), mean, template, given)
    assert bool(jnp.all(state.params["conv1"]["kernel"] == 1))
    assert not bool(jnp.all(state.params["conv2"]["kernel"] == 1))


def test_the_steps_train_and_count(parts):
    layout, init_fn, template, (step_fn, eval_fn) = parts
    mean = np.full((20, 20, 3), 127, np.float32)
    state = build.initialize(init_fn, jax.random.key(0), mean, template)
    state, loss = step_fn(state, layout.put(batch(), 8), jax.random.key(1))
    assert (int(state.step), np.isfinite(float(loss))) == (1, True)
    mask = np.arange(8) < 5
    seen = layout.put(batch() | {"mask": mask}, 8)
    totals = eval_fn(build.empty_totals(layout), state.params, state.mean, seen)
    assert float(totals["images"]) == 5


def test_epochs_become_steps():
    config = OptimizerConfig(learning_rate=1.0, schedule="steps", drop_epochs=(2.0,))
    optimizer = build.make_optimizer(config, steps_per_epoch=3)
    params = {"fc": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    state, rates = optimizer.init(params), []
    for _ in range(8):
        _, state = optimizer.update(params, state, params)
        rates.append(round(float(applied_rate(state)), 6))
    assert rates == [1.0] * 6 + [0.1] * 2


def rates(config, steps, **options):
    """The rates of a kernel and of a bias at some steps."""
    optimizer = build.make_optimizer(config, steps_per_epoch=10, **options)
    params = {"conv1": {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}}
    state, result = optimizer.init(params), []
    for step in range(max(steps) + 1):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        if step in steps:
            result.append([-float(updates["conv1"][name][0]) for name in ("kernel", "bias")])
    return np.array(result)


def test_drops_may_leave_biases_alone():
    config = OptimizerConfig(
        learning_rate=0.5,
        momentum=0.0,
        bias_rate=2.0,
        schedule="steps",
        drop_epochs=(1.0,),
        drop_biases=False,
    )
    np.testing.assert_allclose(rates(config, (0, 9, 10)), [[0.5, 1], [0.5, 1], [0.05, 1]])


def test_biases_may_fall_in_other_steps():
    config = OptimizerConfig(
        learning_rate=1.0,
        momentum=0.0,
        schedule="exponential",
        final_rate=0.01,
        rate_levels=3,
        bias_final_rate=0.1,
        bias_rate_levels=2,
    )
    expected = [[1, 1], [0.1, 1], [0.1, 0.1], [0.01, 0.1]]
    np.testing.assert_allclose(rates(config, (0, 14, 15, 20), epochs=3), expected, rtol=1e-5)
    same = OptimizerConfig(momentum=0.0, schedule="cosine", learning_rate=1.0)
    kernel, bias = rates(same, (5,), epochs=1)[0]
    assert kernel == bias == pytest.approx(0.5)


def test_layers_end_at_an_epoch():
    config = OptimizerConfig(learning_rate=1.0, momentum=0.0)
    layers = build.LayerSettings(ends={"conv1": 2.0})
    actual = rates(config, (19, 20), layers=layers, first_step=0.0)
    np.testing.assert_allclose(actual, [[1, 1], [0, 0]])
