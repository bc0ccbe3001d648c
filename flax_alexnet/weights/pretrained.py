"""A trained model with everything that is needed to use it."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.config.schema import ModelConfig
from flax_alexnet.data.augment import preprocess, rescale, subtract_mean, ten_crops
from flax_alexnet.data.decode import DecodeError, decode, read_file
from flax_alexnet.data.preprocessing import Preprocessing, ResizeRule
from flax_alexnet.models.alexnet import AlexNet, make_model
from flax_alexnet.models.architectures import (
    Weighted,
    architecture,
    layers_until,
    parameter_shapes,
    variants,
)
from flax_alexnet.utils.errors import UserError, unknown
from flax_alexnet.weights.stored import listed

Params = dict[str, dict[str, Any]]
MOST_CLASSES = 2**20
LPIPS_HEADS = tuple(f"lin{stage}" for stage in range(5))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A trained model: parameters, preprocessing and label names, as `flax_alexnet.load` reads it.

    Example:
      >>> pretrained = flax_alexnet.load("alexnet.safetensors")
      >>> images = pretrained.open("cat.jpg")[None]  # uint8[1, 256, 256, 3]
      >>> seen = pretrained.preprocess(images)
      >>> logits = pretrained.model.apply({"params": pretrained.params}, seen)

    Attributes:
      config: the configuration of the model; `num_classes` is set.
      params: {"conv1": {"kernel": float32[…], "bias": float32[…]}, …}. A trunk, which lacks all
        dense layers or the last ones, has features but no logits.
      preprocessing: what is done to an image before the model sees it.
      label_names: the names of the classes in order; empty if they are unknown.
      source: where it comes from: "file", "format", "sha256" of that file.
      lpips_heads: {"lin0": float32[1, 1, c, 1], … "lin4"} where it has LPIPS heads, else empty.
    """

    config: ModelConfig
    params: Params
    preprocessing: Preprocessing
    label_names: tuple[str, ...] = ()
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lpips_heads: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Outputs of the model."""
        assert self.config.num_classes is not None, "it is set in every Pretrained"
        return self.config.num_classes

    @property
    def model(self) -> AlexNet:
        """The module that `params` belong to."""
        return make_model(**vars(self.config))

    @property
    def is_classifier(self) -> bool:
        """Whether the model has all layers, and is not only a trunk."""
        return not missing_layers(self)

    def open(self, path: str | Path) -> np.ndarray:
        """An image from a file, brought to this model's size: uint8[image_size, image_size, 3].

        Raises:
          UserError: there is no such file, or it cannot be decoded.
        """
        rule = self.preprocessing
        try:
            return decode(read_file(Path(path).expanduser()), rule.image_size, rule.resize)
        except DecodeError as error:
            raise UserError(f"cannot read image {path}: {error}") from None

    def preprocess(self, images: jax.Array | np.ndarray) -> jax.Array:
        """uint8[b, image_size, image_size, 3] to what the model sees: float32[b, crop, crop, 3].

        Floats in grey levels, 0 … 255, are accepted too.

        Raises:
          UserError: images have another shape or type, or are floats from 0 to 1; the latter are
            not detected in a traced function.
        """
        self._check_images(images)
        return preprocess(images, self.preprocessing)

    def ten_crops(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Like `preprocess`, with the paper's ten crops of each: float32[b, 10, crop, crop, 3]."""
        self._check_images(images)
        rule = self.preprocessing
        crops = ten_crops(subtract_mean(images, rule.mean), rule.crop_size)
        return rescale(crops.reshape(-1, *crops.shape[2:]), rule.scale).reshape(crops.shape)

    def _check_images(self, images: Any) -> None:
        size = self.preprocessing.image_size
        expected = f"expected uint8[b, {size}, {size}, 3]"
        such = "such as pretrained.open(path)[None]"
        if not hasattr(images, "shape") or not hasattr(images, "dtype"):
            raise UserError(f"images are a {type(images).__name__}; {expected}, {such}")
        actual = f"{images.dtype}[{', '.join(map(str, images.shape))}]"
        if images.ndim == 3:
            raise UserError(f"images are {actual}, without a batch axis; {expected}: image[None]")
        if images.shape[1:] != (size, size, 3):
            raise UserError(f"images are {actual}; {expected}, {such}")
        if jnp.issubdtype(images.dtype, jnp.floating):
            if not isinstance(images, jax.core.Tracer) and 0 < images.max(initial=0) <= 1:
                raise UserError(f"images are from 0 to 1; {expected}, grey levels of 0 … 255")
        elif images.dtype != np.uint8:
            raise UserError(f"images are {actual}; {expected}: images.astype(np.uint8)")

    def __repr__(self) -> str:
        count = sum(np.size(value) for value in jax.tree.leaves(self.params))
        missing = "".join(f" without {', '.join(missing_layers(self))}" * (not self.is_classifier))
        heads = ", with LPIPS heads" * bool(self.lpips_heads)
        return (
            f"<Pretrained {self.config.variant}{missing}: {self.num_classes:,} classes, "
            f"{count:,} parameters{heads}, from {self.source.get('file', 'unknown')}>"
        )

    def name(self, label: int) -> str:
        """The name of a class, or its number where it has none."""
        return self.label_names[label] if label < len(self.label_names) else f"class {label}"


