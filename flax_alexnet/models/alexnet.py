"""AlexNet as one linen module that walks a table of layers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_alexnet.models.architectures import (
    AdaptivePool,
    Conv,
    Dense,
    Dropout,
    Layer,
    Local,
    MapNorm,
    Norm,
    Pool,
    Weighted,
    architecture,
    explicit_padding,
    infer_shapes,
    layers_after,
    layers_until,
)
from flax_alexnet.ops.convolution import convolve
from flax_alexnet.ops.dense import multiply
from flax_alexnet.ops.dispatch import Convolution, Facts, Operation, Pooling, Product, choose
from flax_alexnet.ops.linear import Direction
from flax_alexnet.ops.local import locally_connect
from flax_alexnet.ops.lrn import local_response_normalization, map_normalization
from flax_alexnet.ops.pooling import adaptive_average_pool, average_pool, max_pool
from flax_alexnet.ops.primitives import Pads

Operator = Callable[..., jax.Array]
Initializer = Callable[..., Any]


def unpartitioned(layer: Layer, operator: Operator) -> Operator:
    """Returns the operator of a layer unchanged; `jit` decides how its arrays are sharded."""
    del layer
    return operator


class AlexNet(nn.Module):
    """Any variant of AlexNet: float[b, h, w, 3] images to float[b, num_classes] logits.

    Images are NHWC and RGB, mean-subtracted, of any size that leaves at least one pixel before the
    first dense layer. Parameters are float32 and called `conv1` … `conv5`, `fc6`, `fc7`, `fc8`
    (`cuda_convnet_18pct`: `conv1` … `conv3`, `fc10`), each with `kernel` and `bias`; convolution
    kernels are (h, w, in / groups, out) and dense kernels (in, out), where `fc6` reads its input
    flattened in the order (h, w, c).

    With `mutable=["intermediates"]` every activation is returned under its name, as an array: each
    layer after its activation function, `norm1`, `pool1`, …, and `logits`. With Flax's own
    `capture_intermediates=True` a layer with parameters returns what Flax captures instead: its
    output before the activation function, as `["conv1"]["__call__"][0]`.

    Example:
      >>> model = AlexNet(variant="paper", num_classes=1000)
      >>> params = model.init(key, jnp.zeros((1, 224, 224, 3)))["params"]
      >>> logits = model.apply({"params": params}, images)
      >>> logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
      >>> logits, state = model.apply({"params": params}, images, mutable=["intermediates"])
      >>> state["intermediates"]["conv5"].shape
      (1, 13, 13, 256)

    Attributes:
      variant: a name in `flax_alexnet.models.architectures.ARCHITECTURES`.
      num_classes: outputs, ≥ 1.
      dtype: type of the computation, such as `jnp.bfloat16`; parameters stay float32.
      dropout_rate: share of the units set to zero where the variant has dropout, in [0, 1).
      width: multiplier of the features of every layer but the last, > 0.
      relu_logits: the notebook's ReLU on the last layer. It is a fault, off by default: a logit
        below zero gets no gradient, and a model whose logits are all zero never learns again.
      initialization: "published" for the variant's own initial values, or "he" for normal kernels
        of variance 2 / fan in and zero biases (He et al. 2015), which also trains where N(0, 0.01)
        stalls.
      activation: the function after each layer; the paper's Figure 1 compares `nn.relu`, `nn.tanh`.
      partition: maps (layer, operator) to an operator with the same result, which is used instead;
        `flax_alexnet.parallel.layouts` splits a layer's work over devices with it.

    Raises:
      UserError (a ValueError): an unknown variant, or an image too small, naming the layer that
        runs out of pixels.
    """

    variant: str = "notebook"
    num_classes: int = 1000
    dtype: Any = jnp.float32
    dropout_rate: float = 0.5
    width: float = 1.0
    relu_logits: bool = False
    initialization: Literal["published", "he"] = "published"
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    partition: Callable[[Layer, Operator], Operator] = unpartitioned

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        first: str | None = None,
        last: str | None = None,
    ) -> jax.Array:
        """Returns the logits, or the activation called `last`.

        With `last`, later layers are not computed, and their parameters are not needed. With
        `first`, `images` is the activation of that name, and only the layers after it are computed.
        """
        layers = architecture(self.variant).scaled(self.num_classes, self.width)
        logits = layers[-1]
        if first is not None:
            layers = layers_after(layers, first)
        if last is not None:
            layers = layers_until(layers, last)
        shape: tuple[int, ...]
        if images.ndim != 4:
            raise ValueError(f"images must be (batch, height, width, channels), not {images.shape}")
        # It raises UserError for an image that is too small, and names the layer.
        infos = infer_shapes(layers, *images.shape[1:])
        x = images.astype(self.dtype)
        for info in infos:
            layer, affine = info.layer, None
            match layer:
                case Conv(name=name, kernel_size=side, groups=groups):
                    operator = functools.partial(
                        convolve, stride=layer.stride, padding=_padding(x, layer), groups=groups
                    )
                    shape = (side, side, x.shape[-1] // groups, layer.features)
                    affine = self._affine(layer, operator, shape)
                    x = affine(x)
                case Local(name=name, kernel_size=side):
                    operator = functools.partial(locally_connect, padding=_padding(x, layer))
                    places = info.shape[:2]
                    shape = (*places, side, side, x.shape[-1], layer.features)
                    affine = self._affine(layer, operator, shape, places)
                    x = affine(x)
                case Dense(name=name):
                    assert layer.features is not None, "scaled layers have their features"
                    shape = (math.prod(x.shape[1:]), layer.features)
                    affine = self._affine(layer, _flat_product, shape)
                    x = affine(x)
                    if layer is logits:
                        name = "logits"
                case Norm(name=name):
                    normalize = functools.partial(
                        local_response_normalization,
                        depth_radius=layer.depth_radius,
                        bias=layer.bias,
                        alpha=layer.alpha,
                        beta=layer.beta,
                        groups=layer.groups,
                    )
                    x = self.partition(layer, normalize)(x)
                case MapNorm(name=name):
                    x = map_normalization(x, layer.kernel_size, layer.bias, layer.alpha, layer.beta)
                case Pool(name=name):
                    pool = max_pool if layer.kind == "MAX" else average_pool
                    x = pool(x, layer.kernel_size, layer.stride, _padding(x, layer))
                case AdaptivePool(name=name):
                    x = adaptive_average_pool(x, layer.size)
                case Dropout():
                    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
                    continue
            if layer.activation and (name != "logits" or self.relu_logits):
                x = self.activation(x)
            # With `capture_intermediates` Flax has put a layer's output under its name already.
            captured = affine and affine.has_variable("intermediates", "__call__")
            wanted = self.is_mutable_collection("intermediates") and not self.is_initializing()
            if wanted and not captured:
                # Flax's `sow` rejects the name of a submodule, and `conv1` is both here.
                self.put_variable("intermediates", name, x)
        return x

    def _affine(
        self,
        layer: Weighted,
        operator: Operator,
        shape: tuple[int, ...],
        places: Sequence[int] = (),
    ) -> "Affine":
        fan_in = math.prod(shape[len(places) : -1])
        kernel_init, bias_init = self._initializers(layer, fan_in, len(places))
        operator = self.partition(layer, operator)
        biases = (*places, shape[-1])
        return Affine(operator, shape, biases, kernel_init, bias_init, self.dtype, name=layer.name)

    def _initializers(
        self, layer: Weighted, fan_in: int, places: int
    ) -> tuple[Initializer, Initializer]:
        if self.initialization == "he":
            he_normal = nn.initializers.he_normal(batch_axis=tuple(range(places)))
            return he_normal, nn.initializers.zeros
        if layer.kernel_std is None or layer.bias is None:
            uniform = nn.initializers.uniform(2 * fan_in**-0.5)  # in [0, 2 / sqrt(fan in))

            def centred(*args: Any) -> jax.Array:
                return uniform(*args) - fan_in**-0.5

            return centred, centred
        return nn.initializers.normal(layer.kernel_std), nn.initializers.constant(layer.bias)


class Affine(nn.Module):
    """A layer with parameters: it applies an operator to an array and a kernel, and adds a bias."""

    operator: Operator
    kernel_shape: tuple[int, ...]  # outputs come last
    bias_shape: tuple[int, ...]
    kernel_init: Initializer
    bias_init: Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, self.kernel_shape, jnp.float32)
        bias = self.param("bias", self.bias_init, self.bias_shape, jnp.float32)
        y = self.operator(x, kernel.astype(self.dtype))
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def make_model(*, dtype: str, activation: str, **attributes: Any) -> AlexNet:
    """Creates the model from a configuration, which gives types and functions by name.

    Args:
      dtype: "float32" or "bfloat16".
      activation: "relu" or "tanh".
      attributes: the other attributes of `AlexNet`.
    """
    function = {"relu": nn.relu, "tanh": nn.tanh}[activation]
    return AlexNet(dtype=jnp.dtype(dtype), activation=function, **attributes)


def implementations(
    layers: tuple[Layer, ...],
    platform: str,
    dtype: Any = jnp.float32,
    *,
    rows: int = 64,
    channels: int = 3,
) -> str:
    """A line that says which implementations `flax_alexnet.ops.dispatch` picks for the layers.

    Args:
      layers: layers whose features are set; see `Architecture.scaled`.
      platform: JAX's name of the platform of the compilation: "cpu", "cuda", "tpu" …
      dtype: type of the computation.
      rows: images that a device computes at once.
      channels: channels of the images.
    """
    used: dict[str, dict[str, list[str]]] = {}
    forward, gradient = Direction.FORWARD, Direction.GRADIENT
    of_kernels = forward, Direction.INPUT_GRADIENT, Direction.KERNEL_GRADIENT

    def note(
        layer: Layer, operation: Operation, directions: Sequence[Direction], facts: Facts | None
    ) -> None:
        for direction in directions:
            what = f"{operation} {direction}" if len(directions) > 1 else str(operation)
            name = choose(operation, direction, platform, facts)
            used.setdefault(what, {}).setdefault(name, []).append(layer.name)

    facts: Facts
    for layer in layers:
        match layer:
            case Conv(groups=groups):
                sizes = channels // groups, layer.features // groups
                facts = Convolution(*sizes, layer.kernel_size, layer.stride, dtype)
                # The gradient with respect to the images is not computed.
                directions = of_kernels[::2] if layer is layers[0] else of_kernels
                note(layer, Operation.CONVOLUTION, directions, facts)
                channels = layer.features
            case Local():
                channels = layer.features
            case Norm():
                note(layer, Operation.NORMALIZATION, [forward], None)
            case Pool(kind="MAX"):
                facts = Pooling(layer.kernel_size, layer.stride, dtype)
                note(layer, Operation.MAX_POOLING, [forward, gradient], facts)
            case Pool():
                facts = Pooling(layer.kernel_size, layer.stride, dtype)
                note(layer, Operation.AVERAGE_POOLING, [forward], facts)
            case Dense():
                note(layer, Operation.DENSE, of_kernels, Product(rows, dtype))
    return "; ".join(
        f"{what}: " + ", ".join(f"{name} ({' '.join(at)})" for name, at in sorted(by.items()))
        for what, by in used.items()
    )


def _flat_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return multiply(x.reshape(x.shape[0], math.prod(x.shape[1:])), kernel)


def _padding(x: jax.Array, layer: Conv | Local | Pool) -> Pads:
    top_bottom, left_right = (
        explicit_padding(size, layer.kernel_size, layer.stride, layer.padding)
        for size in x.shape[1:3]
    )
    return top_bottom, left_right
