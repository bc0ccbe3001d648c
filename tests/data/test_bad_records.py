"""Images that cannot be read, in training: skipped, counted, named, and the same every time."""

import contextlib
import io
import itertools
import json
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.commands.prepare import prepare
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.data.bad_records import BadRecords, Limit
from flax_alexnet.data.dataset import CachedExamples, DecodedExamples, open_examples
from flax_alexnet.data.loader import evaluation_batches, training_batches
from flax_alexnet.data.sources import NO_LABEL, Record, open_dataset
from flax_alexnet.train import main as train
from flax_alexnet.training.run_directory import record
from flax_alexnet.training.setup import set_up
from flax_alexnet.utils.errors import UserError

BAD = {4: "it is on fire", 5: "", 17: "", 29: "it is on fire"}  # 5 and 17 are no images


class Damaged:
    """Thirty images whose grey level and label say their index; some cannot be read."""

    prepared = False
    label_names = tuple("class") * 6

    def __init__(self, bad=BAD):
        self.bad = bad

    def __len__(self):
        return 30

    def name(self, index):
        return f"image {index}"

    def label(self, index):
        del index
        return NO_LABEL

    def read(self, index):
        if self.bad.get(index):
            raise UserError(self.bad[index])
        return Record(self.bytes(index), index, self.name(index))

    def bytes(self, index):
        if index in self.bad:
            return b"no image"
        data = io.BytesIO()
        Image.fromarray(np.full((2, 2, 3), index, np.uint8)).save(data, "png")
        return data.getvalue()


def ignore(name, problem, label):
    del name, problem, label


def ledger(tmp_path, max_bad=1.0, total=30, **options):
    limit = Limit({NO_LABEL: ("train images", total)}, max_bad)
    return BadRecords(tmp_path, "train", total, limit, **options)


def lines(tmp_path, file="bad_records.jsonl"):
    return [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]


def labels(batches, count):
    result = []
    for batch in itertools.islice(batches, count):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
        result.append(batch["label"].tolist())
    return result


@pytest.mark.parametrize("kind", [CachedExamples, DecodedExamples])
class TestSkipping:
    def test_the_next_readable_one_takes_the_place(self, kind):
        """All others keep theirs, with any number of threads, resumed anywhere."""
        whole = labels(training_batches(kind(Damaged({}), 2), 8, seed=1), 8)
        place = {4: 6, 5: 6, 17: 18, 29: 0}
        expected = [[place.get(label, label) for label in row] for row in whole]
        for threads, step in ((4, 0), (1, 3), (4, 6)):
            examples = kind(Damaged(), 2, on_bad=ignore)
            batches = training_batches(examples, 8, seed=1, threads=threads, start=8 * step)
            assert labels(batches, 8 - step) == expected[step:]

    def test_a_process_reads_the_same_rows(self, kind):
        examples = kind(Damaged(), 2, on_bad=ignore)
        whole = labels(training_batches(examples, 8, seed=1), 5)
        other = kind(Damaged(), 2, on_bad=ignore)
        rows = labels(training_batches(other, 8, seed=1, rows=[2, 6]), 5)
        assert rows == [[row[2], row[6]] for row in whole]

    @pytest.mark.parametrize("threads", [1, 4])
    def test_evaluation_counts_each_readable_one_once(self, kind, threads):
        bad = {**BAD, 0: "it fills up the last batch"}
        batches = list(evaluation_batches(kind(Damaged(bad), 2, on_bad=ignore), 8, threads=threads))
        assert [batch["image"].shape for batch in batches] == [(8, 2, 2, 3)] * 4
        seen = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
        assert seen.tolist() == [index for index in range(30) if index not in bad]

    def test_each_is_told_of_with_its_problem(self, kind, tmp_path):
        bad = ledger(tmp_path)
        labels(training_batches(kind(Damaged(), 2, on_bad=bad.add), 8, seed=1), 5)
        assert {line["name"]: line["problem"] for line in lines(tmp_path)} == {
            f"image {index}": problem or "it is no image in a known format"
            for index, problem in BAD.items()
        }

    def test_none_that_can_be_read(self, kind):
        examples = kind(Damaged(dict.fromkeys(range(30), "")), 2, on_bad=ignore)
        with pytest.raises(UserError, match="none of the 30 images can be read"):
            next(training_batches(examples, 8, seed=1))


