"""What is found in a model that does not train, and said of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet import AlexNet
from flax_alexnet.training.divergence import (
    dead_units,
    divergence,
    largest_activation,
    new_plateau,
    on_plateau,
    plateau_remedies,
    plateau_warning,
)

MODEL = AlexNet("cuda_convnet_19pct", num_classes=4, width=0.25)
IMAGES = np.random.default_rng(1).normal(size=(3, 24, 24, 3)).astype("f")


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)["params"]
    draw = np.random.default_rng(0).normal

    def small(leaf):  # so that no layer's values are larger than those of the one before
        scale = 0.1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return draw(scale=scale, size=leaf.shape).astype("f")

    return jax.tree.map(small, shapes)


def changed(params, layer, change):
    return {**params, layer: jax.tree.map(lambda leaf: change(leaf.copy()), params[layer])}


def test_a_unit_that_is_never_above_zero_is_dead(params):
    assert set(dead_units(MODEL, params, IMAGES)) == {"conv1", "conv2", "conv3"}
    units = params["conv2"]["bias"].size

    def with_first(*biases):  # units that give their bias, whatever they see
        def change(leaf):
            leaf[..., : len(biases)] = 0 if leaf.ndim > 1 else biases
            return leaf

        return changed(params, "conv2", change)

    before = dead_units(MODEL, with_first(1, 1, 1, 1), IMAGES)
    dead = dead_units(MODEL, with_first(-1, -1, -1, 1), IMAGES)
    assert dead["conv2"] * units == pytest.approx(before["conv2"] * units + 3, abs=1e-4)
    assert dead["conv1"] == before["conv1"]


@pytest.mark.parametrize(
    ("layer", "value", "expected"),
    [("conv3", 1e6, "conv3"), ("conv2", np.nan, "conv2"), ("conv1", np.inf, "conv1")],
)
def test_the_layer_that_explodes_is_found(params, layer, value, expected):
    """NaN and infinity count as the largest, in the first layer that has them."""

    def explode(leaf):
        return leaf if leaf.ndim > 1 else np.full_like(leaf, value)

    name, largest = largest_activation(MODEL, changed(params, layer, explode), IMAGES)
    assert name.startswith(expected)
    assert largest == pytest.approx(value if np.isfinite(value) else np.inf, rel=0.1)


def test_a_plateau_is_a_loss_that_equal_chances_give():
    assert on_plateau(math.log(10), 10)
    assert on_plateau(2.3030, 10), "measured after an epoch of quickstart with N(0, 0.01)"
    assert not on_plateau(1.8183, 10), "and with He et al.'s initial values"
    assert not on_plateau(2.25, 10)
    assert not on_plateau(math.log(10), 1000)


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ([], False),
        ([(0.75, 2.303)], False),
        ([(0.75, 2.303), (1.5, 2.303)], True),
        ([(1, 2.303), (2, 2.303)], False),  # it has been said, perhaps before a restart
        ([(1, 1.8), (5, 2.303)], True),
        ([(1, 1.8), (6, 2.303)], False),
        ([(10, 2.303)], True),  # with --eval-epochs 10
        ([(0.5, 2.303), (10, 2.303)], True),
        ([(10, 2.303), (20, 2.303)], False),
        ([(1, 1.8), (2, 1.2)], False),
    ],
)
def test_a_plateau_is_new_once_and_early(evaluations, expected):
    assert new_plateau(evaluations, 10) is expected


RUN = {"pretrained": False, "frozen": False, "initialization": "published", "scale": 1.0}


@pytest.mark.parametrize(
    ("run", "expected", "has_it"),
    [
        ({}, "--model.initialization he with --augment.scale 0.015625", "--freeze"),
        ({"initialization": "he"}, "--augment.scale 0.015625", "initialization"),
        ({"scale": 1 / 64}, "--model.initialization he", "--augment.scale"),
        ({"scale": (0.017, 0.018, 0.017), "initialization": "he"}, "another", "--augment.scale"),
        ({"pretrained": True, "frozen": True}, "fewer layers with --freeze", "initialization"),
        ({"pretrained": True}, "a higher --optimizer.learning-rate", "--freeze"),
    ],
)
def test_what_may_help_is_nothing_that_the_run_has(run, expected, has_it):
    remedies = plateau_remedies(**{**RUN, **run})
    assert remedies[0].startswith(expected)
    assert has_it not in " ".join(remedies)
    assert remedies[-1] == "more epochs"


def test_what_is_said_is_one_line_with_all_that_counts():
    said = plateau_warning(10, {"conv1": 0.25, "fc6": 1.0}, ["this", "that"])
    assert "ln(10) = 2.303" in said
    assert "conv1 25%, fc6 100%" in said
    assert said.endswith("It may help to take this, or that")
    said = divergence(1234, 0.02, "conv2", jnp.inf, 1000)
    assert "at step 1,234, at a learning rate of 0.02" in said
    assert "inf, in conv2" in said
    assert "that of step 1,000" in said
    assert divergence(1, 0.02, "conv2", 3.0, None).endswith("checkpoint is none")
