"""A trained model over images, in batches: each image with its own result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.data.examples import Example
from flax_alexnet.inference.batches import check_numbers, infer, log_probabilities
from flax_alexnet.utils.errors import UserError


def examples(values):
    """An example a value, whose pixels are that; None is one that cannot be read."""
    for number, value in enumerate(values):
        image = None if value is None else np.full((4, 4, 3), value, np.uint8)
        yield Example(str(number), -1, image, "" if value is not None else "it is damaged")


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("values", [[], [None], [1, None, 2, 3, None, None, 4, 5, 6, 7, 8, 9, 10]])
def test_each_image_has_its_row_and_a_bad_one_none(values, batch_size):
    sizes = set()

    @jax.jit
    def mean(images):
        sizes.add(images.shape[0])
        return {"mean": jnp.mean(images.astype(jnp.float32), axis=(1, 2, 3))}

    rows = list(infer(mean, examples(values), batch_size))
    assert [example.name for example, _ in rows] == [str(n) for n in range(len(values))]
    assert [row and float(row["mean"]) for _, row in rows] == values
    assert all(size % jax.local_device_count() == 0 for size in sizes)
    assert len(sizes) <= 1


def test_probabilities_add_up_and_ten_crops_are_their_mean(pretrained):
    size = pretrained.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), np.uint8)
    for crops in (1, 2, 10):
        sums = np.exp(np.asarray(log_probabilities(pretrained, crops)(images))).sum(axis=1)
        np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_what_is_no_number_is_refused_and_the_logarithm_of_zero_is_one():
    check_numbers(np.array([-np.inf, 0.0]), "x.png")
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match=r"not finite for x\.png"):
            check_numbers(np.array([0.0, value]), "x.png")
