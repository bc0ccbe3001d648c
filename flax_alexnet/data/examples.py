"""Pictures decoded to equal squares, by index, and their mean."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.sources import Source
from flax_alexnet.errors import UserError

CACHE_BYTES = 2**30  # decoded datasets up to this are kept in memory
MEAN_PICTURES = 2**16  # over so many the mean is taken where there are more

Example = dict[str, Any]  # "image": uint8[size, size, 3], "label": int32[]


class Examples(Protocol):
    """Decoded pictures by index, as Grain reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class DecodedExamples:
    """Pictures read and decoded each time they are asked for."""

    def __init__(self, source: Source, size: int):
        self._source, self._size = source, size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        image, label = _decoded(self._source, [index], self._size)
        return {"image": image[0], "label": label[0]}


class CachedExamples:
    """Pictures decoded once and kept in memory."""

    def __init__(self, source: Source, size: int):
        self.images = np.empty((len(source), size, size, 3), np.uint8)
        self.labels = np.empty((len(source),), np.int32)

        def fill(start: int) -> None:
            rows = range(start, min(start + 256, len(source)))
            self.images[start : rows.stop], self.labels[start : rows.stop] = _decoded(
                source, rows, size
            )

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, range(0, len(source), 256)):
                pass

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


def open_examples(source: Source, size: int) -> Examples:
    """`source` decoded to `size` × `size`: kept in memory where that takes less than 1 GiB.

    Raises:
      UserError: a picture that cannot be decoded, named here and not in the middle of a training.
        Every picture is tried but those of large datasets that were tried when they were prepared.
    """
    if len(source) * size * size * 3 <= CACHE_BYTES:
        return CachedExamples(source, size)
    if not source.prepared:
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda index: _decoded(source, [index], size), range(len(source))):
                pass
    return DecodedExamples(source, size)


def mean_image(examples: Examples) -> np.ndarray:
    """The mean of each pixel over the pictures: float32[size, size, 3], in grey levels 0 … 255.

    Section 2 of the paper. Of more than 65,536 pictures as many, evenly spaced, are taken.
    """
    count = min(len(examples), MEAN_PICTURES)
    indices = np.linspace(0, len(examples) - 1, count).astype(int)

    def total(chunk: Sequence[int]) -> np.ndarray:
        return np.stack([examples[int(i)]["image"] for i in chunk]).sum(axis=0, dtype=np.float64)

    with ThreadPoolExecutor() as pool:
        # Summed in a fixed order, so that the mean does not depend on the number of threads.
        chunks = (indices[i : i + 256] for i in range(0, count, 256))
        sums = sum(pool.map(total, chunks), np.zeros_like(examples[0]["image"], np.float64))
    return (sums / count).astype(np.float32)


def _decoded(source: Source, indices: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(indices), size, size, 3), np.uint8)
    labels = np.empty((len(indices),), np.int32)
    for row, record in enumerate(source.records(indices)):
        try:
            images[row] = decode(record.image, size)
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
