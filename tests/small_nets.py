"""Trained nets that tests can afford: every variant, narrow, of random values."""

import dataclasses

import numpy as np

from flax_alexnet.config import ModelConfig
from flax_alexnet.preprocessing import Preprocessing
from flax_alexnet.weights.pretrained import Pretrained, expected_shapes, unflatten

# Small, so that programs compile quickly; torchvision's average pool still has 4 × 4 pixels to
# bring to 6 × 6, and cuda-convnet's windows hang over the edge.
CROPS = {"notebook": 51, "torchvision": 159, "cuda_convnet_cifar10": 18}


def small_net(variant: str, **config) -> Pretrained:
    """Seven classes; a mean image, a scale for each channel, and logits of about 1."""
    rng = np.random.default_rng(0)
    crop = CROPS.get(variant, 67)
    mean = rng.uniform(100, 150, (crop + 5, crop + 5, 3)).astype(np.float32)
    rule = Preprocessing(crop + 5, "paper", crop, mean, (0.02, 0.03, 0.01))
    net = Pretrained(ModelConfig(variant, 7, 0.05, **config), {}, rule)
    params = {}
    for name, shape in expected_shapes(net).items():
        fan_in = np.prod(shape[:-1]) if name.endswith("kernel") else 4
        params[name] = (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
    return dataclasses.replace(net, params=unflatten(params))


def random_pictures(net: Pretrained, count: int) -> np.ndarray:
    """uint8[count, image_size, image_size, 3]."""
    size = net.preprocessing.image_size
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
