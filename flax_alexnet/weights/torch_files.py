"""PyTorch's weight files, read and written; PyTorch itself is needed only to write a `.pth`.

A `.pth` is what `torch.save` makes of a state dict. Since PyTorch 1.6 it is a zip file of a pickle
(`data.pkl`) and the numbers of each storage (`data/0`, …). Before, it was a row of five pickles
(a magic number, a version, facts about the machine, the value, the keys of the storages), then for
each storage its length as an int64 and its numbers. A tensor is a window of a storage: an offset,
a shape and strides, all counted in numbers.

What people have is often more: a checkpoint of a training, in which the state dict is one entry of
several, and the net in a wrapper that puts its own name before those of the tensors.
"""

import dataclasses
import io
import math
import mmap
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_alexnet.errors import UserError, first_line
from flax_alexnet.outputs import need_room
from flax_alexnet.weights.pickles import (
    NONSENSE,
    Global,
    PickleError,
    Skipped,
    dictionary,
    is_shape,
    read_pickle,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
DAMAGED = (*NONSENSE, OSError, zipfile.BadZipFile, zlib.error, PickleError)

STORAGES: dict[str, np.dtype] = {
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

    def ask(self, identity: Any) -> _Storage | Skipped:
        """For a persistent id, ("storage", type, key, device, count); the old format adds None.

        The old format has ("module", class, file, source) too, where a whole module was saved.
        """
        if isinstance(identity[1], Skipped):
            return identity[1]
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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor | Skipped:
    del rest  # whether it requires gradients, its hooks
    if isinstance(storage, Skipped):
        return storage
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


# Where checkpoints have the net itself, the first that is there, or else beside everything.
ENTRIES = ("state_dict", "model_state_dict", "model", "")
DEPTH = 3  # of dictionaries in which a state dict is looked for
WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")  # of DataParallel, and of torch.compile


def read_pth(path: Path, known: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a state dict by PyTorch's names, such as "features.0.weight".

    It may be an entry of a checkpoint, beside objects of any kind, which are skipped and not made.

    Args:
      path: of a file that `torch.save` wrote.
      known: names of the net that is looked for.

    Returns:
      The tensors by the names that they have without a wrapper's; and lines that say what was taken
      off the names or left out.

    Raises:
      UserError: the file is damaged, of another kind, or has objects in the place of tensors,
        which could be code.
    """
    try:
        read_file = _read_zip if zipfile.is_zipfile(path) else _read_legacy
        tensors, notes = read_file(path, known)
        arrays, more = _unwrapped({name: t.array() for name, t in tensors.items()}, known)
        return arrays, notes + more
    except DAMAGED as error:
        raise UserError(
            f"cannot read {path} as a state dict of PyTorch: {first_line(error)}"
        ) from None


def read_safetensors(path: Path, known: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a safetensors file; arguments and what is returned as in `read_pth`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unwrapped(tensors, known)
    # TypeError and AttributeError come of types that NumPy has not.
    except (OSError, SafetensorError, TypeError, AttributeError, PickleError) as error:
        raise UserError(f"cannot read {path} as safetensors: {first_line(error)}") from None


def _read_zip(path: Path, known: Collection[str]) -> tuple[dict[str, _Tensor], list[str]]:
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
        tensors, notes = _state_dict(value, known)
        needed = {id(tensor.storage) for tensor in tensors.values()}
        for key, storage in storages.items():
            if id(storage) in needed:
                storage.fill(file.read(f"{prefix}data/{key}"), order == b"big")
    return tensors, notes


def _read_legacy(path: Path, known: Collection[str]) -> tuple[dict[str, _Tensor], list[str]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if read_pickle(stream, {}) != LEGACY_MAGIC or read_pickle(stream, {}) != LEGACY_PROTOCOL:
            raise PickleError("it does not begin as what torch.save writes")
        big_endian = not read_pickle(stream, {})["little_endian"]
        storages = _Storages()
        value = read_pickle(stream, ADMITTED, storages.ask)
        tensors, notes = _state_dict(value, known)
        needed = {id(tensor.storage) for tensor in tensors.values()}
        for key in read_pickle(stream, {}):
            storage = storages[key]
            count = int.from_bytes(stream.read(8), "big" if big_endian else "little")
            if count != storage.count:
                raise PickleError(f"a storage of {storage.count:,} numbers says it has {count:,}")
            if id(storage) in needed:
                storage.fill(stream.read(count * storage.dtype.itemsize), big_endian)
            else:
                stream.seek(count * storage.dtype.itemsize, os.SEEK_CUR)
    return tensors, notes


def _state_dict(value: Any, known: Collection[str]) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors in what was saved, by their names, and a line where there are several nets."""
    if not isinstance(value, dict):
        raise PickleError("it holds no dictionary of tensors")
    found = dict(_with_tensors(value))
    nets = {where: found[where] for where in found if _prefixes(found[where], known)} or found
    if not nets:
        entries = (*(value.get(entry) for entry in ENTRIES), *value.values())
        objects = [entry for entry in entries if isinstance(entry, Skipped)]
        raise objects[0].refusal() if objects else PickleError("it holds no tensors")
    where = next((entry for entry in ENTRIES if entry in nets), None)
    if where is None and len(nets) > 1:
        raise PickleError(f"it holds several nets, {', '.join(nets)}; save one of them alone")
    where = next(iter(nets)) if where is None else where
    others = [other for other in nets if other != where]
    result = {}
    for name, tensor in nets[where].items():
        if isinstance(tensor, _Tensor):
            result[str(name)] = tensor
        elif _prefixes([name], known):
            if isinstance(tensor, Skipped):
                raise tensor.refusal()
            raise PickleError(f"its entry {name!r} is no tensor; expected a state dict")
    said = f"note: its {where or 'top'} is taken, and not {', '.join(others)}"
    return result, [said] if others else []


def _with_tensors(value: dict[Any, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every dictionary in `value` that holds tensors, with the name of its entry."""
    level, seen = {"": value}, set()
    for _ in range(DEPTH):
        below = {}
        for where, entries in level.items():
            if id(entries) in seen:  # else one that holds itself would take its author's time
                continue
            seen.add(id(entries))
            if any(isinstance(entry, _Tensor) for entry in entries.values()):
                yield where, entries
            for key, entry in entries.items():
                if isinstance(entry, dict):
                    below[f"{where}.{key}" if where else str(key)] = entry
        level = below


def _prefixes(names: Iterable[Any], known: Collection[str]) -> set[str]:
    """What stands before the names of a net that is looked for, where there is one."""
    bare = [WRAPPER.sub("", str(name)) for name in names]
    prefixes = {name.removesuffix(end) for name in bare for end in known if name.endswith(end)}
    return {prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")}


def _unwrapped(
    tensors: Mapping[str, np.ndarray], known: Collection[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors by the names that they have without a wrapper's, and a line that says so."""
    prefix, *others = sorted(_prefixes(tensors, known)) or [""]
    if others:
        raise PickleError(f"it holds several nets, {', '.join((prefix, *others))}; save one alone")
    result, changed, left_out = {}, [], []
    for name, value in tensors.items():
        bare = WRAPPER.sub("", name)
        if not bare.startswith(prefix):
            left_out.append(name)
            continue
        bare = bare.removeprefix(prefix)
        if bare in result:
            raise PickleError(f"it has {bare} twice, in a wrapper and without")
        result[bare] = value
        changed += [f"{name} is read as {bare}"] * (name != bare)
    said = [f"{changed[0]}, and all others likewise"] if changed else []
    said += [f"left out is what has not this prefix: {', '.join(left_out)}"] if left_out else []
    return result, [f"note: {'; '.join(said)}"] if said else []


def write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a state dict, as `.pth` (which needs PyTorch) or `.safetensors`.

    Raises:
      UserError: PyTorch is not there, or the disk has no room.
      OSError, SafetensorError, RuntimeError: it cannot be written.
    """
    need_room(path, sum(value.nbytes for value in tensors.values()))
    try:
        if path.suffix == ".safetensors":
            save_file(dict(tensors), path, {"format": "pt"})
        else:
            import torch

            torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    except ModuleNotFoundError:
        raise UserError(
            f"writing {path.name} needs PyTorch: pip install 'torch>=2.10'; or write a "
            ".safetensors, which does not"
        ) from None
