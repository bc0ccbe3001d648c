"""The order of pictures, and batches of them, with Grain.

Which pictures a batch holds, and in which order, follows from (seed, step) alone: not from the
number of processes or threads, nor from where a run was interrupted.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from flax_alexnet.data.examples import Example, Examples

Batch = dict[str, np.ndarray]  # "image": uint8[b, s, s, 3], "label": int32[b], "mask": bool[b]


def training_batches(
    examples: grain.sources.RandomAccessDataSource[Example],
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    threads: int = 2,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches without end, each epoch a new permutation, from the one of `start_step` on.

    The stream of pictures is cut into batches of `batch_size`, which may span two epochs, so
    that every picture is seen equally often. The place of one that cannot be read is taken by the
    next one in `examples`. Of each batch only `rows` are read, those of the process's own devices;
    None is all.
    """
    dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    return _batches(dataset, batch_size, start_step, threads, rows)


def evaluation_batches(
    examples: Examples,
    batch_size: int,
    *,
    threads: int = 2,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every picture exactly once, in order; the last batch is filled up and masked.

    Batches have an entry "mask": bool[b], false for what was filled up, and for what stands in the
    place of a picture that cannot be read.
    """
    dataset = grain.MapDataset.source(_Padded(examples, batch_size))
    return _batches(dataset, batch_size, 0, threads, rows)


class _Padded:
    """Examples with a mask, up to a whole number of batches; bad ones are masked."""

    def __init__(self, examples: Examples, batch_size: int):
        self._examples = examples
        self._length = -(-len(examples) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        example = self._examples.find(index) if index < len(self._examples) else None
        return {**(example or self._examples[0]), "mask": np.bool_(example is not None)}


class _Rows(grain.MapDataset):
    """Some rows of each batch, as one stream."""

    def __init__(self, parent: Any, batch_size: int, rows: Sequence[int]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def _batches(
    dataset: Any, batch_size: int, start: int, threads: int, rows: Sequence[int] | None
) -> Iterator[Batch]:
    if not flags.FLAGS.is_parsed():  # Grain reads a flag of absl's, and this is no absl program
        flags.FLAGS.mark_as_parsed()
    rows = range(batch_size) if rows is None else rows
    dataset = _Rows(dataset, batch_size, rows).batch(len(rows), drop_remainder=True)
    # Each thread makes a whole batch: two ahead of each keep the device fed without much memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(dataset.to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, start)
    return iterator
