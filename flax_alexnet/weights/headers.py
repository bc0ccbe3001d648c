"""The header of a safetensors file, checked before the library reads the file."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import open_regular, parse_json
from flax_alexnet.utils.text import printable
from flax_alexnet.weights.pickles import NONSENSE
from flax_alexnet.weights.stored import LARGEST, MOST_TENSORS, Stored, is_shape, read_exactly

LARGEST_HEADER = 8 * 2**20  # bytes; a thousand label names take 30 thousand
DTYPES = {
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype("?"),
}


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the tensors of a safetensors file.

    Raises:
      UserError: it is damaged, has types that are not read, or more than any weights have.
    """
    try:
        with open_regular(path, LARGEST) as file:
            size = int.from_bytes(read_exactly(file, 8), "little")
            if size > LARGEST_HEADER:
                raise ValueError(f"its header has more than {LARGEST_HEADER:,} bytes")
            entries = parse_json(bytes(read_exactly(file, size)))
        if len(entries) > MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
        with safe_open(path, framework="numpy") as checked:
            metadata = checked.metadata() or {}
        entries.pop("__metadata__", None)
        tensors = {printable(name): _stored(path, name, entry) for name, entry in entries.items()}
        if len(tensors) < len(entries):
            raise ValueError("it has two tensors of one name")
    except (SafetensorError, OSError, *NONSENSE) as error:
        raise _refusal(path, error) from None
    return metadata, tensors


def _stored(path: Path, name: str, entry: dict[str, object]) -> Stored:
    kind, shape = entry["dtype"], tuple(entry["shape"])  # type: ignore[arg-type, var-annotated]
    if kind not in DTYPES:
        raise ValueError(f"its {printable(name)} is of the type {kind}, which is not read")
    if not is_shape(shape):
        raise ValueError(f"its {printable(name)} has no shape that an array can have")
    return Stored(shape, DTYPES[str(kind)], functools.partial(_numbers, path, name))


def _numbers(path: Path, name: str) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise _refusal(path, error) from None


def _refusal(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} is no safetensors file that can be read: {first_line(error)}")
