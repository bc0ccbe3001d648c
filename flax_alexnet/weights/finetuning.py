"""Training from a trained model: which settings and parameters a run takes from it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from flax_alexnet.config.schema import Config
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights.labels import match_labels
from flax_alexnet.weights.load import read
from flax_alexnet.weights.pretrained import Params, Pretrained, check_tensors, expected_shapes

MODEL_FIELDS = ("variant", "width", "activation", "relu_logits")


class Start(NamedTuple):
    """What a run starts with instead of random values and its own mean image."""

    params: Params  # of the layers that are taken over
    mean: np.ndarray  # float32[image_size, image_size, 3]
    random_layers: frozenset[str]  # layers that are not taken over
    message: str  # a line for the user


def adapt(recipe: Config, path: Path) -> Config:
    """The recipe with the variant and the preprocessing of the trained model in `path`.

    Raises:
      UserError: there is none.
    """
    pretrained, _ = read(path)  # what is worth knowing of it is said when the run begins
    same = {name: getattr(pretrained.config, name) for name in MODEL_FIELDS}
    recipe = recipe.with_preprocessing(pretrained.preprocessing)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **same))


def start_from(
    pretrained: Pretrained, config: Config, num_classes: int, label_names: Sequence[str]
) -> Start:
    """The parameters that a run takes from a model: all, but the last layer where classes differ.

    Raises:
      UserError: the run's model or its images are of another kind.
    """
    for name in MODEL_FIELDS:
        theirs, ours = getattr(pretrained.config, name), getattr(config.model, name)
        if theirs != ours:
            flag = name.replace("_", "-")
            raise UserError(
                f"--model.{flag} is {ours}, but --init-from {config.init_from} has {theirs}; leave "
                "that flag out"
            )
    size = config.data.image_size
    mean = np.asarray(pretrained.preprocessing.mean, np.float32)
    if mean.ndim == 3 and mean.shape[0] != size:
        raise UserError(
            f"--data.image-size is {size}, but the mean image in {config.init_from} has "
            f"{mean.shape[0]} pixels; leave that flag out"
        )
    same_classes = num_classes == pretrained.num_classes and _same(label_names, pretrained)
    rule = dataclasses.replace(pretrained.preprocessing, crop_size=config.augment.crop_size)
    model = dataclasses.replace(config.model, num_classes=num_classes)
    shapes = expected_shapes(dataclasses.replace(pretrained, config=model, preprocessing=rule))
    *_, last = (path.partition("/")[0] for path in shapes)
    params = {k: v for k, v in pretrained.params.items() if same_classes or k != last}
    actual = {path: value.shape for path, value in flatten_dict(params, sep="/").items()}
    wanted = {path: shape for path, shape in shapes.items() if path.partition("/")[0] in params}
    check_tensors(actual, wanted, f"--init-from {config.init_from}")
    random_layers = {path.partition("/")[0] for path in shapes.keys() - wanted.keys()}
    message = f"starting from {pretrained.source.get('file', config.init_from)}"
    if not same_classes and last in pretrained.params:
        message += f"; {last} is replaced, since its {pretrained.num_classes} classes are not these"
        message += f" {num_classes}"
    if absent := sorted(random_layers - pretrained.params.keys()):
        message += f"; {', '.join(absent)} not there, and drawn at random"
    whole = np.ascontiguousarray(np.broadcast_to(mean, (size, size, 3)))
    return Start(params, whole, frozenset(random_layers), message)


def _same(label_names: Sequence[str], pretrained: Pretrained) -> bool:
    """Whether the classes are the model's in its order; true where it has no names that say it."""
    try:
        order, matched = match_labels(label_names, pretrained.label_names, pretrained.num_classes)
    except UserError:
        return not pretrained.label_names
    in_order = np.array_equal(order, np.arange(pretrained.num_classes))
    return in_order and (matched or not pretrained.label_names)
