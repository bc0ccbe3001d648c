"""Checkpoints of the original code (cuda-convnet, 2011 to 2014), as its `convnet.py` saves them.

Such a file is a pickle, {"model_state": {"layers": [...], "epoch": …}, "op": …}, perhaps in a zip
archive. A layer is a dictionary with its name, its type, the layers that it reads, a matrix of
weights for each of these, and biases (`WeightLayerParser` in `layer.py`). Of a layer with c input
channels and kernels of k × k pixels, the matrices are

| layer | weights | biases |
|---|---|---|
| conv | (c · k · k, features) | (features, 1) |
| local | (h' · w' · c · k · k, features) | (features · h' · w', 1) |
| fc | (inputs, features); inputs that are maps are (c, h, w) | (1, features) |

Two towers are two layers whose names end in a and b. Images are RGB.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_alexnet.models.architectures import (
    Conv,
    Dense,
    Local,
    Weighted,
    architecture,
    infer_shapes,
)
from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.utils.text import printable
from flax_alexnet.weights.archives import open_member, open_zip
from flax_alexnet.weights.pickles import NONSENSE, NUMPY, PickleError, read_pickle
from flax_alexnet.weights.stored import LARGEST, listed

LARGEST_PICKLE = 10**9  # bytes: the weights, their velocities, and lists of errors of a training
# The layers of the files by ours; those of two towers are two.
TOWERS = {f"conv{stage}": (f"conv{stage}a", f"conv{stage}b") for stage in range(1, 6)}
ORIGINAL = {
    **TOWERS,
    "fc6": ("fc2048a", "fc2048b"),
    "fc7": ("fc2048ba", "fc2048bb"),
    "fc8": ("fc1000",),
}
DAMAGED = (*NONSENSE, OSError, zipfile.BadZipFile, zlib.error, PickleError)


class Convnet(NamedTuple):
    """What a checkpoint has of a model."""

    variant: str
    params: dict[str, dict[str, np.ndarray]]  # by our names, in our layout
    num_classes: int


class DataMeta(NamedTuple):
    """What the `batches.meta` of a dataset says."""

    mean: np.ndarray  # float32[size, size, 3], RGB
    label_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The arrays of a layer of a file, in the order of the layers that it reads."""

    weights: tuple[np.ndarray, ...]
    biases: np.ndarray


def read_checkpoint(path: Path) -> Convnet:
    """The model in a checkpoint of the original code.

    Raises:
      UserError: the file is damaged, is no such checkpoint, or is of a model that is none of the
        variants `original` and `cuda_convnet_…`.
    """
    try:
        layers, kinds = _layers(_read(path))
    except DAMAGED as error:
        raise UserError(
            f"cannot read {path} as a checkpoint of cuda-convnet: {first_line(error)}"
        ) from None
    variant = _variant(layers, kinds, path)
    names = ORIGINAL if variant == "original" else {name: (name,) for name in layers}
    last = architecture(variant).layers[-1].name
    num_classes = layers[names[last][0]].biases.size
    return Convnet(variant, _params(variant, layers, names, num_classes, path), num_classes)


def read_data_meta(path: Path) -> DataMeta:
    """The mean image and the label names in a `batches.meta` of the original code.

    Raises:
      UserError: the file is damaged, or has no mean of square images in three colours.
    """
    try:
        content = _read(path)
        values = np.asarray(content["data_mean"], np.float32)
        size = round((values.size / 3) ** 0.5)
        mean = values.reshape(3, size, size).transpose(1, 2, 0)
        names = content.get("label_names")
        names = names if isinstance(names, list) else []
        return DataMeta(np.ascontiguousarray(mean), tuple(printable(str(name)) for name in names))
    except DAMAGED as error:
        raise UserError(f"cannot read {path} as a batches.meta: {first_line(error)}") from None


def _read(path: Path) -> Mapping[str, Any]:
    """The dictionary that a file of the original code holds."""
    with open_regular(path, LARGEST) as file:
        if file.read(2) == b"PK":
            with open_zip(path) as archive, open_member(archive, "data") as member:
                content = read_pickle(member, NUMPY, largest=LARGEST_PICKLE)
        else:
            file.seek(0)
            content = read_pickle(file, NUMPY, largest=LARGEST_PICKLE)
    if not isinstance(content, dict):
        raise PickleError("it holds something else than a dictionary")
    return content


