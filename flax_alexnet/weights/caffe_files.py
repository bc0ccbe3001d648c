"""Caffe's files: `.caffemodel`, a net with its weights, and `.binaryproto`, a mean image.

Both are protocol buffers of a few messages, of which `SCHEMA` has the fields that matter here. Two
things differ from Caffe's own `caffe.proto`, though not on disk: numbers are declared as bytes,
which is what packed numbers are, so that they are taken over whole and not one by one; so are
messages that are repeated, and each is parsed when its turn comes.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from flax_alexnet.errors import UserError, first_line
from flax_alexnet.inputs import read_bytes
from flax_alexnet.weights.formats import LARGEST

# (name, number, type, repeated); a type in lower case is protobuf's own.
SCHEMA = {
    "Shape": [("dim", 1, "int64", True)],
    "Blob": [
        ("num", 1, "int64", False),
        ("channels", 2, "int64", False),
        ("height", 3, "int64", False),
        ("width", 4, "int64", False),
        ("data", 5, "bytes", True),  # packed floats
        ("shape", 7, "Shape", False),
        ("double_data", 8, "bytes", True),  # packed doubles
    ],
    "Layer": [
        ("name", 1, "bytes", False),
        ("type", 2, "bytes", False),
        ("blobs", 7, "bytes", True),
    ],
    "V0Layer": [
        ("name", 1, "bytes", False),
        ("type", 2, "bytes", False),
        ("blobs", 50, "bytes", True),
    ],
    "V1Layer": [
        ("layer", 1, "V0Layer", False),
        ("name", 4, "bytes", False),
        ("type", 5, "int64", False),
        ("blobs", 6, "bytes", True),
    ],
    "Net": [
        ("name", 1, "bytes", False),
        ("layers", 2, "bytes", True),  # V1Layer, until 2014
        ("layer", 100, "bytes", True),  # Layer, since
    ],
}
NORM, POOL = (b"lrn", 15), (b"pooling", b"pool", 17)  # types by name, and V1's numbers for them
MOST_LAYERS = 10_000
LARGEST_MEAN = 2**24  # bytes; ImageNet's has 786,446


@dataclasses.dataclass(frozen=True)
class CaffeNet:
    """A caffemodel.

    Attributes:
      tensors: "conv1.blobs[0]" (kernel), "conv1.blobs[1]" (bias) and so on, without axes of one at
        their front, which old files fill up to four with.
      variant: "caffenet" where pooling comes before normalization, else "caffe"; None where the
        file has neither and does not bear their names.
    """

    tensors: dict[str, np.ndarray]
    variant: str | None


def read_caffemodel(path: Path) -> CaffeNet:
    """Reads a net as Caffe writes it, in any of its three generations.

    Raises:
      UserError: it is damaged, or no net with weights.
    """
    try:
        net = _parse("Net", read_bytes(path, LARGEST))
        if len(net.layer) + len(net.layers) > MOST_LAYERS:
            raise ValueError(f"it has more than {MOST_LAYERS:,} layers")
        layers = [_parse("Layer", data) for data in net.layer]
        for data in net.layers:
            old = _parse("V1Layer", data)
            layers.append(old.layer if old.HasField("layer") else old)
        tensors: dict[str, np.ndarray] = {}
        for layer in layers:
            for index, blob in enumerate(layer.blobs):
                name = f"{_text(layer.name)}.blobs[{index}]"
                if name in tensors:
                    raise ValueError(f"it has {name} twice")
                tensors[name] = _numbers(_parse("Blob", blob))
    except (OSError, DecodeError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read {path} as a caffemodel: {first_line(error)}") from None
    if not tensors:
        raise UserError(f"{path} holds no weights; expected a .caffemodel as Caffe writes it")
    return CaffeNet(tensors, _variant(layers, net.name))


def read_mean(path: Path) -> np.ndarray:
    """The mean image of a `.binaryproto`: float32[h, w, 3], RGB, or float32[h, w, 1], grey.

    A mean colour has one pixel.

    Raises:
      UserError: it is damaged, or no image.
    """
    try:
        mean = _numbers(_parse("Blob", read_bytes(path, LARGEST_MEAN))).astype(np.float32)
        if mean.ndim == 2:  # of one channel, an axis that is left out
            mean = mean[None]
        if mean.ndim != 3 or mean.shape[0] not in (1, 3):
            raise ValueError(f"it has {mean.shape} numbers; expected 3 colours, height and width")
    except (OSError, DecodeError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read {path} as a mean image: {first_line(error)}") from None
    return np.ascontiguousarray(mean.transpose(1, 2, 0)[:, :, ::-1])


def _numbers(blob: Any) -> np.ndarray:
    data, double_data = b"".join(blob.data), b"".join(blob.double_data)
    dtype = np.dtype("<f8" if double_data else "<f4")
    data = double_data or data
    shape = tuple(blob.shape.dim[:9]) or (blob.num, blob.channels, blob.height, blob.width)
    size = math.prod(shape) * dtype.itemsize
    if len(shape) > 8 or any(side < 0 for side in shape) or size != len(data):
        said = "×".join(map(str, shape))
        raise ValueError(f"a blob of {said} has {len(data) // dtype.itemsize:,} numbers")
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return np.frombuffer(data, dtype).reshape(shape)


def _variant(layers: list[Any], name: bytes) -> str | None:
    for layer in layers:
        kind = layer.type.lower() if isinstance(layer.type, bytes) else layer.type
        if kind in (*NORM, *POOL):
            return "caffenet" if kind in POOL else "caffe"
    return {b"caffenet": "caffenet", b"alexnet": "caffe"}.get(name.lower())


def _text(name: bytes) -> str:
    return name[:80].decode("utf-8", "replace")


def _parse(message: str, data: bytes) -> Any:
    result = _messages()[message]()
    result.ParseFromString(data)
    return result


@functools.cache
def _messages() -> dict[str, Any]:
    """The classes of the messages of `SCHEMA`."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="flax_alexnet/caffe.proto", package="flax_alexnet.caffe", syntax="proto2"
    )
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = described.field.add(name=name, number=number)
            field.label = field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL
            if kind in SCHEMA:
                field.type = field_type.TYPE_MESSAGE
                field.type_name = f".flax_alexnet.caffe.{kind}"
            else:
                field.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in SCHEMA
    }
