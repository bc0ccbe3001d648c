"""What the papers and codes say of every variant, and how to look at it without computing."""

import functools

import jax
import jax.numpy as jnp
import pytest

from flax_alexnet import AlexNet
from flax_alexnet.models.architectures import ARCHITECTURES, architecture

FC = {"fc6": (4096,), "fc7": (4096,), "logits": (1000,)}
FIVE = {"conv3": (13, 13, 384), "conv4": (13, 13, 384), "conv5": (13, 13, 256)}
POOLED = {**FIVE, "pool5": (6, 6, 256), **FC}
THREE = {  # convolutions of the original code's smaller models of CIFAR-10
    "conv1": (32, 32, 32),
    "pool1": (16, 16, 32),  # 3/2 windows over 32 pixels: the last hangs over the edge
    "conv2": (16, 16, 32),
    "pool2": (8, 8, 32),
    "conv3": (8, 8, 64),
    "pool3": (4, 4, 64),
}
SHAPES = {
    "notebook": {
        "conv1": (56, 56, 96),
        "norm1": (56, 56, 96),
        "pool1": (55, 55, 96),
        "conv2": (28, 28, 256),
        "norm2": (28, 28, 256),
        "pool2": (27, 27, 256),
        **FIVE,
        **FC,
    },
    "paper": {
        "conv1": (55, 55, 96),
        "norm1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "conv2": (27, 27, 256),
        "norm2": (27, 27, 256),
        "pool2": (13, 13, 256),
        **POOLED,
    },
    "caffe": {
        "conv1": (55, 55, 96),
        "norm1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "conv2": (27, 27, 256),
        "norm2": (27, 27, 256),
        "pool2": (13, 13, 256),
        **POOLED,
    },
    "caffenet": {
        "conv1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "norm1": (27, 27, 96),
        "conv2": (27, 27, 256),
        "pool2": (13, 13, 256),
        "norm2": (13, 13, 256),
        **POOLED,
    },
    "torchvision": {
        "conv1": (55, 55, 64),
        "pool1": (27, 27, 64),
        "conv2": (27, 27, 192),
        "pool2": (13, 13, 192),
        "conv3": (13, 13, 384),
        "conv4": (13, 13, 256),
        "conv5": (13, 13, 256),
        "pool5": (6, 6, 256),
        "avgpool": (6, 6, 256),
        **FC,
    },
    "original": {
        "conv1": (55, 55, 96),
        "norm1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "conv2": (27, 27, 256),
        "norm2": (27, 27, 256),
        "map_norm2": (27, 27, 256),
        "pool2": (13, 13, 256),
        **POOLED,
    },
    "cuda_convnet_80sec": {**THREE, "fc64": (64,), "logits": (10,)},
    "cuda_convnet_19pct": {**THREE, "logits": (10,)},
    "cuda_convnet_18pct": {
        "conv1": (32, 32, 32),
        "pool1": (16, 16, 32),
        "map_norm1": (16, 16, 32),
        "conv2": (16, 16, 32),
        "pool2": (8, 8, 32),
        "map_norm2": (8, 8, 32),
        "conv3": (8, 8, 64),
        "pool3": (4, 4, 64),
        "logits": (10,),
    },
    "cuda_convnet_13pct": {
        "conv1": (24, 24, 64),
        "pool1": (12, 12, 64),
        "conv2": (12, 12, 64),
        "pool2": (6, 6, 64),
        "local3": (6, 6, 32),
        "local4": (6, 6, 32),
        "logits": (10,),
    },
    "cuda_convnet_11pct": {
        "conv1": (24, 24, 64),
        "pool1": (12, 12, 64),
        "norm1": (12, 12, 64),
        "conv2": (12, 12, 64),
        "norm2": (12, 12, 64),
        "pool2": (6, 6, 64),
        "local3": (6, 6, 64),
        "local4": (6, 6, 32),
        "logits": (10,),
    },
}
# variant: (image size, parameters, multiply-accumulates)
COSTS = {
    "notebook": (224, 201_838_952, 1_312_376_832),
    "paper": (224, 60_965_224, 724_406_816),
    "caffe": (227, 60_965_224, 724_406_816),
    "caffenet": (227, 60_965_224, 724_406_816),
    "torchvision": (224, 61_100_840, 714_188_480),
    "original": (224, 60_965_224, 724_406_816),
    # parameters: 32·(5·5·3 + 1) + 32·(5·5·32 + 1) + 64·(5·5·32 + 1) + 10·(4·4·64 + 1)
    #           = 2,432 + 25,632 + 51,264 + 10,250
    # MACs: 32²·32·5·5·3 + 16²·32·5·5·32 + 8²·64·5·5·32 + 4·4·64·10
    #     = 2,457,600 + 6,553,600 + 3,276,800 + 10,240
    "cuda_convnet_19pct": (32, 89_578, 12_298_240),
    "cuda_convnet_18pct": (32, 89_578, 12_298_240),
    # as 19pct, but for the dense layers: 64·(4·4·64 + 1) + 10·(64 + 1), and 4·4·64·64 + 64·10
    "cuda_convnet_80sec": (32, 145_578, 12_354_176),
    # parameters: 64·(5·5·3 + 1) + 64·(5·5·64 + 1) + 6·6·(32·(3·3·64 + 1) + 32·(3·3·32 + 1))
    #           + 10·(6·6·32 + 1) = 4,864 + 102,464 + 664,704 + 332,928 + 11,530
    "cuda_convnet_13pct": (24, 1_116_490, 18_517_248),
    # parameters: 4,864 + 102,464 + 6·6·(64·(3·3·64 + 1) + 32·(3·3·64 + 1)) + 11,530
    "cuda_convnet_11pct": (24, 2_112_970, 19_512_576),
}
# The tests are about what the initializers ask for; this generator compiles five times as fast.
KEY = jax.random.key(0, impl="rbg")
variants = pytest.mark.parametrize("variant", ARCHITECTURES)


def images(variant, batch=2):
    size = COSTS[variant][0]
    return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)


def full_size(variant, **options):
    return AlexNet(variant, num_classes=architecture(variant).num_classes, **options)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def activations(model, params, x, train=False, dropout_key=None):
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    state = model.apply({"params": params}, x, train=train, rngs=rngs, mutable=["intermediates"])[1]
    return state["intermediates"]


def abstract_params(model, x):
    return jax.eval_shape(model.init, KEY, x)["params"]


def abstract_activations(model, x):
    """Shapes and types only: nothing is computed."""
    return jax.eval_shape(functools.partial(activations, model), abstract_params(model, x), x)
