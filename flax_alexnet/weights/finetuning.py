"""Training from a trained net: what its file says about the run, and what is taken from it."""

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

OF_THE_NET = ("variant", "width", "activation", "relu_logits")


class Start(NamedTuple):
    """What a run starts with instead of random values and its own mean image."""

    params: Params  # of the layers that are taken over
    mean: np.ndarray  # float32[image_size, image_size, 3]
    anew: frozenset[str]  # layers that are not taken over
    said: str  # a line for the user


def adapt(recipe: Config, path: Path) -> Config:
    """The recipe with the variant and the preprocessing of the trained net in `path`.

    Raises:
      UserError: there is none.
    """
    net, _ = read(path)  # what is worth knowing of it is said when the run begins
    same = {name: getattr(net.config, name) for name in OF_THE_NET}
    recipe = recipe.with_preprocessing(net.preprocessing)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **same))


def start_from(
    net: Pretrained, config: Config, num_classes: int, label_names: Sequence[str]
) -> Start:
    """The parameters that a run takes from `net`: all, but the last layer where classes differ.

    Raises:
      UserError: the run's net or its pictures are of another kind.
    """
    for name in OF_THE_NET:
        theirs, ours = getattr(net.config, name), getattr(config.model, name)
        if theirs != ours:
            flag = name.replace("_", "-")
            raise UserError(
                f"--model.{flag} is {ours}, but --init-from {config.init_from} has {theirs}; leave "
                "that flag out"
            )
    size = config.data.image_size
    mean = np.asarray(net.preprocessing.mean, np.float32)
    if mean.ndim == 3 and mean.shape[0] != size:
        raise UserError(
            f"--data.image-size is {size}, but the mean image in {config.init_from} has "
            f"{mean.shape[0]} pixels; leave that flag out"
        )
    same_classes = num_classes == net.num_classes and _same(label_names, net)
    rule = dataclasses.replace(net.preprocessing, crop_size=config.augment.crop_size)
    model = dataclasses.replace(config.model, num_classes=num_classes)
    shapes = expected_shapes(dataclasses.replace(net, config=model, preprocessing=rule))
    *_, last = (path.partition("/")[0] for path in shapes)
    params = {k: v for k, v in net.params.items() if same_classes or k != last}
    found = {path: value.shape for path, value in flatten_dict(params, sep="/").items()}
    wanted = {path: shape for path, shape in shapes.items() if path.partition("/")[0] in params}
    check_tensors(found, wanted, f"--init-from {config.init_from}")
    anew = {path.partition("/")[0] for path in shapes.keys() - wanted.keys()}
    said = f"starting from {net.source.get('file', config.init_from)}"
    if not same_classes and last in net.params:
        said += f"; {last} is replaced, since its {net.num_classes} classes are not these"
        said += f" {num_classes}"
    if absent := sorted(anew - net.params.keys()):
        said += f"; {', '.join(absent)} not there, and made anew"
    whole = np.ascontiguousarray(np.broadcast_to(mean, (size, size, 3)))
    return Start(params, whole, frozenset(anew), said)


def _same(label_names: Sequence[str], net: Pretrained) -> bool:
    """Whether the classes are the net's in its order; true where it has no names that say it."""
    try:
        order, matched = match_labels(label_names, net.label_names, net.num_classes)
    except UserError:
        return not net.label_names
    in_order = np.array_equal(order, np.arange(net.num_classes))
    return in_order and (matched or not net.label_names)
