"""Pictures decoded to equal squares, by index, and their mean."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flax_alexnet.data.ahead import map_threads
from flax_alexnet.data.bad_records import OnBad, refuse
from flax_alexnet.data.pictures import Picture, chunks, read_rows
from flax_alexnet.data.sources import Source
from flax_alexnet.errors import UserError
from flax_alexnet.preprocessing import ResizeRule

CACHE_BYTES = 2**30  # decoded datasets up to this are kept in memory
MEAN_PICTURES = 2**16  # over so many the mean is taken where there are more
CHUNK = 64  # pictures that a thread reads and decodes at once
EVERYTHING = slice(None)

Example = dict[str, Any]  # "image": uint8[size, size, 3], "label": int32[]

UNKNOWN, BAD = -2, -1  # in the place of a label: not tried yet, cannot be read


class Examples(abc.ABC):
    """Decoded pictures by index, some of which may turn out to be unreadable."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def find(self, index: int) -> Example | None:
        """The picture at `index`; None where it cannot be read."""

    def __getitem__(self, index: int) -> Example:
        """The picture at `index`, or the next one, in a circle, that can be read.

        Who takes the place of a bad picture follows from the data alone, and so is the same in any
        thread, on any process, and after a run was resumed.

        Raises:
          UserError: no picture can be read.
        """
        for step in range(len(self)):
            example = self.find((index + step) % len(self))
            if example is not None:
                return example
        raise UserError(f"none of the {len(self):,} pictures can be read; take another dataset")

    def find_all(self, indices: Sequence[int]) -> list[Example | None]:
        """`find` for several indices, which may read them at once."""
        return [self.find(index) for index in indices]

    def take(self, indices: Sequence[int]) -> list[Example]:
        """`[self[index] for index in indices]`, which may read them at once."""
        found = zip(indices, self.find_all(indices), strict=True)
        return [example or self[(index + 1) % len(self)] for index, example in found]


class DecodedExamples(Examples):
    """Pictures read and decoded each time they are asked for; `on_bad` is told of bad ones."""

    def __init__(
        self, source: Source, size: int, resize: ResizeRule = "paper", on_bad: OnBad = refuse
    ):
        self._source, self._size, self._resize, self._on_bad = source, size, resize, on_bad

    def __len__(self) -> int:
        return len(self._source)

    def find(self, index: int) -> Example | None:
        return self._find([index])[0]

    def find_all(self, indices: Sequence[int]) -> list[Example | None]:
        parts = chunks(self._source, indices, CHUNK)
        return [example for part in parts for example in self._find(part)]

    def _find(self, indices: Sequence[int]) -> list[Example | None]:
        pictures = _read(self._source, indices, self._size, self._resize)
        for picture in _bad(pictures):
            self._on_bad(picture.name, picture.problem)
        return [
            None if image is None else {"image": image, "label": np.int32(label)}
            for _, label, image, _ in pictures
        ]


class CachedExamples(Examples):
    """Pictures decoded once and kept in memory: those of `share` now, others when asked for.

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

    def _fill(self, rows: Sequence[int]) -> list[Picture]:
        """Decodes some pictures; returns the bad ones."""
        pictures = _read(self._source, rows, self._size, self._resize)
        for row, picture in zip(rows, pictures, strict=True):
            if picture.image is None:
                self._labels[row] = BAD
            else:  # the label last: it says to other threads that the picture is there
                self._images[row] = picture.image
                self._labels[row] = picture.label
        return _bad(pictures)

    def __len__(self) -> int:
        return len(self._labels)

    def find(self, index: int) -> Example | None:
        if self._labels[index] == UNKNOWN:
            for picture in self._fill([index]):
                self._on_bad(picture.name, picture.problem)
        if self._labels[index] == BAD:
            return None
        return {"image": self._images[index], "label": self._labels[index]}


def open_examples(
    source: Source,
    size: int,
    share: slice = EVERYTHING,
    resize: ResizeRule = "paper",
    on_bad: OnBad = refuse,
) -> Examples:
    """`source` brought to `size` × `size`: kept in memory where that takes less than 1 GiB.

    All pictures of `share` are tried here, before the training. Large datasets that were prepared
    were tried then, and are not here.

    Raises:
      UserError: a picture without a label; or one that cannot be read, where `on_bad`, which is
        told of each in order, raises it.
    """
    if len(source) * size * size * 3 <= CACHE_BYTES:
        return CachedExamples(source, size, share, resize, on_bad)
    if not source.prepared:
        _try(source, share, lambda rows: _bad(_read(source, rows, size, resize)), on_bad)
    return DecodedExamples(source, size, resize, on_bad)


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

    def add(rows: np.ndarray) -> np.ndarray:
        images = np.stack([example["image"] for example in examples.take(rows.tolist())])
        # So few grey levels cannot overflow, and whole numbers add up the same in any order.
        return images.sum(axis=0, dtype=np.int32)

    parts = np.split(indices[share], range(CHUNK, len(indices[share]), CHUNK))
    sums = sum(map_threads(add, parts), np.zeros_like(examples[0]["image"], np.int32))
    return (total(sums) / count).astype(np.float32)


def _try(
    source: Source, share: slice, function: Callable[[Sequence[int]], list[Picture]], on_bad: OnBad
) -> None:
    """Tells `on_bad` of the bad pictures of `share`, in order, which `function` of rows finds."""
    for bad in map_threads(function, chunks(source, range(len(source))[share], CHUNK)):
        for picture in bad:
            on_bad(picture.name, picture.problem)


def _bad(pictures: Sequence[Picture]) -> list[Picture]:
    return [picture for picture in pictures if picture.image is None]


def _read(source: Source, rows: Sequence[int], size: int, resize: ResizeRule) -> list[Picture]:
    """The pictures at `rows`, each with an outcome; UserError for a label that is out of range."""
    pictures = read_rows(source, rows, size, resize)
    for picture in pictures:
        if picture.image is not None and not 0 <= picture.label < len(source.label_names):
            raise UserError(
                f"picture {picture.name} has the label {picture.label}, but there are only "
                f"{len(source.label_names)} classes; take a split with labels"
            )
    return pictures
