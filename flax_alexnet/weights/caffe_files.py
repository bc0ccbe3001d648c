"""Caffe's files: `.caffemodel`, a model with its weights, and `.binaryproto`, a mean image.

Both are protocol buffers: a message is a row of fields, each a number, a kind, and a whole number
or some bytes, which may be a message again. Of the few fields that matter the places in the file
are noted, since the library for them takes many times the memory of what it reads, and of a file
that means harm any amount.
"""

import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.utils.text import printable
from flax_alexnet.weights.stored import (
    LARGEST,
    MOST_AXES,
    MOST_TENSORS,
    Stored,
    is_shape,
    read_exactly,
)


class Numbers(NamedTuple):
    """The numbers of the fields of a layer, in one of the three generations of Caffe's models."""

    name: int
    type: int
    blobs: int


NET_NAME, NET_LAYERS, NET_LAYER = 1, 2, 100  # `layers` until 2014, `layer` since
V1_LAYER = 1  # within one of `layers`, where it is of the first generation
V0, V1, NEW = Numbers(1, 2, 50), Numbers(4, 5, 6), Numbers(1, 2, 7)
BLOB_SIDES = (1, 2, 3, 4)  # of old blobs: number, channels, height, width
BLOB_FLOATS, BLOB_SHAPE, BLOB_DOUBLES, SHAPE_SIDES = 5, 7, 8, 1
MOST_FIELDS = 50_000  # of a file; a model has some hundred
LONGEST_VARINT = 10  # bytes of a whole number
NORM, POOL = (b"lrn", 15), (b"pooling", b"pool", 17)  # types by name, and V1's numbers for them
MOST_LAYERS = 10_000
LONGEST_TEXT = 80  # bytes of a name or a type that are read
LARGEST_MEAN = 2**24  # bytes; ImageNet's has 786,446


