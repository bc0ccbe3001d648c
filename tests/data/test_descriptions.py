"""Prepared datasets that lie about themselves: each is one line, at once, before any image."""

import json
import os
import shutil
import signal

import pytest

from flax_alexnet.commands.prepare import main as prepare_main
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.train import main as train
from flax_alexnet.utils.errors import UserError
from tests.images import make_folder

NAME = "prepared_folder/pets"
INFO, FEATURES, LABELS = "dataset_info.json", "features.json", "label.labels.txt"
SHARD = "prepared_folder-train.array_record-00000-of-00001"


@pytest.fixture(autouse=True)
def in_time():
    """What waits for ever fails within ten seconds."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    make_folder(folder / "pets", {"cat": 12, "dog": 13})
    prepare(f"folder:{folder / 'pets'}", folder / "data", image_size=16)
    return folder / "data"


@pytest.fixture
def data_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def edit(name, change):
    """The attack that lets `change` edit the JSON of a file."""

    def attack(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return attack


def train_split(**values):
    return edit(INFO, lambda info: info["splits"][0].update(values))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def link(name, target):
    def attack(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def pipe(name):
    def attack(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return attack


def sparse(name):
    return lambda folder: os.truncate(folder / name, 3 * 10**9)


def classes(number, names=False):
    def attack(folder):
        text = (folder / FEATURES).read_text()
        (folder / FEATURES).write_text(
            text.replace('"numClasses": "2"', f'"numClasses": "{number}"')
        )
        if not names:
            (folder / LABELS).unlink()

    return attack


def code_in_old_json(folder):
    """Old files have JSON within JSON."""
    inner = {"features": {"image": {"pythonClassName": "evil.Image", "image": {}}}}
    outer = {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": json.dumps(inner),
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    }
    (folder / FEATURES).write_text(json.dumps(outer))


ATTACKS = {
    "fewer images": (train_split(shardLengths=["10"]), f"{SHARD} holds 23 images, where .* 10"),
    "more images": (train_split(shardLengths=["5000"]), "holds 23 images, where .* 5,000"),
    "no images": (train_split(shardLengths=["0"]), "holds 23 images, where .* 0"),
    "fewer than none": (train_split(shardLengths=["-5"]), "holds 23 images, where .* -5"),
    "2**62 images": (train_split(shardLengths=[str(2**62)]), "4,611,686,018,427,387,904"),
    "2**70 images": (train_split(shardLengths=[str(2**70)]), "Value out of range"),
    "100,000 files": (train_split(shardLengths=["1"] * 100_000), "train has 100,000 files"),
    "a file that is not there": (train_split(shardLengths=["12", "11"]), "No such file"),
    "a file elsewhere": (train_split(filepathTemplate="../../../etc/passwd"), "is a part of it"),
    "a name elsewhere": (edit(INFO, lambda info: info.update(name="../../x")), "is a part of it"),
    "the file of another split": (
        train_split(filepathTemplate="{DATASET}-test.{FILEFORMAT}-{SHARD_X_OF_Y}"),
        "holds 2 images, where .* 23",
    ),
    "an unknown format": (edit(INFO, lambda info: info.update(fileFormat="x")), "not a valid"),
    "a list": (write(INFO, b"[]"), "Invalid version"),
    "nested information": (write(INFO, b'{"splits":[' * 5000 + b"]}" * 5000), "nested too deep"),
    "nested features": (
        write(FEATURES, b'{"featuresDict":' * 5000 + b"1" + b"}" * 5000),
        f"{FEATURES}: it is nested too deep|no field named",
    ),
    "10**9 classes": (classes(10**9), "says 1000000000 classes; 1 to 1,000,000 are read"),
    "fewer than no class": (classes(-3), "says -3 classes"),
    "10**9 classes with names": (classes(10**9, names=True), "names 2 classes, where .* 1000"),
    "fewer names": (write(LABELS, b"cat\n"), "names 1 classes, where there are 2"),
    "no names": (write(LABELS, b""), "names 0 classes, where there are 2"),
    "a name twice": (write(LABELS, b"cat\ncat\n"), "names the class cat twice"),
    "names that are no text": (write(LABELS, b"\xff\xfe\0\n\n"), "can't decode byte 0xff"),
    "code in JSON within JSON": (code_in_old_json, r"would run evil\.Image, which is not of TFDS"),
}
for name in (INFO, FEATURES, LABELS, SHARD):
    ATTACKS[f"a pipe {name}"] = (pipe(name), f"{name}: it is no regular file")
    ATTACKS[f"a device {name}"] = (link(name, "/dev/zero"), f"{name}: it is no regular file")
for name in (INFO, FEATURES, LABELS):
    ATTACKS[f"3 GB {name}"] = (sparse(name), f"{name}: it has 3,000,000,000 bytes; at most")


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_description_that_lies_is_one_line(data_dir, attack):
    make, expected = ATTACKS[attack]
    make(data_dir / NAME / "1.0.0")
    with pytest.raises(UserError, match=expected) as caught:
        open_dataset(NAME, data_dir)
    assert "1.0.0 " in str(caught.value), "the folder is named"


def test_a_command_ends_with_2(data_dir, tmp_path, capsys):
    train_split(shardLengths=["10"])(data_dir / NAME / "1.0.0")
    flags = ["--workdir", str(tmp_path / "run"), "--data.name", NAME]
    assert train([*flags, "--data.data-dir", str(data_dir)]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: the dataset in {data_dir / NAME / '1.0.0'} is damaged ({SHARD} holds 23 images, "
        f"where {INFO} says 10): remove that folder and prepare it once more\n"
    )


@pytest.mark.parametrize(
    "attack",
    [
        edit(INFO, lambda info: info["splits"].append(info["splits"][0])),
        edit(INFO, lambda info: info.update(moduleName="os")),
        edit(INFO, lambda info: info.update(description="other")),
    ],
)
def test_what_says_nothing_wrong_is_read_whole(data_dir, attack):
    attack(data_dir / NAME / "1.0.0")
    dataset = open_dataset(NAME, data_dir, "train[:50%]+test")
    assert len(dataset.train) == 14
    assert list(dataset.label_names) == ["cat", "dog"]


def test_names_of_classes_are_printable(data_dir):
    (data_dir / NAME / "1.0.0" / LABELS).write_bytes(b"\x1b[31mred\n=1+1\n")
    assert list(open_dataset(NAME, data_dir).label_names) == [r"\x1b[31mred", "=1+1"]


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_the_embedded_dataset_waits_for_no_pipe(tmp_path, name, capsys):
    folder = tmp_path / "shapes_and_textures" / "1.0.0"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: it is no regular file"):
        open_dataset("shapes_and_textures", tmp_path)
    assert prepare_main(["--data.data-dir", str(tmp_path)]) == 2
    assert "it is no regular file" in capsys.readouterr().err
