"""The names of classes: ImageNet's thousand, which ship with the package, or those of a file."""

import functools
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from flax_alexnet.errors import UserError, first_line


@functools.cache
def _imagenet() -> tuple[tuple[str, str], ...]:
    text = (files("flax_alexnet.weights") / "imagenet_labels.txt").read_text("utf-8")
    rows = [line.partition(" ") for line in text.splitlines()]
    return tuple((synset, name) for synset, _, name in rows)


def imagenet_labels() -> tuple[str, ...]:
    """The 1000 classes of ILSVRC-2012 in the order of their synsets, as published nets have them.

    Each is the first of WordNet's words for it, such as "tench"; where two classes share one, a
    word in brackets tells them apart, such as "crane (bird)".
    """
    return tuple(name for _, name in _imagenet())


def imagenet_synsets() -> tuple[str, ...]:
    """WordNet's numbers of the same classes in the same order, such as "n01440764"."""
    return tuple(synset for synset, _ in _imagenet())


def match_labels(
    names: Sequence[str], label_names: Sequence[str], num_classes: int
) -> tuple[np.ndarray, bool]:
    """The net's class of each of a dataset's classes, by name where names agree.

    A dataset may have fewer classes than the net, and in another order, if all its names are the
    net's, or those that WordNet gives ImageNet's classes ("n01440764"). Where the net has no names,
    or wholly other ones, the classes must be as many, and are taken in their order.

    Args:
      names: of the dataset's classes.
      label_names: of the net's; empty where unknown.
      num_classes: the net's.

    Returns:
      int[len(names)], and whether they were matched by name.

    Raises:
      UserError: the classes do not fit.
    """
    if tuple(names) == tuple(label_names):
        return np.arange(len(names)), True
    known = {name: label for label, name in enumerate(label_names)}
    if tuple(label_names) == imagenet_labels():
        known |= {synset: label for label, synset in enumerate(imagenet_synsets())}
    missing = [name for name in names if name not in known]
    if not missing:
        return np.array([known[name] for name in names]), True
    if len(missing) == len(names) == num_classes:
        return np.arange(num_classes), False
    raise UserError(
        f"{len(missing)} of the dataset's {len(names)} classes are not among the net's "
        f"{num_classes} (the first: {missing[0]!r}); take the dataset it was trained for"
    )


def read_labels(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names in a text file, one a line.

    Raises:
      UserError: it cannot be read, or its lines are not as many as the classes, or one comes twice.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read labels {path}: {first_line(error)}") from None
    if len(names) != num_classes or not all(names):
        raise UserError(
            f"{path} has {sum(map(bool, names))} names on {len(names)} lines; expected one on each "
            f"of {num_classes}, as many as the net has classes"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has the name {twice[0]!r} twice; tell the classes apart")
    return names