@pytest.mark.parametrize("threads", [1, 4])
def test_too_many_end_the_training(tmp_path, threads):
    bad = ledger(tmp_path, max_bad=3 / 30)
    batches = training_batches(
        DecodedExamples(Damaged(), 2, on_bad=bad.add), 8, seed=1, threads=threads
    )
    with pytest.raises(UserError, match=r"now 4 of 30 train images are bad, more than .* 0\.1"):
        labels(batches, 5)
    assert len(lines(tmp_path)) == 4
    examples = DecodedExamples(Damaged(), 2, on_bad=ledger(tmp_path, max_bad=4 / 30).add)
    labels(training_batches(examples, 8, seed=1), 5)


@pytest.mark.parametrize("cached", [True, False])
def test_the_trial_at_the_start_names_the_first(tmp_path, monkeypatch, cached):
    if not cached:
        monkeypatch.setattr("flax_alexnet.data.dataset.CACHE_BYTES", 0)
    with pytest.raises(UserError, match="cannot read image image 4: it is on fire; remove or"):
        open_examples(Damaged(), 2)
    with pytest.raises(UserError, match="image 4: it is on fire; now 1 of 30"):
        open_examples(Damaged(), 2, on_bad=ledger(tmp_path, max_bad=0.001).add)
    bad = ledger(tmp_path)
    open_examples(Damaged(), 2, slice(1, None, 2), on_bad=bad.add)
    assert bad.report().startswith("3 of 30 train images cannot be read and are skipped")
    assert bad.report() == ""
    bad.add("another", "torn")
    assert bad.report().startswith("4 of 30")
    names = [line["name"] for line in lines(tmp_path)]
    assert names == [*(f"image {i}" for i in (4, 5, 17, 29)), "another"]


def test_a_label_out_of_range_is_a_mistake_in_the_split(tmp_path):
    source = Damaged()
    source.label_names = tuple("class")
    for make in (CachedExamples, DecodedExamples):
        with pytest.raises(UserError, match="image 6 has the label 6, but there are only 5"):
            make(source, 2, on_bad=ledger(tmp_path).add).take([5])


class TestLedger:
    def test_nothing_bad_leaves_no_file(self, tmp_path):
        assert len(ledger(tmp_path)) == 0
        assert not any(tmp_path.iterdir())

    def test_an_image_is_named_once_by_any_thread(self, tmp_path):
        bad = ledger(tmp_path, process=3)
        several = [
            threading.Thread(target=lambda: [bad.add(f"{i}\n", "torn") for i in range(30)])
            for _ in range(4)
        ]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        assert len(bad) == 30
        names = [line["name"] for line in lines(tmp_path, "bad_records.3.jsonl")]
        assert sorted(names) == sorted(f"{i}\n" for i in range(30))

    @pytest.mark.parametrize("cut", [0, 1, 30])
    def test_a_later_start_repeats_nothing(self, tmp_path, cut):
        """What it knows from the file does not count: those images may be repaired by now."""
        path = tmp_path / "bad_records.jsonl"
        first = ledger(tmp_path)
        for name in "abc":
            first.add(name, "torn")
        path.write_bytes(path.read_bytes()[: -cut or None])  # as a kill may leave it
        later = ledger(tmp_path, max_bad=2 / 30)
        later.add("c", "torn")
        later.add("d", "torn")
        assert len(later) == 2
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        assert [json.loads(line)["name"] for line in whole] == ["a", "b", "c", "d"]
        assert json.loads(whole[3]) == {"split": "train", "name": "d", "problem": "torn"}

    @pytest.mark.parametrize(("max_bad", "allowed"), [(0, 0), (0.01, 2), (0.295, 59), (1, 200)])
    def test_the_limit(self, tmp_path, max_bad, allowed):
        bad = ledger(tmp_path, max_bad, total=200)
        for index in range(allowed):
            bad.add(f"{index}", "torn")
        if allowed < 200:
            with pytest.raises(
                UserError, match=f"cannot read image x: torn.* {allowed + 1} of 200"
            ):
                bad.add("x", "torn")
            with pytest.raises(UserError):  # whoever comes later hears it too
                bad.add("x", "torn")

    def test_what_a_full_disk_keeps_out_is_said_and_comes_later(self, tmp_path, capsys):
        bad = ledger(tmp_path / "later")
        bad.add("a", "torn")
        said = capsys.readouterr().err
        assert said.startswith(f"cannot write {tmp_path}/later/bad_records.jsonl (No such file or")
        assert '"name": "a"' in said
        (tmp_path / "later").mkdir()
        bad.add("b", "torn")
        assert [line["name"] for line in lines(tmp_path / "later")] == ["a", "b"]
        assert not capsys.readouterr().err


