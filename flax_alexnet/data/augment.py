"""The paper's preprocessing and augmentation (sections 2 and 4.1), on the device.

Pure functions of a key and a whole batch, so that what is drawn for an image depends on its place
in the global batch and not on the device it lies on. Images are in grey levels, 0 … 255, RGB.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.data.preprocessing import Preprocessing, Scale
from flax_alexnet.utils.errors import UserError

ColorNoise = Literal["none", "cuda-convnet", "eigenvalues", "original"]

# Principal components of the RGB values of ImageNet's training pixels, one a column; the first is
# brightness. The constants that fb.resnet.torch published, and that most programs since have used.
PRINCIPAL_COMPONENTS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ],
    np.float32,
)
# Those of the original code, of ILSVRC-2012 (`make-data/input_meta` of cuda-convnet2).
ORIGINAL_COMPONENTS = np.array(
    [
        [-0.56351045, -0.71257945, 0.41795513],
        [-0.57618440, -0.02354167, -0.81698062],
        [-0.59200296, 0.70119634, 0.39731118],
    ],
    np.float32,
)
STANDARD_DEVIATIONS = np.array([121.78, 37.09, 19.72], np.float32)  # of the original code
# The components, and the grey levels that a unit draw moves an image along each of them.
COLOR_NOISE = {
    # The original 2012 code multiplies by standard deviations.
    "cuda-convnet": (PRINCIPAL_COMPONENTS, STANDARD_DEVIATIONS),
    # The paper's text says eigenvalues; these, of pixels in [0, 1], are in wide use.
    "eigenvalues": (PRINCIPAL_COMPONENTS, np.array([0.2175, 0.0188, 0.0045], np.float32) * 255),
    "original": (ORIGINAL_COMPONENTS, STANDARD_DEVIATIONS),
}
NOISE = 0.1  # standard deviation of the draws


def subtract_mean(images: jax.Array | np.ndarray, mean: jax.Array | np.ndarray) -> jax.Array:
    """uint8 or float[b, h, w, 3] less float32[h, w, 3] (or a colour, float32[3]): float32."""
    return jnp.asarray(images, jnp.float32) - jnp.broadcast_to(mean, images.shape[1:])[None]


def rescale(images: jax.Array, scale: Scale) -> jax.Array:
    """float32[b, h, w, 3] times a number, or times one for each channel."""
    if isinstance(scale, tuple):
        return images * np.array(scale, np.float32).reshape(1, 1, 1, 3)
    return images * scale


def _check_size(images: jax.Array, size: int) -> None:
    """Raises UserError for images that have no part of `size`: a slice would be cut short."""
    if min(images.shape[1:3]) < size:
        shape = ", ".join(map(str, images.shape))
        raise UserError(f"images are [{shape}]; expected [b, h, w, 3] of {size} pixels or more")


def center_crop(images: jax.Array, size: int) -> jax.Array:
    """[b, h, w, 3] → [b, size, size, 3]: the middle, with the odd pixel at the bottom and right.

    Raises:
      UserError: the images are smaller, here and in the other functions that cut.
    """
    _check_size(images, size)
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def ten_crops(images: jax.Array, size: int) -> jax.Array:
    """[b, h, w, 3] → [b, 10, size, size, 3]: four corners and the centre, then mirrored each.

    Section 4.1 of the paper, whose test averages the softmax over these.
    """
    _check_size(images, size)
    height, width = images.shape[1:3]
    corners = [(0, 0), (0, width - size), (height - size, 0), (height - size, width - size)]
    crops = [images[:, top : top + size, left : left + size] for top, left in corners]
    five = jnp.stack([*crops, center_crop(images, size)], axis=1)
    return jnp.concatenate([five, five[..., ::-1, :]], axis=1)


def random_crop(key: jax.Array, images: jax.Array, size: int, chunk: int = 1) -> jax.Array:
    """[b, h, w, 3] → [b, size, size, 3], each at a place of its own, all equally likely.

    With `chunk`, as many images in a row are cut at the same place.
    """
    _check_size(images, size)
    batch, height, width, channels = images.shape
    limit = jnp.array([height - size + 1, width - size + 1])
    corners = jax.random.randint(key, (-(-batch // chunk), 2), 0, limit[None])
    corners = _each(corners, batch, chunk)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, channels))

    return jax.vmap(crop)(images, corners)


def random_resized_crop(key: jax.Array, images: jax.Array, size: int, area: float) -> jax.Array:
    """[b, h, w, 3] → [b, size, size, 3]: a random rectangle of each image, resized (bilinear).

    The share of the image's area is uniform in [`area`, 1] and the ratio of width to height is
    log-uniform in [3/4, 4/3], cut to the image's sides; all places are equally likely (Szegedy et
    al. 2015, section 6, as torchvision's `RandomResizedCrop` has it).
    """
    batch, height, width, channels = images.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas = height * width * jax.random.uniform(area_key, (batch,), minval=area)
    limit = float(np.log(4 / 3))
    ratios = jnp.exp(jax.random.uniform(ratio_key, (batch,), minval=-limit, maxval=limit))
    sides = jnp.stack([jnp.sqrt(areas / ratios), jnp.sqrt(areas * ratios)], axis=1)
    whole = jnp.array([[height, width]], jnp.float32)
    sides = jnp.minimum(sides, whole)
    corners = jax.random.uniform(place_key, (batch, 2)) * (whole - sides)

    def crop(image: jax.Array, corner: jax.Array, side: jax.Array) -> jax.Array:
        scale = size / side
        shape = (size, size, channels)
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -corner * scale, "linear", antialias=False
        )

    return jax.vmap(crop)(images, corners, sides)


def random_flip(key: jax.Array, images: jax.Array, chunk: int = 1) -> jax.Array:
    """[b, h, w, 3], each image, or each `chunk` of them, mirrored with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(-(-images.shape[0] // chunk), 1, 1, 1))
    return jnp.where(_each(flip, images.shape[0], chunk), images[:, :, ::-1], images)


def _each(drawn: jax.Array, batch: int, chunk: int) -> jax.Array:
    """[⌈batch / chunk⌉, …] → [batch, …]: what was drawn for each chunk, for each of its images."""
    return drawn if chunk == 1 else jnp.repeat(drawn, chunk, axis=0)[:batch]


def color_noise(key: jax.Array, images: jax.Array, scaling: ColorNoise) -> jax.Array:
    """PCA colour noise: adds Σ_k p_k α_k s_k to all pixels of an image, α_k ~ N(0, 0.1).

    The paper calls s_k the eigenvalues; its code took their square roots, which in grey levels is
    2.2, 7.7 and 17 times what the constants in wide use give (see `COLOR_SCALES`).

    Args:
      key: one for the batch; each image has its own α, drawn once a presentation.
      images: float32[b, h, w, 3] in grey levels; the mean may be subtracted or not.
      scaling: "cuda-convnet" (as strong as in the original code), "eigenvalues" (in wide use),
        "original" (with the components of the original code too, which then divides the images by
        1.1, in training only), or "none".
    """
    if scaling == "none":
        return images
    components, scales = COLOR_NOISE[scaling]
    alpha = NOISE * jax.random.normal(key, (images.shape[0], 3))
    shift = (alpha * scales[None]) @ components.T
    noisy = images + shift[:, None, None, :]
    return noisy / (1 + NOISE) if scaling == "original" else noisy


def mixup(key: jax.Array, images: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Mixes each image of a batch with its counterpart from the batch's other end.

    With λ ~ Beta(alpha, alpha), one for the batch, and λ ≥ 1/2 without loss of generality, image i
    of n becomes λ · image i + (1 − λ) · image n−1−i. The loss is to be mixed in the same way
    (Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018).

    Args:
      key: one for the batch.
      images: float32[b, h, w, 3].
      alpha: > 0; the larger, the nearer is λ to 1/2.

    Returns:
      The mixed images, and λ, float32[].
    """
    share = jax.random.beta(key, alpha, alpha)
    share = jnp.maximum(share, 1 - share)
    return share * images + (1 - share) * images[::-1], share


def augment(
    key: jax.Array,
    images: jax.Array,
    preprocessing: Preprocessing,
    *,
    crop: bool = True,
    flip: bool = True,
    noise: ColorNoise = "none",
    area: float | None = None,
    chunk: int = 1,
) -> jax.Array:
    """What training sees: mean subtracted, random crop and flip, colour noise, all scaled.

    uint8[b, h, w, 3] → float32[b, crop_size, crop_size, 3]; `preprocessing` has mean, crop_size
    and scale. With `area` crops are those of `random_resized_crop`; with `chunk` as many images in
    a row share a crop, if it is not resized, and a flip.
    """
    size = preprocessing.crop_size
    crop_key, flip_key, noise_key = jax.random.split(key, 3)
    images = subtract_mean(images, preprocessing.mean)
    if crop and area is not None:
        images = random_resized_crop(crop_key, images, size, area)
    elif crop:
        images = random_crop(crop_key, images, size, chunk)
    else:
        images = center_crop(images, size)
    if flip:
        images = random_flip(flip_key, images, chunk)
    return rescale(color_noise(noise_key, images, noise), preprocessing.scale)


def preprocess(images: jax.Array | np.ndarray, preprocessing: Preprocessing) -> jax.Array:
    """What evaluation sees: mean subtracted, central crop, scaled; shapes as above."""
    centred = subtract_mean(images, preprocessing.mean)
    return rescale(center_crop(centred, preprocessing.crop_size), preprocessing.scale)
