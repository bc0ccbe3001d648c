"""Names and layouts of other systems, and back."""

import numpy as np
import pytest

from flax_alexnet.weights import name_maps


@pytest.mark.parametrize(
    "layout", [name_maps.TORCHVISION, name_maps.CAFFE, name_maps.CAFFE_TENSORFLOW]
)
@pytest.mark.parametrize("path", ["conv1/kernel", "conv2/kernel", "fc6/kernel", "fc7/kernel"])
def test_layouts_are_inverted(layout, path):
    shape = {"conv1/kernel": (5, 4, 3, 7), "conv2/kernel": (5, 4, 2, 7)}.get(path, (24, 7))
    value = np.random.default_rng(0).standard_normal(shape, np.float32)
    theirs = layout.theirs(path, value, (2, 3, 4))
    assert theirs.shape == layout.their_shape(shape)
    np.testing.assert_array_equal(layout.ours(path, theirs, (2, 3, 4)), value)
