"""The step: what it counts, types, draws; that layouts agree is in test_sharding.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.architectures import architecture
from flax_alexnet.augment import augment, preprocess
from flax_alexnet.build import compile_steps, initialize, state_template
from flax_alexnet.config import AugmentConfig, Config
from flax_alexnet.model import AlexNet
from flax_alexnet.optimizer import create_optimizer
from flax_alexnet.sharding import make_layout
from flax_alexnet.step import create_state, eval_step, train_step, zero_totals

CROP = 64
MEAN = np.full((70, 70, 3), 127, np.float32)
QUICK = {"xla_backend_optimization_level": 1}  # for what runs once
CONFIG = Config(
    batch_size=16,
    augment=AugmentConfig(crop_size=CROP, color_noise="cuda-convnet", scale=1 / 64),
)


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (16, 70, 70, 3), np.uint8),
            "label": rng.integers(0, 10, 16).astype(np.int32),
        }


@functools.cache
def run(dtype="float32"):
    """Losses of ten steps with dropout and augmentation, and the state after them."""
    layout = make_layout(
        "data", architecture("notebook").scaled(10, 0.1), devices=jax.devices()[:2]
    )
    model = AlexNet("notebook", 10, width=0.1, initialization="he", dtype=jnp.dtype(dtype))
    optimizer = create_optimizer(0.01)
    init = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=CROP)
    template = state_template(init, 70, layout)
    state = initialize(init, jax.random.key(0), MEAN, template)
    step_fn, _ = compile_steps(CONFIG, model, optimizer, layout, template)
    losses = []
    for batch in batches(10):
        state, loss = step_fn(state, layout.put(batch, 16), jax.random.key(5))
        losses.append(float(loss))
    return losses, state


def test_the_state_counts_steps_and_images():
    _, state = run()
    assert int(state.step) == 10
    assert float(state.totals["images"]) == 160
    assert float(state.totals["loss"]) / 160 == pytest.approx(np.mean(run()[0]), rel=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    losses, state = run("bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, run()[0], rtol=0.05)
    assert losses != run()[0]


def test_draws_derive_from_the_step():
    """The same batch twice gives two losses, and the same step once more gives the same one."""
    model = AlexNet("notebook", 10, width=0.1, initialization="he")
    optimizer = create_optimizer(0.01)
    create = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=CROP)
    state = jax.jit(create, compiler_options=QUICK)(jax.random.key(0), MEAN)
    fn = jax.jit(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            augment=functools.partial(augment, crop_size=CROP, scale=1 / 64),
        )
    )
    (batch,) = batches(1)
    at = lambda step: float(fn(state.replace(step=jnp.int32(step)), batch, jax.random.key(0))[1])  # noqa: E731
    assert at(0) != at(1)
    assert at(0) == at(0)


def test_evaluation_counts_each_image_once():
    model = AlexNet("notebook", 10, width=0.1, initialization="he")
    mean, images = MEAN, jnp.zeros((1, CROP, CROP, 3))
    init = jax.jit(lambda key: model.init(key, images)["params"], compiler_options=QUICK)
    params = init(jax.random.key(0))
    fn = jax.jit(
        functools.partial(
            eval_step,
            model=model,
            preprocess=functools.partial(preprocess, crop_size=CROP, scale=1 / 64),
        )
    )
    (batch,) = batches(1)
    mask = np.arange(16) < 11
    masked = fn(zero_totals(), params, mean, batch | {"mask": mask})
    alone = fn(
        zero_totals(),
        params,
        mean,
        {name: rows[:11] for name, rows in batch.items()} | {"mask": np.ones(11, bool)},
    )
    assert float(masked["images"]) == 11
    for name in masked:
        assert float(masked[name]) == pytest.approx(float(alone[name]), rel=1e-5)