def _layers(content: Mapping[str, Any]) -> tuple[dict[str, _Layer], set[str]]:
    """The layers with weights by their names, and the types of all layers."""
    state = content.get("model_state")
    if not isinstance(state, dict) or "layers" not in state:
        raise PickleError("it has no model_state with layers")
    listed_layers = state["layers"]
    if isinstance(listed_layers, dict):  # by name, since 2014
        listed_layers = list(listed_layers.values())
    names = [printable(str(layer["name"])) for layer in listed_layers]
    result = {}
    for name, layer in zip(names, listed_layers, strict=True):
        if "weights" in layer:
            inputs = [i if isinstance(i, str) else names[i] for i in layer["inputs"]]
            arrays = [*layer["weights"], layer["biases"]]
            if not all(isinstance(a, np.ndarray) and a.dtype.kind == "f" for a in arrays):
                raise PickleError(f"{name} has something else than arrays of numbers")
            if len(inputs) != len(arrays) - 1:
                raise PickleError(f"{name} reads {len(inputs)} layers by {len(arrays) - 1} weights")
            # The first tower comes first in our layout; a layer may read it second.
            order = sorted(range(len(inputs)), key=lambda index: inputs[index])
            weights = tuple(arrays[index] for index in order)
            result[name] = _Layer(weights, arrays[-1])
    return result, {str(layer["type"]) for layer in listed_layers}


def _variant(layers: Mapping[str, _Layer], kinds: set[str], path: Path) -> str:
    """The variant whose layers these are."""
    match sorted(layers):
        case ["conv1", "conv2", "conv3", "fc10"]:
            return "cuda_convnet_18pct" if "rnorm" in kinds else "cuda_convnet_19pct"
        case ["conv1", "conv2", "conv3", "fc10", "fc64"]:
            return "cuda_convnet_80sec"
        case ["conv1", "conv2", "fc10", "local3", "local4"]:
            return "cuda_convnet_11pct" if "cmrnorm" in kinds else "cuda_convnet_13pct"
        case names if names == sorted(name for pair in ORIGINAL.values() for name in pair):
            return "original"
        case names:
            raise UserError(
                f"{path} is of a model with the layers {listed(names)}; expected those of the "
                "variant original, or of a cuda_convnet_… model"
            )


def _params(
    variant: str,
    layers: Mapping[str, _Layer],
    names: Mapping[str, Sequence[str]],
    num_classes: int,
    path: Path,
) -> dict[str, dict[str, np.ndarray]]:
    table = architecture(variant)
    result = {}
    before: tuple[int, ...] = (table.image_size, table.image_size, 3)
    for info in infer_shapes(table.scaled(num_classes), table.image_size, table.image_size):
        if isinstance(info.layer, Weighted):
            parts = [layers[name] for name in names[info.layer.name]]
            try:
                result[info.layer.name] = _converted(info.layer, before, info.shape, parts)
            except ValueError:
                shapes = [array.shape for part in parts for array in (*part.weights, part.biases)]
                raise UserError(
                    f"{path} does not fit {variant}: {info.layer.name} has arrays of {shapes}"
                ) from None
        before = info.shape
    return result


def _converted(
    layer: Weighted, before: tuple[int, ...], after: tuple[int, ...], parts: Sequence[_Layer]
) -> dict[str, np.ndarray]:
    """Kernel and bias in our layout; each part has a share of the features.

    Raises:
      ValueError: the arrays are of another size than the layer's.
    """
    kernels, biases = [], []
    for part in parts:
        features = after[-1] // len(parts)
        match layer:
            case Conv(kernel_size=side):
                arrays = [w.reshape(-1, side, side, features) for w in part.weights]
                kernels.append(np.concatenate(arrays).transpose(1, 2, 0, 3))
                biases.append(part.biases.reshape(features))
            case Local(kernel_size=side):
                (weights,) = part.weights
                places = after[:2]
                kernel = weights.reshape(*places, before[-1], side, side, features)
                kernels.append(kernel.transpose(0, 1, 3, 4, 2, 5))
                biases.append(part.biases.reshape(features, *places).transpose(1, 2, 0))
            case Dense():
                maps = before[:-1]
                arrays = [w.reshape(-1, *maps, features) for w in part.weights]
                kernel = np.moveaxis(np.concatenate(arrays), 0, len(maps))
                kernels.append(kernel.reshape(-1, features))
                biases.append(part.biases.reshape(features))
    kernel, bias = np.concatenate(kernels, -1), np.concatenate(biases, -1)
    groups = layer.groups if isinstance(layer, Conv) else 1
    if not isinstance(layer, Dense) and kernel.shape[-2] != before[-1] // groups:
        raise ValueError("another number of channels")
    if isinstance(layer, Dense) and len(kernel) != np.prod(before):
        raise ValueError("another number of inputs")
    return {
        "kernel": np.ascontiguousarray(kernel, np.float32),
        "bias": np.ascontiguousarray(bias, np.float32),
    }
