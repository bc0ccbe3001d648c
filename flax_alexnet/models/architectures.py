"""The variants of AlexNet as tables of layers, and the arithmetic of shapes over them.

A variant is a frozen description, and `flax_alexnet.AlexNet` computes what it describes. Every
difference between the variants (sizes, padding, groups, order of pooling and normalization, initial
values) is in these tables and nowhere else.

Sources: the TensorFlow notebook this project starts from; Krizhevsky, Sutskever and Hinton,
"ImageNet Classification with Deep Convolutional Neural Networks" (2012), with its source code's
model #145 for what the paper leaves open; Caffe's bvlc_alexnet and bvlc_reference_caffenet;
torchvision's `alexnet` ("One weird trick", 2014); cuda-convnet's `example-layers`.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

from flax_alexnet.utils.errors import UserError, unknown

# "SAME" and "VALID" as in TensorFlow; "CEIL" lets the last window hang over the far edge, as Caffe
# and cuda-convnet do; a pair is (before, after), the same for height and width.
Padding = Literal["SAME", "VALID", "CEIL"] | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A square convolution, then the activation function if `activation` is True.

    `kernel_std` is the standard deviation of a normal initializer and `bias` a constant; None for
    both is PyTorch's default, uniform in ±1/sqrt(fan in).
    """

    name: str
    features: int
    kernel_size: int
    stride: int = 1
    padding: Padding = "VALID"
    groups: int = 1
    kernel_std: float | None = 0.01
    bias: float | None = 0.0
    activation: bool = True


@dataclasses.dataclass(frozen=True)
class Local:
    """A locally connected layer, then the activation function.

    It is a square convolution of stride 1 with a kernel and a bias for each place of its output,
    so it takes maps of one size only (cuda-convnet's `local`, with unshared biases).
    """

    name: str
    features: int
    kernel_size: int
    padding: Padding = "VALID"
    kernel_std: float | None = 0.01
    bias: float | None = 0.0
    stride: ClassVar[int] = 1
    activation: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer on the flattened (height, width, channel) input, then the activation function.

    `features=None` marks the last layer: it has one feature per class and no activation function.
    """

    name: str
    features: int | None
    kernel_std: float | None = 0.01
    bias: float | None = 0.0
    activation: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Norm:
    """Local response normalization, in TensorFlow's convention (`alpha` not divided by n)."""

    name: str
    depth_radius: int
    bias: float
    alpha: float
    beta: float = 0.75
    groups: int = 1
    activation: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class MapNorm:
    """Normalization within each map, over a square window, with `alpha` not divided by its pixels.

    cuda-convnet's `rnorm`, and Caffe's `WITHIN_CHANNEL`, divide it.
    """

    name: str
    kernel_size: int
    bias: float
    alpha: float
    beta: float = 0.75
    activation: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Pool:
    """A square pooling window; `AVERAGE` counts only the pixels that lie inside the image.

    The activation function follows if `activation` is True.
    """

    name: str
    kernel_size: int
    stride: int
    kind: Literal["MAX", "AVERAGE"] = "MAX"
    padding: Padding = "VALID"
    activation: bool = False


@dataclasses.dataclass(frozen=True)
class AdaptivePool:
    """Average pooling to `size` × `size` for any input size (PyTorch's AdaptiveAvgPool2d)."""

    name: str
    size: int
    activation: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout; the rate is the model's."""

    name: str
    activation: ClassVar[bool] = False


