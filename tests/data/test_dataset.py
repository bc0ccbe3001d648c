"""Examples by index: decoded or kept, and their mean."""

import numpy as np
import pytest

from flax_alexnet.data.dataset import (
    CachedExamples,
    DecodedExamples,
    open_examples,
)
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.utils.errors import UserError
from tests.images import make_folder


class TestExamples:
    @pytest.fixture
    def dataset(self, tmp_path):
        return open_dataset(f"folder:{make_folder(tmp_path, {'a': 12, 'b': 18})}")

    def test_cached_and_decoded_agree(self, dataset):
        cached, decoded = CachedExamples(dataset.train, 9), DecodedExamples(dataset.train, 9)
        assert len(cached) == len(decoded) == 27
        for name, values in cached.take(range(27)).items():
            np.testing.assert_array_equal(values, decoded.take(range(27))[name])

    def test_large_sets_are_tried_and_not_cached(self, dataset, tmp_path, monkeypatch):
        assert isinstance(open_examples(dataset.train, 9), CachedExamples)
        monkeypatch.setattr("flax_alexnet.data.dataset.CACHE_BYTES", 1000)
        assert isinstance(open_examples(dataset.train, 9), DecodedExamples)
        (tmp_path / "a" / "003.png").write_bytes(b"damaged")
        with pytest.raises(UserError, match=r"cannot read image .*003\.png"):
            open_examples(dataset.train, 9)
