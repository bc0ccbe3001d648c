"""Each augmentation against NumPy, with the draws taken from the same key."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.data.augment import (
    COLOR_NOISE,
    augment,
    center_crop,
    color_noise,
    mixup,
    preprocess,
    random_crop,
    random_flip,
    random_resized_crop,
    subtract_mean,
    ten_crops,
)
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.utils.errors import UserError

KEY = jax.random.key(3)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


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


def test_a_chunk_shares_a_crop_and_a_flip(images):
    """As the original code draws them: 32 images in a row, and the last chunk may be shorter."""
    places = np.arange(120).reshape(1, 10, 12, 1)
    same = jnp.asarray(np.repeat(places, 70, 0))
    for change in (
        lambda key, x: random_crop(key, x, 8, chunk=32),
        lambda key, x: random_flip(key, x, chunk=32),
    ):
        seen = set()
        for number in range(8):
            results = np.asarray(change(jax.random.key(number), same))
            assert results.shape[0] == 70
            chunks = [results[start : start + 32] for start in (0, 32, 64)]
            assert all((chunk == chunk[0]).all() for chunk in chunks)
            seen |= {chunk[0].tobytes() for chunk in chunks}
        assert len(seen) > 1
    np.testing.assert_array_equal(random_flip(KEY, images, chunk=1), random_flip(KEY, images))


def test_a_resized_crop_is_a_rectangle_of_the_image():
    """Of an image whose values are its coordinates, a crop has the coordinates of its places."""
    rows, columns = np.mgrid[:32, :40].astype(np.float32)
    places = np.repeat(np.stack([rows, columns, 0 * rows], -1)[None], 4000, 0)
    crops = np.asarray(random_resized_crop(KEY, jnp.asarray(places), 16, 0.3))
    assert crops.shape == (4000, 16, 16, 3)
    # Inside the image, where nothing is cut off, the coordinates are linear.
    heights, widths = ((crops[:, 8, 8, axis] - crops[:, 7, 7, axis]) * 16 for axis in (0, 1))
    areas, ratios = heights * widths / (32 * 40), widths / heights
    assert areas.min() >= 0.3 * 0.99
    assert areas.max() <= 1.001
    cut = (heights > 31.99) | (widths > 39.99)  # by the sides of the image
    assert (np.abs(np.log(ratios[~cut])) <= np.log(4 / 3) + 1e-3).all()
    # Uniform on [0.3, 1], but for the large ones that the sides cut.
    assert np.mean(areas < 0.5) == pytest.approx(2 / 7, abs=0.03)
    tops = crops[:, :, :, 0].mean((1, 2)) - heights / 2 + 0.5
    assert tops.min() >= -0.01
    assert (tops + heights).max() <= 32.01


def test_a_resized_crop_of_all_of_a_square_is_the_image(images):
    square = jnp.asarray(images[:1, :, :10], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 300)
    crops = jax.vmap(lambda key: random_resized_crop(key, square, 10, 1.0))(keys)
    assert crops.shape == (300, *square.shape)
    # The one whose ratio is nearest to one is almost all of the image.
    assert np.abs(np.asarray(crops) - square[None]).max((1, 2, 3, 4)).min() < 5


def test_mixup_is_the_formula_and_lambda_is_of_the_beta_distribution(images):
    x = jnp.asarray(images, jnp.float32)
    mixed, share = mixup(KEY, x, 0.4)
    share = float(share)
    assert 0.5 <= share <= 1
    np.testing.assert_allclose(mixed, share * x + (1 - share) * x[::-1], rtol=1e-5, atol=1e-4)
    keys = jax.random.split(KEY, 4000)
    shares = np.asarray(jax.vmap(lambda key: mixup(key, x[:1, :1, :1], 0.4)[1])(keys))
    # Of the larger of λ and 1 − λ, the distance to 1/2 is that of λ: its square has the variance
    # of Beta(α, α), 1 / (4·(2·α + 1)).
    assert ((shares - 0.5) ** 2).mean() == pytest.approx(1 / (4 * 1.8), rel=0.03)


@pytest.mark.parametrize("scaling", ["cuda-convnet", "eigenvalues", "original"])
def test_color_noise_is_the_papers_formula(images, scaling):
    noisy = color_noise(KEY, jnp.asarray(images, jnp.float32), scaling)
    alpha = 0.1 * np.asarray(jax.random.normal(KEY, (len(images), 3)), np.float64)
    components, scales = COLOR_NOISE[scaling]
    for image, ours, a in zip(images, np.asarray(noisy), alpha, strict=True):
        shift = sum(components[:, k] * a[k] * scales[k] for k in range(3))
        divisor = 1.1 if scaling == "original" else 1.0
        np.testing.assert_allclose(ours, (image + shift) / divisor, atol=1e-4)


def test_the_original_code_is_stronger_by_the_known_factors():
    factors = COLOR_NOISE["cuda-convnet"][1] / COLOR_NOISE["eigenvalues"][1]
    np.testing.assert_allclose(factors, [2.2, 7.7, 17.2], atol=0.05)
    for components, _ in COLOR_NOISE.values():
        # Orthonormal columns: a unit draw moves an image by exactly the scale.
        np.testing.assert_allclose(components.T @ components, np.eye(3), atol=1e-3)


def test_the_original_components_are_those_of_the_original_code():
    path = SHARED / "imagenet_mean" / "ilsvrc2012_mean_and_pca.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    components, deviations = COLOR_NOISE["original"]
    with np.load(path) as theirs:
        vectors, scales = theirs["color_vectors"][:, ::-1], theirs["color_std"][::-1]
    signs = np.sign((vectors * components).sum(0))  # of which a component has two
    np.testing.assert_allclose(components, vectors * signs, atol=1e-6)
    np.testing.assert_allclose(deviations, scales, atol=5e-3)


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