Weighted = Conv | Local | Dense  # layers with a kernel and a bias
Layer = Weighted | Norm | MapNorm | Pool | AdaptivePool | Dropout


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A variant: its layers, and the image size and number of classes it was published with."""

    name: str
    image_size: int
    num_classes: int
    layers: tuple[Layer, ...]

    @property
    def groups(self) -> int:
        """The largest number of groups of any convolution: 2 where the model has two towers."""
        return max(layer.groups for layer in self.layers if isinstance(layer, Conv))

    def scaled(self, num_classes: int, width: float = 1.0) -> tuple[Layer, ...]:
        """The layers with `width` times the features (whole per group), `num_classes` outputs."""

        def scale(layer: Layer) -> Layer:
            if isinstance(layer, Weighted):
                if layer.features is None:
                    return dataclasses.replace(layer, features=num_classes)
                per_group = max(1, round(layer.features * width / self.groups))
                return dataclasses.replace(layer, features=per_group * self.groups)
            return layer

        return tuple(scale(layer) for layer in self.layers)


NOTEBOOK = Architecture(
    "notebook",
    224,
    1000,
    (
        Conv("conv1", 96, 11, 4, "SAME"),
        Norm("norm1", depth_radius=5, bias=2.0, alpha=1e-4),
        Pool("pool1", 2, 1),
        Conv("conv2", 256, 5, 2, "SAME", bias=1.0),
        Norm("norm2", depth_radius=5, bias=2.0, alpha=1e-4),
        Pool("pool2", 2, 1),
        Conv("conv3", 384, 3, 2, "VALID"),
        Conv("conv4", 384, 3, 1, "SAME", bias=1.0),
        Conv("conv5", 256, 3, 1, "SAME", bias=1.0),
        Dense("fc6", 4096),
        Dropout("dropout6"),
        Dense("fc7", 4096),
        Dropout("dropout7"),
        Dense("fc8", None),
    ),
)

# The paper's 224 pixels do not give its 55 × 55 maps; model #145 pads the right and bottom edges.
PAPER = Architecture(
    "paper",
    224,
    1000,
    (
        Conv("conv1", 96, 11, 4, (0, 3)),
        Norm("norm1", depth_radius=2, bias=2.0, alpha=1e-4, groups=2),
        Pool("pool1", 3, 2),
        Conv("conv2", 256, 5, 1, (2, 2), groups=2, bias=1.0),
        Norm("norm2", depth_radius=2, bias=2.0, alpha=1e-4, groups=2),
        Pool("pool2", 3, 2),
        Conv("conv3", 384, 3, 1, (1, 1)),
        Conv("conv4", 384, 3, 1, (1, 1), groups=2, bias=1.0),
        Conv("conv5", 256, 3, 1, (1, 1), groups=2, bias=1.0),
        Pool("pool5", 3, 2),
        Dense("fc6", 4096, bias=1.0),
        Dropout("dropout6"),
        Dense("fc7", 4096, bias=1.0),
        Dropout("dropout7"),
        Dense("fc8", None),
    ),
)


def _caffe(name: str, *, pool_first: bool, bias: float) -> Architecture:
    """bvlc_alexnet normalizes, then pools; bvlc_reference_caffenet pools, then normalizes."""

    def norm_and_pool(stage: int) -> tuple[Layer, Layer]:
        norm = Norm(f"norm{stage}", depth_radius=2, bias=1.0, alpha=1e-4 / 5)
        pool = Pool(f"pool{stage}", 3, 2, padding="CEIL")
        return (pool, norm) if pool_first else (norm, pool)

    return Architecture(
        name,
        227,
        1000,
        (
            Conv("conv1", 96, 11, 4),
            *norm_and_pool(1),
            Conv("conv2", 256, 5, 1, (2, 2), groups=2, bias=bias),
            *norm_and_pool(2),
            Conv("conv3", 384, 3, 1, (1, 1)),
            Conv("conv4", 384, 3, 1, (1, 1), groups=2, bias=bias),
            Conv("conv5", 256, 3, 1, (1, 1), groups=2, bias=bias),
            Pool("pool5", 3, 2, padding="CEIL"),
            Dense("fc6", 4096, kernel_std=0.005, bias=bias),
            Dropout("dropout6"),
            Dense("fc7", 4096, kernel_std=0.005, bias=bias),
            Dropout("dropout7"),
            Dense("fc8", None),
        ),
    )


CAFFE = _caffe("caffe", pool_first=False, bias=0.1)
CAFFENET = _caffe("caffenet", pool_first=True, bias=1.0)

TORCHVISION = Architecture(
    "torchvision",
    224,
    1000,
    (
        Conv("conv1", 64, 11, 4, (2, 2), kernel_std=None, bias=None),
        Pool("pool1", 3, 2),
        Conv("conv2", 192, 5, 1, (2, 2), kernel_std=None, bias=None),
        Pool("pool2", 3, 2),
        Conv("conv3", 384, 3, 1, (1, 1), kernel_std=None, bias=None),
        Conv("conv4", 256, 3, 1, (1, 1), kernel_std=None, bias=None),
        Conv("conv5", 256, 3, 1, (1, 1), kernel_std=None, bias=None),
        Pool("pool5", 3, 2),
        AdaptivePool("avgpool", 6),
        Dropout("dropout6"),
        Dense("fc6", 4096, kernel_std=None, bias=None),
        Dropout("dropout7"),
        Dense("fc7", 4096, kernel_std=None, bias=None),
        Dense("fc8", None, kernel_std=None, bias=None),
    ),
)

# Model #145 of the original code, which the paper describes with some differences: conv1 has no
# activation function before its normalization, norm2 is followed by one within each map, alpha is
# divided by the size of the window, and conv3 to conv5 begin with larger kernels.
ORIGINAL = Architecture(
    "original",
    224,
    1000,
    (
        Conv("conv1", 96, 11, 4, (0, 3), activation=False),
        Norm("norm1", depth_radius=2, bias=2.0, alpha=1e-4 / 5, groups=2),
        Pool("pool1", 3, 2, activation=True),
        Conv("conv2", 256, 5, 1, (2, 2), groups=2, bias=1.0),
        Norm("norm2", depth_radius=2, bias=2.0, alpha=1e-4 / 5, groups=2),
        MapNorm("map_norm2", 5, bias=1.0, alpha=1e-3 / 25),
        Pool("pool2", 3, 2),
        Conv("conv3", 384, 3, 1, (1, 1), kernel_std=0.03),
        Conv("conv4", 384, 3, 1, (1, 1), groups=2, kernel_std=0.03, bias=1.0),
        Conv("conv5", 256, 3, 1, (1, 1), groups=2, kernel_std=0.03, bias=1.0, activation=False),
        Pool("pool5", 3, 2, activation=True),
        Dense("fc6", 4096, bias=1.0),
        Dropout("dropout6"),
        Dense("fc7", 4096, bias=1.0),
        Dropout("dropout7"),
        Dense("fc8", None),
    ),
)


def _cuda_convnet(name: str, image_size: int, *layers: Layer) -> Architecture:
    return Architecture(f"cuda_convnet_{name}", image_size, 10, layers)


def _three_convolutions(*, normalize: bool) -> tuple[Layer, ...]:
    """The convolutions of the original code's smaller models of CIFAR-10."""

    def map_norm(stage: int) -> tuple[Layer, ...]:
        return (MapNorm(f"map_norm{stage}", 3, bias=1.0, alpha=5e-5 / 9),) if normalize else ()

    return (
        Conv("conv1", 32, 5, 1, (2, 2), kernel_std=1e-4),
        Pool("pool1", 3, 2, padding="CEIL"),
        *map_norm(1),
        Conv("conv2", 32, 5, 1, (2, 2)),
        Pool("pool2", 3, 2, "AVERAGE", "CEIL"),
        *map_norm(2),
        Conv("conv3", 64, 5, 1, (2, 2)),
        Pool("pool3", 3, 2, "AVERAGE", "CEIL"),
    )


