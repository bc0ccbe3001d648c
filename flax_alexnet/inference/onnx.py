"""A model as an ONNX graph, written from its table of layers.

A variant is data, so nothing is traced: each layer becomes the nodes that ONNX has for it, and the
graph can be read beside the table. Maps are (b, c, h, w) within, and (b, h, w, c) at both ends.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.models.architectures import (
    AdaptivePool,
    Conv,
    Dense,
    Layer,
    Local,
    MapNorm,
    Norm,
    Pool,
    architecture,
    explicit_padding,
    infer_shapes,
    layers_until,
)
from flax_alexnet.ops.pooling import adaptive_average_pool
from flax_alexnet.utils.errors import UserError

OPSET, IR_VERSION = 17, 8  # of 2022: no operator here needs more, and old runtimes read it
LARGEST_FILE = 2 * 10**9  # bytes; a message of protobuf ends at 2 GiB
ACTIVATIONS: dict[Any, str] = {nn.relu: "Relu", nn.tanh: "Tanh"}
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


class Chain:
    """Nodes of ONNX, each of which reads what the one before gives, and then constants."""

    def __init__(self, images: str):
        self.value = images
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, kind: str, *others: np.ndarray | str, **attributes: Any) -> None:
        """A node of (value, *others), whose result is the value from now on.

        The others are constants, or names of earlier values.
        """
        name = f"{kind}_{len(self.nodes)}"
        inputs = []
        for index, other in enumerate(others):
            if isinstance(other, str):
                inputs.append(other)
            else:
                inputs.append(f"{name}/{index}")
                self.constants[inputs[-1]] = other
        self.nodes.append(helper.make_node(kind, [self.value, *inputs], [name], name, **attributes))
        self.value = name


def onnx_model(
    model: AlexNet, params: Mapping[str, Mapping[str, Any]], rule: Preprocessing, last: str
) -> onnx.ModelProto:
    """Preprocessing, then the model up to the activation `last`, in float32 and for any batch.

    The input is called "images": uint8[batch, image_size, image_size, 3], RGB. The output has the
    activation's name, its shape, and maps as (batch, h, w, c): float32[batch, …].

    Raises:
      UserError: the weights need more than the 2 GB that one file of ONNX can hold.
    """
    layers = layers_until(architecture(model.variant).scaled(model.num_classes, model.width), last)
    chain = Chain("images")
    _preprocess(chain, rule)
    shape: tuple[int, ...] = (rule.crop_size, rule.crop_size, 3)
    for info in infer_shapes(layers, *shape):
        _layer(chain, info.layer, shape, params.get(info.layer.name, {}))
        if info.layer.activation and (
            info.layer.name != layers[-1].name or last != "logits" or model.relu_logits
        ):
            chain.add(ACTIVATIONS[model.activation])
        shape = info.shape
    if len(shape) == 3:
        chain.add("Transpose", perm=TO_NHWC)
    chain.nodes[-1].output[0] = last

    size = sum(array.nbytes for array in chain.constants.values())
    if size > LARGEST_FILE:
        raise UserError(f"weights of {size / 1e9:.1f} GB do not fit into ONNX, which ends at 2 GB")
    sides = [rule.image_size, rule.image_size, 3]
    graph = helper.make_graph(
        chain.nodes,
        f"AlexNet_{model.variant}",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *sides])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", *shape])],
        [numpy_helper.from_array(array, name) for name, array in chain.constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(
        graph, producer_name="flax_alexnet", opset_imports=[opset], ir_version=IR_VERSION
    )


def _preprocess(chain: Chain, rule: Preprocessing) -> None:
    """As `flax_alexnet.preprocess`."""
    first = (rule.image_size - rule.crop_size) // 2
    chain.add("Cast", to=TensorProto.FLOAT)
    chain.add("Sub", np.asarray(rule.mean, np.float32))
    chain.add(
        "Slice", *(np.array([n, n]) for n in (first, first + rule.crop_size)), np.array([1, 2])
    )
    chain.add("Mul", np.asarray(rule.scale, np.float32))
    chain.add("Transpose", perm=TO_NCHW)


def _layer(chain: Chain, layer: Layer, shape: tuple[int, ...], params: Mapping[str, Any]) -> None:
    """A layer without its activation function, for maps of `shape` (h, w, c) or features (c,)."""
    match layer:
        case Conv():
            kernel = np.asarray(params["kernel"], np.float32).transpose(3, 2, 0, 1)
            bias = np.asarray(params["bias"], np.float32)
            chain.add("Conv", kernel, bias, group=layer.groups, **_window(layer, shape))
        case Local():
            _local(chain, layer, shape, params)
        case MapNorm(kernel_size=side):
            x = chain.value
            chain.add("Mul", x)
            chain.add(
                "AveragePool", kernel_shape=[side] * 2, pads=[side // 2] * 4, count_include_pad=1
            )
            chain.add("Mul", np.array(layer.alpha * side**2, np.float32))
            chain.add("Add", np.array(layer.bias, np.float32))
            chain.add("Pow", np.array(-layer.beta, np.float32))
            chain.add("Mul", x)
        case Norm():
            # A group's channels follow one another: groups can pass for images of their own.
            channels, size = shape[2], 2 * layer.depth_radius + 1
            chain.add("Reshape", np.array([-1, channels // layer.groups, *shape[:2]]))
            # ONNX divides alpha by the size.
            alpha = layer.alpha * size
            chain.add("LRN", alpha=alpha, beta=layer.beta, bias=layer.bias, size=size)
            chain.add("Reshape", np.array([-1, channels, *shape[:2]]))
        case Pool(kind="MAX"):
            chain.add("MaxPool", **_window(layer, shape))
        case Pool():
            chain.add("AveragePool", count_include_pad=0, **_window(layer, shape))
        case AdaptivePool(size=size):
            # The matrix of a linear operator is what the operator makes of the identity.
            pixels = shape[0] * shape[1]
            identity = jnp.eye(pixels).reshape(pixels, *shape[:2], 1)
            matrix = np.asarray(adaptive_average_pool(identity, size)).reshape(pixels, -1)
            chain.add("Reshape", np.array([0, 0, pixels]))
            chain.add("MatMul", matrix)
            chain.add("Reshape", np.array([0, 0, size, size]))
        case Dense():
            if len(shape) == 3:
                chain.add("Transpose", perm=TO_NHWC)
                chain.add("Flatten")
            chain.add(
                "Gemm", *(np.asarray(params[name], np.float32) for name in ("kernel", "bias"))
            )


def _local(chain: Chain, layer: Local, shape: tuple[int, ...], params: Mapping[str, Any]) -> None:
    """A locally connected layer: a product for each place with the values under its window."""
    kernel, bias = (np.asarray(params[name], np.float32) for name in ("kernel", "bias"))
    height, width, side, _, channels, features = kernel.shape
    values = side * side * channels
    # A convolution with the identity copies the values under the window, in the kernel's order.
    identity = np.eye(values, dtype=np.float32).reshape(values, side, side, channels)
    chain.add("Conv", identity.transpose(0, 3, 1, 2), **_window(layer, shape))
    chain.add("Reshape", np.array([-1, values, height * width]))
    chain.add("Transpose", perm=(2, 0, 1))
    chain.add("MatMul", kernel.reshape(height * width, values, features))
    chain.add("Add", bias.reshape(height * width, 1, features))
    chain.add("Transpose", perm=(1, 2, 0))
    chain.add("Reshape", np.array([-1, features, height, width]))


def _window(layer: Conv | Local | Pool, shape: tuple[int, ...]) -> dict[str, list[int]]:
    (top, bottom), (left, right) = (
        explicit_padding(size, layer.kernel_size, layer.stride, layer.padding) for size in shape[:2]
    )
    return {
        "kernel_shape": [layer.kernel_size] * 2,
        "strides": [layer.stride] * 2,
        "pads": [top, left, bottom, right],
    }
