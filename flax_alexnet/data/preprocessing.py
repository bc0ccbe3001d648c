"""The preprocessing of images, which is a part of a trained model."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # a configuration is checked before JAX is imported
    import jax

# How an image becomes a square of `image_size` pixels:
# - "paper": shorter side scaled (bicubic), the central square cut out, in one operation;
# - "torchvision": `Resize` then `CenterCrop` (bilinear with antialiasing, sides in whole pixels);
# - "caffe": warped to the square, whatever its shape (bilinear, no antialiasing), as
#   `convert_imageset --resize_height=256 --resize_width=256` does.
ResizeRule = Literal["paper", "torchvision", "caffe"]

Scale = float | tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessing:
    """From an image to what the model was trained on: RGB, mean subtracted, centre cut, scaled.

    Attributes:
      image_size: side of the square that an image is brought to, in pixels.
      resize: how.
      crop_size: side of the central part that the model sees.
      mean: float32[3], or float32[image_size, image_size, 3], in grey levels 0 … 255, RGB.
      scale: what the difference is multiplied with; one number, or one for each channel.
    """

    image_size: int
    resize: ResizeRule
    crop_size: int
    mean: "np.ndarray | jax.Array"
    scale: Scale = 1.0

    def with_mean(self, mean: "np.ndarray | jax.Array") -> "Preprocessing":
        """The same with another mean, such as that of a `TrainState`."""
        return dataclasses.replace(self, mean=mean)
