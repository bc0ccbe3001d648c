"""PyTorch's weight files, read and written; PyTorch itself is needed only to write a `.pth`.

A `.pth` is what `torch.save` makes of a state dict. Since PyTorch 1.6 it is a zip file of a pickle
(`data.pkl`) and the numbers of each storage (`data/0`, …). Before, it was a row of five pickles
(a magic number, a version, facts about the machine, the value, the keys of the storages), then for
each storage its length as an int64 and its numbers. A tensor is a window of a storage: an offset,
a shape and strides, all counted in numbers.

What people have is often more: a checkpoint of a training, in which the state dict is one entry of
several, and the model in a wrapper that puts its own name before those of the tensors.
"""

import dataclasses
import functools
import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.utils.outputs import check_room
from flax_alexnet.utils.text import printable
from flax_alexnet.weights.archives import open_zip, read_member
from flax_alexnet.weights.headers import read_header
from flax_alexnet.weights.pickles import (
    LARGEST_PICKLE,
    NONSENSE,
    Global,
    PickleError,
    Skipped,
    dictionary,
    read_pickle,
)
from flax_alexnet.weights.stored import LARGEST, Stored, is_shape, listed, read_exactly

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


# Numbers that a storage may have beside those of a tensor, which it is read for: the whole model.
MOST_BESIDE = 2**26


@dataclasses.dataclass
class _Storage:
    """Numbers of one type, and how their bytes are read, which is known after the tensors are."""

    dtype: np.dtype
    count: int
    read: Callable[[], bytearray] | None = None
    big_endian: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize

    def numbers(self) -> np.ndarray:
        if self.read is None:
            raise PickleError("a storage is not there")
        values = np.frombuffer(self.read(), self.dtype)
        return values.byteswap() if self.big_endian else values


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

    def check(self) -> None:
        """Raises ValueError for one that makes no sense, or is not within its storage."""
        shape, strides = self.shape, self.strides
        sane = is_shape(shape) and is_shape(strides) and is_shape((self.offset,))
        if not sane or len(shape) != len(strides):
            raise ValueError("a tensor makes no sense")
        last = self.offset + sum(
            max(0, n - 1) * step for n, step in zip(shape, strides, strict=True)
        )
        # A stride of zero would make much of little.
        if math.prod(shape) > self.storage.count or last >= max(1, self.storage.count):
            raise ValueError("a tensor reaches beyond its storage")

    def stored(self, path: Path) -> Stored:
        """What the readers of layouts take; `path` is for the message."""
        self.check()

        def read() -> np.ndarray:
            try:
                if self.storage.count - math.prod(self.shape) > MOST_BESIDE:
                    raise PickleError("a tensor is a small part of its storage; save a copy of it")
                values = self.storage.numbers()
            except DAMAGED as error:
                raise _refusal(path, error) from None
            in_bytes = [step * values.itemsize for step in self.strides]
            return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, in_bytes)

        return Stored(self.shape, self.storage.dtype, read)


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


# Where checkpoints have the model itself, the first that is there, or else beside everything.
ENTRIES = ("state_dict", "model_state_dict", "model", "")
DEPTH = 3  # of dictionaries in which a state dict is looked for
WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")  # of DataParallel, and of torch.compile


def read_pth(path: Path, known: Collection[str]) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a state dict by PyTorch's names, such as "features.0.weight".

    It may be an entry of a checkpoint, beside objects of any kind, which are skipped and not made.

    Args:
      path: of a file that `torch.save` wrote.
      known: names of the model that is looked for.

    Returns:
      The tensors by the names that they have without a wrapper's; and lines that say what was taken
      off the names or left out.

    Raises:
      UserError: the file is damaged, of another kind, or has objects in the place of tensors,
        which could be code.
    """
    try:
        with open_regular(path, LARGEST) as file:
            read_file = _read_zip if zipfile.is_zipfile(file) else _read_legacy
        tensors, notes = read_file(path, known)
        arrays, more = _unwrapped({name: t.stored(path) for name, t in tensors.items()}, known)
        return arrays, notes + more
    except DAMAGED as error:
        raise _refusal(path, error) from None


def _refusal(path: Path, error: BaseException) -> UserError:
    return UserError(f"cannot read {path} as a state dict of PyTorch: {first_line(error)}")


def read_safetensors(path: Path, known: Collection[str]) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a safetensors file; arguments and what is returned as in `read_pth`.

    Raises:
      UserError: it cannot be read.
    """
    _, tensors = read_header(path)
    try:
        return _unwrapped(tensors, known)
    except PickleError as error:
        raise UserError(f"cannot read {path} as safetensors: {first_line(error)}") from None


