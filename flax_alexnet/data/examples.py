"""Pictures decoded to equal squares, by index, and their mean."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from flax_alexnet.data.ahead import map_threads
from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.sources import Source
from flax_alexnet.errors import UserError
from flax_alexnet.preprocessing import ResizeRule

CACHE_BYTES = 2**30  # decoded datasets up to this are kept in memory
MEAN_PICTURES = 2**16  # over so many the mean is taken where there are more
CHUNK = 64  # pictures that a thread reads and decodes at once
EVERYTHING = slice(None)

T = TypeVar("T")

Example = dict[str, Any]  # "image": uint8[size, size, 3], "label": int32[]


class Examples(Protocol):
    """Decoded pictures by index, as Grain reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class DecodedExamples:
    """Pictures read and decoded each time they are asked for."""

    def __init__(self, source: Source, size: int, resize: ResizeRule = "paper"):
        self._source, self._size, self._resize = source, size, resize

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        image, label = _decoded(self._source, [index], self._size, self._resize)
        return {"image": image[0], "label": label[0]}


class CachedExamples:
    """Pictures decoded once and kept in memory: those of `share` now, others when asked for."""

    def __init__(
        self, source: Source, size: int, share: slice = EVERYTHING, resize: ResizeRule = "paper"
    ):
        self._source, self._size, self._resize = source, size, resize
        self._images = np.empty((len(source), size, size, 3), np.uint8)
        self._labels = np.empty((len(source),), np.int32)
        self._known = np.zeros((len(source),), bool)
        _exhaust(_for_chunks(self._fill, np.arange(len(source))[share]))

    def _fill(self, rows: Sequence[int]) -> None:
        self._images[rows], self._labels[rows] = _decoded(
            self._source, rows, self._size, self._resize
        )
        self._known[rows] = True

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        if not self._known[index]:
            self._fill([index])
        return {"image": self._images[index], "label": self._labels[index]}


def open_examples(
    source: Source, size: int, share: slice = EVERYTHING, resize: ResizeRule = "paper"
) -> Examples:
    """`source` brought to `size` × `size`: kept in memory where that takes less than 1 GiB.

    Raises:
      UserError: a picture of `share` that cannot be decoded, named here and not in the middle of a
        training. Large datasets that were prepared were tried then, and are not here.
    """
    if len(source) * size * size * 3 <= CACHE_BYTES:
        return CachedExamples(source, size, share, resize)
    if not source.prepared:

        def attempt(rows: Sequence[int]) -> None:
            _decoded(source, rows, size, resize)

        _exhaust(_for_chunks(attempt, np.arange(len(source))[share]))
    return DecodedExamples(source, size, resize)


def mean_image(
    examples: Examples,
    share: slice = EVERYTHING,
    total: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """The mean of each pixel over the pictures: float32[size, size, 3], in grey levels 0 … 255.

    Section 2 of the paper. Of more than 65,536 pictures as many, evenly spaced, are taken.

    Args:
      examples: all pictures.
      share: those that this process looks at.
      total: adds up int32 arrays over the processes.
    """
    count = min(len(examples), MEAN_PICTURES)
    indices = np.linspace(0, len(examples) - 1, count).astype(int)

    def add(chunk: Sequence[int]) -> np.ndarray:
        # So few grey levels cannot overflow, and whole numbers add up the same in any order.
        return np.stack([examples[i]["image"] for i in chunk]).sum(axis=0, dtype=np.int32)

    sums = sum(_for_chunks(add, indices[share]), np.zeros_like(examples[0]["image"], np.int32))
    return (total(sums) / count).astype(np.float32)


def _for_chunks(function: Callable[[Sequence[int]], T], indices: np.ndarray) -> Iterator[T]:
    """What `function` gives for each few of the indices, in all threads."""
    chunks = np.split(indices, range(CHUNK, len(indices), CHUNK))
    return map_threads(lambda chunk: function(chunk.tolist()), chunks)


def _exhaust(items: Iterator[object]) -> None:
    collections.deque(items, maxlen=0)


def _decoded(
    source: Source, indices: Sequence[int], size: int, resize: ResizeRule
) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(indices), size, size, 3), np.uint8)
    labels = np.empty((len(indices),), np.int32)
    for row, record in enumerate(source.records(indices)):
        try:
            images[row] = decode(record.image, size, resize)
        except DecodeError as error:
            raise UserError(
                f"cannot decode picture {record.name}: {error}; remove or repair it"
            ) from None
        if not 0 <= record.label < len(source.label_names):
            raise UserError(
                f"picture {record.name} has the label {record.label}, but there are only "
                f"{len(source.label_names)} classes; take a split with labels"
            )
        labels[row] = record.label
    return images, labels
