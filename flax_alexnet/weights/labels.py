"""The names of classes: ImageNet's thousand, which ship with the package, or those of a file."""

import functools
from importlib.resources import files
from pathlib import Path

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


def read_labels(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names in a text file, one a line.

    Raises:
      UserError: it cannot be read, or its lines are not as many as the classes.
    """
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read labels {path}: {first_line(error)}") from None
    if len(names) != num_classes or not all(names):
        raise UserError(
            f"{path} has {sum(map(bool, names))} names on {len(names)} lines; expected one on each "
            f"of {num_classes}, as many as the net has classes"
        )
    return names
