"""Recipes: values that flags override."""

import dataclasses

import pytest

from flax_alexnet.config.recipes import RECIPES, parse_config
from flax_alexnet.config.schema import validate
from flax_alexnet.models.architectures import architecture, infer_shapes


def test_a_recipe_is_a_value_and_flags_override_it():
    argv = ["--recipe", "paper", "--data.name", "cifar10", "--seed=3"]
    argv += ["--optimizer.learning-rate", "0.02"]
    expected = dataclasses.replace(
        RECIPES["paper"],
        seed=3,
        data=dataclasses.replace(RECIPES["paper"].data, name="cifar10"),
        optimizer=dataclasses.replace(RECIPES["paper"].optimizer, learning_rate=0.02),
    )
    assert parse_config(argv) == expected
    assert parse_config([]) == RECIPES["quickstart"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_its_images_fit(name):
    config = RECIPES[name]
    validate(config)
    layers = architecture(config.model.variant).scaled(1000, config.model.width)
    infer_shapes(layers, config.augment.crop_size, config.augment.crop_size)
