"""Features of many pictures in one file, HDF5 or NumPy, written row by row and resumable.

Both have the same columns, with a row a picture: `name` (bytes, UTF-8), `label` (int32, −1 where
unknown), `status` (uint8: 0 not yet, 1 read, 2 could not be read), `problem` (bytes: why not), and
one for each layer (float32; NaN where the picture could not be read). HDF5 holds each as a dataset,

    h5py.File("features.h5")["fc7"][:]

and NumPy one structured array, to be mapped and not loaded:

    np.load("features.npy", mmap_mode="r")["fc7"]
"""

import os
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from flax_alexnet.errors import UserError, first_line

TODO, READ, UNREADABLE = 0, 1, 2
SUFFIXES = (".h5", ".hdf5", ".npy")


class FeatureFile:
    """A file of features, made or opened to go on with.

    All room is taken when the file is made, so that later only values are written in place: a
    process that is killed leaves a file that can be read and gone on with.

    Args:
      path: with one of `SUFFIXES`.
      names: of the pictures, in order.
      layers: {name: shape of a picture's features}.

    Raises:
      UserError: there is a file that is not of these pictures and layers, or none can be made.
    """

    def __init__(self, path: Path, names: Sequence[str], layers: Mapping[str, Sequence[int]]):
        encoded = np.array([name.encode() for name in names])
        self.types = np.dtype(
            [("name", encoded.dtype), ("label", "i4"), ("status", "u1"), ("problem", "S200")]
            + [(layer, "f4", tuple(shape)) for layer, shape in layers.items()]
        )
        self.path, self._length = path, len(names)
        try:
            is_new = not path.exists()
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._make(encoded) if is_new else self._open()
            same = np.array_equal(self["name"][:], encoded)
        # h5py reports a full disk as RuntimeError.
        except (
            *(OSError, ValueError, KeyError, EOFError, RuntimeError, AttributeError, TypeError),
            tokenize.TokenError,  # of the header of a damaged .npy
        ) as error:
            raise UserError(
                f"cannot use {path} ({first_line(error)}); take another --output"
            ) from None
        if not same:
            raise UserError(
                f"{path} holds the features of other pictures; take another --output, or remove it"
            )

    def _is_numpy(self) -> bool:
        return self.path.suffix == ".npy"

    def _make(self, names: np.ndarray) -> Any:
        # Under another name until it is whole, so that none is taken up half made.
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self._take_room(names, partial)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
        return self._open()

    def _take_room(self, names: np.ndarray, partial: Path) -> None:
        if self._is_numpy():
            array = np.lib.format.open_memmap(partial, "w+", self.types, (self._length,))
            array["name"] = names
            array.flush()
            if hasattr(os, "posix_fallocate"):  # or a full disk would end the process by a signal
                with partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        else:
            with h5py.File(partial, "w") as file:
                early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                for column in self.types.names or ():
                    base, shape = self.types[column].base, self.types[column].shape
                    file.create_dataset(column, (self._length, *shape), base, dcpl=early)
                file["name"][:] = names

    def _open(self) -> Any:
        if not self.path.is_file():
            raise ValueError("it is no regular file")
        if self._is_numpy():
            np.load(self.path, mmap_mode="r")  # refuses a file that was cut off; "r+" mends it
            array = np.load(self.path, mmap_mode="r+")
            if array.dtype != self.types or array.shape != (self._length,):
                raise ValueError("it has other columns or rows")
            return array
        file = h5py.File(self.path, "r+")
        if set(file) != set(self.types.names or ()):
            found = ", ".join(file)
            file.close()
            raise ValueError(f"it has other columns: {found}")
        for column in self.types.names or ():
            wanted = (self.types[column].base, (self._length, *self.types[column].shape))
            if (file[column].dtype, file[column].shape) != wanted:
                file.close()
                raise ValueError(f"its column {column} is of another type or shape")
        return file

    def __getitem__(self, column: str) -> Any:
        """A column, to be sliced and assigned to as an array."""
        return self._file[column]

    @property
    def done(self) -> int:
        """How many rows are written; they are the first ones."""
        return int(np.count_nonzero(self["status"][:]))

    def write(self, start: int, columns: Mapping[str, np.ndarray], status: np.ndarray) -> None:
        """Writes rows from `start` on; their status last, so that a row counts once it is whole."""
        for column, values in columns.items():
            self[column][start : start + len(status)] = values
        self._file.flush()
        self["status"][start : start + len(status)] = status
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if not self._is_numpy():
            self._file.close()
        del self._file


def nearest(
    file: FeatureFile,
    layer: str,
    queries: Sequence[int],
    count: int,
    distance: Literal["euclidean", "cosine"] = "euclidean",
    block: int = 2**26,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose features are nearest to those of the queries, as in the paper's Figure 4.

    Args:
      file: complete or not; only rows that were read count.
      layer: whose features are compared.
      queries: rows.
      count: neighbours of each; the query itself is none.
      distance: the paper's Euclidean one, or that of the vectors scaled to unit length, which suits
        maps, whose lengths differ much.
      block: numbers in memory at once.

    Returns:
      Rows, int[queries, count], and distances, float[queries, count], the nearest first. Fewer than
      `count` columns where there are not so many other pictures.
    """

    def vectors(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(len(values), -1).astype(np.float64)
        if distance == "euclidean":
            return flat
        return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    status = file["status"][:]
    wanted = vectors(np.stack([file[layer][row] for row in queries]))
    distances = np.full((len(queries), len(status)), np.inf)
    step = max(1, block // wanted.shape[1])
    for start in range(0, len(status), step):
        values = vectors(file[layer][start : start + step])
        squares = (wanted**2).sum(1)[:, None] + (values**2).sum(1) - 2 * wanted @ values.T
        distances[:, start : start + step] = np.sqrt(np.maximum(squares, 0))
    distances[:, status != READ] = np.inf
    distances[np.arange(len(queries)), list(queries)] = np.inf
    count = min(count, int((status == READ).sum()) - 1)
    rows = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return rows, np.take_along_axis(distances, rows, axis=1)