def expected_shapes(pretrained: Pretrained) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of the whole model by its path, such as "conv1/kernel"."""
    layers = architecture(pretrained.config.variant).scaled(
        pretrained.num_classes, pretrained.config.width
    )
    return parameter_shapes(
        layers, pretrained.preprocessing.crop_size, pretrained.preprocessing.crop_size
    )


def last_layers(paths: Iterable[str]) -> list[frozenset[str]]:
    """The sets of parameter paths that a trunk may lack: those of the last n ≥ 1 dense layers."""
    dense = [path for path in paths if path.startswith("fc")]
    layers = list(dict.fromkeys(path.partition("/")[0] for path in dense))
    return [
        frozenset(path for path in dense if path.partition("/")[0] in layers[first:])
        for first in range(len(layers))
    ]


def missing_layers(pretrained: Pretrained) -> list[str]:
    """The layers that a trunk lacks."""
    return sorted(
        {path.partition("/")[0] for path in expected_shapes(pretrained)} - pretrained.params.keys()
    )


def check_classifier(pretrained: Pretrained) -> None:
    """Raises UserError for a trunk, which has no logits."""
    if not pretrained.is_classifier:
        file, missing = pretrained.source.get("file", "this model"), missing_layers(pretrained)
        raise UserError(
            f"{file} has no {', '.join(missing)}: it gives features, but no classes; take a whole "
            "model"
        )


def check_layers(pretrained: Pretrained, layers: Iterable[str]) -> None:
    """Raises UserError for an activation that the model lacks, or has no parameters for."""
    table = architecture(pretrained.config.variant).layers
    for name in layers:
        for layer in layers_until(table, name):
            if isinstance(layer, Weighted) and layer.name not in pretrained.params:
                file = pretrained.source.get("file", "this model")
                raise UserError(f"{file} has no {layer.name}, which {name} needs")


def check_sane(pretrained: Pretrained) -> None:
    """Raises ValueError for a configuration or preprocessing that no model has."""
    config, rule = pretrained.config, pretrained.preprocessing
    if config.variant not in variants():
        raise ValueError(unknown("variant", str(config.variant), variants()))
    sizes = (rule.image_size, rule.crop_size, config.num_classes)
    sides = (rule.image_size, rule.image_size, 3)
    for name, sane in (
        ("sizes", all(type(n) is int and 1 <= n <= MOST_CLASSES for n in sizes)),
        ("crop_size", rule.crop_size <= rule.image_size),
        ("width", type(config.width) in (int, float) and 0 < config.width <= 100),
        ("dtype", config.dtype in get_args(get_type_hints(ModelConfig)["dtype"])),
        ("activation", config.activation in get_args(get_type_hints(ModelConfig)["activation"])),
        ("relu_logits", isinstance(config.relu_logits, bool)),
        ("resize", rule.resize in get_args(ResizeRule)),
        ("scale", np.isfinite(rule.scale).all() and np.min(rule.scale) > 0),
        ("mean", rule.mean.shape in ((3,), sides)),
        ("source", isinstance(pretrained.source, dict)),
        ("label_names", len(pretrained.label_names) in (0, config.num_classes)),
        ("label_names", all(isinstance(label, str) for label in pretrained.label_names)),
    ):
        if not sane:
            raise ValueError(f"no model has such a value of {name}")


def check_tensors(
    actual: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    file: object,
    optional: Collection[frozenset[str]] = (),
) -> None:
    """Raises UserError that lists every missing, surplus or misshaped tensor of a file at once.

    Args:
      actual: the shapes in the file, by the names of its own format.
      expected: the expected shapes, by the same names.
      file: the name of the file in the message.
      optional: sets of names; the names of one set may be missing, but only all of them together.
    """
    missing = expected.keys() - actual.keys()
    if missing in optional:
        missing = set()
    problems = [f"{name} is missing, expected {_shape(expected[name])}" for name in sorted(missing)]
    problems += [
        f"{name} {_shape(actual[name])} is not expected"
        for name in sorted(actual.keys() - expected.keys())
    ]
    problems += [
        f"{name} is {_shape(actual[name])}, expected {_shape(expected[name])}"
        for name in sorted(actual.keys() & expected.keys())
        if tuple(actual[name]) != tuple(expected[name])
    ]
    if problems:
        raise UserError(f"{file} does not fit: {listed(problems, '; ')}")


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
