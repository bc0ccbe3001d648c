"""Weight files of PyTorch, Caffe and cuda-convnet, written field by field, without these."""

import dataclasses
import io
import itertools
import pickle
import struct
import zipfile
from typing import ClassVar

import numpy as np

from flax_alexnet.commands.convert import main
from flax_alexnet.models.architectures import (
    Conv,
    Dense,
    Local,
    Weighted,
    architecture,
    infer_shapes,
)

CONVOLUTIONS = {  # torchvision's, in its own order
    "features.0": (64, 3, 11, 11),
    "features.3": (192, 64, 5, 5),
    "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3),
    "features.10": (256, 256, 3, 3),
}


def assert_is_trunk(pretrained, trunk):
    for index, layer in enumerate(CONVOLUTIONS, 1):
        kernel, bias = (
            pretrained.params[f"conv{index}"]["kernel"],
            pretrained.params[f"conv{index}"]["bias"],
        )
        np.testing.assert_array_equal(kernel, np.moveaxis(trunk[f"{layer}.weight"], (0, 1), (3, 2)))
        np.testing.assert_array_equal(bias, trunk[f"{layer}.bias"])
    assert not pretrained.is_classifier


def refused(capsys, *argv):
    """The one line with which the command refuses."""
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# What `torch.save` writes, without PyTorch.


class Named:
    """A name that is written into a pickle as it is."""

    def __init__(self, module, name):
        self.path = module, name

    def __call__(self):
        raise NotImplementedError


@dataclasses.dataclass
class Tensor:
    """A tensor, whose fields may be set to what cannot be."""

    storage: tuple
    offset: int
    shape: tuple
    strides: tuple

    def __reduce__(self):
        rebuild = Named("torch._utils", "_rebuild_tensor_v2")
        return rebuild, (self.storage, self.offset, self.shape, self.strides, False, {})


class TorchPickler(pickle._Pickler):
    """Protocol 2, with storages as persistent ids."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def save_pers(self, identity):
        self.save(identity, save_persistent_id=False)
        self.write(pickle.BINPERSID)

    def save(self, value, save_persistent_id=True):
        # Only the tuple itself is an id, and not when it is written as one.
        if not save_persistent_id:
            return self.save_tuple(value)
        return super().save(value)

    def save_named(self, named):
        self.write("c{}\n{}\n".format(*named.path).encode())

    dispatch[Named] = save_named


def torch_pickle(value):
    stream = io.BytesIO()
    TorchPickler(stream, 2).dump(value)
    return stream.getvalue()


def torch_tensor(key, value, *view):
    names = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long"}
    kind = Named("torch", names[value.dtype.str[1:]] + "Storage")
    strides = tuple(stride // value.itemsize for stride in value.strides)
    return Tensor(("storage", kind, key, "cpu", value.size, *view), 0, value.shape, strides)


def zip_pth(path, arrays, order="little", value=None, compression=zipfile.ZIP_STORED):
    tensors = {n: torch_tensor(str(key), v) for key, (n, v) in enumerate(arrays.items())}
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", torch_pickle(value or tensors))
        file.writestr("model/byteorder", order)
        for key, array in enumerate(arrays.values()):
            data = array.astype(array.dtype.newbyteorder(order)).tobytes()
            file.writestr(f"model/data/{key}", data)
    return path


def legacy_pth(path, arrays, order="little", value=None):
    tensors = {n: torch_tensor(n.upper(), v, None) for n, v in arrays.items()}
    facts = {"little_endian": order == "little"}
    parts = [0x1950A86A20F9469CFC6C, 1001, facts, value or tensors]
    data = b"".join(map(torch_pickle, [*parts, [name.upper() for name in arrays]]))
    for array in arrays.values():
        data += array.size.to_bytes(8, order)
        data += array.astype(array.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(data)
    return path


# Caffe, written field by field as the format has it: (number, payload) pairs.


def varint(number):
    digits = b""
    while number > 127:
        digits += bytes([number % 128 + 128])
        number //= 128
    return digits + bytes([number])


def message(*fields):
    """Each field is (number, value): a whole number, or bytes, whose length is written first."""
    result = b""
    for number, value in fields:
        if isinstance(value, int):
            result += varint(number << 3) + varint(value)
        else:
            result += varint(number << 3 | 2) + varint(len(value)) + value
    return result


def blob(value, old=True):
    numbers = (5, value.astype("<f4").tobytes())
    if old:
        sides = (1,) * (4 - value.ndim) + value.shape
        return message(*enumerate(sides, 1), numbers)
    return message((7, message((1, b"".join(map(varint, value.shape))))), numbers)


CAFFE_SHAPES = {
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
}
KINDS = {
    "new": {"conv": b"Convolution", "norm": b"LRN", "pool": b"Pooling"},
    "v1": {"conv": 4, "norm": 15, "pool": 17},
    "v0": {"conv": b"conv", "norm": b"lrn", "pool": b"pool"},
}


def caffemodel(path, generation="v1", order=("norm1", "pool1"), values=None, name=b"model"):
    """A trunk of Caffe's, in one of its three generations."""
    rng = np.random.default_rng(0)
    values = values or {}
    layers = []
    for layer in ("conv1", *order, "conv2", "conv3", "conv4", "conv5"):
        kind, title = KINDS[generation][layer[:4]], layer.encode()
        blobs = []
        if layer in CAFFE_SHAPES:
            shape = CAFFE_SHAPES[layer]
            kernel = values.get(layer, rng.standard_normal(shape, np.float32))
            blobs = [
                blob(kernel, generation != "new"),
                blob(kernel[:, 0, 0, 0], generation != "new"),
            ]
        if generation == "new":
            layers.append((100, message((1, title), (2, kind), *((7, b) for b in blobs))))
        elif generation == "v1":
            layers.append((2, message((4, title), (5, kind), *((6, b) for b in blobs))))
        else:
            old = message((1, title), (2, kind), *((50, b) for b in blobs))
            layers.append((2, message((1, old))))
    path.write_bytes(message((1, name), *layers))
    return path


