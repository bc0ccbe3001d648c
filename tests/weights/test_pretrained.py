"""A trained model as a value: what it does to images, and what it says of itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.data.augment import center_crop
from flax_alexnet.models.activations import features
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.load import load
from flax_alexnet.weights.pretrained import check_classifier
from tests.small_models import random_images


def test_preprocessing_subtracts_crops_and_scales_each_channel(pretrained):
    images = np.random.default_rng(0).integers(0, 256, (2, 72, 72, 3), np.uint8)
    expected = (images - np.array([120, 110, 100.0])) * np.array([0.02, 0.03, 0.04])
    expected = expected[:, 4:68, 4:68]
    np.testing.assert_allclose(pretrained.preprocess(images), expected, rtol=1e-5, atol=1e-6)


def test_ten_crops_are_four_corners_and_the_centre_and_their_mirror_images(pretrained):
    images = np.random.default_rng(0).integers(0, 256, (2, 72, 72, 3), np.uint8)
    mean = np.random.default_rng(1).uniform(0, 255, (72, 72, 3)).astype(np.float32)
    pretrained = dataclasses.replace(
        pretrained, preprocessing=dataclasses.replace(pretrained.preprocessing, mean=mean)
    )
    crops = np.asarray(pretrained.ten_crops(images))
    assert crops.shape == (2, 10, 64, 64, 3)
    # The mean image is subtracted before the crop: each corner has its own part of it.
    seen = (images - mean) * np.array([0.02, 0.03, 0.04], np.float32)
    for place, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]):
        expected = seen[:, top : top + 64, left : left + 64]
        np.testing.assert_allclose(crops[:, place], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(crops[:, 5 + place], crops[:, place, :, ::-1])
    np.testing.assert_array_equal(crops[:, 4], center_crop(pretrained.preprocess(images), 64))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((72, 72, 3), np.uint8), r"without a batch axis; .*: image\[None\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"uint8\[2, 64, 64, 3\]; expected uint8\[b, 72, 72"),
        (np.zeros((2, 3, 72, 72), np.uint8), r"expected uint8\[b, 72, 72, 3\]"),
        (np.zeros((2, 72, 72, 1), np.uint8), r"expected uint8\[b, 72, 72, 3\]"),
        (np.zeros((1, 72, 72, 3), np.int32), r"int32\[.*: images.astype\(np.uint8\)"),
        (np.full((1, 72, 72, 3), 0.5), "images are from 0 to 1; .* grey levels of 0 … 255"),
        ("cat.jpg", r"images are a str; .* pretrained.open\(path\)\[None\]"),
    ],
)
def test_images_that_do_not_fit_are_one_line(pretrained, images, says):
    for function in (pretrained.preprocess, pretrained.ten_crops):
        with pytest.raises(UserError, match=says) as error:
            function(images)
        assert "\n" not in str(error.value)
    if isinstance(images, np.ndarray) and images.dtype != float:
        with pytest.raises(UserError, match=says):
            jax.jit(pretrained.preprocess)(images)


def test_floats_in_grey_levels_and_batches_of_none_are_images_too(pretrained):
    images = random_images(pretrained, 2)
    expected = pretrained.preprocess(images)
    for same in (images.astype(np.float32), jnp.asarray(images)):
        np.testing.assert_array_equal(pretrained.preprocess(same), expected)
    assert pretrained.preprocess(images[:0].astype(np.float32)).shape == (0, 64, 64, 3)


def test_a_model_is_shown_in_a_line(pretrained):
    assert (
        repr(pretrained) == "<Pretrained torchvision: 4 classes, 146,550 parameters, from made.pth>"
    )
    trunk = {name: values for name, values in pretrained.params.items() if name != "fc8"}
    heads = {"lin0": np.zeros(3)}
    said = repr(dataclasses.replace(pretrained, params=trunk, lpips_heads=heads, source={}))
    assert said.startswith("<Pretrained torchvision without fc8: 4 classes, ")
    assert said.endswith(" parameters, with LPIPS heads, from unknown>")


def test_a_trunk_has_features_but_no_classes(pretrained, tmp_path):
    trunk = {name: values for name, values in pretrained.params.items() if name.startswith("conv")}
    safetensors_files.save(
        dataclasses.replace(pretrained, params=trunk), tmp_path / "trunk.safetensors"
    )
    again = load(tmp_path / "trunk.safetensors")
    assert not again.is_classifier
    with pytest.raises(UserError, match=r"made.pth has no fc6, fc7, fc8"):
        check_classifier(again)
    some = {**trunk, "fc6": pretrained.params["fc6"]}
    safetensors_files.save(
        dataclasses.replace(pretrained, params=some), tmp_path / "some.safetensors"
    )
    again = load(tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=r"made.pth has no fc7, fc8"):
        check_classifier(again)
    images = again.preprocess(random_images(again, 1))
    assert features(again.model, again.params, images, ["fc6"])["fc6"].shape == (1, 205)
    hole = {**trunk, "fc7": pretrained.params["fc7"]}
    safetensors_files.save(
        dataclasses.replace(pretrained, params=hole), tmp_path / "hole.safetensors"
    )
    with pytest.raises(UserError, match=r"params/fc6/bias is missing.*params/fc8/bias is missing"):
        load(tmp_path / "hole.safetensors")
