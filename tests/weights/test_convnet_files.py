"""Checkpoints of the original code, written here as its `layer.py` and `gpumodel.py` write them."""

import io
import itertools
import pickle
import struct
import zipfile

import numpy as np
import pytest

from flax_alexnet.models.architectures import (
    Conv,
    Dense,
    Local,
    Weighted,
    architecture,
    infer_shapes,
)
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import load
from flax_alexnet.weights.convnet_files import read_checkpoint, read_data_meta
from tests.small_models import make_pretrained


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


def dump(value):
    buffer = io.BytesIO()
    Python2(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def theirs(layer, kernel, before):
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


def their_biases(layer, bias):
    if isinstance(layer, Dense):
        return np.asfortranarray(bias.reshape(1, -1))
    return bias.transpose(2, 0, 1).reshape(-1, 1) if bias.ndim == 3 else bias.reshape(-1, 1)


def layers_of(pretrained):
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
            entry["weights"] = [theirs(layer, params["kernel"], before)]
            entry["weightsInc"] = [np.zeros_like(entry["weights"][0])]
            entry["biases"] = their_biases(layer, params["bias"])
        layers.append(entry)
        before = info.shape
    return layers


def checkpoint_of(layers):
    return {"op": OptionsParser(), "model_state": {"layers": layers, "epoch": 140, "batchnum": 1}}


def cifar_model(variant, num_classes=10):
    size = architecture(variant).image_size
    return make_pretrained(variant, num_classes, size, 32, width=1.0)


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name, layer in expected.items():
        for part in ("kernel", "bias"):
            np.testing.assert_array_equal(params[name][part], layer[part], err_msg=name)


CIFAR = ["80sec", "19pct", "18pct", "13pct", "11pct"]


@pytest.mark.parametrize("name", CIFAR)
def test_the_models_of_cifar_are_told_apart_and_read(name, tmp_path):
    pretrained = cifar_model(f"cuda_convnet_{name}")
    path = tmp_path / "140.1"
    path.write_bytes(dump(checkpoint_of(layers_of(pretrained))))
    loaded = load.load(path)
    assert (loaded.config.variant, loaded.num_classes) == (f"cuda_convnet_{name}", 10)
    assert_same(loaded.params, pretrained.params)
    rule = loaded.preprocessing
    crop = 24 if name in ("13pct", "11pct") else 32
    assert (rule.image_size, rule.crop_size, rule.scale) == (32, crop, 1.0)


def towers_of(pretrained):
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
                matrix = theirs(layer, half, before)
                weights = np.split(matrix, len(inputs))
                if theirs_name == "fc2048bb":
                    inputs, weights = inputs[::-1], weights[::-1]
                layers[theirs_name] = {
                    "name": theirs_name,
                    "type": "fc" if isinstance(layer, Dense) else "conv",
                    "inputs": inputs,
                    "weights": weights,
                    "biases": their_biases(layer, half_bias),
                }
        before = info.shape
    return layers


def test_two_towers_are_put_together(tmp_path):
    """By the names of layers, as the code of 2014 has them; a narrow model is enough."""
    pretrained = make_pretrained("original", 7, 224, 256, width=1.0, seed=1)
    path = tmp_path / "90.1"
    path.write_bytes(dump(checkpoint_of(towers_of(pretrained))))
    found = read_checkpoint(path)
    assert (found.variant, found.num_classes) == ("original", 7)
    assert_same(found.params, pretrained.params)


def test_a_compressed_checkpoint_is_the_same(tmp_path):
    pretrained = cifar_model("cuda_convnet_18pct", 4)
    path = tmp_path / "10.2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", dump(checkpoint_of(layers_of(pretrained))))
    loaded = load.load(path)
    assert loaded.num_classes == 4
    assert_same(loaded.params, pretrained.params)


def meta(size=32, names=("airplane", "automobile")):
    mean = np.random.default_rng(0).uniform(0, 255, (3 * size * size, 1)).astype(np.float32)
    return {"data_mean": mean, "label_names": list(names), "num_vis": 3 * size * size}


def test_the_mean_image_and_the_names_of_classes_are_in_batches_meta(tmp_path):
    path = tmp_path / "batches.meta"
    path.write_bytes(dump(meta()))
    mean, names = read_data_meta(path)
    assert names == ("airplane", "automobile")
    assert mean[5, 7, 2] == meta()["data_mean"][2 * 1024 + 5 * 32 + 7, 0]

    checkpoint = tmp_path / "140.1"
    checkpoint.write_bytes(dump(checkpoint_of(layers_of(cifar_model("cuda_convnet_13pct", 2)))))
    pretrained, _ = load.read(checkpoint, mean=path)
    np.testing.assert_array_equal(pretrained.preprocessing.mean, mean)
    assert pretrained.label_names == names


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("model_state"), "it has no model_state with layers"),
        (lambda c: c.update(model_state=[]), "it has no model_state with layers"),
        (lambda c: c["model_state"]["layers"].pop(), "is of a model with the layers conv1, conv2"),
        (lambda c: c["model_state"]["layers"][1].pop("biases"), "cannot be read|cannot read"),
        (
            lambda c: c["model_state"]["layers"][1]["weights"].append(np.zeros(3, np.float32)),
            "conv1 reads 1 layers by 2 weights",
        ),
        (
            lambda c: c["model_state"]["layers"][1].update(weights=[np.zeros((9, 9), np.float32)]),
            r"does not fit cuda_convnet_19pct: conv1 has arrays of \[\(9, 9\)",
        ),
        (
            lambda c: c["model_state"]["layers"][1].update(weights=[OptionsParser()]),
            "conv1 has something else than arrays of numbers",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, says, tmp_path):
    content = checkpoint_of(layers_of(cifar_model("cuda_convnet_19pct")))
    change(content)
    path = tmp_path / "140.1"
    path.write_bytes(dump(content))
    with pytest.raises(UserError, match=says) as error:
        load.load(path)
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_meta_of_another_kind(tmp_path):
    path = tmp_path / "140.1"
    path.write_bytes(dump(checkpoint_of(layers_of(cifar_model("cuda_convnet_19pct"))))[:-2000])
    with pytest.raises(UserError, match=r"cannot read .* as a checkpoint of cuda-convnet"):
        load.load(path)
    other = tmp_path / "batches.meta"
    for content in ({"data_mean": np.zeros(10, np.float32)}, {"nothing": 1}, [1]):
        other.write_bytes(dump(content))
        with pytest.raises(UserError, match=r"cannot read .* as a batches\.meta"):
            read_data_meta(other)
