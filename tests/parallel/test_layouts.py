"""Layouts: each trains as one device does, holds what it says, and refuses what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.config.schema import AugmentConfig, Config
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.models.architectures import ARCHITECTURES, architecture
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.training.build import compile_steps, initialize, state_template
from flax_alexnet.training.optimizer import create_optimizer
from flax_alexnet.training.step import create_state
from flax_alexnet.utils.errors import UserError

CLASSES = 16
BATCH = 16
WIDTH = 1 / 8
STEPS = 20
CROPS = {"notebook": 64, "torchvision": 64, "cuda_convnet_19pct": 24}


def layout_of(name, variant, shape=(), devices=8, classes=CLASSES):
    layers = architecture(variant).scaled(classes, WIDTH)
    return make_layout(name, layers, shape, jax.devices()[:devices])


def batches(size):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (BATCH, size, size, 3), np.uint8),
            "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        }


def initial(template):
    """The same values for every layout; He's, but drawn by NumPy, which is quicker to start."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = np.zeros(leaf.shape, leaf.dtype)
        if jax.tree_util.keystr(path[:1]) == ".mean":
            values += 127
        elif jax.tree_util.keystr(path[-1:]) in (".factor", ".backoff"):  # of the rate
            values += 1
        elif jax.tree_util.keystr(path[:1]) == ".params" and len(leaf.shape) > 1:
            std = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            # Small logits: from a loss far above ln 16 rounding would decide which units die.
            std *= 0.1 if leaf.shape[-1] == CLASSES else 1
            values = (std * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, template)


@functools.cache
def run(name, variant, shape=(), devices=8, classes=CLASSES, frozen=()):
    """Losses of twenty steps with dropout and augmentation, and the state after them."""
    crop = CROPS.get(variant, 67)
    settings = AugmentConfig(crop_size=crop, color_noise="cuda-convnet", scale=1 / 64)
    layout = layout_of(name, variant, shape, devices, classes)
    model = AlexNet(variant, classes, width=WIDTH, initialization="he")
    # A low rate: now and then rounding decides whether a unit is dead for an image, and from there
    # on trajectories part, the faster the higher the rate.
    optimizer = create_optimizer(0.0005)
    init = functools.partial(
        create_state, model=model, optimizer=optimizer, crop_size=crop, frozen=frozen
    )
    template = state_template(init, crop + 6, layout)
    state = initial(template)
    config = Config(batch_size=BATCH, augment=settings)
    step_fn, _ = compile_steps(config, model, optimizer, layout, template, frozen)
    losses = []
    for batch in batches(crop + 6):
        state, loss = step_fn(state, layout.put(batch, BATCH), jax.random.key(5))
        losses.append(float(loss))
    assert step_fn._cache_size() == 1, "the step was compiled more than once"
    return losses, state


TOWERS = [name for name, table in ARCHITECTURES.items() if table.groups == 2]
CASES = [
    *((name, variant, ()) for name in ("data", "hybrid") for variant in ARCHITECTURES),
    # Dense layers, which are all that it treats, are alike in the others.
    *(("zero", variant, ()) for variant in ("notebook", "paper", "cuda_convnet_19pct")),
    ("hybrid", "paper", (2, 4)),
    *(("towers", variant, (4, 2)) for variant in TOWERS),
]
QUICK = [  # the two of the small model share a run on one device
    ("data", "cuda_convnet_19pct", ()),
    ("hybrid", "cuda_convnet_19pct", ()),
]


