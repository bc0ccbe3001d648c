"""The step: what it counts, types, draws; that layouts agree is in parallel/test_layouts.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_alexnet.config.schema import AugmentConfig, Config
from flax_alexnet.data.augment import augment, mixup, preprocess
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.models.architectures import architecture
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.training.build import compile_steps, initialize, state_template
from flax_alexnet.training.metrics import cross_entropy
from flax_alexnet.training.optimizer import create_optimizer
from flax_alexnet.training.step import create_state, eval_step, train_step, zero_totals

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
def compiled(dtype):
    """A step of (state, batch) on devices that split batch and dense layers, and a first state."""
    layers = architecture("notebook").scaled(10, 0.1)
    layout = make_layout("hybrid", layers, (2, 2), jax.devices()[:4])
    model = AlexNet("notebook", 10, width=0.1, initialization="he", dtype=jnp.dtype(dtype))
    optimizer = create_optimizer(0.01)
    init = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=CROP)
    template = state_template(init, 70, layout)
    first = jax.tree.map(np.asarray, initialize(init, jax.random.key(0), MEAN, template))
    step_fn, _ = compile_steps(CONFIG, model, optimizer, layout, template)

    def step(state, batch):
        state = jax.tree.map(lambda a, t: jax.device_put(a, t.sharding), state, template)
        return step_fn(state, layout.put(batch, 16), jax.random.key(5))

    return step, first


@functools.cache
def run(dtype="float32"):
    """Losses of ten steps with dropout and augmentation, and the state after them."""
    step, state = compiled(dtype)
    losses = []
    for batch in batches(10):
        state, loss = step(state, batch)
        losses.append(float(loss))
    return losses, state


def test_the_state_counts_steps_and_images():
    _, state = run()
    assert int(state.step) == 10
    assert float(state.totals["images"]) == 160
    assert float(state.totals["loss"]) / 160 == pytest.approx(np.mean(run()[0]), rel=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    losses, state = run("bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, run()[0], rtol=0.05)
    assert losses != run()[0]


@functools.partial(jax.jit, compiler_options=QUICK)
def evaluate(params, batch, mask=True):
    batch = {**batch, "mask": jnp.broadcast_to(mask, batch["label"].shape)}
    model = AlexNet("notebook", 10, width=0.1)

    def centre(images, mean):
        return preprocess(images, Preprocessing(CROP, "paper", CROP, mean, 1 / 64))

    return eval_step(zero_totals(), params, MEAN, batch, model=model, preprocess=centre)


def assert_same_bits(one, other):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def with_params(state, **changed):
    """The state with `fc8_bias=values`, or with one unit of a layer: `fc7_kernel={(…): value}`."""
    params = jax.tree.map(np.copy, state.params)
    for name, values in changed.items():
        layer, part = name.split("_")
        for place, value in (values if isinstance(values, dict) else {...: values}).items():
            params[layer][part][place] = value
    return state.replace(params=params)


def no_such_label(state, batch):
    return state, {**batch, "label": np.full(16, 10, np.int32)}


def infinite_loss(state, batch):
    """The loss of label 1 exceeds the largest number, and its gradient is at most 1."""
    bias = np.float32([3e38, -3e38, *[0] * 8])
    return with_params(state, fc8_bias=bias), {**batch, "label": np.full(16, 1, np.int32)}


def infinite_gradient(state, batch):
    """By one unit of fc7, on one device of two: tiny by its bias, and fc8 makes up for it."""
    unit = 7
    state = with_params(
        state,
        fc6_kernel=state.params["fc6"]["kernel"] * np.float32(1e16),
        fc7_kernel=0,
        fc7_bias={...: 0, unit: 1e-25},
        fc8_kernel={unit: np.arange(10) * 1e24},
    )
    return state, batch


@pytest.mark.parametrize("spoil", [no_such_label, infinite_loss, infinite_gradient])
def test_a_step_that_is_not_finite_is_not_made(spoil):
    step, _ = compiled("float32")
    _, trained = run()
    before, batch = spoil(jax.tree.map(np.asarray, trained), next(batches(1)))
    after, loss = step(before, batch)
    assert np.isnan(loss)
    assert_same_bits(after, before)


def test_the_infinite_gradient_has_a_finite_loss():
    state, batch = infinite_gradient(compiled("float32")[1], next(batches(1)))
    assert 0 < float(evaluate(state.params, batch)["loss"]) < 1e6


def test_a_batch_that_failed_changes_nothing_after_it():
    step, first = compiled("float32")
    state = first
    for number, batch in enumerate(batches(10)):
        if number in (0, 5):
            state, loss = step(*no_such_label(state, batch))
            assert np.isnan(loss)
        state, loss = step(state, batch)
        assert float(loss) == run()[0][number]
    assert_same_bits(state, run()[1])


def test_what_overflows_in_the_update_is_the_largest_number():
    """A unit of fc7 that is dead already, whose bias falls at a great speed."""
    step, first = compiled("float32")
    largest = np.finfo(np.float32).max
    state = with_params(first, fc7_bias={3: -largest})
    speeds = state.opt_state[2].trace
    speeds["fc7"]["bias"] = np.where(np.arange(speeds["fc7"]["bias"].size) == 3, -largest, 0)
    state, loss = step(state, next(batches(1)))
    assert np.isfinite(loss)
    assert state.params["fc7"]["bias"][3] == -largest
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.totals)))


def test_draws_derive_from_the_step():
    """The same batch twice gives two losses, and the same step once more gives the same one."""
    step, first = compiled("float32")
    (batch,) = batches(1)
    at = lambda number: float(step(first.replace(step=np.int32(number)), batch)[1])  # noqa: E731
    assert at(0) != at(1)
    assert at(0) == at(0)


def test_evaluation_counts_each_image_once():
    params = compiled("float32")[1].params
    (batch,) = batches(1)
    masked = evaluate(params, batch, np.arange(16) < 11)
    alone = evaluate(params, {name: rows[:11] for name, rows in batch.items()})
    assert float(masked["images"]) == 11
    for name in masked:
        assert float(masked[name]) == pytest.approx(float(alone[name]), rel=1e-5)


@pytest.fixture
def as_optax_has_it():
    """About types and ranks optax is less strict than these tests are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("as_optax_has_it")
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        pytest.param(
            optax.chain(optax.clip_by_global_norm(1.0), create_optimizer(0.01)),
            marks=pytest.mark.slow,
        ),
        pytest.param(optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2), marks=pytest.mark.slow),
        pytest.param(
            optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau(patience=2)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["adam", "clipped", "accumulated", "on the plateau of the loss"],
)
def test_any_optimizer_of_optax_trains(optimizer):
    """And its state stays, to the bit, where a loss is not finite."""
    model = AlexNet("cuda_convnet_19pct", 3, initialization="he")
    settings = {"model": model, "optimizer": optimizer}
    mean = jnp.full((18, 18, 3), 127.0)
    make = jax.jit(functools.partial(create_state, crop_size=16, **settings))
    state = make(jax.random.key(0), mean)
    rule = Preprocessing(18, "paper", 16, mean, 1 / 64)
    step = jax.jit(
        functools.partial(
            train_step,
            augment=lambda key, images, mean: augment(key, images, rule.with_mean(mean)),
            **settings,
        )
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 18, 18, 3), np.uint8),
        "label": rng.integers(0, 3, 8).astype(np.int32),
    }
    losses = []
    for _ in range(20):
        state, loss = step(state, batch, jax.random.key(1))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    after, loss = step(state, batch | {"label": np.full(8, 99, np.int32)}, jax.random.key(1))
    assert np.isnan(loss)
    assert_same_bits(after, state)


