"""Trained models that tests can afford: every variant, narrow, of random values."""

import dataclasses

import numpy as np
from flax.traverse_util import unflatten_dict

from flax_alexnet.config.schema import ModelConfig
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.weights.pretrained import Pretrained, expected_shapes

COLOR = np.array([120, 110, 100], np.float32)
# Small, so that programs compile quickly; torchvision's average pool still has 4 × 4 pixels to
# bring to 6 × 6, and cuda-convnet's windows hang over the edge.
CROPS = {"notebook": 51, "torchvision": 159, "cuda_convnet_19pct": 18}


def make_pretrained(
    variant="torchvision", num_classes=4, crop_size=64, image_size=72, seed=0, **config
) -> Pretrained:
    """A model of random values, a twentieth as wide, at which half of the units live."""
    rng = np.random.default_rng(seed)
    pretrained = Pretrained(
        ModelConfig(variant, num_classes, **{"width": 0.05, **config}),
        {},
        Preprocessing(
            image_size, "torchvision", crop_size, np.float32([120, 110, 100]), (0.02, 0.03, 0.04)
        ),
        tuple(f"class {letter}" for letter in "abcdefgh"[:num_classes]) if num_classes < 9 else (),
        {"file": "made.pth", "format": "test", "sha256": "0" * 64},
    )
    params = {}
    for name, shape in expected_shapes(pretrained).items():
        fan_in = np.prod(shape[:-1]) if name.endswith("kernel") else 4
        params[name] = (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
    return dataclasses.replace(pretrained, params=unflatten_dict(params, sep="/"))


def small_pretrained(variant: str, **config) -> Pretrained:
    """Seven classes, at the least size that shows all that is its own, and a mean image."""
    crop = CROPS.get(variant, 67)
    if variant.startswith("cuda_convnet"):  # of which a twentieth would be one or two kernels
        config = {"width": 0.2, **config}
    pretrained = make_pretrained(variant, 7, crop, crop + 5, **config)
    mean = np.random.default_rng(1).uniform(100, 150, (crop + 5, crop + 5, 3)).astype(np.float32)
    rule = Preprocessing(crop + 5, "paper", crop, mean, (0.02, 0.03, 0.01))
    return dataclasses.replace(pretrained, preprocessing=rule, label_names=(), source={})


def random_images(pretrained: Pretrained, count: int) -> np.ndarray:
    """uint8[count, image_size, image_size, 3]."""
    size = pretrained.preprocessing.image_size
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)


def by_hand(pretrained, files, crops=1):
    """Probabilities of each image on its own, outside of any command: float64[n, classes]."""
    result = []
    for file in files:
        image = pretrained.open(file)[None]
        seen = pretrained.preprocess(image) if crops == 1 else pretrained.ten_crops(image)[0]
        logits = np.asarray(pretrained.model.apply({"params": pretrained.params}, seen), np.float64)
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        result.append((exp / exp.sum(-1, keepdims=True)).mean(axis=0))
    return np.array(result)