def _read_zip(path: Path, known: Collection[str]) -> tuple[dict[str, _Tensor], list[str]]:
    with open_zip(path) as file:
        sizes = {info.filename: info.file_size for info in file.infolist()}
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
        if not stored or sum(sizes.values()) > path.stat().st_size:
            raise PickleError("it is compressed, which torch.save never does")
        pickles = [name for name in file.namelist() if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise PickleError(
                "it is a zip file without one data.pkl; expected what torch.save writes"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        big_endian = sizes.get(order) == 3 and read_member(file, order, 3) == b"big"
        if sizes[pickles[0]] > LARGEST_PICKLE:
            raise PickleError(f"its data.pkl has more than {LARGEST_PICKLE:,} bytes")
        data = io.BytesIO(read_member(file, pickles[0], sizes[pickles[0]]))
    storages = _Storages()
    tensors, notes = _state_dict(read_pickle(data, ADMITTED, storages.ask), known)
    needed = {id(tensor.storage) for tensor in tensors.values()}
    for key, storage in storages.items():
        if id(storage) in needed:
            name = f"{prefix}data/{key}"
            if name not in sizes:
                raise PickleError(f"it has no item named {name!r}")
            if sizes[name] != storage.size:
                raise PickleError(
                    f"a storage of {storage.count:,} numbers has {sizes[name]:,} bytes"
                )
            storage.read = functools.partial(_member, path, name, storage.size)
            storage.big_endian = big_endian
    return tensors, notes


def _member(path: Path, name: str, size: int) -> bytearray:
    with open_zip(path) as file:
        return read_member(file, name, size)


def _read_legacy(path: Path, known: Collection[str]) -> tuple[dict[str, _Tensor], list[str]]:
    with open_regular(path, LARGEST) as stream:
        if read_pickle(stream, {}) != LEGACY_MAGIC or read_pickle(stream, {}) != LEGACY_PROTOCOL:
            raise PickleError("it does not begin as what torch.save writes")
        big_endian = not read_pickle(stream, {})["little_endian"]
        storages = _Storages()
        value = read_pickle(stream, ADMITTED, storages.ask)
        tensors, notes = _state_dict(value, known)
        keys, end = read_pickle(stream, {}), path.stat().st_size
        for key in keys:
            if not isinstance(key, str):  # tuples within tuples would be hashed for ever
                raise PickleError("a storage that makes no sense")
            storage = storages[key]
            count = int.from_bytes(stream.read(8), "big" if big_endian else "little")
            if count != storage.count:
                raise PickleError(f"a storage of {storage.count:,} numbers says it has {count:,}")
            place = stream.tell()
            if place + storage.size > end:
                raise PickleError("it ends too early")
            storage.read = functools.partial(_piece, path, place, storage.size)
            storage.big_endian = big_endian
            stream.seek(storage.size, os.SEEK_CUR)
    return tensors, notes


def _piece(path: Path, place: int, size: int) -> bytearray:
    with open_regular(path, LARGEST) as file:
        file.seek(place)
        return read_exactly(file, size)


def _state_dict(value: Any, known: Collection[str]) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors in what was saved, by their names, and a line where there are several models."""
    if not isinstance(value, dict):
        raise PickleError("it holds no dictionary of tensors")
    entries_of = dict(_with_tensors(value))
    models = {
        where: entries_of[where] for where in entries_of if _prefixes(entries_of[where], known)
    } or entries_of
    if not models:
        entries = (*(value.get(entry) for entry in ENTRIES), *value.values())
        objects = [entry for entry in entries if isinstance(entry, Skipped)]
        raise objects[0].refusal() if objects else PickleError("it holds no tensors")
    where = next((entry for entry in ENTRIES if entry in models), None)
    if where is None and len(models) > 1:
        raise PickleError(
            f"it holds several models, {listed(list(models))}; save one of them alone"
        )
    where = next(iter(models)) if where is None else where
    others = [other for other in models if other != where]
    result = {}
    for name, tensor in models[where].items():
        if isinstance(tensor, _Tensor):
            result[printable(str(name))] = tensor
        elif _prefixes([name], known):
            if isinstance(tensor, Skipped):
                raise tensor.refusal()
            raise PickleError(f"its entry {name!r} is no tensor; expected a state dict")
    note = f"note: its {where or 'top'} is taken, and not {listed(others)}"
    return result, [note] if others else []


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
                    name = printable(str(key))
                    below[f"{where}.{name}" if where else name] = entry
        level = below


def _prefixes(names: Iterable[Any], known: Collection[str]) -> set[str]:
    """What stands before the names of a model that is looked for, where there is one."""
    bare = [WRAPPER.sub("", str(name)) for name in names]
    prefixes = {name.removesuffix(end) for name in bare for end in known if name.endswith(end)}
    return {prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")}


def _unwrapped(
    tensors: Mapping[str, Stored], known: Collection[str]
) -> tuple[dict[str, Stored], list[str]]:
    """Tensors by the names that they have without a wrapper's, and a line that says so."""
    prefix, *others = sorted(_prefixes(tensors, known)) or [""]
    if others:
        raise PickleError(f"it holds several models, {listed([prefix, *others])}; save one alone")
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
    parts = [f"{changed[0]}, and all others likewise"] if changed else []
    parts += [f"left out is what has not this prefix: {listed(left_out)}"] if left_out else []
    return result, [f"note: {'; '.join(parts)}"] if parts else []


def write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a state dict, as `.pth` (which needs PyTorch) or `.safetensors`.

    Raises:
      UserError: PyTorch is not there, or the disk has no room.
      OSError, SafetensorError, RuntimeError: it cannot be written.
    """
    check_room(path, sum(value.nbytes for value in tensors.values()))
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