@pytest.mark.parametrize(
    ("name", "variant", "shape"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_layout_trains_as_one_device_does(name, variant, shape):
    (one, alone), (several, state) = run("data", variant, devices=1), run(name, variant, shape)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    before = initial(alone).params
    for start, a, b in zip(
        *(jax.tree.leaves(params) for params in (before, alone.params, state.params)), strict=True
    ):
        assert not np.array_equal(a, start), "nothing was learned"
        assert len(b.sharding.device_set) == 8
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * np.abs(a).max()


@pytest.mark.parametrize(("name", "shape"), [("zero", ()), ("hybrid", (1, 8)), ("towers", (4, 2))])
@pytest.mark.slow
def test_frozen_layers_stay_in_every_layout(name, shape):
    frozen = ("conv1", "conv2", "fc6")
    losses, state = run(name, "paper", shape, frozen=frozen)
    np.testing.assert_allclose(losses, run("data", "paper", devices=1, frozen=frozen)[0], rtol=1e-5)
    learning = jax.tree_util.tree_leaves_with_path(state.opt_state)
    paths = " ".join(jax.tree_util.keystr(path) for path, _ in learning)
    assert "fc7" in paths
    assert not any(layer in paths for layer in frozen)
    before = initial(state).params
    for layer, values in before.items():
        for part, value in values.items():
            same = np.array_equal(value, state.params[layer][part])
            assert same == (layer in frozen), (layer, part)


@pytest.mark.parametrize(("name", "shape"), [("hybrid", (1, 8)), ("towers", (4, 2))])
@pytest.mark.slow
def test_classes_that_do_not_divide_are_left_whole(name, shape):
    """The last layer is computed for each device's own images instead."""
    losses, state = run(name, "paper", shape, classes=15)
    assert state.params["fc8"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(losses, run("data", "paper", devices=1, classes=15)[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero", "hybrid"])
def test_state_is_made_where_it_stays(name):
    """Each device holds its share of the dense layers and their velocities, from the start."""
    layers = architecture("notebook").scaled(1000)
    layout = make_layout(name, layers)
    model, optimizer = AlexNet("notebook"), create_optimizer(0.01)
    init = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=224)
    template = state_template(init, 256, layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    key, mean = jax.random.key(0), jax.ShapeDtypeStruct((256, 256, 3), jnp.float32)
    compiled = jax.jit(init, out_shardings=shardings).lower(key, mean).compile()
    memory = compiled.memory_analysis()
    fc6 = 4 * 13 * 13 * 256 * 4096
    # 2 x 709 MB of fc6 would lie on each device otherwise.
    assert memory.output_size_in_bytes < 2 * fc6 / 8 + 120e6
    assert memory.temp_size_in_bytes < fc6


def test_values_do_not_depend_on_where_they_are_made():
    made = []
    for name, devices in (("data", 1), ("hybrid", 8)):
        layout = layout_of(name, "cuda_convnet_19pct", devices=devices)
        model = AlexNet("cuda_convnet_19pct", CLASSES, width=WIDTH)
        init = functools.partial(
            create_state, model=model, optimizer=create_optimizer(0.01), crop_size=24
        )
        template = state_template(init, 30, layout)
        state = initialize(init, jax.random.key(0), np.ones((30, 30, 3), np.float32), template)
        made.append(jax.tree.leaves(state))
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "variant", "shape", "message"),
    [
        ("data", "paper", (4,), "--parallel.mesh 4 does not fit: --parallel.layout data has the"),
        ("data", "paper", (4, 2), "has the axes data, and their sizes multiply to the 8 devices"),
        ("hybrid", "paper", (3, 2), "has the axes data, model, and their sizes"),
        ("hybrid", "paper", (-2, -4), "has the axes data, model, and their sizes"),
        ("hybrid", "paper", (8, 1), "splits nothing with one device along 'model'"),
        ("towers", "notebook", (), "needs a variant whose convolutions have groups"),
        ("towers", "paper", (2, 4), "towers is for 1 or 2 devices a model, not 4"),
    ],
)
def test_what_does_not_fit_is_refused(name, variant, shape, message):
    with pytest.raises(UserError, match=message):
        layout_of(name, variant, shape)


def test_features_that_do_not_divide_are_named():
    layers = architecture("paper").scaled(10, 0.1)
    with pytest.raises(UserError, match="the 410 features of fc6 do not divide by the 8 devices"):
        make_layout("hybrid", layers)


def test_rows_are_those_of_the_devices():
    layout = layout_of("towers", "paper")
    assert layout.rows(8) == list(range(8))
    batch = {"label": np.arange(8, dtype=np.int32)}
    placed = layout.put(batch, 8)["label"]
    assert placed.tolist() == list(range(8))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}
