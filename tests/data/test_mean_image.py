"""The mean image: of all images where there are few, else of as many, evenly spaced."""

import numpy as np
import pytest

from flax_alexnet.data import mean_image as module
from flax_alexnet.data.dataset import CachedExamples, DecodedExamples
from flax_alexnet.data.mean_image import mean_image
from flax_alexnet.data.sources import open_dataset
from tests.images import make_folder


@pytest.fixture
def source(tmp_path):
    return open_dataset(f"folder:{make_folder(tmp_path, {'a': 12, 'b': 18})}").train


def test_it_is_the_mean_of_all_however_they_are_read(source):
    cached, decoded = CachedExamples(source, 9), DecodedExamples(source, 9)
    np.testing.assert_array_equal(mean_image(cached), mean_image(decoded))
    images = cached.take(range(len(cached)))["image"]
    np.testing.assert_allclose(mean_image(cached), images.mean(0), rtol=1e-5)


def test_shares_of_processes_add_up_to_the_same(source):
    examples, sums = CachedExamples(source, 9), []
    for process in range(3):
        mean_image(examples, slice(process, None, 3), lambda values: sums.append(values) or values)
    whole = mean_image(examples, total=lambda _: sum(sums))
    np.testing.assert_array_equal(whole, mean_image(examples))


def test_of_many_images_some_are_taken(source, monkeypatch):
    monkeypatch.setattr(module, "MEAN_IMAGES", 3)
    examples = CachedExamples(source, 9)
    images = examples.take([0, (len(examples) - 1) // 2, len(examples) - 1])["image"]
    np.testing.assert_allclose(mean_image(examples), images.mean(0), rtol=1e-5)
