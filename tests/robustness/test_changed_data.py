"""Images that change between starts, or processes, of a run are not taken for the same."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.commands.prepare import prepare
from flax_alexnet.config.cli import parse
from flax_alexnet.config.recipes import QUICKSTART
from flax_alexnet.config.schema import Config
from flax_alexnet.data.sources import END_OF_IMAGE, END_OF_SHARD, open_dataset, open_splits
from flax_alexnet.train import main as train
from flax_alexnet.training import setup
from flax_alexnet.training.run_directory import record
from flax_alexnet.training.setup import agree, set_up
from flax_alexnet.utils.errors import UserError
from tests.images import make_folder

TRAIN, EVAL = "the images to train on have changed", "the images to evaluate on have changed"


@pytest.fixture
def pets(tmp_path):
    return make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})


@pytest.fixture
def start(tmp_path, pets):
    """A start of a run, up to where steps would begin."""

    def start(*more, name=f"folder:{pets}"):
        flags = ["--workdir", str(tmp_path / "run"), "--data.name", name, "--batch-size", "8"]
        flags += ["--model.width", "0.05", "--data.data-dir", str(tmp_path / "data")]
        config = parse(Config, [*flags, *more], QUICKSTART, "flax_alexnet.train")
        with contextlib.ExitStack() as held:
            ready = set_up(config, held)
        record(config.workdir, ready.identity)
        return ready

    return start


def paint(path, seed):
    """Another image under the same name, in the same form."""
    with Image.open(path) as image:
        size = image.size
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_all_images_replaced_under_their_names(start, pets):
    start()
    for number, path in enumerate(sorted(pets.rglob("*.png"))):
        paint(path, 1000 + number)
    with pytest.raises(UserError, match=f"{EVAL}; {TRAIN}.*, or --allow-changes to go on"):
        start()
    assert start("--allow-changes").history.changes == [EVAL, TRAIN]
    assert start().history.changes == [], "it goes on with the new ones"


@pytest.mark.parametrize(
    ("name", "changed"), [("cat/000.png", TRAIN), ("cat/009.png", EVAL), ("dog/012.png", TRAIN)]
)
@pytest.mark.parametrize("change", ["another", "a pixel", "unreadable", "swapped"])
def test_one_image(start, pets, name, changed, change):
    start()
    path = pets / name
    if change == "another":
        paint(path, 1000)
    elif change == "a pixel":
        with Image.open(path) as image:
            image.putpixel((10, 10), (1, 2, 3))
            image.save(path)
    elif change == "unreadable":
        path.rename(path.with_name("other"))
        path.symlink_to("nowhere")
    else:
        (path.parent / "001.png").rename(path.parent / "x")
        path.rename(path.parent / "001.png")
        (path.parent / "x").rename(path)
    with pytest.raises(UserError, match=changed):
        start()


def test_a_copy_is_said_and_goes_on(start, pets, capsys):
    start()
    for path in pets.rglob("*.png"):
        os.utime(path, ns=(10**18, 10**18))
    capsys.readouterr()
    start()
    said = capsys.readouterr().out
    assert said.count("image files were written again since the last start of the run") == 1
    start()
    assert capsys.readouterr().out == ""


def test_a_copy_elsewhere_has_the_same_digest(pets, tmp_path):
    copy = shutil.copytree(pets, tmp_path / "elsewhere" / "animals")
    one, other = (open_splits(f"folder:{path}").open("all") for path in (pets, copy))
    assert one.digest() == other.digest()
    os.utime(copy / "cat" / "000.png", ns=(10**18, 10**18))
    assert one.digest().content == other.digest().content
    assert one.digest().times != other.digest().times


def test_a_run_of_an_older_version_goes_on(start, tmp_path, capsys):
    identity = start().identity
    names = ("dataset.train_digest", "dataset.eval_digest", "dataset.times")
    record(tmp_path / "run", {k: v for k, v in identity.items() if k not in names})
    capsys.readouterr()
    assert start().history.changes == []
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert all(config[name] == identity[name] for name in names)


class TestPrepared:
    NAME = "prepared_folder/pets"

    def test_prepared_anew_from_other_images(self, start, pets, tmp_path):
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        before = start(name=self.NAME).identity
        shutil.rmtree(tmp_path / "data")
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert start(name=self.NAME).identity == before, "of the same ones it is the same"
        shutil.rmtree(tmp_path / "data")
        paint(pets / "cat" / "000.png", 1000)
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        with pytest.raises(UserError, match=TRAIN):
            start(name=self.NAME)

    def test_no_more_than_both_ends_of_a_file_are_read(self, pets, tmp_path):
        prepare(f"folder:{pets}", tmp_path / "data", image_size=64)
        source = open_dataset(self.NAME, tmp_path / "data").train
        before = source.digest()
        (path,) = (tmp_path / "data").rglob("*-train.*")
        size = path.stat().st_size
        assert size > 2 * END_OF_SHARD
        for place, seen in ((0, True), (END_OF_SHARD, False), (size - END_OF_SHARD, True)):
            data = bytearray(path.read_bytes())
            data[place] ^= 1
            path.write_bytes(data)
            assert (source.digest() != before) is seen
            data[place] ^= 1
            path.write_bytes(data)
        assert END_OF_IMAGE < END_OF_SHARD


def test_processes_with_other_images_are_found(start, pets, monkeypatch):
    own = start().identity
    paint(pets / "cat" / "000.png", 1000)
    other = start("--allow-changes").identity | {"allow_changes": False}
    said = [json.dumps({"error": "", "run": run}) for run in (own, other)]
    monkeypatch.setattr(setup, "gather", lambda *_: said)
    with pytest.raises(UserError, match="the digest of the images to train on is"):
        agree(own, "")


def test_the_command_ends_with_2(start, pets, tmp_path, capsys):
    start()
    paint(pets / "cat" / "000.png", 1000)
    flags = ["--workdir", str(tmp_path / "run"), "--data.name", f"folder:{pets}"]
    flags += ["--model.width", "0.05", "--data.data-dir", str(tmp_path / "data")]
    capsys.readouterr()
    assert train([*flags, "--batch-size", "8"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/run holds a run of another configuration ({TRAIN}): take another "
        "--workdir, or --allow-changes to go on with the new one\n"
    )
