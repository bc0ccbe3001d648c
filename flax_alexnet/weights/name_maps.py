"""Maps names and axis orders of other systems to ours, and back.

| system | convolution | dense | fc6 reads | conv1 reads |
|---|---|---|---|---|
| Flax, and this package | (h, w, in / groups, out) | (in, out) | (h, w, c) | RGB |
| PyTorch's torchvision | (out, in, h, w) | (out, in) | (c, h, w) | RGB |
| Caffe | (out, in / groups, h, w) | (out, in) | (c, h, w) | BGR |
| caffe-tensorflow (guerzh/tf_weights) | (h, w, in / groups, out) | (in, out) | (h, w, c) | BGR |

All number the groups of a convolution alike: the first is the first half of the channels.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_alexnet.models.architectures import architecture, infer_shapes, parameter_shapes
from flax_alexnet.utils.errors import UserError, unknown
from flax_alexnet.weights.pretrained import (
    LPIPS_HEADS,
    MOST_CLASSES,
    Params,
    check_tensors,
    last_layers,
)
from flax_alexnet.weights.stored import Stored, Tensor, listed, numbers

DENSE = ("fc6", "fc7", "fc8")
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", *DENSE)
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, as OpenCV has it


@dataclasses.dataclass(frozen=True)
class NameMap:
    """A row of the table above.

    Attributes:
      names: the other system's names by ours, {"conv1/kernel": "features.0.weight", …}.
      channels_first: whether kernels begin with (out, in), and fc6 reads (c, h, w).
      bgr: whether conv1 reads blue, green, red.
    """

    names: Mapping[str, str]
    channels_first: bool = False
    bgr: bool = False

    def ours(self, path: str, value: np.ndarray, flattened: Sequence[int]) -> np.ndarray:
        """Converts the other system's parameter to ours; `flattened` is the (h, w, c) of fc6."""
        if self.channels_first and path == "fc6/kernel":
            height, width, channels = flattened
            value = value.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
            value = value.reshape(height * width * channels, -1)
        elif self.channels_first:
            value = value.transpose(_to_last(value.ndim))
        if self.bgr and path == "conv1/kernel":
            value = value[:, :, ::-1]
        return np.ascontiguousarray(value, np.float32)

    def theirs(self, path: str, value: np.ndarray, flattened: Sequence[int]) -> np.ndarray:
        """The inverse of `ours`."""
        if self.bgr and path == "conv1/kernel":
            value = value[:, :, ::-1]
        if self.channels_first and path == "fc6/kernel":
            value = value.reshape(*flattened, -1).transpose(3, 2, 0, 1)
            value = value.reshape(value.shape[0], -1)
        elif self.channels_first:
            value = value.transpose(np.argsort(_to_last(value.ndim)))
        return np.ascontiguousarray(value, np.float32)

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter in the other system, from its shape in ours."""
        order = np.argsort(_to_last(len(shape))) if self.channels_first else range(len(shape))
        return tuple(shape[axis] for axis in order)


def _to_last(ndim: int) -> tuple[int, ...]:
    """The axes that bring (out, in, h, w) to (h, w, in, out), and (out, in) to (in, out)."""
    return (*range(2, ndim), 1, 0) if ndim > 1 else (0,)


_TORCHVISION_LAYERS = dict(
    zip(
        LAYERS,
        (*(f"features.{i}" for i in (0, 3, 6, 8, 10)), *(f"classifier.{i}" for i in (1, 4, 6))),
        strict=True,
    )
)


def _names(kernel: str, bias: str, layers: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{layer}/{part}": ending.format(theirs)
        for layer, theirs in layers.items()
        for part, ending in (("kernel", kernel), ("bias", bias))
    }


_SAME = {layer: layer for layer in LAYERS}
FLAX = NameMap(_names("{}/kernel", "{}/bias", _SAME))
TORCHVISION = NameMap(_names("{}.weight", "{}.bias", _TORCHVISION_LAYERS), channels_first=True)
CAFFE = NameMap(_names("{}.blobs[0]", "{}.blobs[1]", _SAME), channels_first=True, bgr=True)
CAFFE_TENSORFLOW = NameMap(_names("{}[0]", "{}[1]", _SAME), bgr=True)
# LPIPS heads are 1 × 1 convolutions to one channel: with the names of the package lpips, and ours.
LPIPS = NameMap({head: f"{head}.model.1.weight" for head in LPIPS_HEADS}, channels_first=True)
FLAX_HEADS = NameMap({head: head for head in LPIPS_HEADS})


def name_dense(
    name_map: NameMap, tensors: Mapping[str, Tensor], file: object, head: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Renames the dense layers of a Caffe model to fc6, fc7 and fc8, whatever their names are.

    Users who fine-tune in Caffe rename the last layer, and perhaps others, so that Caffe does not
    fill them from the pretrained file. A layer with another name is recognized by its shape.

    Args:
      name_map: a map in which layers have the same names as ours.
      tensors: the tensors by their names in the file.
      file: the name of the file in messages.
      head: the name of the last layer, if there are several candidates; the others are left out.

    Returns:
      The tensors, and a line that says how layers were renamed, if any were.

    Raises:
      UserError: there are several candidates for the last layer, or none is called `head`.
    """
    kernel, bias = (
        name_map.names[f"fc8/{part}"].removeprefix("fc8") for part in ("kernel", "bias")
    )
    layers = [name.removesuffix(kernel) for name in tensors if name.endswith(kernel)]
    shapes, _ = _shapes("caffe", 1000)

    def others(layer: str, *known: str | None) -> list[str]:
        """Layers of other names that could be `layer`."""
        result = []
        for name in (name for name in layers if name not in (*LAYERS, *known)):
            inputs, outputs = shapes[f"{layer}/kernel"]
            sides = [tensors[name + end].shape for end in (kernel, bias) if name + end in tensors]
            if layer == "fc8":
                outputs = math.prod(sides[-1])  # as many classes as there are
            if sides == [name_map.their_shape((inputs, outputs)), (outputs,)]:
                result.append(name)
        return result

    named = {}  # ours by theirs
    for layer in ("fc6", "fc7"):
        candidates = others(layer, head)
        if layer not in layers and len(candidates) == 1:
            named[candidates[0]] = layer
    last = [name for name in layers if name == "fc8"] + others("fc8", *named)
    if head is None and len(last) > 1:
        raise UserError(
            f"{file} has several last layers, {listed(last)}: choose one with convert --head "
            "NAME, or load(…, head=NAME)"
        )
    if head not in (None, *last):
        raise UserError(f"{file}: {unknown('last layer', str(head), last)}")
    named |= {name: "fc8" for name in last if head in (None, name)}
    left_out = [name for name in last if name not in named]
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        end = next((end for end in (kernel, bias) if name.endswith(end)), "")
        theirs = name.removesuffix(end)
        if theirs not in left_out:
            result[named.get(theirs, theirs) + end] = value
    what = {"fc6": "fc6", "fc7": "fc7", "fc8": "the last layer"}
    notes = [f"{name} is taken for {what[ours]}" for name, ours in named.items() if name != ours]
    notes += [f"{name} is left out" for name in left_out]
    return result, [f"note: {listed(notes)}"] if notes else []


