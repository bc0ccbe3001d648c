"""What people do with a trained net: predict, evaluate, features. As commands, on small nets."""

import csv
import dataclasses
import glob
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from small_nets import make_net

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.config.recipes import QUICKSTART
from flax_alexnet.config.schema import flatten
from flax_alexnet.data.examples import find_images
from flax_alexnet.data.sources import Record, open_splits
from flax_alexnet.inference.feature_file import READ, FeatureFile, nearest
from flax_alexnet.train import main as train
from flax_alexnet.training.run_directory import claim, record
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.labels import imagenet_labels, imagenet_synsets, match_labels

PREDICT, EVALUATE, FEATURES, EXPORT, PLOT = (
    importlib.import_module(f"flax_alexnet.commands.{name}").main
    for name in ("predict", "evaluate", "features", "export", "plot")
)


def by_hand(net, files, crops=1):
    """Probabilities of each picture on its own, outside of any command: float64[n, classes]."""
    result = []
    for file in files:
        image = net.open(file)[None]
        seen = net.preprocess(image) if crops == 1 else net.ten_crops(image)[0]
        logits = np.asarray(net.model.apply({"params": net.params}, seen), np.float64)
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        result.append((exp / exp.sum(-1, keepdims=True)).mean(axis=0))
    return np.array(result)


def pictures(photographs):
    return sorted(photographs.rglob("*.png"))


