"""Each augmentation against NumPy, with the draws taken from the same key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.data.augment import (
    COLOR_SCALES,
    PRINCIPAL_COMPONENTS,
    augment,
    center_crop,
    color_noise,
    preprocess,
    random_crop,
    random_flip,
    subtract_mean,
    ten_crops,
)
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.utils.errors import UserError

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (64, 10, 12, 3), np.uint8)


def test_subtract_mean(images):
    mean = np.random.default_rng(1).uniform(0, 255, images.shape[1:]).astype(np.float32)
    ours = subtract_mean(jnp.asarray(images), jnp.asarray(mean))
    np.testing.assert_array_equal(ours, images.astype(np.float32) - mean)


def test_center_crop(images):
    np.testing.assert_array_equal(center_crop(images, 7), images[:, 1:8, 2:9])


def test_images_that_are_too_small_are_not_cut_short():
    """Slices of NumPy and JAX would give 12 × 224 without a word."""
    images = np.zeros((1, 200, 256, 3), np.float32)
    rule = Preprocessing(256, "paper", 224, np.zeros(3, np.float32))
    for cut in (
        lambda: center_crop(images, 224),
        lambda: ten_crops(images, 224),
        lambda: random_crop(KEY, images, 224),
        lambda: preprocess(images, rule),
        lambda: augment(KEY, images, rule),
        lambda: augment(KEY, images, rule, crop=False),
        lambda: jax.jit(center_crop, static_argnums=1)(images, 224),
    ):
        with pytest.raises(UserError, match=r"images are \[1, 200, 256, 3\]; expected .* of 224"):
            cut()
    assert center_crop(images, 200).shape == (1, 200, 200, 3)


def test_random_crop_cuts_a_window_and_reaches_every_place_equally_often(images):
    crops = np.asarray(random_crop(KEY, jnp.asarray(images), 8))
    for image, crop in zip(images, crops, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8, 3))[:, :, 0]
        assert (windows == crop).all(axis=(2, 3, 4)).any()

    rows, columns = np.mgrid[:10, :12]
    places = np.repeat((rows * 12 + columns)[None, ..., None], 30_000, 0)
    corners = np.asarray(random_crop(KEY, jnp.asarray(places), 8))[:, 0, 0, 0]
    values, counts = np.unique(corners, return_counts=True)
    assert set(values) == {row * 12 + column for row in range(3) for column in range(5)}
    # 15 places: 2,000 each; five standard deviations of a binomial count are 216.
    assert np.abs(counts - 2000).max() < 216


def test_random_flip_mirrors_half_of_the_images_whole(images):
    many = jnp.asarray(np.repeat(images[:1], 1000, 0))
    flipped = np.asarray(random_flip(KEY, many))
    mirrored = (flipped == images[0, :, ::-1]).all(axis=(1, 2, 3))
    as_it_was = (flipped == images[0]).all(axis=(1, 2, 3))
    assert (mirrored ^ as_it_was).all()
    assert 420 < mirrored.sum() < 580


@pytest.mark.parametrize("scaling", ["cuda-convnet", "eigenvalues"])
def test_color_noise_is_the_papers_formula(images, scaling):
    noisy = color_noise(KEY, jnp.asarray(images, jnp.float32), scaling)
    alpha = 0.1 * np.asarray(jax.random.normal(KEY, (len(images), 3)), np.float64)
    for image, ours, a in zip(images, np.asarray(noisy), alpha, strict=True):
        shift = sum(PRINCIPAL_COMPONENTS[:, k] * a[k] * COLOR_SCALES[scaling][k] for k in range(3))
        np.testing.assert_allclose(ours, image + shift, atol=1e-4)


def test_the_original_code_is_stronger_by_the_known_factors():
    factors = COLOR_SCALES["cuda-convnet"] / COLOR_SCALES["eigenvalues"]
    np.testing.assert_allclose(factors, [2.2, 7.7, 17.2], atol=0.05)
    # Orthonormal columns: a unit draw moves an image by exactly the scale.
    gram = PRINCIPAL_COMPONENTS.T @ PRINCIPAL_COMPONENTS
    np.testing.assert_allclose(gram, np.eye(3), atol=1e-3)


def test_augment_composes_the_parts_and_evaluation_takes_the_centre(images):
    half = Preprocessing(12, "paper", 8, jnp.full((10, 12, 3), 100.0), 0.5)
    ours = augment(KEY, jnp.asarray(images), half, noise="eigenvalues")
    crop_key, flip_key, noise_key = jax.random.split(KEY, 3)
    expected = random_flip(
        flip_key, random_crop(crop_key, jnp.asarray(images, jnp.float32) - 100, 8)
    )
    np.testing.assert_array_equal(ours, color_noise(noise_key, expected, "eigenvalues") * 0.5)

    whole = dataclasses.replace(half, scale=1.0)
    plain = augment(KEY, jnp.asarray(images), whole, crop=False, flip=False)
    centre = preprocess(jnp.asarray(images), whole)
    np.testing.assert_array_equal(plain, centre)
    np.testing.assert_array_equal(centre, images[:, 1:9, 2:10].astype(np.float32) - 100)


def test_draws_do_not_depend_on_the_devices_that_images_lie_on(images):
    rule = Preprocessing(12, "paper", 8, jnp.zeros((10, 12, 3)))
    fn = jax.jit(lambda x: augment(KEY, x, rule, noise="cuda-convnet"))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one, eight = fn(jnp.asarray(images)), fn(jax.device_put(images, split))
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(one, eight, atol=1e-4)
