"""Names of classes: as lists, and matched with those of a dataset."""

import json

import pytest

from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights.labels import (
    imagenet_labels,
    imagenet_synsets,
    match_labels,
    read_labels,
)


def test_labels_are_matched_by_name(pretrained):
    def match(names, label_names=pretrained.label_names):
        labels, by_name = match_labels(names, label_names, 4 if len(label_names) < 5 else 1000)
        return labels.tolist(), by_name

    assert match(["class c", "class a"]) == ([2, 0], True)
    assert match(["w", "x", "y", "z"]) == ([0, 1, 2, 3], False)
    assert match(["w", "x", "y", "z"], ()) == ([0, 1, 2, 3], False)
    twice = ("crane", "crane", "x", "y")
    assert match(twice, twice) == ([0, 1, 2, 3], True)
    some = ["tench", "n01443537", "crane (machine)", "n02085620-Chihuahua"]
    assert match(some, imagenet_labels()) == ([0, 1, 517, 151], True)
    # WordNet's numbers in the model's own names, be it ImageNet's or not.
    assert match(["n02000002", "x", "n02000001 b"], ("n02000001 a", "x", "y", "n02000002, z")) == (
        [3, 1, 0],
        True,
    )
    words = [f"{s} {n}, x" for s, n in zip(imagenet_synsets(), imagenet_labels(), strict=True)]
    assert match(["n01443537", "n01440764"], words) == ([1, 0], True)
    # Class numbers, as text sorts them: of a model without names, ImageNet's, or named by numbers.
    assert match(["0", "1", "3", "2"], ()) == ([0, 1, 3, 2], True)
    assert match(["00", "01", "03", "02"], ("0", "1", "2", "3")) == ([0, 1, 3, 2], True)
    assert match(["0", "1", "3", "2"], ("0", "3", "2", "1")) == ([0, 3, 1, 2], True)
    numbers = sorted(map(str, range(1000)))
    assert match(numbers, imagenet_labels()) == ([int(number) for number in numbers], True)
    assert match(["0", "1", "3", "2"]) == ([0, 1, 3, 2], False)
    assert match(["1", "2", "3", "4"], ()) == ([0, 1, 2, 3], False)
    for names in (["class c", "x"], ["w", "x", "y"], ["class a", "x", "y", "z"]):
        with pytest.raises(UserError, match="not among the model's 4"):
            match(names)


NAMES = imagenet_labels()
NUMBERED = [f"{synset} {name}" for synset, name in zip(imagenet_synsets(), NAMES, strict=True)]
WORDS = [f"{line}, other word" for line in NUMBERED]
LISTS = {
    "CRLF": ("\r\n".join(NAMES) + "\r\n", NAMES),
    "blank lines at the end": ("\ufeff" + "\n".join(NAMES) + "\n \n\n", NAMES),
    "synset_words.txt of Caffe": ("\n".join(WORDS), WORDS),
    "synsets": ("\n".join(imagenet_synsets()), imagenet_synsets()),
    "JSON": (json.dumps(NAMES), NAMES),
    "imagenet_class_index.json of Keras": (
        json.dumps({str(i): line.split(" ", 1) for i, line in enumerate(NUMBERED)}),
        NUMBERED,
    ),
    "JSON by numbers": (json.dumps(dict(sorted((str(i), n) for i, n in enumerate(NAMES)))), NAMES),
    "Python": ("{" + ",\n ".join(f"{i}: {n!r}" for i, n in enumerate(NAMES)) + "}", NAMES),
    "numbered lines": ("".join(f"{i}: '{n}',\n" for i, n in enumerate(NAMES)), NAMES),
}


@pytest.mark.parametrize(("text", "expected"), LISTS.values(), ids=LISTS)
def test_lists_of_labels_as_people_have_them(tmp_path, text, expected):
    """And folders of some of ImageNet's classes match all of them by WordNet's numbers."""
    (tmp_path / "labels").write_bytes(text.encode())
    names = read_labels(tmp_path / "labels", 1000)
    assert names == tuple(expected)
    labels, matched = match_labels(["n02007558", "n01440764"], names, 1000)
    assert (labels.tolist(), matched) == ([130, 0], True)


def test_classes_of_one_name_are_told_apart_by_their_numbers(tmp_path):
    (tmp_path / "labels").write_text("\n".join(name.split(" (")[0] for name in NAMES))
    names = read_labels(tmp_path / "labels", 1000)
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert len(set(names)) == 1000
    assert match_labels(["n03126707", "n01440764"], names, 1000)[0].tolist() == [517, 0]


def test_imagenets_classes_in_another_order_are_known_by_their_own_numbers():
    numbered = [f"{s} {n}" for s, n in zip(imagenet_synsets(), imagenet_labels(), strict=True)]
    names = numbered[:700] + numbered[:699:-1]  # most of them in their places
    labels, matched = match_labels(imagenet_synsets(), names, 1000)
    assert matched
    assert [names[label] for label in labels] == numbered
    bare = list(imagenet_labels()[:700] + imagenet_labels()[:699:-1])
    with pytest.raises(UserError, match="1000 of the dataset's 1000 classes are not among"):
        match_labels([*imagenet_synsets()[:-1], "n99999999"], bare, 1001)
    assert not match_labels(imagenet_synsets(), bare, 1000)[1]


def test_labels(shared_data):
    names, synsets = imagenet_labels(), imagenet_synsets()
    assert len({name.lower() for name in names}) == len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    known = {0: "tench", 134: "crane (bird)", 281: "tabby", 517: "crane (machine)"}
    assert {label: names[label] for label in known} == known
    by_synset = dict(zip(synsets, names, strict=True))
    for image in (shared_data / "imagenet_samples").glob("*.JPEG"):
        synset, _, name = image.stem.partition("_")
        words = name.replace("_", " ").lower()
        assert by_synset[synset].replace("'", "").lower().startswith(words.replace("'", ""))