# The models of the original code's `example-layers`, which are called by their test errors. A dense
# layer has the name that it has there.
CUDA_CONVNET_80SEC = _cuda_convnet(
    "80sec",
    32,
    *_three_convolutions(normalize=False),
    Dense("fc64", 64, kernel_std=0.1),
    Dense("fc10", None, kernel_std=0.1),
)
CUDA_CONVNET_19PCT = _cuda_convnet(
    "19pct", 32, *_three_convolutions(normalize=False), Dense("fc10", None)
)
CUDA_CONVNET_18PCT = _cuda_convnet(
    "18pct", 32, *_three_convolutions(normalize=True), Dense("fc10", None)
)
# The paper's "four-layer CNN" with 13 % test error without normalization and 11 % with it (section
# 3.3), by its footnote. The second also has twice the features in its third layer.
CUDA_CONVNET_13PCT = _cuda_convnet(
    "13pct",
    24,
    Conv("conv1", 64, 5, 1, (2, 2), kernel_std=1e-4),
    Pool("pool1", 3, 2, padding="CEIL"),
    Conv("conv2", 64, 5, 1, (2, 2)),
    Pool("pool2", 3, 2, padding="CEIL"),
    Local("local3", 32, 3, (1, 1), kernel_std=0.04),
    Local("local4", 32, 3, (1, 1), kernel_std=0.04),
    Dense("fc10", None),
)
CUDA_CONVNET_11PCT = _cuda_convnet(
    "11pct",
    24,
    Conv("conv1", 64, 5, 1, (2, 2), kernel_std=1e-4),
    Pool("pool1", 3, 2, padding="CEIL"),
    Norm("norm1", depth_radius=4, bias=1.0, alpha=1e-3 / 9),
    Conv("conv2", 64, 5, 1, (2, 2)),
    Norm("norm2", depth_radius=4, bias=1.0, alpha=1e-3 / 9),
    Pool("pool2", 3, 2, padding="CEIL"),
    Local("local3", 64, 3, (1, 1), kernel_std=0.04),
    Local("local4", 32, 3, (1, 1), kernel_std=0.04),
    Dense("fc10", None),
)

