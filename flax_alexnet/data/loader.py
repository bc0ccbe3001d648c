"""The order of the images of a run, and their batches, with Grain.

The images of a batch and their order depend only on the seed and on the number of images before
it. They do not depend on the number of processes or threads, or on where a run was interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from flax_alexnet.data.dataset import Batch, Examples


def training_batches(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    threads: int = 2,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless batches after the first `start` images; each epoch is a new permutation.

    The stream of images is cut into batches of `batch_size`, which may span two epochs, so
    that every image is seen equally often. An image that cannot be read is replaced by the next
    one in `examples`. Only the `rows` of each batch are read, which are those of the process's own
    devices; None: all rows.
    """
    order = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    return _batches(order, examples.take, batch_size, start, threads, rows)


def evaluation_batches(
    examples: Examples,
    batch_size: int,
    *,
    threads: int = 2,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every image exactly once, in order; the last batch is filled up and masked.

    Batches have an entry "mask": bool[b], which is false for rows that fill up the batch and for
    images that cannot be read.
    """
    whole = -(-len(examples) // batch_size) * batch_size

    def read(indices: Sequence[int]) -> Batch:
        batch = examples.read([index for index in indices if index < len(examples)])
        more = len(indices) - len(batch["mask"])  # the last indices: they fill up the batch
        batch = {
            name: np.concatenate([values, np.zeros((more, *values.shape[1:]), values.dtype)])
            for name, values in batch.items()
        }
        batch["image"][~batch["mask"]], batch["label"][~batch["mask"]] = 0, 0
        return batch

    return _batches(grain.MapDataset.range(whole), read, batch_size, 0, threads, rows)


class _Batches(grain.MapDataset):
    """Some rows of each batch of a sequence of indices; `read` reads all rows of a batch at once.

    The first batch begins at position `start` of the sequence.
    """

    def __init__(
        self,
        order: Any,
        read: Callable[[Sequence[int]], Batch],
        batch_size: int,
        start: int,
        rows: Sequence[int],
    ):
        super().__init__(order)
        self._read, self._batch_size, self._start = read, batch_size, start
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return (len(self._parent) - self._start) // self._batch_size

    def __getitem__(self, index: Any) -> Any:
        first = self._start + index * self._batch_size
        return self._read([int(self._parent[first + row]) for row in self._rows])


def _batches(
    order: Any,
    read: Callable[[Sequence[int]], Batch],
    batch_size: int,
    start: int,
    threads: int,
    rows: Sequence[int] | None,
) -> Iterator[Batch]:
    if not flags.FLAGS.is_parsed():  # Grain reads a flag of absl's, and this is no absl program
        flags.FLAGS.mark_as_parsed()
    rows = range(batch_size) if rows is None else rows
    dataset = _Batches(order, read, batch_size, start, rows)
    # Each thread makes whole batches. Two prefetched batches per thread keep the device busy
    # without much memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))