def test_totals_of_another_kind_are_named():
    model, optimizer = AlexNet("cuda_convnet_19pct", 3), optax.sgd(0.1)
    settings = {"model": model, "optimizer": optimizer}
    mean = jnp.zeros((18, 18, 3))
    make = functools.partial(create_state, crop_size=16, **settings)
    state = jax.eval_shape(make, jax.random.key(0), mean).replace(totals={})
    with pytest.raises(ValueError, match="expected those of flax_alexnet"):
        train_step(state, {}, jax.random.key(1), augment=augment, **settings)


SMALL = AlexNet("cuda_convnet_19pct", 10, width=0.125, initialization="he")


def small_step(state, batch, **options):
    """A step of a small model on images of 16 pixels, without augmentation."""

    def scale(_, images, mean):
        return (images.astype(jnp.float32) - mean[None]) / 64

    optimizer = create_optimizer(0.01)
    step = functools.partial(train_step, model=SMALL, optimizer=optimizer, augment=scale, **options)
    return jax.jit(step, compiler_options=QUICK)(state, batch, jax.random.key(5))


def small_state(**options):
    return create_state(
        jax.random.key(0),
        jnp.full((16, 16, 3), 127.0),
        model=SMALL,
        optimizer=create_optimizer(0.01),
        crop_size=16,
        **options,
    )