ARCHITECTURES = {
    table.name: table
    for table in (
        NOTEBOOK,
        PAPER,
        ORIGINAL,
        CAFFE,
        CAFFENET,
        TORCHVISION,
        CUDA_CONVNET_80SEC,
        CUDA_CONVNET_19PCT,
        CUDA_CONVNET_18PCT,
        CUDA_CONVNET_13PCT,
        CUDA_CONVNET_11PCT,
    )
}

_OWN: dict[str, Architecture] = {}  # variants that are not published, by their names
# Names that variants had in older versions, whose files have them still.
RENAMED = {"cuda_convnet_cifar10": "cuda_convnet_19pct"}


def register(table: Architecture) -> None:
    """Makes a variant of one's own usable by its name, in this process.

    Raises:
      UserError: another variant has that name.
    """
    if variants().get(table.name, table) != table:
        raise UserError(f"there is a variant {table.name} already; take another name")
    _OWN[table.name] = table


def variants() -> dict[str, Architecture]:
    """All variants by their names, with those that were registered."""
    return ARCHITECTURES | _OWN


def architecture(variant: str) -> Architecture:
    """The table called `variant`. Raises UserError with the nearest name if there is none."""
    known = variants()
    if variant not in known:
        raise UserError(unknown("variant", variant, known))
    return known[variant]


def activation_names(layers: Iterable[Layer]) -> tuple[str, ...]:
    """The names of the activations in their order; the last one is "logits"."""
    names = [layer.name for layer in layers if not isinstance(layer, Dropout)]
    return (*names[:-1], "logits")


def layers_until(layers: tuple[Layer, ...], last: str) -> tuple[Layer, ...]:
    """The layers up to the one that gives the activation `last`; UserError where there is none."""
    return layers[: _end(layers, last)]


def layers_after(layers: tuple[Layer, ...], first: str) -> tuple[Layer, ...]:
    """The layers that follow the activation `first`; UserError where there is none."""
    return layers[_end(layers, first) :]


