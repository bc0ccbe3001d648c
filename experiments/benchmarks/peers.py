"""The variants in TensorFlow and PyTorch, each in its fastest usual form: what ours is measured by.

Both walk the tables of `flax_alexnet.models.architectures` and train by the paper's rule (momentum
0.9, decay 0.0005) with dropout, on float32 images that lie in memory already. TensorFlow is
compiled by `tf.function`; PyTorch by `torch.compile` with `channels_last`, on a GPU under autocast
to bfloat16 and with its fused optimizer.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_alexnet.models.architectures import (
    AdaptivePool,
    Conv,
    Dense,
    Dropout,
    Layer,
    Norm,
    Pool,
    architecture,
    explicit_padding,
    infer_shapes,
    parameter_shapes,
)

RATE, MOMENTUM, DECAY, DROPOUT = 0.01, 0.9, 0.0005, 0.5

Run = Callable[[], object]  # does the work once, and returns when it is done


def random_batch(size: int, batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images in grey levels less their mean, float32[b, size, size, 3], and labels, int64[b]."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-128, 128, (batch, size, size, 3)).astype(np.float32)
    return images, rng.integers(0, classes, batch)


def torch_runs(variant: str, batch: int, size: int) -> tuple[Run, Run]:
    """One training step, and the logits, of a variant in PyTorch on the GPU where there is one."""
    import torch
    from torch import nn
    from torch.nn import functional

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    table = architecture(variant)

    class InTowers(nn.Module):
        def __init__(self, norm: Norm):
            super().__init__()
            window = 2 * norm.depth_radius + 1
            self.groups = norm.groups
            self.norm = nn.LocalResponseNorm(window, norm.alpha * window, norm.beta, norm.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.norm(part) for part in x.chunk(self.groups, 1)], 1)

    def module(layer: Layer, shape: tuple[int, ...], last: bool) -> list[nn.Module]:
        """A layer on (h, w, c), or on (n,)."""
        match layer:
            case Conv():
                (top, bottom), (left, right) = pads(layer, shape)
                even = top == bottom and left == right
                return [
                    *([] if even else [nn.ZeroPad2d((left, right, top, bottom))]),
                    nn.Conv2d(
                        shape[-1],
                        layer.features,
                        layer.kernel_size,
                        layer.stride,
                        (top, left) if even else 0,
                        groups=layer.groups,
                    ),
                    nn.ReLU(),
                ]
            case Norm():
                return [InTowers(layer)]
            case Pool():
                ceil = layer.padding == "CEIL"
                if layer.kind == "MAX":
                    return [nn.MaxPool2d(layer.kernel_size, layer.stride, ceil_mode=ceil)]
                return [nn.AvgPool2d(layer.kernel_size, layer.stride, 0, ceil, False)]
            case AdaptivePool():
                return [nn.AdaptiveAvgPool2d(layer.size)]
            case Dense():
                flat = [nn.Flatten()] if len(shape) == 3 else []
                linear = nn.Linear(int(np.prod(shape)), layer.features or 0)
                return [*flat, linear, *([] if last else [nn.ReLU()])]
            case Dropout():
                return [nn.Dropout(DROPOUT)]
        raise ValueError(f"{variant} has {layer.name}, which is not written here in PyTorch")

    layers = table.scaled(table.num_classes)
    modules: list[Any] = []
    shape: tuple[int, ...] = (size, size, 3)
    for layer, after in zip(layers, shapes(layers, size), strict=True):
        modules += module(layer, shape, layer is layers[-1])
        shape = after
    net: Any = nn.Sequential(*modules)
    net.to(device, memory_format=torch.channels_last)
    images, labels = (torch.tensor(a).to(device) for a in random_batch(size, batch, shape[0]))
    images = images.permute(0, 3, 1, 2)  # of NHWC in memory: this is channels_last
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, weight_decay=DECAY, fused=True)
    cast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=cuda)

    @torch.compile
    def loss_of(images: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(net(images), labels)

    logits_of = torch.compile(lambda images: net(images))
    wait = torch.cuda.synchronize if cuda else lambda: None

    def train() -> None:
        net.train()
        with cast():
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    def infer() -> None:
        net.eval()
        with cast(), torch.inference_mode():
            logits_of(images)
        wait()

    return train, infer


def tensorflow_runs(variant: str, batch: int, size: int) -> tuple[Run, Run]:
    """One training step, and the logits, of a variant in TensorFlow on the CPU."""
    import tensorflow as tf

    table = architecture(variant)
    layers = table.scaled(table.num_classes)
    parameters = {
        name: tf.Variable(tf.random.normal(shape, stddev=0.01))
        for name, shape in parameter_shapes(layers, size, size).items()
    }
    variables = list(parameters.values())
    velocities = [tf.Variable(tf.zeros_like(v)) for v in variables]

    def norm(layer: Norm, x: tf.Tensor) -> tf.Tensor:
        options = layer.depth_radius, layer.bias, layer.alpha, layer.beta
        return tf.nn.lrn(x, *options)

    def conv(layer: Conv, x: tf.Tensor) -> tf.Tensor:
        padding = [(0, 0), *pads(layer, x.shape[1:]), (0, 0)]
        # TensorFlow has no gradient of a convolution with groups on a CPU, so each is its own.
        kernels = tf.split(parameters[f"{layer.name}/kernel"], layer.groups, axis=-1)
        parts = [
            tf.nn.conv2d(part, kernel, layer.stride, padding)
            for part, kernel in zip(tf.split(x, layer.groups, axis=-1), kernels, strict=True)
        ]
        x = tf.concat(parts, axis=-1) if layer.groups > 1 else parts[0]
        return tf.nn.relu(tf.nn.bias_add(x, parameters[f"{layer.name}/bias"]))

    def pool(layer: Pool, x: tf.Tensor) -> tf.Tensor:
        (top, bottom), (left, right) = pads(layer, x.shape[1:])
        if layer.kind == "MAX":
            if bottom or right:
                x = tf.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)], constant_values=-1e30)
            return tf.nn.max_pool2d(x, layer.kernel_size, layer.stride, "VALID")
        # With SAME TensorFlow, too, counts only what lies inside.
        return tf.nn.avg_pool2d(x, layer.kernel_size, layer.stride, "SAME")

    def net(x: tf.Tensor, train: bool) -> tf.Tensor:
        for layer in layers:
            match layer:
                case Conv():
                    x = conv(layer, x)
                case Norm():
                    parts = tf.split(x, layer.groups, axis=-1)
                    x = tf.concat([norm(layer, part) for part in parts], axis=-1)
                case Pool():
                    x = pool(layer, x)
                case AdaptivePool():
                    assert x.shape[1:3] == (layer.size, layer.size), "it has nothing to do"
                case Dense():
                    x = tf.reshape(x, [batch, -1])
                    x = tf.matmul(x, parameters[f"{layer.name}/kernel"])
                    x = tf.nn.bias_add(x, parameters[f"{layer.name}/bias"])
                    x = x if layer is layers[-1] else tf.nn.relu(x)
                case Dropout():
                    x = tf.nn.dropout(x, DROPOUT) if train else x
                case _:
                    raise ValueError(f"{layer.name} is not written here in TensorFlow")
        return x

    images, labels = (tf.constant(a) for a in random_batch(size, batch, table.num_classes))

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, net(images, True))
            loss = tf.reduce_mean(losses)
        for v, velocity, g in zip(
            variables, velocities, tape.gradient(loss, variables), strict=True
        ):
            velocity.assign(MOMENTUM * velocity - RATE * (g + DECAY * v))
            v.assign_add(velocity)
        return loss

    logits = tf.function(lambda: net(images, False))
    return lambda: step().numpy(), lambda: logits().numpy()


def shapes(layers: tuple[Layer, ...], size: int) -> list[tuple[int, ...]]:
    """What each layer gives for one image."""
    return [info.shape for info in infer_shapes(layers, size, size)]


def pads(layer: Conv | Pool, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pixels ((top, bottom), (left, right)) that a layer adds to (h, w, c)."""
    return [explicit_padding(s, layer.kernel_size, layer.stride, layer.padding) for s in shape[:2]]