@pytest.fixture
def pets(tmp_path):
    """200 images in two classes, of which every tenth is held out."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for index in range(100):
            path = tmp_path / "pets" / label / f"{index:03}.png"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "pets"


class TestFolders:
    """A tenth of a class may be bad, be they trained on or held out."""

    def open(self, tmp_path, pets, *more):
        """What a training opens before anything is compiled."""
        flags = train_flags(tmp_path / "run", tmp_path)[:-2]  # with the default of --data.max-bad
        config = parse_config([*flags, "--data.name", f"folder:{pets}", *more])
        with contextlib.ExitStack() as held:
            return set_up(config, held)

    def test_some_are_named_and_left_out(self, tmp_path, pets, capsys):
        (pets / "cat" / "003.png").write_bytes(b"")
        (pets / "dog" / "009.png").write_bytes((pets / "dog" / "009.png").read_bytes()[:300])
        ready = self.open(tmp_path, pets)
        (held_out, *_) = evaluation_batches(ready.data.eval, 24)
        assert held_out["mask"].sum() == 19
        said = capsys.readouterr().out
        assert "1 of 180 train images cannot be read and are skipped" in said
        assert "1 of 20 eval images cannot be read and are skipped" in said
        found = {line["name"]: line["problem"] for line in lines(tmp_path / "run")}
        assert found.keys() == {f"{pets}/cat/003.png", f"{pets}/dog/009.png"}
        assert found[f"{pets}/cat/003.png"] == "it is empty"

    def test_more_than_a_tenth_of_a_class_are_refused(self, tmp_path, pets):
        for index in range(10):
            (pets / "cat" / f"{index:03}.png").write_bytes(b"")
        self.open(tmp_path, pets)
        (pets / "cat" / "010.png").write_bytes(b"")
        too_many = "11 of 100 images of cat are bad, more than --data.max-bad 0.1 allows"
        with pytest.raises(UserError, match=re.escape(too_many)):
            self.open(tmp_path, pets)
        self.open(tmp_path, pets, "--data.max-bad", "0.2")

    def test_a_run_keeps_its_order_of_classes(self, tmp_path, pets):
        """That of text, as it was once; a resumed run must not call its classes otherwise."""
        (pets / "cat").rename(pets / "10")
        (pets / "dog").rename(pets / "9")
        ready = self.open(tmp_path, pets)
        assert ready.data.dataset.label_names == ["9", "10"]
        record(tmp_path / "run", ready.identity | {"dataset.label_names": ["10", "9"]})
        again = self.open(tmp_path, pets)
        assert again.data.dataset.label_names == ["10", "9"]
        assert [r.data.train.take([0])["label"][0] for r in (again, ready)] == [0, 1]


def train_flags(workdir, data_dir):
    """A small model, evaluated after 5, 9 and 12 steps."""
    return [
        *("--workdir", str(workdir), "--data.data-dir", str(data_dir), "--no-compilation-cache"),
        *("--data.name", "prepared_folder/pets", "--data.image-size", "16", "--data.threads", "4"),
        *("--model.variant", "cuda_convnet_19pct", "--model.width", "0.1"),
        *("--augment.crop-size", "12", "--batch-size", "8", "--steps", "12", "--epochs", "100"),
        *("--log-every", "1", "--data.max-bad", "0.5"),
    ]


KILLED = """
import os, signal, sys
from flax_alexnet import train
from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.data import dataset

dataset.CACHE_BYTES = 0
save = Checkpoints.save