class Span(NamedTuple):
    """Bytes in a file, from `start` to before `end`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class _Messages:
    """The fields of messages in a file, of which there may be so many and no more."""

    def __init__(self, file: io.BufferedReader):
        self._file, self._left = file, MOST_FIELDS
        self.whole = Span(0, file.seek(0, io.SEEK_END))

    def fields(self, message: Span) -> Iterator[tuple[int, int | Span]]:
        """The number of each field of a message, with its value where that is of use here.

        Raises:
          ValueError: the bytes are no message, or there are too many fields.
        """
        place = message.start
        while place < message.end:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"it has more than {MOST_FIELDS:,} fields")
            self._file.seek(place)
            head = self._file.read(min(2 * LONGEST_VARINT, message.end - place))
            tag, used = _varint(head, 0)
            value: int | Span | None = None
            match tag % 8:
                case 0:
                    value, used = _varint(head, used)
                case 1 | 5 as kind:  # a number of 64 or 32 bits, of which none matters
                    used += 8 if kind == 1 else 4
                case 2:
                    size, used = _varint(head, used)
                    value = Span(place + used, place + used + size)
                    used += size
                case _:
                    raise ValueError("it has a field of a kind that Caffe does not write")
            if tag < 8:
                raise ValueError("it has a field of number 0")
            place += used
            if place > message.end:
                raise ValueError("a field reaches beyond its end")
            if value is not None:
                yield tag // 8, value

    def bytes(self, span: Span, most: int) -> bytes:
        self._file.seek(span.start)
        return self._file.read(min(span.size, most))


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A whole number that begins at `place`, and where it ends."""
    value = 0
    for index, byte in enumerate(data[place : place + LONGEST_VARINT]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise ValueError("a number does not end")


@dataclasses.dataclass(frozen=True)
class CaffeNet:
    """A caffemodel.

    Attributes:
      tensors: "conv1.blobs[0]" (kernel), "conv1.blobs[1]" (bias) and so on, without axes of one at
        their front, which old files fill up to four with.
      variant: "caffenet" where pooling comes before normalization, else "caffe"; None where the
        file has neither and does not bear their names.
    """

    tensors: dict[str, Stored]
    variant: str | None


def read_caffemodel(path: Path) -> CaffeNet:
    """Reads a model as Caffe writes it, in any of its three generations.

    Raises:
      UserError: it is damaged, or no model with weights.
    """
    try:
        with open_regular(path, LARGEST) as file:
            name, layers, tensors = _read_net(path, _Messages(file))
    except (OSError, ValueError, EOFError) as error:
        raise _refusal(path, "a caffemodel", error) from None
    if not tensors:
        raise UserError(f"{path} holds no weights; expected a .caffemodel as Caffe writes it")
    return CaffeNet(tensors, _variant(layers, name))


def _read_net(
    path: Path, messages: _Messages
) -> tuple[bytes, list[bytes | int], dict[str, Stored]]:
    """The name of a model, the type of each layer, and the tensors."""
    net_name = b""
    old: list[tuple[Span, Numbers]] = []
    new: list[tuple[Span, Numbers]] = []
    for number, value in messages.fields(messages.whole):
        if not isinstance(value, Span):
            continue
        if number == NET_NAME:
            net_name = messages.bytes(value, LONGEST_TEXT)
        elif number == NET_LAYERS:
            first = [
                (inner, V0)
                for field, inner in messages.fields(value)
                if field == V1_LAYER and isinstance(inner, Span)
            ]
            old.append(first[-1] if first else (value, V1))
        elif number == NET_LAYER:
            new.append((value, NEW))
        if len(old) + len(new) > MOST_LAYERS:
            raise ValueError(f"it has more than {MOST_LAYERS:,} layers")
    types: list[bytes | int] = []
    tensors: dict[str, Stored] = {}
    for layer, numbers in (*new, *old):
        name, blobs = b"", list[Span]()
        kind: bytes | int = b""
        for field, value in messages.fields(layer):
            if field == numbers.type:
                kind = messages.bytes(value, LONGEST_TEXT) if isinstance(value, Span) else value
            elif field == numbers.name and isinstance(value, Span):
                name = messages.bytes(value, LONGEST_TEXT)
            elif field == numbers.blobs and isinstance(value, Span):
                blobs.append(value)
        types.append(kind)
        for index, blob in enumerate(blobs):
            title = f"{printable(name.decode('utf-8', 'replace'))}.blobs[{index}]"
            if title in tensors:
                raise ValueError(f"it has {title} twice")
            if len(tensors) == MOST_TENSORS:
                raise ValueError(f"it has more than {MOST_TENSORS:,} blobs")
            tensors[title] = _blob(path, messages, blob, "a caffemodel")
    return net_name, types, tensors


def read_mean(path: Path) -> np.ndarray:
    """The mean image of a `.binaryproto`: float32[h, w, 3], RGB, or float32[h, w, 1], grey.

    A mean colour has one pixel.

    Raises:
      UserError: it is damaged, or no image.
    """
    try:
        with open_regular(path, LARGEST_MEAN) as file:
            messages = _Messages(file)
            blob = _blob(path, messages, messages.whole, "a mean image")
        mean = blob.read().astype(np.float32)
        if mean.ndim == 2:  # of one channel, an axis that is left out
            mean = mean[None]
        if mean.ndim != 3 or mean.shape[0] not in (1, 3):
            raise ValueError(f"it has {mean.shape} numbers; expected 3 colours, height and width")
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise _refusal(path, "a mean image", error) from None
    return np.ascontiguousarray(mean.transpose(1, 2, 0)[:, :, ::-1])


def _blob(path: Path, messages: _Messages, blob: Span, what: str) -> Stored:
    """A tensor, without axes of one at its front; `path` and `what` it is are for the message."""
    old = dict.fromkeys(BLOB_SIDES, 0)
    shape: Sequence[int] | None = None
    floats: list[Span] = []
    doubles: list[Span] = []
    for number, value in messages.fields(blob):
        if isinstance(value, int):
            if number in old:
                old[number] = value
        elif number == BLOB_SHAPE:
            shape = _shape(messages, value)
        elif number in (BLOB_FLOATS, BLOB_DOUBLES) and value.size:
            (floats if number == BLOB_FLOATS else doubles).append(value)
    sides = tuple(shape or old.values())
    dtype, spans = np.dtype("<f8" if doubles else "<f4"), doubles or floats
    size = sum(span.size for span in spans)
    if not is_shape(sides) or math.prod(sides) * dtype.itemsize != size:
        # What is negative is written as 2⁶⁴ less that.
        shown = "×".join(str(side if side < 2**63 else side - 2**64) for side in sides)
        raise ValueError(f"a blob of {shown} has {size // dtype.itemsize:,} numbers")
    while len(sides) > 1 and sides[0] == 1:
        sides = sides[1:]

    def read() -> np.ndarray:
        data = bytearray()
        try:
            with open_regular(path, LARGEST) as file:
                for span in spans:
                    file.seek(span.start)
                    piece = read_exactly(file, span.size)
                    if data:
                        data += piece
                    else:
                        data = piece  # the usual case, without a copy
        except (OSError, EOFError) as error:
            raise _refusal(path, what, error) from None
        return np.frombuffer(data, dtype).reshape(sides)

    return Stored(sides, dtype, read)


def _shape(messages: _Messages, message: Span) -> list[int]:
    """The sides that a message of a blob's shape has, packed or one by one."""
    sides: list[int] = []
    for number, value in messages.fields(message):
        if number != SHAPE_SIDES:
            continue
        if isinstance(value, int):
            sides.append(value)
            continue
        data = messages.bytes(value, (MOST_AXES + 1) * LONGEST_VARINT)
        place = 0
        while place < len(data) and len(sides) <= MOST_AXES:
            side, place = _varint(data, place)
            sides.append(side)
    if len(sides) > MOST_AXES:
        raise ValueError(f"a blob has more than {MOST_AXES} axes")
    return sides


def _variant(types: Sequence[bytes | int], name: bytes) -> str | None:
    for kind in types:
        known = kind.lower() if isinstance(kind, bytes) else kind
        if known in (*NORM, *POOL):
            return "caffenet" if known in POOL else "caffe"
    return {b"caffenet": "caffenet", b"alexnet": "caffe"}.get(name.lower())


def _refusal(path: Path, what: str, error: BaseException) -> UserError:
    return UserError(f"cannot read {path} as {what}: {first_line(error)}")
