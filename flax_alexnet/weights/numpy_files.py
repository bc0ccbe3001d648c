"""NumPy's files: `.npz` of named arrays, and the pickled dictionary that is a `.npy`."""

import io
import math
import mmap
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_alexnet.errors import UserError, first_line
from flax_alexnet.weights.pickles import NONSENSE, NUMPY, PickleError, Skipped, read_pickle

DAMAGED = (
    *(*NONSENSE, OSError, zipfile.BadZipFile, zlib.error, PickleError),
    tokenize.TokenError,  # of a header
)
LARGEST = 2**31  # bytes of an .npz when unpacked


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by their names.

    Raises:
      UserError: it is damaged, or holds other than arrays of numbers.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if sum(info.file_size for info in file.infolist()) > LARGEST:
                raise PickleError("it unpacks to more than 2 GiB")
            return {
                name.removesuffix(".npy"): _array(file.read(name), name) for name in file.namelist()
            }
    except DAMAGED as error:
        raise UserError(f"cannot read {path} as an .npz: {first_line(error)}") from None


def _array(data: bytes, name: str) -> np.ndarray:
    stream = io.BytesIO(data)
    shape, fortran_order, dtype = _header(stream)
    if dtype.hasobject:
        raise PickleError(f"its {name} is no array of numbers")
    start = stream.tell()
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise PickleError(f"its {name} is not as long as it says")
    numbers = np.frombuffer(data, dtype, offset=start)
    return numbers.reshape(shape, order="F" if fortran_order else "C")


def read_npy(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickled {"conv1": [kernel, bias], …}, as "conv1[0]", "conv1[1]" and so on.

    Raises:
      UserError: it is damaged, or holds other than such a dictionary.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _, _, dtype = _header(data)
            if not dtype.hasobject:
                raise PickleError("it holds one array; expected a dictionary of layers")
            value = read_pickle(data, NUMPY).item()
        return {
            f"{layer}[{index}]": _numbers(array)
            for layer, arrays in value.items()
            for index, array in enumerate(arrays)
        }
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
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
