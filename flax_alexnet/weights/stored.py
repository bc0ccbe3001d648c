"""Tensors in files, whose numbers are read after their shapes were found to fit a model.

What a file says of a tensor takes next to no memory, whatever it says; its numbers then take what
the model takes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

LARGEST = 2**31  # bytes of a weight file; the parameters of AlexNet are 244 million
MOST_TENSORS = 10_000  # in a file; a training's checkpoint has some hundred
PIECE = 2**20  # bytes that are read at once
MOST_AXES = 8
MOST_SHOWN = 100  # names in a message; a whole model has 16 tensors


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file says of a tensor, and the function that reads its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)


Tensor: TypeAlias = np.ndarray | Stored


def numbers(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor, read if need be; raises UserError as the reader of its file does."""
    return tensor.read() if isinstance(tensor, Stored) else tensor


def is_shape(value: Any) -> bool:
    """Whether a value can be the shape of an array: a few whole numbers, none negative or vast."""
    sides = isinstance(value, tuple) and len(value) <= MOST_AXES
    return sides and all(isinstance(side, int) and 0 <= side < 2**63 for side in value)


def read_exactly(stream: Any, size: int) -> bytearray:
    """The next `size` bytes of a stream, in pieces; raises EOFError where it has fewer."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        piece = stream.read(min(len(rest), PIECE))
        if not piece:
            raise EOFError("it ends too early")
        rest[: len(piece)] = piece
        rest = rest[len(piece) :]
    return data


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Names in a line, the first of them where they are too many to be read."""
    more = len(names) - MOST_SHOWN
    shown = separator.join(names[:MOST_SHOWN])
    return f"{shown}{separator}and {more:,} more" if more > 0 else shown
