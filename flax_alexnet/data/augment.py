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

ColorNoise = Literal["none", "cuda-convnet", "eigenvalues"]

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
# Grey levels that a unit draw moves an image along each component.
COLOR_SCALES = {
    # The original 2012 code multiplies by standard deviations.
    "cuda-convnet": np.array([121.78, 37.09, 19.72], np.float32),
    # The paper's text says eigenvalues; these, of pixels in [0, 1], are in wide use.
    "eigenvalues": np.array([0.2175, 0.0188, 0.0045], np.float32) * 255,
}


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


def random_crop(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """[b, h, w, 3] → [b, size, size, 3], each at a place of its own, all equally likely."""
    _check_size(images, size)
    batch, height, width, channels = images.shape
    limit = jnp.array([height - size + 1, width - size + 1])
    corners = jax.random.randint(key, (batch, 2), 0, limit[None])

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, channels))

    return jax.vmap(crop)(images, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """[b, h, w, 3], each image mirrored left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def color_noise(key: jax.Array, images: jax.Array, scaling: ColorNoise) -> jax.Array:
    """PCA colour noise: adds Σ_k p_k α_k s_k to all pixels of an image, α_k ~ N(0, 0.1).

    The paper calls s_k the eigenvalues; its code took their square roots, which in grey levels is
    2.2, 7.7 and 17 times what the constants in wide use give (see `COLOR_SCALES`).

    Args:
      key: one for the batch; each image has its own α, drawn once a presentation.
      images: float32[b, h, w, 3] in grey levels; the mean may be subtracted or not.
      scaling: "cuda-convnet" (the original code), "eigenvalues" (in wide use), or "none".
    """
    if scaling == "none":
        return images
    alpha = 0.1 * jax.random.normal(key, (images.shape[0], 3))
    shift = (alpha * COLOR_SCALES[scaling][None]) @ PRINCIPAL_COMPONENTS.T
    return images + shift[:, None, None, :]


def augment(
    key: jax.Array,
    images: jax.Array,
    preprocessing: Preprocessing,
    *,
    crop: bool = True,
    flip: bool = True,
    noise: ColorNoise = "none",
) -> jax.Array:
    """What training sees: mean subtracted, random crop and flip, colour noise, all scaled.

    uint8[b, h, w, 3] → float32[b, crop_size, crop_size, 3]; `preprocessing` has mean, crop_size
    and scale.
    """
    size = preprocessing.crop_size
    crop_key, flip_key, noise_key = jax.random.split(key, 3)
    images = subtract_mean(images, preprocessing.mean)
    images = random_crop(crop_key, images, size) if crop else center_crop(images, size)
    if flip:
        images = random_flip(flip_key, images)
    return rescale(color_noise(noise_key, images, noise), preprocessing.scale)


def preprocess(images: jax.Array | np.ndarray, preprocessing: Preprocessing) -> jax.Array:
    """What evaluation sees: mean subtracted, central crop, scaled; shapes as above."""
    centred = subtract_mean(images, preprocessing.mean)
    return rescale(center_crop(centred, preprocessing.crop_size), preprocessing.scale)
