"""Preprocessing as a value that a configuration and a trained model share."""

import dataclasses

import numpy as np
import pytest

from flax_alexnet.config.recipes import RECIPES
from flax_alexnet.data.preprocessing import Preprocessing


def test_another_mean_leaves_the_rest():
    rule = Preprocessing(40, "caffe", 32, np.zeros(3), 0.5)
    other = rule.with_mean(np.ones(3))
    assert other.mean.tolist() == [1, 1, 1]
    assert dataclasses.replace(other, mean=None) != rule  # by identity: arrays do not compare
    for name in ("image_size", "resize", "crop_size", "scale"):
        assert getattr(other, name) == getattr(rule, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_configuration_gives_what_it_was_given(recipe):
    mean = np.zeros(3)
    rule = Preprocessing(300, "torchvision", 200, mean, (0.1, 0.2, 0.3))
    again = RECIPES[recipe].with_preprocessing(rule).preprocessing(mean)
    assert vars(again) == vars(rule)  # the mean is the same object