# Checkpoints of cuda-convnet, written as its `layer.py` and `gpumodel.py` write them.


class Python2(pickle._Pickler):
    """Writes texts and bytes as Python 2 wrote its strings, which were both."""

    def save_string(self, value):
        data = value.encode("latin-1") if isinstance(value, str) else value
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


class OptionsParser:
    """An object of a class of the original code, which lies in each of its checkpoints."""


def dump_python2(value):
    buffer = io.BytesIO()
    Python2(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def convnet_matrix(layer, kernel, before):
    """A kernel as the matrix that the original code has, number by number.

    Rows count channels, then the rows and columns of a kernel or of a map.
    """
    match layer:
        case Conv(kernel_size=side):
            matrix = np.empty((kernel.shape[2] * side * side, kernel.shape[3]), np.float32)
            for y, x, c in itertools.product(range(side), range(side), range(kernel.shape[2])):
                matrix[(c * side + y) * side + x] = kernel[y, x, c]
        case Local(kernel_size=side):
            rows, columns, _, _, channels, features = kernel.shape
            matrix = np.empty((rows * columns * channels * side * side, features), np.float32)
            for i, j, y, x, c in itertools.product(
                *map(range, (rows, columns, side, side, channels))
            ):
                place = i * columns + j
                matrix[((place * channels + c) * side + y) * side + x] = kernel[i, j, y, x, c]
        case Dense() if len(before) == 3:
            height, width, channels = before
            matrix = np.empty_like(kernel)
            for y, x, c in itertools.product(*map(range, before)):
                matrix[(c * height + y) * width + x] = kernel[(y * width + x) * channels + c]
        case Dense():
            matrix = kernel
    return np.asfortranarray(matrix) if isinstance(layer, Dense) else matrix


def convnet_biases(layer, bias):
    if isinstance(layer, Dense):
        return np.asfortranarray(bias.reshape(1, -1))
    return bias.transpose(2, 0, 1).reshape(-1, 1) if bias.ndim == 3 else bias.reshape(-1, 1)


def convnet_layers(pretrained):
    """The layers of a model of one tower: dictionaries in a list, which read by their numbers."""
    table, size = architecture(pretrained.config.variant), pretrained.preprocessing.crop_size
    layers = [{"name": "data", "type": "data", "inputs": []}]
    before = (size, size, 3)
    for info in infer_shapes(table.scaled(pretrained.num_classes), size, size):
        layer = info.layer
        kind = {"Norm": "cmrnorm", "MapNorm": "rnorm", "Dense": "fc"}.get(
            type(layer).__name__, type(layer).__name__.lower()
        )
        entry = {"name": layer.name, "type": kind, "inputs": [len(layers) - 1]}
        if isinstance(layer, Weighted):
            params = pretrained.params[layer.name]
            entry["weights"] = [convnet_matrix(layer, params["kernel"], before)]
            entry["weightsInc"] = [np.zeros_like(entry["weights"][0])]
            entry["biases"] = convnet_biases(layer, params["bias"])
        layers.append(entry)
        before = info.shape
    return layers


def convnet_checkpoint(layers):
    return {"op": OptionsParser(), "model_state": {"layers": layers, "epoch": 140, "batchnum": 1}}


def convnet_meta(size=32, names=("airplane", "automobile")):
    mean = np.random.default_rng(0).uniform(0, 255, (3 * size * size, 1)).astype(np.float32)
    return {"data_mean": mean, "label_names": list(names), "num_vis": 3 * size * size}


def convnet_towers(pretrained):
    """The layers of #145, as dictionaries by their names; fc2048bb reads the second tower first."""
    size = pretrained.preprocessing.crop_size
    table = architecture("original").scaled(pretrained.num_classes)
    layers = {"data": {"name": "data", "type": "data", "inputs": []}}
    shapes = {"": (size, size, 3)}
    reads = {
        "conv1": ["data"],
        "conv2": ["pool1"],
        "conv3": ["pool2a", "pool2b"],
        "conv4": ["conv3"],
        "conv5": ["conv4"],
        "fc6": ["pool3a", "pool3b"],
        "fc7": ["hs1a", "hs1b"],
        "fc8": ["hs2a", "hs2b"],
    }
    names = {"fc6": "fc2048", "fc7": "fc2048b"}
    before = shapes[""]
    for info in infer_shapes(table, size, size):
        layer = info.layer
        if isinstance(layer, Weighted):
            kernel, bias = (pretrained.params[layer.name][part] for part in ("kernel", "bias"))
            parts = [("fc1000", kernel, bias)]
            if layer.name != "fc8":
                halves = zip(np.split(kernel, 2, -1), np.split(bias, 2, -1), strict=True)
                base = names.get(layer.name, layer.name)
                parts = [(base + tower, *half) for tower, half in zip("ab", halves, strict=True)]
            for theirs_name, half, half_bias in parts:
                inputs = list(reads[layer.name])
                matrix = convnet_matrix(layer, half, before)
                weights = np.split(matrix, len(inputs))
                if theirs_name == "fc2048bb":
                    inputs, weights = inputs[::-1], weights[::-1]
                layers[theirs_name] = {
                    "name": theirs_name,
                    "type": "fc" if isinstance(layer, Dense) else "conv",
                    "inputs": inputs,
                    "weights": weights,
                    "biases": convnet_biases(layer, half_bias),
                }
        before = info.shape
    return layers
