"""Weights in NumPy files: `.npz` with named arrays, and `.npy` with a pickled dictionary."""

import io
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.utils.text import printable
from flax_alexnet.weights.archives import open_member, open_zip, read_member
from flax_alexnet.weights.pickles import NONSENSE, NUMPY, PickleError, Skipped, read_pickle
from flax_alexnet.weights.stored import LARGEST, MOST_TENSORS, Stored, is_shape

DAMAGED = (
    *(*NONSENSE, OSError, zipfile.BadZipFile, zlib.error, PickleError),
    tokenize.TokenError,  # of a header
)
LONGEST_HEADER = 10_000  # bytes, as NumPy has it, which would read any length before it refuses
# Bytes of a pickled dictionary with those that are made of them: two and a half times the model's
# 244 million, since Python 3 writes for Python 2 texts of half as many bytes more, of which the
# bytes are made. Numbers of 64 bits have twice as many.
LARGEST_PICKLE = 620 * 10**6


def read_npz(path: Path) -> dict[str, Stored]:
    """The arrays of an `.npz` by their names.

    Raises:
      UserError: it is damaged, or holds other than arrays of numbers.
    """
    try:
        with open_zip(path) as file:
            names = file.namelist()
            if len(set(names)) < len(names):
                raise PickleError("it has two arrays of one name")
            return {
                printable(name.removesuffix(".npy")): _member(path, file, name) for name in names
            }
    except DAMAGED as error:
        raise _refusal(path, error) from None


def _member(path: Path, file: zipfile.ZipFile, name: str) -> Stored:
    with open_member(file, name) as stream:
        start = io.BytesIO(stream.read(LONGEST_HEADER + 16))
    shape, fortran_order, dtype = _header(start)
    if dtype.kind not in "biufc":
        raise PickleError(f"its {name} is no array of numbers")
    size = math.prod(shape) * dtype.itemsize
    if start.tell() + size != file.getinfo(name).file_size:
        raise PickleError(f"its {name} is not as long as it says")

    def read() -> np.ndarray:
        try:
            with open_zip(path) as file:
                data = read_member(file, name, size, start.tell())
        except DAMAGED as error:
            raise _refusal(path, error) from None
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")

    return Stored(shape, dtype, read)


def _refusal(path: Path, error: BaseException) -> UserError:
    return UserError(f"cannot read {path} as an .npz: {first_line(error)}")


def read_npy(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickled {"conv1": [kernel, bias], …}, as "conv1[0]", "conv1[1]" and so on.

    Raises:
      UserError: it is damaged, or holds other than such a dictionary.
    """
    try:
        with open_regular(path, LARGEST) as file:
            start = io.BytesIO(file.read(LONGEST_HEADER + 16))
            _, _, dtype = _header(start)
            if not dtype.hasobject:
                raise PickleError("it holds one array; expected a dictionary of layers")
            file.seek(start.tell())
            layers = read_pickle(file, NUMPY, largest=LARGEST_PICKLE).item().items()
        tensors: dict[str, np.ndarray] = {}
        for layer, arrays in layers:
            if not isinstance(arrays, list | tuple):
                raise PickleError("a layer holds something else than a list of arrays")
            # One list may be that of many layers.
            if len(tensors) + len(arrays) > MOST_TENSORS:
                raise PickleError(f"it has more than {MOST_TENSORS:,} arrays")
            for index, array in enumerate(arrays):
                tensors[f"{printable(str(layer))}[{index}]"] = _numbers(array)
        return tensors
    except DAMAGED as error:
        raise UserError(
            f"cannot read {path} as a dictionary of layers, {{'conv1': [kernel, bias], …}}: "
            f"{first_line(error)}"
        ) from None


def _numbers(array: Any) -> np.ndarray:
    if isinstance(array, Skipped):
        raise array.refusal()
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise PickleError("a layer holds something else than arrays")
    return array


def _header(stream: Any) -> tuple[Any, bool, np.dtype]:
    """Shape, whether in Fortran's order, and type, from the start of an `.npy`."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    if not is_shape(shape):
        raise PickleError("it has an array of a shape that no array has")
    return shape, fortran_order, dtype