def _end(layers: tuple[Layer, ...], activation: str) -> int:
    names = activation_names(layers)
    if activation not in names:
        raise UserError(unknown("activation", activation, names))
    kept = [layer for layer in layers if not isinstance(layer, Dropout)]
    return layers.index(kept[names.index(activation)]) + 1


def parameter_shapes(
    layers: Iterable[Layer], height: int, width: int, channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path, such as "conv1/kernel", for images of one size."""
    layers = tuple(layers)
    result: dict[str, tuple[int, ...]] = {}
    before: tuple[int, ...] = (height, width, channels)
    places: tuple[int, ...]
    kernel: tuple[int, ...]
    for info in infer_shapes(layers, height, width, channels):
        layer, places, kernel = info.layer, (), ()
        match layer:
            case Conv(kernel_size=side):
                kernel = (side, side, before[-1] // layer.groups)
            case Local(kernel_size=side):
                places = info.shape[:-1]
                kernel = (*places, side, side, before[-1])
            case Dense():
                kernel = (math.prod(before),)
        if kernel:
            result[f"{layer.name}/kernel"] = (*kernel, info.shape[-1])
            result[f"{layer.name}/bias"] = (*places, info.shape[-1])
        before = info.shape
    return result


class LayerInfo(NamedTuple):
    """The output and the cost of a layer for one image; `shape` is (h, w, c), or (c,) if flat."""

    layer: Layer
    shape: tuple[int, ...]
    parameters: int
    macs: int  # multiply-accumulates of the forward pass


def explicit_padding(size: int, kernel_size: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Pixels added (before, after) along an axis of `size` for any of the paddings above."""
    if padding == "SAME":
        total = max(0, (-(-size // stride) - 1) * stride + kernel_size - size)
        return total // 2, total - total // 2
    if padding == "VALID":
        return 0, 0
    if padding == "CEIL":
        # The last window starts inside the image, even where the stride exceeds the window.
        return 0, min(-(size - kernel_size) % stride, kernel_size - 1)
    return padding


def infer_shapes(
    layers: Iterable[Layer], height: int, width: int, channels: int = 3
) -> list[LayerInfo]:
    """Shapes, parameters and multiply-accumulates of each layer for one image.

    Raises:
      UserError: a layer is left with less than one pixel; its name is in the message.
    """
    result = []
    shape: tuple[int, ...] = (height, width, channels)
    for layer in layers:
        parameters = macs = 0
        match layer:
            case Conv() | Local() | Pool():
                spatial = []
                for size in shape[:2]:
                    padding = explicit_padding(size, layer.kernel_size, layer.stride, layer.padding)
                    spatial.append((size + sum(padding) - layer.kernel_size) // layer.stride + 1)
                if min(spatial) < 1:
                    raise UserError(
                        f"an image of {height}×{width} does not fit: {layer.name} is left with "
                        f"{shape[0]}×{shape[1]} pixels for a window of {layer.kernel_size}; "
                        "use larger images"
                    )
                if isinstance(layer, Pool):
                    shape = (*spatial, shape[2])
                else:
                    groups = layer.groups if isinstance(layer, Conv) else 1
                    per_output = layer.kernel_size**2 * shape[2] // groups
                    macs = math.prod(spatial) * layer.features * per_output
                    places = 1 if isinstance(layer, Conv) else math.prod(spatial)
                    parameters = places * layer.features * (per_output + 1)
                    shape = (*spatial, layer.features)
            case AdaptivePool():
                shape = (layer.size, layer.size, shape[2])
            case Dense():
                assert layer.features is not None, "infer_shapes() takes scaled layers"
                macs = math.prod(shape) * layer.features
                parameters = macs + layer.features
                shape = (layer.features,)
        result.append(LayerInfo(layer, shape, parameters, macs))
    return result
