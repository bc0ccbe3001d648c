"""The mean image of a dataset (section 2 of the paper)."""

from collections.abc import Callable, Sequence

import numpy as np

from flax_alexnet.data.dataset import EVERYTHING, Examples, chunks
from flax_alexnet.data.prefetch import map_threads

MEAN_IMAGES = 2**16  # the most images over which the mean is taken


def mean_image(
    examples: Examples,
    share: slice = EVERYTHING,
    total: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """The mean of each pixel over the images: float32[size, size, 3], in grey levels 0 … 255.

    See section 2 of the paper. If there are more than 65,536 images, the mean is taken over that
    many, evenly spaced.

    Args:
      examples: all images.
      share: the images that this process sums.
      total: adds up int32 arrays over the processes.
    """
    count = min(len(examples), MEAN_IMAGES)
    indices = np.linspace(0, len(examples) - 1, count).astype(int)

    def add(rows: Sequence[int]) -> np.ndarray:
        # So few grey levels cannot overflow, and a sum of integers does not depend on the order.
        return examples.take(rows)["image"].sum(axis=0, dtype=np.int32)

    zero = np.zeros_like(examples.take([0])["image"][0], np.int32)
    sums = sum(map_threads(add, chunks(indices[share])), zero)
    return (total(sums) / count).astype(np.float32)
