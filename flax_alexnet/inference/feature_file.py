"""Features of many images in one file, HDF5 or NumPy, written row by row and resumable.

Both formats have the same columns and one row for each image: `name` (bytes, UTF-8), `label`
(int32, −1 if unknown), `status` (uint8: 0 not yet, 1 read, 2 could not be read), `problem` (bytes:
why not), `size` and `changed` (int64: the size of the image's file in bytes and its modification
time, in nanoseconds since 1970; 0 if the image has no file of its own), and one column for each
layer (float32; NaN if the image could not be read). HDF5 stores each column as a dataset,

    h5py.File("features.h5")["fc7"][:]

and NumPy stores all as one structured array, which is memory-mapped and not loaded:

    np.load("features.npy", mmap_mode="r")["fc7"]
"""

import contextlib
import mmap
import os
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.inputs import check_regular
from flax_alexnet.utils.outputs import alone, cannot_write

TODO, READ, UNREADABLE = 0, 1, 2
SUFFIXES = (".h5", ".hdf5", ".npy")


class FeatureFile:
    """A file of features, new or resumed; no other process can resume it until it is closed.

    The file takes all its disk space when it is created. Later, plain writes put only numbers at
    their positions in the file. They involve neither the HDF5 library nor a mapping, which could
    lose numbers or crash, so a process that is killed leaves a file that can be read and resumed.

    Args:
      path: the file, with one of `SUFFIXES`.
      names: the names of the images, in order.
      layers: {name: shape of an image's features}.

    Raises:
      UserError: the file exists with other images or layers, or cannot be created.
    """

    def __init__(self, path: Path, names: Sequence[str], layers: Mapping[str, Sequence[int]]):
        encoded = np.array([name.encode() for name in names])
        self.types = np.dtype(
            [("name", encoded.dtype), ("label", "<i4"), ("status", "u1"), ("problem", "S200")]
            + [("size", "<i8"), ("changed", "<i8")]
            + [(layer, "<f4", tuple(shape)) for layer, shape in layers.items()]
        )
        self.path, self._length = path, len(names)
        with contextlib.ExitStack() as resources:
            try:
                folder = resources.enter_context(alone(path))
                if not os.path.lexists(path):
                    self._make(encoded, folder / path.name)
                self._at = self._places()
                flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                self._file = os.open(path, flags)
                resources.callback(os.close, self._file)
                self._bytes = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
                self._columns = {
                    name: np.ndarray(self._length, self.types[name], self._bytes, place, (stride,))
                    for name, (place, stride) in self._at.items()
                }
            # h5py reports a full disk as RuntimeError.
            except (
                *(OSError, ValueError, KeyError, EOFError, RuntimeError, AttributeError),
                *(TypeError, OverflowError),
                tokenize.TokenError,  # of the header of a damaged .npy
            ) as error:
                if isinstance(error, UserError):
                    raise
                reason = cause(error)
                raise UserError(f"cannot use {path} ({reason}); take another --output") from None
            if not np.array_equal(self["name"], encoded):
                raise UserError(
                    f"{path} holds the features of other images; take another --output, or "
                    "remove it"
                )
            self._resources = resources.pop_all()

    def _make(self, names: np.ndarray, partial: Path) -> None:
        """Creates the file under another name, and renames it once it is complete."""
        if self.path.suffix == ".npy":
            array = np.lib.format.open_memmap(partial, "w+", self.types, (self._length,))
            array["name"] = names
            array.flush()
        else:
            with h5py.File(partial, "w") as file:
                early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                for column in self.types.names or ():
                    base, shape = self.types[column].base, self.types[column].shape
                    file.create_dataset(column, (self._length, *shape), base, dcpl=early)
                file["name"][:] = names
        with partial.open("r+b") as whole:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(whole.fileno(), 0, partial.stat().st_size)
            os.fsync(whole.fileno())
        partial.replace(self.path)

    def _places(self) -> dict[str, tuple[int, int]]:
        """The offset of each column in the file, and the number of bytes from row to row.

        Raises:
          ValueError: the columns are not as `_make` creates them, or are not in this file.
        """
        if self.path.is_symlink():
            raise ValueError("it is a link")
        check_regular(self.path)
        names = self.types.names or ()
        if self.path.suffix == ".npy":
            array = np.lib.format.open_memmap(self.path, mode="r")
            if array.dtype != self.types or array.shape != (self._length,):
                raise ValueError("it has other columns or rows")
            fields: Any = self.types.fields
            return {name: (array.offset + fields[name][1], array.strides[0]) for name in names}
        with h5py.File(self.path, "r") as file:
            if len(file) != len(names) or set(file) != set(names):
                raise ValueError("it has other columns")
            return {name: (self._place(file, name), self.types[name].itemsize) for name in names}

    def _place(self, file: h5py.File, name: str) -> int:
        """The offset of the numbers of a dataset, which must be contiguous and in this file."""
        of_own_kind = isinstance(file.get(name, getlink=True), h5py.HardLink)
        if not of_own_kind or not isinstance(file[name], h5py.Dataset):
            raise ValueError(f"its {name} is a link or a group")
        column = file[name]
        wanted = (self.types[name].base, (self._length, *self.types[name].shape))
        if (column.dtype, column.shape) != wanted:
            raise ValueError(f"its column {name} is of another type or shape")
        creation = column.id.get_create_plist()
        place = column.id.get_offset()
        if (
            creation.get_layout() != h5py.h5d.CONTIGUOUS
            or creation.get_external_count()
            or place is None
        ):
            raise ValueError(f"its column {name} is not stored as it was made")
        return place

    def __getitem__(self, column: str) -> np.ndarray:
        """A read-only view of a column in the file, which shows later writes too."""
        return self._columns[column]

    def write(self, rows: Sequence[int], columns: Mapping[str, Any], status: np.ndarray) -> None:
        """Writes rows; their status is written only once their values are on the disk.

        Args:
          rows: the numbers of the rows, in increasing order.
          columns: the values of these rows, by the names of columns.
          status: the status of each row, uint8[len(rows)].

        Raises:
          UserError: they cannot be written.
        """
        values = np.zeros(len(rows), self.types)
        values["name"] = self["name"][rows]
        for column in columns:
            values[column] = columns[column]
        try:
            self._put(rows, values)
            os.fsync(self._file)
            values["status"] = status
            self._put(rows, values)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def _put(self, rows: Sequence[int], values: np.ndarray) -> None:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, several in zip((0, *breaks), np.split(np.asarray(rows), breaks), strict=True):
            piece = values[start : start + len(several)]
            if self.path.suffix == ".npy":
                self._write_at("name", several[0], piece)
                continue
            for column in self.types.names or ():
                if column != "name":
                    self._write_at(column, several[0], piece[column])

    def _write_at(self, column: str, row: int, values: np.ndarray) -> None:
        begin, stride = self._at[column]
        data, place = memoryview(values.tobytes()), begin + int(row) * stride
        while data:
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def close(self) -> None:
        """Closes the file; what was written is on the disk then."""
        with contextlib.suppress(OSError):
            os.fsync(self._file)
        self._columns = {}
        self._resources.close()


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
      queries: the rows whose neighbours are searched.
      count: the number of neighbours of each query, which does not include the query itself.
      distance: the paper's Euclidean distance, or that of the vectors scaled to unit length, which
        suits maps, since their lengths differ much.
      block: numbers in memory at once.

    Returns:
      Rows, int[queries, count], and distances, float[queries, count], the nearest first. They have
      fewer than `count` columns if there are fewer other images.
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
