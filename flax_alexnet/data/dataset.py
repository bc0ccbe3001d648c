"""Decoded images by index, of one size: decoded at each read, or kept in memory."""

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
READ_AT_ONCE = 16  # prepared images that a thread reads before it decodes them
EVERYTHING = slice(None)

UNKNOWN, BAD = -2, -1  # special labels: the image is not decoded yet, or cannot be read

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
        """The images at `indices`; a bad one is replaced by the next one that can be read.

        After the last image the search continues at the first. The replacement depends on the data
        alone, so it is the same in any thread, on any process, and after a run was resumed.

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
    """Images that are decoded at each request; `on_bad` is called for each bad one."""

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
    """Images decoded once and kept in memory: those of `share` at once, others on request.

    `on_bad` is called for each image that cannot be read.
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
        # Images are stored only once they are complete, since another thread may read them.
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
    """Opens `source` at `size` × `size`; its images are kept in memory if they take up to 1 GiB.

    All images of `share` are decoded here once, before the training, to find bad ones. Large
    prepared datasets are not, since they were checked when they were prepared.

    Raises:
      UserError: an image has no label; or `on_bad`, which is called in order for each image that
        cannot be read, raises it.
    """
    if len(source) * size * size * 3 <= CACHE_BYTES:
        return CachedExamples(source, size, share, resize, on_bad)
    if not source.prepared:
        _try(source, share, lambda rows: _bad(_read(source, rows, size, resize)), on_bad)
    return DecodedExamples(source, size, resize, on_bad)


def _try(
    source: Source, share: slice, function: Callable[[Sequence[int]], list[Example]], on_bad: OnBad
) -> None:
    """Calls `on_bad`, in order, for the bad images that `function` finds in the rows of `share`."""
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

    Reading is Python code, in which threads wait for one another, so reading several at once takes
    less time. The files of a folder may be as large as `decode` allows and are read one by one.
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
    """Decodes the images at `rows`. Raises UserError for a label that is out of range.

    `out` gives the arrays into which the images are decoded.
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