@pytest.mark.parametrize("crops", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_predict_gives_each_picture_its_probabilities(net, weights, photographs, tmp_path, crops):
    output = tmp_path / "out" / "predictions.json"
    flags = ["--crops", str(crops), "--top", "4", "--batch-size", "8", "--output", str(output)]
    assert PREDICT([str(weights), str(photographs), *flags]) == 0
    rows = json.loads(output.read_text())
    files = pictures(photographs)
    assert [row["name"] for row in rows] == [str(file) for file in files]
    for row, expected in zip(rows, by_hand(net, files, crops), strict=True):
        said = {best["label"]: best["probability"] for best in row["predictions"]}
        assert list(said.values()) == sorted(said.values(), reverse=True)
        np.testing.assert_allclose([said[i] for i in range(4)], expected, rtol=1e-4)
        assert row["predictions"][0]["name"] == net.label_names[int(np.argmax(expected))]


def test_bad_pictures_are_named_and_stop_no_other(weights, photographs, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = (photographs / "class a" / "0.png").read_bytes()
    (folder / "a.png").write_bytes(good)
    (folder / "b.jpg").write_bytes(b"")
    (folder / "c.png").write_bytes(good[:99])
    (folder / "d.txt").write_text("words")
    (folder / "e.jpg").symlink_to(folder / "nowhere")
    (folder / "f.jpg").mkdir()
    (folder / "f.jpg" / "g.jpg").write_bytes(good)  # a PNG by its bytes
    (folder / ".hidden").write_text("passed over")
    os.mkfifo(folder / "h.jpg")
    output = tmp_path / "predictions.csv"
    assert PREDICT([str(weights), str(folder), "--top", "1", "--output", str(output)]) == 0
    with output.open() as file:
        rows = {row["name"].removeprefix(f"{folder}/"): row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if not row["problem"]} == {"a.png", "f.jpg/g.jpg"}
    assert rows["b.jpg"]["problem"] == "it is empty"
    assert "no picture in a known format" in rows["d.txt"]["problem"]
    assert "No such file" in rows["e.jpg"]["problem"]
    assert "no regular file" in rows["h.jpg"]["problem"]
    assert len(rows) == 7
    said = capsys.readouterr().out
    assert "2 of 7 pictures read; 5 not:" in said
    assert PREDICT([str(weights), str(folder / "b.jpg")]) == 2


def test_arguments_are_files_folders_and_globs(photographs):
    files = pictures(photographs)

    def found(*arguments):
        source = find_images(arguments)
        return [source.name(index) for index in range(len(source))]

    assert found(str(photographs)) == [str(file) for file in files]
    assert found(f"{photographs}/*/0.png", f"{photographs}/class a") == [
        *(str(file) for file in files if file.name == "0.png"),
        *(str(file) for file in files[1:3]),
    ]
    for wrong in ([], [f"{photographs}/*.jpg"], ["nothing"]):
        with pytest.raises(UserError, match="no pictures"):
            found(*wrong)
    odd = photographs.parent / "[odd].png"
    odd.write_bytes(files[0].read_bytes())
    assert found(str(odd)) == [str(odd)]


@pytest.mark.parametrize(
    "pattern", ["", "/**", "/**/*", "/**/*.png", "/*", "/**/**/*.png", "/*/**"]
)
def test_links_that_lead_back_are_not_followed_for_ever(
    photographs, tmp_path, monkeypatch, pattern
):
    folder = tmp_path / "pictures"
    shutil.copytree(photographs, folder)
    for inside in (folder, *folder.iterdir()):
        for number in range(3):  # 3 ** 40 ways
            (inside / f"a link {number}").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    expected = [str(path) for path in sorted(folder.glob("*/*.png"))]

    def found(pattern):
        paths = find_images([pattern, pattern]).paths
        return sorted(str(path) for path in paths if path.name != "loop")

    assert found(f"{folder}{pattern}") == expected
    monkeypatch.chdir(folder)
    relative = [path.removeprefix(f"{folder}/") for path in expected]
    assert found(pattern.removeprefix("/") or ".") == relative


def test_globs_name_what_they_always_did(photographs, tmp_path, monkeypatch):
    """Without links and hidden files, as Python's own."""
    folder = tmp_path / "a" / "[odd]"
    shutil.copytree(photographs, folder)
    shutil.copytree(photographs, folder / "class a" / "deeper")
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.png", "a/**/0.png", "*/*/*/*.png", "**/class */**/1.png", "**/deeper/**"):
        named = (Path(path) for path in glob.glob(pattern, recursive=True))
        assert set(find_images([pattern]).paths) == {path for path in named if path.is_file()}


def test_evaluate_counts_every_picture_once(net, weights, photographs, tmp_path, capsys):
    flags = ["--data.name", f"folder:{photographs}", "--data.split", "all", "--batch-size", "8"]
    output = tmp_path / "out"
    assert EVALUATE([str(weights), *flags, "--output", str(output)]) == 0
    source = find_images([str(photographs)])
    files = [Path(source.name(index)) for index in range(len(source))]
    labels = np.array([net.label_names.index(file.parent.name) for file in files])
    expected = by_hand(net, files)
    best = expected.argmax(-1)
    report = json.loads((output / "evaluation.json").read_text())
    assert report["images"] == len(files) == 12
    assert report["top1"] == np.mean(best == labels)
    assert report["top5"] == 1  # of four classes
    loss = -np.log(expected[np.arange(12), labels]).mean()
    np.testing.assert_allclose(report["loss"], loss, rtol=1e-4)
    with (output / "confusion.csv").open() as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], int)
    theirs = np.zeros((4, 4), int)
    np.add.at(theirs, (labels, best), 1)
    np.testing.assert_array_equal(counts, theirs)
    with (output / "classes.csv").open() as file:
        of_classes = [float(row["top1"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(of_classes, theirs.diagonal() / 3)
    assert (output / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert f"top-1 {report['top1']:.2%}" in capsys.readouterr().out


@pytest.fixture
def run(net, photographs, tmp_path):
    """A run of the net on photographs, started in another version of the program."""
    size = net.preprocessing.image_size
    config = dataclasses.replace(
        QUICKSTART,
        model=net.config,
        data=dataclasses.replace(
            QUICKSTART.data, name=f"folder:{photographs}", image_size=size, eval_split="test"
        ),
    )
    identity = flatten(config) | {"dataset.label_names": list(net.label_names), "dataset.eval": 1}
    for name in ("data.image_key", "data.label_key"):
        del identity[name]
    claim(tmp_path / "run", identity)
    record(tmp_path / "run", identity)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    state = {"params": net.params, "mean": np.zeros((size, size, 3), np.float32)}
    checkpoints.save(3, state, {"eval_top1": 0.5})
    checkpoints.close()
    return tmp_path / "run"


def test_a_run_is_evaluated_on_its_own_dataset(run, weights, photographs, capsys):
    """And nothing is written over what another evaluation has written."""

    def images(folder):
        report = json.loads((folder / "evaluation.json").read_text())
        assert report["dataset"] == f"folder:{photographs}"
        return report["images"], report["split"]

    assert EVALUATE([str(run)]) == 0
    assert images(run / "evaluation") == (1, "test")
    first = {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()}
    assert EVALUATE([str(run), "--data.split", "all"]) == 0
    assert images(run / "evaluation-2") == (12, "all")
    assert EVALUATE([str(run), "--crops", "10"]) == 0
    assert images(run / "evaluation-3") == (1, "test")
    assert f"everything is in {run}/evaluation-3" in capsys.readouterr().out
    assert EVALUATE([str(run), str(run)]) == 0
    assert images(run / "evaluation-4") == (1, "test")
    assert {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()} == first
    assert EVALUATE([str(run), "--output", str(run / "evaluation")]) == 0  # the same once more
    assert not (run / "evaluation-5").exists()
    assert not capsys.readouterr().err
    assert EVALUATE([str(run), str(weights)]) == 2
    assert f"{weights} does not say which pictures it was" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_relative_folder_is_evaluated_from_everywhere(
    photographs, tmp_path, monkeypatch, capsys
):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "pictures").symlink_to(photographs)
    monkeypatch.chdir(tmp_path / "home")
    flags = ["--model.width", "0.05", "--batch-size", "8", "--steps", "1"]
    flags += ["--no-compilation-cache", "--workdir", "runs/mine", "--data.name", "folder:pictures"]
    assert train(flags) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert EVALUATE(["../home/runs/mine"]) == 0
    assert (tmp_path / "home" / "runs" / "mine" / "evaluation" / "evaluation.json").exists()
    assert not capsys.readouterr().err


def test_held_out_pictures_that_are_others_now_are_said(run, capsys):
    config = json.loads((run / "config.json").read_text())
    config["config"]["dataset.eval"] = 2
    (run / "config.json").write_text(json.dumps(config))
    assert EVALUATE([str(run)]) == 0
    said = capsys.readouterr().err
    assert "has changed: 2 pictures were held out in training, and 1 are now" in said


@pytest.mark.parametrize("same", [True, False])
def test_held_out_pictures_of_the_same_number_are_compared(run, photographs, capsys, same):
    digest = open_splits(f"folder:{photographs}").open("test").digest().content
    config = json.loads((run / "config.json").read_text())
    config["config"]["dataset.eval_digest"] = digest if same else digest[::-1]
    (run / "config.json").write_text(json.dumps(config))
    assert EVALUATE([str(run)]) == 0
    said = capsys.readouterr().err
    assert said.count("has changed: other pictures were held out in training than are now") == (
        0 if same else 1
    )


def test_classes_are_matched_by_order_only_where_that_is_wanted(
    weights, photographs, tmp_path, capsys
):
    for letter, name in zip("abcd", "wxyz", strict=True):
        (tmp_path / "others").mkdir(exist_ok=True)
        (tmp_path / "others" / name).symlink_to(photographs / f"class {letter}")
    copy = tmp_path / "net.safetensors"
    copy.write_bytes(weights.read_bytes())
    flags = [str(copy), "--data.name", f"folder:{tmp_path}/others"]
    assert EVALUATE(flags) == 2
    said = capsys.readouterr().err
    assert "--match-by-order (w → class a, x → class b, y → class c, …)" in said
    assert EVALUATE([*flags, "--match-by-order"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: the classes are matched by their order alone: w → class a, x")
    assert (tmp_path / "net-evaluation" / "evaluation.json").exists()


def test_several_nets_are_averaged_though_their_preprocessing_differs(
    net, weights, photographs, tmp_path
):
    other = make_net(seed=7)
    rule = dataclasses.replace(other.preprocessing, resize="caffe", image_size=80)
    other = dataclasses.replace(other, preprocessing=rule)
    safetensors_files.save(other, tmp_path / "other.safetensors")
    flags = ["--data.name", f"folder:{photographs}", "--crops", "10", "--output", str(tmp_path)]
    assert EVALUATE([str(weights), str(tmp_path / "other.safetensors"), *flags]) == 0
    held_out = [pictures(photographs)[9]]
    expected = np.mean([by_hand(n, held_out, crops=10) for n in (net, other)], axis=0)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    np.testing.assert_allclose(report["loss"], -np.log(expected[0, 3]), rtol=1e-4)
    assert len(report["weights"]) == 2


def test_labels_are_matched_by_name(net):
    def match(names, label_names=net.label_names):
        labels, by_name = match_labels(names, label_names, 4 if len(label_names) < 5 else 1000)
        return labels.tolist(), by_name

    assert match(["class c", "class a"]) == ([2, 0], True)
    assert match(["w", "x", "y", "z"]) == ([0, 1, 2, 3], False)
    assert match(["w", "x", "y", "z"], ()) == ([0, 1, 2, 3], False)
    twice = ("crane", "crane", "x", "y")
    assert match(twice, twice) == ([0, 1, 2, 3], True)
    some = ["tench", "n01443537", "crane (machine)", "n02085620-Chihuahua"]
    assert match(some, imagenet_labels()) == ([0, 1, 517, 151], True)
    # WordNet's numbers in the net's own names, be it ImageNet's or not.
    assert match(["n02000002", "x", "n02000001 b"], ("n02000001 a", "x", "y", "n02000002, z")) == (
        [3, 1, 0],
        True,
    )
    words = [f"{s} {n}, x" for s, n in zip(imagenet_synsets(), imagenet_labels(), strict=True)]
    assert match(["n01443537", "n01440764"], words) == ([1, 0], True)
    # Class numbers, as text sorts them: of a net without names, ImageNet's, or named by numbers.
    assert match(["0", "1", "3", "2"], ()) == ([0, 1, 3, 2], True)
    assert match(["00", "01", "03", "02"], ("0", "1", "2", "3")) == ([0, 1, 3, 2], True)
    assert match(["0", "1", "3", "2"], ("0", "3", "2", "1")) == ([0, 3, 1, 2], True)
    numbers = sorted(map(str, range(1000)))
    assert match(numbers, imagenet_labels()) == ([int(number) for number in numbers], True)
    assert match(["0", "1", "3", "2"]) == ([0, 1, 3, 2], False)
    assert match(["1", "2", "3", "4"], ()) == ([0, 1, 2, 3], False)
    for names in (["class c", "x"], ["w", "x", "y"], ["class a", "x", "y", "z"]):
        with pytest.raises(UserError, match="not among the net's 4"):
            match(names)


def test_what_is_counted_of_a_picture():
    """Of seven classes, with ties: equal values are taken in the order of the classes."""
    counted = importlib.import_module("flax_alexnet.commands.evaluate").Evaluation(
        np.zeros((7, 7), int), np.zeros(7, int)
    )
    rows = np.log([[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], [0.1] * 4 + [0.2] * 3])
    for label in range(7):
        counted.add(label, rows[0])
        counted.add(label, rows[1])
    assert counted.confusion[:, 0].tolist() == [1] * 7
    assert counted.confusion[:, 4].tolist() == [1] * 7
    # Of the first row classes 0 … 4 are among the five; of the second 4, 5, 6, then 0 and 1.
    assert counted.top5.tolist() == [2, 2, 1, 1, 2, 1, 1]
    summary = counted.summary()
    assert (summary["images"], summary["top1"], summary["top5"]) == (14, 2 / 14, 10 / 14)
    assert summary["loss"] == pytest.approx(-rows.sum() / 14)


def test_a_picture_without_a_label_and_a_net_without_numbers_are_refused(
    weights, photographs, tmp_path, capsys
):
    flags = ["--data.name", f"folder:{photographs}", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flax_alexnet.data.sources.FolderSource.read", unlabelled)
        assert EVALUATE([str(weights), *flags]) == 2
    assert "has no label" in capsys.readouterr().err
    broken = make_net()
    broken.params["fc7"]["bias"][0] = np.nan
    safetensors_files.save(broken, tmp_path / "nan.safetensors")
    assert EVALUATE([str(tmp_path / "nan.safetensors"), *flags]) == 2
    assert "not a number" in capsys.readouterr().err


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A net whose weights are finite, and too large for what is computed from them."""
    net = make_net()
    for layer in ("conv1", "conv2"):
        net.params[layer]["kernel"] *= np.float32(1e30)
    path = tmp_path_factory.mktemp("huge") / "huge.safetensors"
    safetensors_files.save(net, path)
    return path


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (PREDICT, ["{photographs}", "--output", "out.json", "--plot", "out.png"]),
        (PREDICT, ["{photographs}", "--output", "out.csv", "--crops", "10"]),
        (EVALUATE, ["--data.name", "folder:{photographs}", "--output", "out"]),
        (FEATURES, ["{photographs}", "--output", "out.npy", "--nearest", "out.png"]),
        (EXPORT, ["out.stablehlo"]),
        (PLOT, ["{photographs}/class a/0.png", "--output", ".", "--layers", "pool5"]),
    ],
)
def test_a_net_of_huge_weights_is_refused(
    huge, photographs, tmp_path, monkeypatch, capsys, command, arguments
):
    monkeypatch.chdir(tmp_path)
    assert command([str(huge), *(a.format(photographs=photographs) for a in arguments)]) == 2
    said = capsys.readouterr()
    *warnings, error = said.err.splitlines()
    assert error.startswith("error: the net gives what is not a number for ")
    assert len(warnings) == (command is FEATURES)
    assert "nan" not in said.out
    # Features that are there stay, and the kernels are drawn before anything is computed.
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {"out.npy", "conv1.png"}


def test_features_that_are_not_finite_are_said(huge, photographs, tmp_path, capsys):
    """Their rows tell them from those of pictures that could not be read."""
    (tmp_path / "bad.png").write_bytes(b"bad")
    output = tmp_path / "features.npy"
    flags = ["--output", str(output), "--batch-size", "8"]
    assert FEATURES([str(huge), str(photographs), str(tmp_path / "bad.png"), *flags]) == 0
    said = capsys.readouterr()
    assert "warning: the net gives what is not a finite number for 12 pictures (the" in said.err
    assert "12 of 13 pictures read" in said.out
    assert (column(output, "status") == READ).sum() == 12


def unlabelled(source, index):
    return Record(source.paths[index].read_bytes(), -1, "x.png")


def test_a_guard_against_transfers_does_not_end_a_command(weights, photographs):
    command = [sys.executable, "-m", "flax_alexnet", "predict", str(weights), str(photographs)]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_TRANSFER_GUARD": "disallow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_names_need_not_be_unicode(weights, photographs, tmp_path, capsys):
    folder = tmp_path / "odd"
    folder.mkdir()
    good = (photographs / "class a" / "0.png").read_bytes()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(good)
    (folder / os.fsdecode(b"\xe9" * 100 + b".png")).symlink_to(folder / ("é" * 100))
    for suffix in ("csv", "json"):
        output = tmp_path / f"predictions.{suffix}"
        plot = tmp_path / f"{suffix}.png"
        assert (
            PREDICT([str(weights), str(folder), "--output", str(output), "--plot", str(plot)]) == 0
        )
        assert "caf\\xe9.png" in output.read_text().replace("\\\\", "\\")
    for suffix in ("h5", "npy"):
        flags = ["--output", str(tmp_path / f"features.{suffix}")]
        assert FEATURES([str(weights), str(folder), *flags]) == 0
    assert "1 of 2 pictures read; 1 not" in capsys.readouterr().out


def column(path, name):
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")[name]
    with h5py.File(path) as file:
        return file[name][:]


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
def test_features_of_a_folder_are_in_one_file(net, weights, photographs, tmp_path, suffix):
    (tmp_path / "bad.png").write_bytes(b"bad")
    output = tmp_path / f"features{suffix}"
    flags = ["--layers", "conv5", "fc7", "--output", str(output), "--batch-size", "8"]
    assert FEATURES([str(weights), str(tmp_path / "bad.png"), str(photographs), *flags]) == 0
    files = pictures(photographs)
    names = [name.decode() for name in column(output, "name")]
    assert names == [str(tmp_path / "bad.png"), *map(str, files)]
    assert column(output, "status").tolist() == [2] + [1] * 12
    assert column(output, "problem")[0] == b"it is no picture in a known format"
    images = net.preprocess(np.stack([net.open(file) for file in files]))
    _, state = net.model.apply({"params": net.params}, images, mutable=["intermediates"])
    for layer in ("conv5", "fc7"):
        values = column(output, layer)
        assert np.isnan(values[0]).all()
        expected = state["intermediates"][layer]
        assert values[1:].shape == expected.shape
        np.testing.assert_allclose(values[1:], expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_dataset_have_labels(weights, photographs, tmp_path):
    output = tmp_path / "features.h5"
    flags = ["--data.name", f"folder:{photographs}", "--data.split", "train"]
    assert FEATURES([str(weights), *flags, "--output", str(output)]) == 0
    assert column(output, "label").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
def test_features_go_on_where_they_were_killed(weights, photographs, tmp_path, suffix):
    """Killed in the second batch, when its values are written, but not yet that they are there."""
    whole, killed = (tmp_path / f"{name}{suffix}" for name in ("whole", "killed"))
    flags = ["--batch-size", "8", "--layers", "fc7", "conv1"]
    assert FEATURES([str(weights), str(photographs), *flags, "--output", str(whole)]) == 0
    program = """
import sys, time
from flax_alexnet.inference.feature_file import FeatureFile
from flax_alexnet.commands.features import main

put, calls = FeatureFile._put, []

def slow_put(self, rows, values):
    calls.append(rows)
    if len(calls) == 4:
        print("written", flush=True)
        time.sleep(60)
    put(self, rows, values)

FeatureFile._put = slow_put
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, str(weights), str(photographs), *flags]
    with subprocess.Popen([*command, "--output", str(killed)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert column(killed, "status").tolist() == [1] * 8 + [0] * 4
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        original = FeatureFile.write
        patch.setattr(FeatureFile, "write", lambda *a: (seen.append(a[1]), original(*a)))
        assert FEATURES([str(weights), str(photographs), *flags, "--output", str(killed)]) == 0
    assert seen == [[8, 9, 10, 11]]
    for name in ("name", "label", "status", "fc7", "conv1"):
        np.testing.assert_array_equal(column(killed, name), column(whole, name))


def test_pictures_that_have_changed_or_could_not_be_read_are_tried_again(
    weights, photographs, tmp_path, capsys
):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    files = pictures(folder)
    whole = files[5].read_bytes()
    files[5].write_bytes(b"bad")
    flags = [str(weights), str(folder), "--layers", "fc7", "--output"]
    output, fresh = str(tmp_path / "features.h5"), str(tmp_path / "fresh.h5")
    assert FEATURES([*flags, output]) == 0
    files[5].write_bytes(whole)
    files[2].write_bytes(files[9].read_bytes())
    capsys.readouterr()
    assert FEATURES([*flags, output]) == 0
    said = capsys.readouterr().out
    assert "1 pictures have changed since they were read, and are read again" in said
    assert "fc7 of 12 pictures (10 were there)" in said
    assert FEATURES([*flags, fresh]) == 0
    assert Path(output).read_bytes() == Path(fresh).read_bytes()
    values = column(Path(output), "fc7")
    np.testing.assert_array_equal(values[2], values[9])
    assert np.isfinite(values[5]).all()


def test_pictures_of_any_time_have_features(weights, photographs, tmp_path, capsys):
    """A stamp has 64 bits, which end with the year 2262."""
    picture = tmp_path / "a.png"
    shutil.copy(photographs / "class a" / "0.png", picture)
    for seconds in (-(2**31), 2**34):
        os.utime(picture, (seconds, seconds))
        flags = ["--output", str(tmp_path / f"{seconds}.npy")]
        for _ in range(2):
            assert FEATURES([str(weights), str(picture), *flags]) == 0
        assert "(1 were there)" in capsys.readouterr().out


def test_a_file_of_other_features_is_left_alone(weights, photographs, tmp_path, capsys):
    output = tmp_path / "features.npy"
    flags = ["--layers", "fc7", "--output", str(output)]
    assert FEATURES([str(weights), str(photographs), *flags]) == 0
    before = output.read_bytes()
    safetensors_files.save(make_net(seed=3), tmp_path / "other.safetensors")
    for weights_of, where, more, says in (
        (tmp_path / "other.safetensors", photographs, [], "of another net"),
        (weights, photographs / "class a", [], "other columns or rows"),
        (weights, photographs, ["--layers", "fc6"], "other columns or rows"),
        (weights, photographs, ["--layers", "fc9"], "did you mean 'fc"),
        (weights, photographs, ["--queries", "nobody"], "0 pictures have names"),
    ):
        assert FEATURES([str(weights_of), str(where), *flags, *more]) == 2
        assert says in capsys.readouterr().err
    assert output.read_bytes() == before


def test_fewer_layers_do_not_go_on_in_a_file_of_more(weights, photographs, tmp_path, capsys):
    output = tmp_path / "features.h5"
    flags = [str(weights), str(photographs), "--output", str(output), "--layers"]
    assert FEATURES([*flags, "conv1", "fc7"]) == 0
    assert FEATURES([*flags, "fc7"]) == 2
    assert "it has other columns" in capsys.readouterr().err


def test_a_file_that_was_cut_off_is_not_mended(weights, photographs, tmp_path, capsys):
    output = tmp_path / "features.npy"
    flags = [str(weights), str(photographs), "--output", str(output)]
    assert FEATURES(flags) == 0
    output.write_bytes(output.read_bytes()[:-9])
    before = output.read_bytes()
    assert FEATURES(flags) == 2
    assert "cannot use" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_what_is_read_is_not_written_over(weights, photographs, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    picture.write_bytes((photographs / "class a" / "0.png").read_bytes())
    before = picture.read_bytes()
    for command, flag in ((PREDICT, "--plot"), (FEATURES, "--nearest")):
        more = [] if command is PREDICT else ["--output", str(tmp_path / "f.npy")]
        assert command([str(weights), str(picture), flag, str(picture), *more]) == 2
        assert "would be written over" in capsys.readouterr().err
    assert picture.read_bytes() == before


def test_outputs_into_a_run_or_a_dataset_replace_nothing(run, photographs, tmp_path, capsys):
    dataset = tmp_path / "dataset"
    shutil.copytree(photographs, dataset)
    picture = dataset / "class a" / "confusion.png"
    (dataset / "class a" / "0.png").rename(picture)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = ["--data.name", f"folder:{dataset}", "--data.split", "all"]
    for command, flags, output in (
        (PREDICT, [str(dataset), "--output", str(run / "config.json")], run / "config.json"),
        (EVALUATE, [*data, "--output", str(picture.parent)], picture),
    ):
        for more in ([], ["--overwrite"]):
            assert command([str(run), *flags, *more]) == 2
            said = f"error: {output} would be written over, but is read; take another path\n"
            assert capsys.readouterr().err == said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_nearest_neighbours(tmp_path, distance):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 5, 2)).astype(np.float32)
    names = [f"{row}.png" for row in range(30)]
    file = FeatureFile(tmp_path / "x.h5", names, {"conv5": (5, 2)})
    status = np.full(30, READ, np.uint8)
    status[4] = 2
    file.write(range(30), {"conv5": values}, status)
    flat = values.reshape(30, -1)
    if distance == "cosine":
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    rows, distances = nearest(file, "conv5", [3, 7], 28, distance, block=7)
    for query, found, away in zip([3, 7], rows, distances, strict=True):
        exact = np.linalg.norm(flat - flat[query], axis=1)
        others = [row for row in np.argsort(exact, kind="stable") if row not in (query, 4)]
        assert found.tolist() == others
        np.testing.assert_allclose(away, exact[others], rtol=1e-5)
    file.close()


def test_pictures_of_predictions_and_neighbours_are_drawn(weights, photographs, tmp_path):
    plot, near = tmp_path / "predictions.png", tmp_path / "near.png"
    assert PREDICT([str(weights), str(photographs), "--plot", str(plot)]) == 0
    flags = ["--output", str(tmp_path / "f.npy"), "--nearest", str(near), "--neighbours", "3"]
    assert FEATURES([str(weights), str(photographs), *flags, "--queries", "class b/1.png"]) == 0
    for path in (plot, near):
        with Image.open(path) as image:
            assert image.width > 200


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (PREDICT, ["{weights}"], "no pictures"),
        (PREDICT, ["nothing.safetensors", "{photographs}"], "no weights"),
        (PREDICT, ["{weights}", "{photographs}", "--crops", "3"], "crops"),
        (PREDICT, ["{weights}", "{photographs}", "--output", "x.txt"], "a .json or .csv file"),
        (PREDICT, ["{weights}", "{photographs}", "--batch-size", "0"], "--batch-size is 0"),
        (PREDICT, ["{weights}", "{photographs}", "--plto", "x"], "did you mean --plot"),
        (EVALUATE, [], "no weights"),
        (EVALUATE, ["{weights}"], "name a dataset with --data.name"),
        (EVALUATE, ["{weights}", "--data.name", "folder:nothing"], "no folder nothing"),
        (
            EVALUATE,
            ["{weights}", "--data.name", "folder:{photographs}", "--data.split", "x"],
            "all",
        ),
        (FEATURES, ["{weights}"], "name either pictures or a dataset"),
        (FEATURES, ["{weights}", "{photographs}", "--output", "x.csv"], "a .h5 or .npy file"),
        (FEATURES, ["{weights}", "{photographs}", "--layers", "conv6"], "did you mean 'conv5'"),
    ],
)
def test_mistakes_are_one_line(
    weights, photographs, tmp_path, monkeypatch, capsys, command, arguments, says
):
    monkeypatch.chdir(tmp_path)
    named = [a.format(weights=weights, photographs=photographs) for a in arguments]
    assert command(named) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
