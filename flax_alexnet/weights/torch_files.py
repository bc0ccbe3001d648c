"""PyTorch's weight files, read and written; PyTorch itself is needed only to write a `.pth`.

A `.pth` is what `torch.save` makes of a state dict. Since PyTorch 1.6 it is a zip file of a pickle
(`data.pkl`) and the numbers of each storage (`data/0`, …). Before, it was a row of five pickles
(a magic number, a version, facts about the machine, the value, the keys of the storages), then for
each storage its length as an int64 and its numbers. A tensor is a window of a storage: an offset,
a shape and strides, all counted in numbers.
"""

import dataclasses
import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_alexnet.errors import UserError, first_line
from flax_alexnet.outputs import writing
from flax_alexnet.weights.pickles import (
    NONSENSE,
    Global,
    PickleError,
    dictionary,
    is_shape,
    read_pickle,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
DAMAGED = (*NONSENSE, OSError, zipfile.BadZipFile, zlib.error, PickleError)

STORAGES = {
    "torch.FloatStorage": np.dtype("f4"),
    "torch.DoubleStorage": np.dtype("f8"),
    "torch.HalfStorage": np.dtype("f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("i8"),
    "torch.IntStorage": np.dtype("i4"),
    "torch.ShortStorage": np.dtype("i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}


@dataclasses.dataclass
class _Storage:
    """Numbers of one type; in the old format they follow after the tensors that look at them."""

    dtype: np.dtype
    count: int
    numbers: np.ndarray | None = None

    def fill(self, data: bytes, big_endian: bool) -> None:
        if len(data) != self.count * self.dtype.itemsize:
            raise PickleError(f"a storage of {self.count:,} numbers has {len(data):,} bytes")
        numbers = np.frombuffer(data, self.dtype)
        self.numbers = numbers.byteswap() if big_endian else numbers


class _Storages(dict[str, _Storage]):
    """Every storage that a pickle asks for, by its key."""

    def ask(self, identity: Any) -> _Storage:
        """For a persistent id, ("storage", type, key, device, count); the old format adds None."""
        what, kind, key, _, count, *view = identity
        if not isinstance(kind, Global) or kind.name not in STORAGES or any(view):
            raise ValueError("a storage of unknown type")
        if what != "storage" or not isinstance(key, str) or not is_shape((count,)):
            raise ValueError("a storage that makes no sense")
        return self.setdefault(key, _Storage(STORAGES[kind.name], count))


@dataclasses.dataclass
class _Tensor:
    """What stands for `torch._utils._rebuild_tensor_v2` and its like."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """A view of the storage's numbers."""
        numbers, shape, strides = self.storage.numbers, self.shape, self.strides
        sane = is_shape(shape) and is_shape(strides) and is_shape((self.offset,))
        if numbers is None or not sane or len(shape) != len(strides):
            raise ValueError("a tensor makes no sense")
        last = self.offset + sum(
            max(0, n - 1) * step for n, step in zip(shape, strides, strict=True)
        )
        # A stride of zero would make much of little.
        if math.prod(shape) > numbers.size or last >= max(1, numbers.size):
            raise ValueError("a tensor reaches beyond its storage")
        in_bytes = [step * numbers.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], shape, in_bytes)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    del rest  # whether it requires gradients, its hooks
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    return _Tensor(storage, offset, shape, strides)


ADMITTED = {
    "collections.OrderedDict": dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sides: sides,
    **dict.fromkeys(STORAGES),
}


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by PyTorch's names, such as "features.0.weight".

    A checkpoint that holds a state dict as "state_dict" is read too, and "module.", which
    `DataParallel` adds to the names, is left out.

    Raises:
      UserError: the file is damaged, of another kind, or holds more than tensors and plain
        containers, which could be code.
    """
    try:
        value = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
        return _state_dict(value)
    except DAMAGED as error:
        raise UserError(
            f"cannot read {path} as a state dict of PyTorch: {first_line(error)}"
        ) from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        if sum(info.file_size for info in file.infolist()) > path.stat().st_size:
            raise PickleError("it is compressed, which torch.save never does")
        pickles = [name for name in names if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise PickleError(
                "it is a zip file without one data.pkl; expected what torch.save writes"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        order = file.read(f"{prefix}byteorder") if f"{prefix}byteorder" in names else b"little"
        storages = _Storages()
        value = read_pickle(io.BytesIO(file.read(pickles[0])), ADMITTED, storages.ask)
        for key, storage in storages.items():
            storage.fill(file.read(f"{prefix}data/{key}"), order == b"big")
    return value


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if read_pickle(stream, {}) != LEGACY_MAGIC or read_pickle(stream, {}) != LEGACY_PROTOCOL:
            raise PickleError("it does not begin as what torch.save writes")
        big_endian = not read_pickle(stream, {})["little_endian"]
        storages = _Storages()
        value = read_pickle(stream, ADMITTED, storages.ask)
        for key in read_pickle(stream, {}):
            storage = storages[key]
            count = int.from_bytes(stream.read(8), "big" if big_endian else "little")
            if count != storage.count:
                raise PickleError(f"a storage of {storage.count:,} numbers says it has {count:,}")
            storage.fill(stream.read(count * storage.dtype.itemsize), big_endian)
    return value


def _state_dict(value: Any) -> dict[str, np.ndarray]:
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise PickleError("it holds no dictionary of tensors")
    others = [name for name, tensor in value.items() if not isinstance(tensor, _Tensor)]
    if others:
        raise PickleError(f"its entry {str(others[0])[:80]!r} is no tensor; expected a state dict")
    return {str(name).replace("module.", ""): tensor.array() for name, tensor in value.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by their names.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the last two of types
        raise UserError(f"cannot read {path} as safetensors: {first_line(error)}") from None


def write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a state dict, as `.pth` (which needs PyTorch) or `.safetensors`.

    Raises:
      UserError: another ending, PyTorch is not there, or it cannot be written.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path} is to be a state dict of PyTorch; expected .pth or .safetensors")
    try:
        with writing(path, SafetensorError, RuntimeError) as partial:
            if path.suffix == ".safetensors":
                save_file(dict(tensors), partial, {"format": "pt"})
            else:
                import torch

                values = {name: torch.from_numpy(value) for name, value in tensors.items()}
                torch.save(values, partial)
    except ModuleNotFoundError:
        raise UserError(
            f"writing {path} needs PyTorch: pip install 'torch>=2.10'; or write a .safetensors, "
            "which does not"
        ) from None