def read_grey(
    name_map: NameMap, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Converts a model of grey images to one whose conv1 converts colours to grey itself.

    Returns:
      The tensors, and a line that says so; nothing is changed if conv1 reads colours.
    """
    name = name_map.names["conv1/kernel"]
    axis = 1 if name_map.channels_first else 2
    kernel = tensors.get(name)
    if kernel is None or kernel.ndim != 4 or kernel.shape[axis] != 1:
        return dict(tensors), []
    colors = GREY[::-1] if name_map.bgr else GREY

    def colored() -> np.ndarray:
        grey = numbers(kernel)
        return np.concatenate([grey * color for color in colors], axis)

    shape = (*kernel.shape[:axis], len(colors), *kernel.shape[axis + 1 :])
    note = "note: the model reads grey images; conv1 converts colours: R .299 G .587 B .114"
    return {**tensors, name: Stored(shape, kernel.dtype, colored)}, [note]


def read_params(
    name_map: NameMap, tensors: Mapping[str, Tensor], variant: str, file: object
) -> tuple[Params, int]:
    """Parameters under our names, and the number of classes, which the last layer determines.

    A trunk, which lacks all dense layers or the last ones, gets the published number of classes.

    Raises:
      UserError: tensors are missing, surplus, misshaped, or not of floating-point numbers; the
        message names all of them.
    """
    last = tensors.get(name_map.names["fc8/bias"])
    published = architecture(variant)
    num_classes = published.num_classes
    if last is not None and last.ndim == 1 and 1 <= last.shape[0] <= MOST_CLASSES:
        num_classes = last.shape[0]
    shapes, flattened = _shapes(variant, num_classes)
    optional = [frozenset(name_map.names[path] for path in last) for last in last_layers(shapes)]
    params = _read(name_map, tensors, shapes, file, optional, flattened)
    return unflatten_dict(params, sep="/"), num_classes


def read_heads(
    name_map: NameMap, tensors: Mapping[str, Tensor], params: Params, file: object
) -> dict[str, np.ndarray]:
    """LPIPS heads, {"lin0": float32[1, 1, c, 1], …}, for the convolutions of `params`.

    Raises:
      UserError: as `read_params`.
    """
    features = [params[layer]["bias"].shape[0] for layer in LAYERS if layer not in DENSE]
    shapes = {head: (1, 1, n, 1) for head, n in zip(LPIPS_HEADS, features, strict=True)}
    return _read(name_map, tensors, shapes, file)


def _read(
    name_map: NameMap,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    file: object,
    optional: Collection[frozenset[str]] = (),
    flattened: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    check_tensors(
        {name: value.shape for name, value in tensors.items()},
        {name_map.names[path]: name_map.their_shape(shape) for path, shape in shapes.items()},
        file,
        optional,
    )
    whole = [name for name, v in tensors.items() if not jnp.issubdtype(v.dtype, jnp.floating)]
    if whole:
        raise UserError(
            f"{file} does not fit: not floating-point numbers are {listed(whole)}; take weights "
            "that have not been quantized"
        )
    values = {path: tensors[name] for path, name in name_map.names.items() if name in tensors}
    # The values are read only after all checks, one tensor after another.
    return {path: name_map.ours(path, numbers(value), flattened) for path, value in values.items()}


def write_params(name_map: NameMap, params: Params, variant: str) -> dict[str, np.ndarray]:
    """The inverse of `read_params`: tensors by their names."""
    _, flattened = _shapes(variant, 2)
    return {
        name_map.names[path]: name_map.theirs(path, np.asarray(value), flattened)
        for path, value in flatten_dict(params, sep="/").items()
    }


def _shapes(variant: str, num_classes: int) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Our shapes of the parameters, and the (h, w, c) that fc6 reads."""
    table = architecture(variant)
    layers = table.scaled(num_classes)
    infos = infer_shapes(layers, table.image_size, table.image_size)
    flattened = next(
        before.shape for before, info in itertools.pairwise(infos) if info.layer.name == "fc6"
    )
    return parameter_shapes(layers, table.image_size, table.image_size), flattened
