"""The embedded dataset: each image follows from its split and index alone."""

import numpy as np
import pytest

from flax_alexnet.data.synthetic import CLASSES, SIZE, render


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_an_image_is_the_same_each_time(label):
    image = render("train", label)
    assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    np.testing.assert_array_equal(render("train", label), image)


def test_images_of_a_class_and_of_the_splits_differ():
    images = [render("train", 3), render("train", 13), render("test", 3)]
    assert len({image.tobytes() for image in images}) == 3


def test_objects_stand_out_of_their_backgrounds():
    """Where they did not, no model could learn them."""
    spreads = [render("test", index).std(axis=(0, 1)).max() for index in range(50)]
    assert min(spreads) > 15