def small_batches(count):
    for batch in batches(count):
        yield {**batch, "image": batch["image"][:, :16, :16]}


def test_the_average_follows_the_parameters():
    state = small_state(averaged=True)
    expected = jax.tree.map(np.float64, state.params)
    for batch in small_batches(4):
        state, _ = small_step(state, batch, average_decay=0.7)
        expected = jax.tree.map(lambda a, p: 0.7 * a + 0.3 * np.float64(p), expected, state.params)
    for ours, theirs in zip(
        jax.tree.leaves(state.evaluated), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not hasattr(small_state(), "average")
    assert small_state().evaluated is not None


@pytest.mark.slow
def test_the_average_is_that_of_optax():
    """`optax.ema` begins at zero; with the first value as its state, it is the same."""
    state = small_state(averaged=True)
    ema = optax.ema(0.7, debias=False)
    average = ema.init(state.params)._replace(ema=state.params)
    for batch in small_batches(3):
        state, _ = small_step(state, batch, average_decay=0.7)
        _, average = ema.update(state.params, average)
    for ours, theirs in zip(
        jax.tree.leaves(state.average), jax.tree.leaves(average.ema), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_leaves_the_average():
    state = small_state(averaged=True)
    spoilt = jax.tree.map(lambda p: p.at[..., 0].set(jnp.inf), state.params)
    after, loss = small_step(
        state.replace(params=spoilt), next(small_batches(1)), average_decay=0.7
    )
    assert np.isnan(float(loss))
    assert_same_bits(after.average, state.average)


def test_mixup_mixes_images_and_losses():
    state, batch, alpha = small_state(), next(small_batches(1)), 0.4
    _, loss = small_step(state, batch, mixup_alpha=alpha)
    augment_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(5), 0))
    images = (batch["image"].astype(np.float32) - 127) / 64
    mixed, share = mixup(jax.random.fold_in(augment_key, 1), jnp.asarray(images), alpha)
    logits = SMALL.apply({"params": state.params}, mixed)
    one, other = (
        cross_entropy(logits, jnp.asarray(labels)).mean()
        for labels in (batch["label"], batch["label"][::-1])
    )
    assert 0.5 <= float(share) < 1
    assert float(loss) == pytest.approx(float(share * one + (1 - share) * other), rel=1e-5)


@pytest.mark.slow
def test_the_loss_may_be_another():
    state, batch = small_state(), next(small_batches(1))
    smooth = functools.partial(cross_entropy, smoothing=0.2)
    _, loss = small_step(state, batch, loss=smooth)
    images = (batch["image"].astype(np.float32) - 127) / 64
    logits = SMALL.apply({"params": state.params}, images)
    assert float(loss) == pytest.approx(
        float(smooth(logits, jnp.asarray(batch["label"])).mean()), rel=1e-5
    )