def save_and_die(self, step, *arguments, **options):
    if step == 9:  # with step 5 on the disk
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, *arguments, **options)
    assert self.saved()

Checkpoints.save = save_and_die
train.main(sys.argv[1:])
"""
NAMES = ["test[2]", "train[20]", "train[7]"]  # of the bad ones


class TestPrepared:
    """A dataset that was whole when it was prepared, and is not any more."""

    @pytest.fixture
    def data_dir(self, tmp_path):
        rng = np.random.default_rng(0)
        for index in range(40):
            path = tmp_path / "pets" / ("cat", "dog")[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        prepare(f"folder:{tmp_path / 'pets'}", tmp_path / "data", image_size=16)
        return tmp_path / "data"

    def test_a_flipped_bit_costs_one_image(self, data_dir, tmp_path):
        source = open_dataset("prepared_folder/pets", data_dir).train
        image = source.read(7).image
        before = DecodedExamples(source, 16).take(range(len(source)))
        (path,) = data_dir.rglob("*-train.*")
        data = bytearray(path.read_bytes())
        data[data.index(image) + len(image) // 2] ^= 1
        path.write_bytes(data)
        bad = ledger(tmp_path, 0.1, len(source))
        examples = open_examples(
            open_dataset("prepared_folder/pets", data_dir).train, 16, on_bad=bad.add
        )
        assert examples.read([6, 7])["mask"].tolist() == [True, False]
        for name, values in examples.take(range(len(source))).items():
            before[name][7] = before[name][8]
            np.testing.assert_array_equal(values, before[name])
        (line,) = lines(tmp_path)
        assert line["name"] == "train[7]"
        assert "is damaged (" in line["problem"]

    @pytest.fixture
    def damaged(self, data_dir):
        """Two images to train on and one to test on are bad."""
        for split, indices in (("train", (7, 20)), ("test", (2,))):
            dataset = open_dataset("prepared_folder/pets", data_dir)
            source = dataset.train if split == "train" else dataset.eval
            (path,) = data_dir.rglob(f"*-{split}.*")
            data = path.read_bytes()
            for image in map(source.read, indices):
                data = data.replace(image.image, bytes(len(image.image)))
            path.write_bytes(data)
        return data_dir

    @pytest.mark.slow
    def test_a_run_that_is_killed_ends_with_the_same_bits(
        self, damaged, tmp_path, monkeypatch, capsys
    ):
        """Whether images are decoded once, or each time that they are asked for, in threads."""
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert train(train_flags(whole, damaged)) == 0
        said = capsys.readouterr().out
        command = [sys.executable, "-c", KILLED, *train_flags(parts, damaged)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        monkeypatch.setattr("flax_alexnet.data.dataset.CACHE_BYTES", 0)
        assert train(train_flags(parts, damaged)) == 0
        said_later = capsys.readouterr().out
        assert "steps 5 to 12" in said_later
        for run, text in ((whole, said), (parts, said_later)):
            before, _, after = text.partition("\nstep ")
            for count in ("2 of 36 train", "1 of 4 eval"):
                line = f"{count} images cannot be read and are skipped; see {run}/bad_records."
                assert text.count(line) == 1
                assert line in (before if run == whole else after), "it is said when it is found"
            assert sorted(line["name"] for line in lines(run)) == NAMES
        one, other = (json.loads((run / "summary.json").read_text()) for run in (whole, parts))
        for name in ("params_sha256", "eval_loss", "eval_top1"):
            assert one[name] == other[name]

    def test_too_many_end_the_run(self, damaged, tmp_path, capsys):
        assert train([*train_flags(tmp_path / "run", damaged), "--data.max-bad", "0.04"]) == 2
        said = capsys.readouterr().err
        assert "now 2 of 36 train images are bad, more than --data.max-bad 0.04" in said
        assert said.count("\n") == 1

    def test_a_missing_file_ends_the_run(self, data_dir, tmp_path):
        source = open_dataset("prepared_folder/pets", data_dir).train
        next(data_dir.rglob("*-train.*")).unlink()
        bad = ledger(tmp_path, 0.1, len(source))
        with pytest.raises(UserError, match=r"is damaged \(.*now 4 of 36 train images"):
            open_examples(source, 16, on_bad=bad.add)
