"""The names of classes: ImageNet's thousand, which the package has, or those in a file."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.inputs import parse_json, read_text
from flax_alexnet.utils.text import printable

# Lists of ImageNet's classes differ in some words; of one whose order is another few are in place.
LARGEST = 2**20  # bytes; ImageNet's thousand names have 22 thousand
IMAGENETS = 0.9  # the share of them that is in place in the first


@functools.cache
def _imagenet() -> tuple[tuple[str, str], ...]:
    text = (files("flax_alexnet.weights") / "imagenet_labels.txt").read_text("utf-8")
    rows = [line.partition(" ") for line in text.splitlines()]
    return tuple((synset, name) for synset, _, name in rows)


def imagenet_labels() -> tuple[str, ...]:
    """The 1000 classes of ILSVRC-2012 in the order of their synsets, as published models have them.

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
    """The model's class of each of a dataset's classes, by names or numbers where these agree.

    A dataset may have fewer classes than the model, and in another order, if all its names are the
    model's, or have WordNet's numbers ("n01440764") that the model's names have too, or that
    ImageNet's classes have, where the model is one of these. Names that are all of 0 … n − 1 are
    the numbers of the model's classes, where the model has no names, or such numbers itself, or
    ImageNet's classes. Else the classes must be as many, and are taken in their order.

    Args:
      names: of the dataset's classes.
      label_names: of the model's; empty where unknown.
      num_classes: the model's.

    Returns:
      int[len(names)], and whether they were matched by name or number, and not by their order.

    Raises:
      UserError: the classes do not fit.
    """
    if tuple(names) == tuple(label_names):
        return np.arange(len(names)), True
    synsets = _synsets(label_names)
    numbers = _numbers(names, num_classes)
    theirs = _numbers(label_names, num_classes) if label_names else range(num_classes)
    if numbers and (theirs or synsets == imagenet_synsets()):
        places = {number: label for label, number in enumerate(theirs or range(num_classes))}
        return np.array([places[number] for number in numbers]), True
    known = {synset: label for label, synset in enumerate(synsets) if synset}
    known |= {name: label for label, name in enumerate(label_names)}
    matches = [known.get(name, known.get(_synset(name))) for name in names]
    missing = [name for name, label in zip(names, matches, strict=True) if label is None]
    if not missing:
        return np.array(matches), True
    if len(missing) == len(names) == num_classes:
        return np.array(numbers or range(num_classes)), False
    raise UserError(
        f"{len(missing)} of the dataset's {len(names)} classes are not among the model's "
        f"{num_classes} (the first: {missing[0]!r}); take the dataset it was trained for"
    )


def _numbers(names: Sequence[str], count: int) -> list[int] | None:
    """The names as numbers, where they are all of 0 … count − 1."""
    if not all(re.fullmatch("[0-9]{1,9}", name) for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if sorted(numbers) == list(range(count)) else None


def _synset(name: str) -> str:
    """WordNet's number in a name such as "n01440764 tench" or "n02085620-Chihuahua", or ""."""
    matches = re.search(r"(?<![^\W_])n[0-9]{8}(?![0-9])", name)
    return matches[0] if matches else ""


def _synsets(label_names: Sequence[str]) -> tuple[str, ...]:
    """WordNet's numbers of a model's classes, as far as its names say them, or are ImageNet's."""
    if len(label_names) == len(_imagenet()):
        same = sum(
            _word(a) == _word(b) for a, b in zip(label_names, imagenet_labels(), strict=True)
        )
        own = tuple(map(_synset, label_names))
        agree = all(a in ("", b) for a, b in zip(own, imagenet_synsets(), strict=True))
        if agree and same > IMAGENETS * len(label_names):
            return imagenet_synsets()
    return tuple(map(_synset, label_names))


def _word(name: str) -> str:
    """The first word of WordNet's in a name, which numbers, more words and brackets may go with."""
    plain = name.removeprefix(_synset(name)).partition(",")[0].partition("(")[0]
    return plain.replace("_", " ").strip().lower()


def read_labels(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names of a model's classes in a file.

    It is a text with a name on each line, be it alone, as in Caffe's `synset_words.txt`, or as in
    Python's `{0: 'name', …}`; or JSON: a list, or {"0": name}, in which a name may be a list as in
    Keras' `imagenet_class_index.json`. Of ImageNet's classes those with the same name are told
    apart by their numbers in WordNet.

    Raises:
      UserError: it cannot be read, or it has not as many names as the model has classes, or one
        comes twice.
    """
    try:
        text = read_text(path, LARGEST, "utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        reason = cause(error)
        raise UserError(f"cannot read labels {path}: {reason}") from None
    lines = text.splitlines()
    names = [printable(name.strip()) for name in _from_json(text) or _from_python(lines) or lines]
    if len(names) != num_classes or not all(names):
        raise UserError(
            f"{path} has {sum(map(bool, names))} names on {len(names)} lines; expected one on each "
            f"of {num_classes}, as many as the model has classes"
        )
    counts = Counter(names)
    if _synsets(names) == imagenet_synsets():
        names = [
            name if counts[name] == 1 else f"{name} ({synset})"
            for name, synset in zip(names, imagenet_synsets(), strict=True)
        ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has the name {twice[0]!r} twice; tell the classes apart")
    return tuple(names)


def _from_json(text: str) -> Sequence[str]:
    """The names in a list, or in a dictionary from their numbers; none where it is neither."""
    try:
        values = parse_json(text)
    except ValueError:
        return ()
    if isinstance(values, dict):
        values = _by_number(values)
    if not isinstance(values, list):
        return ()
    names = [" ".join(value) if _are_texts(value) else value for value in values]
    return names if _are_texts(names) else ()


def _from_python(lines: Sequence[str]) -> Sequence[str]:
    """The names of lines such as "0: 'tench'," and "{0: 'tench',"; none where one is no such."""
    entry = re.compile(r"""\s*\{?\s*([0-9]+)\s*:\s*(['"])(.*)\2\s*,?\s*\}?\s*""")
    matches = [match for line in lines if (match := entry.fullmatch(line))]
    if len(matches) < len(lines):
        return ()
    return _by_number({match[1]: match[3].replace("\\'", "'") for match in matches})


def _by_number(values: Mapping[str, Any]) -> list[Any]:
    """The values in the order of their keys, where these are all of 0 … n − 1."""
    places = dict(zip(_numbers(list(values), len(values)) or (), values.values(), strict=False))
    return [places[number] for number in sorted(places)]


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
