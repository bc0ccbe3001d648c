"""Images decoded to equal squares, by index, and their mean."""

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flax_alexnet.data.bad_records import OnBad, refuse
from flax_alexnet.data.examples import Example, decode_record, read_record
from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.data.preprocessing import ResizeRule
from flax_alexnet.data.sources import Record, Source
from flax_alexnet.utils.errors import UserError

CACHE_BYTES = 2**30  # decoded datasets up to this are kept in memory
CHUNK = 64  # images that a thread is given at once
READ_AT_ONCE = 16  # prepared images that it reads before it decodes them
EVERYTHING = slice(None)

UNKNOWN, BAD = -2, -1  # in the place of a label: not tried yet, cannot be read

# "image": uint8[b, size, size, 3], "label": int32[b], and perhaps "mask": bool[b], false where an
# image could not be read or only fills up the batch.
Batch = dict[str, np.ndarray]


class Examples(abc.ABC):
    """Decoded images by index, some of which may turn out to be unreadable."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, indices: Sequence[int]) -> Batch:
        """The images at `indices`, with "mask"."""

    def take(self, indices: Sequence[int]) -> Batch:
        """The images at `indices`; for a bad one the next, in a circle, that can be read.

        Who takes the place of a bad image follows from the data alone, and so is the same in any
        thread, on any process, and after a run was resumed.

        Raises:
          UserError: no image can be read.
        """
        batch = self.read(indices)
        for row in np.flatnonzero(~batch.pop("mask")).tolist():
            other = self._next(indices[row])
            for name, values in batch.items():
                values[row] = other[name][0]
        return batch

    def _next(self, index: int) -> Batch:
        for step in range(1, len(self)):
            batch = self.read([(index + step) % len(self)])
            if batch["mask"][0]:
                return batch
        raise UserError(f"none of the {len(self):,} images can be read; take another dataset")


class DecodedExamples(Examples):
    """Images read and decoded each time they are asked for; `on_bad` is told of bad ones."""

    def __init__(
        self, source: Source, size: int, resize: ResizeRule = "paper", on_bad: OnBad = refuse
    ):
        self._source, self._size, self._resize, self._on_bad = source, size, resize, on_bad

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Batch:
        images = np.empty((len(indices), self._size, self._size, 3), np.uint8)
        examples = _read(self._source, indices, self._size, self._resize, images)
        for example in _bad(examples):
            self._on_bad(example.name, example.problem, example.label)
        return _batch(images, _labels(examples))


class CachedExamples(Examples):
    """Images decoded once and kept in memory: those of `share` now, others when asked for.

    `on_bad` is told of those that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        share: slice = EVERYTHING,
        resize: ResizeRule = "paper",
        on_bad: OnBad = refuse,
    ):
        self._source, self._size, self._resize, self._on_bad = source, size, resize, on_bad
        self._images = np.empty((len(source), size, size, 3), np.uint8)
        self._labels = np.full((len(source),), UNKNOWN, np.int32)
        _try(source, share, self._fill, on_bad)

    def _fill(self, rows: Sequence[int]) -> list[Example]:
        """Decodes some images; returns the bad ones."""
        examples = _read(self._source, rows, self._size, self._resize)
        # Put there when they are whole, since another thread may read them already.
        for row, example in zip(rows, examples, strict=True):
            if example.image is not None:
                self._images[row] = example.image
        self._labels[rows] = _labels(examples)  # last: they say that the images are there
        return _bad(examples)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices, int)
        for example in self._fill(rows[self._labels[rows] == UNKNOWN].tolist()):
            self._on_bad(example.name, example.problem, example.label)
        return _batch(self._images[rows], self._labels[rows])


def open_examples(
    source: Source,
    size: int,
    share: slice = EVERYTHING,
    resize: ResizeRule = "paper",
    on_bad: OnBad = refuse,
) -> Examples:
    """`source` brought to `size` × `size`: kept in memory where that takes less than 1 GiB.

    All images of `share` are tried here, before the training. Large datasets that were prepared
    were tried then, and are not here.

    Raises:
      UserError: an image without a label; or one that cannot be read, where `on_bad`, which is
        told of each in order, raises it.
    """
    if len(source) * size * size * 3 <= CACHE_BYTES:
        return CachedExamples(source, size, share, resize, on_bad)
    if not source.prepared:
        _try(source, share, lambda rows: _bad(_read(source, rows, size, resize)), on_bad)
    return DecodedExamples(source, size, resize, on_bad)


def _try(
    source: Source, share: slice, function: Callable[[Sequence[int]], list[Example]], on_bad: OnBad
) -> None:
    """Tells `on_bad` of the bad images of `share`, in order, which `function` of rows finds."""
    for bad in map_threads(function, chunks(np.arange(len(source))[share])):
        for example in bad:
            on_bad(example.name, example.problem, example.label)


def chunks(indices: np.ndarray) -> list[list[int]]:
    """Indices in lists of `CHUNK`, each for a thread."""
    return [part.tolist() for part in np.split(indices, range(CHUNK, len(indices), CHUNK))]


def _bad(examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.image is None]


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([BAD if e.image is None else e.label for e in examples], np.int32)


def _batch(images: np.ndarray, labels: np.ndarray) -> Batch:
    return {"image": images, "label": labels, "mask": labels != BAD}


def _records(source: Source, rows: Sequence[int]) -> Iterator[Record]:
    """The images at `rows`, encoded.

    Reading is Python, in which threads wait for one another: some at once take less time. Of a
    folder, whose files may be as large as `decode` allows, no more than one is held.
    """
    at_once = READ_AT_ONCE if source.prepared else 1
    for start in range(0, len(rows), at_once):
        yield from [read_record(source, row) for row in rows[start : start + at_once]]


def _read(
    source: Source,
    rows: Sequence[int],
    size: int,
    resize: ResizeRule,
    out: Iterable[np.ndarray] | None = None,
) -> list[Example]:
    """The images at `rows`; UserError for a label that is out of range.

    With `out`, squares for them are put there.
    """
    places = itertools.repeat(None) if out is None else out
    examples = [
        decode_record(record, size, resize, place)
        for record, place in zip(_records(source, rows), places, strict=False)
    ]
    for example in examples:
        if example.image is not None and not 0 <= example.label < len(source.label_names):
            raise UserError(
                f"image {example.name} has the label {example.label}, but there are only "
                f"{len(source.label_names)} classes; take a split with labels"
            )
    return examples
