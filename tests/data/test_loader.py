"""The order in which images come, and their batches."""

import itertools

import numpy as np
import pytest

from flax_alexnet.data.dataset import (
    Examples,
)
from flax_alexnet.data.loader import evaluation_batches, training_batches


class Numbers(Examples):
    """Examples whose image and label say their index."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, indices):
        labels = np.array(indices, np.int32)
        images = np.broadcast_to(labels[:, None, None, None] % 251, (len(labels), 2, 2, 3))
        return {"image": images.astype(np.uint8), "label": labels, "mask": labels >= 0}


def labels(batches, count):
    return [batch["label"].tolist() for batch in itertools.islice(batches, count)]


def joined(rows):
    return list(itertools.chain.from_iterable(rows))


class TestOrder:
    def test_every_epoch_is_a_permutation_and_each_is_another(self):
        stream = joined(labels(training_batches(Numbers(30), 8, seed=1), 15))  # 120: 4 epochs
        epochs = [stream[i : i + 30] for i in range(0, 120, 30)]
        assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert epochs[0] != list(range(30))

    def test_it_follows_from_seed_and_step_alone(self):
        whole = labels(training_batches(Numbers(30), 8, seed=1), 15)
        assert whole == labels(training_batches(Numbers(30), 8, seed=1, threads=7), 15)
        for step in (1, 4, 11):
            resumed = training_batches(Numbers(30), 8, seed=1, start=8 * step)
            assert labels(resumed, 15 - step) == whole[step:]
        assert whole != labels(training_batches(Numbers(30), 8, seed=2), 15)

    def test_batches_of_another_size_go_on_with_the_next_image(self):
        stream = joined(labels(training_batches(Numbers(30), 8, seed=1), 15))
        for start in (5, 40):
            resumed = labels(training_batches(Numbers(30), 20, seed=1, start=start), 4)
            assert joined(resumed) == stream[start : start + 80]

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_read_blocks_of_the_same_batches(self, processes):
        whole = labels(training_batches(Numbers(30), 8, seed=1), 10)
        parts = [
            labels(
                training_batches(Numbers(30), 8, seed=1, rows=block),
                10,
            )
            for block in np.split(np.arange(8), processes)
        ]
        assert [joined(rows) for rows in zip(*parts, strict=True)] == whole

    @pytest.mark.parametrize("processes", [1, 2])
    def test_evaluation_gives_each_image_once(self, processes):
        seen = []
        for block in np.split(np.arange(8), processes):
            for batch in evaluation_batches(Numbers(21), 8, rows=block):
                assert batch["image"].shape == (8 // processes, 2, 2, 3)
                seen += batch["label"][batch["mask"]].tolist()
        assert sorted(seen) == list(range(21))
