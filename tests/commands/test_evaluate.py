"""`evaluate`: every image counted once, by itself and in ensembles."""

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from flax_alexnet.commands import evaluate
from flax_alexnet.data.examples import find_images
from flax_alexnet.data.sources import Record, open_splits
from flax_alexnet.train import main as train
from flax_alexnet.weights import safetensors_files
from tests.images import image_files
from tests.small_models import by_hand, make_pretrained


def test_evaluate_counts_every_image_once(pretrained, weights, photographs, tmp_path, capsys):
    flags = ["--data.name", f"folder:{photographs}", "--data.split", "all", "--batch-size", "8"]
    output = tmp_path / "out"
    assert evaluate.main([str(weights), *flags, "--output", str(output)]) == 0
    source = find_images([str(photographs)])
    files = [Path(source.name(index)) for index in range(len(source))]
    labels = np.array([pretrained.label_names.index(file.parent.name) for file in files])
    expected = by_hand(pretrained, files)
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


def test_a_run_is_evaluated_on_its_own_dataset(run, weights, photographs, capsys):
    """And nothing is written over what another evaluation has written."""

    def images(folder):
        report = json.loads((folder / "evaluation.json").read_text())
        assert report["dataset"] == f"folder:{photographs}"
        return report["images"], report["split"]

    assert evaluate.main([str(run)]) == 0
    assert images(run / "evaluation") == (1, "test")
    first = {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()}
    assert evaluate.main([str(run), "--data.split", "all"]) == 0
    assert images(run / "evaluation-2") == (12, "all")
    assert evaluate.main([str(run), "--crops", "2"]) == 0
    assert images(run / "evaluation-3") == (1, "test")
    assert f"everything is in {run}/evaluation-3" in capsys.readouterr().out
    assert evaluate.main([str(run), str(run)]) == 0
    assert images(run / "evaluation-4") == (1, "test")
    assert {path.name: path.read_bytes() for path in (run / "evaluation").iterdir()} == first
    assert evaluate.main([str(run), "--output", str(run / "evaluation")]) == 0  # the same once more
    assert not (run / "evaluation-5").exists()
    assert not capsys.readouterr().err
    assert evaluate.main([str(run), str(weights)]) == 2
    assert f"{weights} does not say which images it was" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_relative_folder_is_evaluated_from_everywhere(
    photographs, tmp_path, monkeypatch, capsys
):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "images").symlink_to(photographs)
    monkeypatch.chdir(tmp_path / "home")
    flags = ["--model.width", "0.05", "--batch-size", "8", "--steps", "1"]
    flags += ["--no-compilation-cache", "--workdir", "runs/mine", "--data.name", "folder:images"]
    assert train(flags) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate.main(["../home/runs/mine"]) == 0
    assert (tmp_path / "home" / "runs" / "mine" / "evaluation" / "evaluation.json").exists()
    assert not capsys.readouterr().err


def test_held_out_images_that_are_others_now_are_said(run, capsys):
    config = json.loads((run / "config.json").read_text())
    config["config"]["dataset.eval"] = 2
    (run / "config.json").write_text(json.dumps(config))
    assert evaluate.main([str(run)]) == 0
    said = capsys.readouterr().err
    assert "has changed: 2 images were held out in training, and 1 are now" in said


@pytest.mark.parametrize("same", [True, False])
def test_held_out_images_of_the_same_number_are_compared(run, photographs, capsys, same):
    digest = open_splits(f"folder:{photographs}").open("test").digest().content
    config = json.loads((run / "config.json").read_text())
    config["config"]["dataset.eval_digest"] = digest if same else digest[::-1]
    (run / "config.json").write_text(json.dumps(config))
    assert evaluate.main([str(run)]) == 0
    said = capsys.readouterr().err
    assert said.count("has changed: other images were held out in training than are now") == (
        0 if same else 1
    )


def test_classes_are_matched_by_order_only_where_that_is_wanted(
    weights, photographs, tmp_path, capsys
):
    for letter, name in zip("abcd", "wxyz", strict=True):
        (tmp_path / "others").mkdir(exist_ok=True)
        (tmp_path / "others" / name).symlink_to(photographs / f"class {letter}")
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(weights.read_bytes())
    flags = [str(copy), "--data.name", f"folder:{tmp_path}/others"]
    assert evaluate.main(flags) == 2
    said = capsys.readouterr().err
    assert "--match-by-order (w → class a, x → class b, y → class c, …)" in said
    assert evaluate.main([*flags, "--match-by-order"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: the classes are matched by their order alone: w → class a, x")
    assert (tmp_path / "model-evaluation" / "evaluation.json").exists()


def test_several_models_are_averaged_though_their_preprocessing_differs(
    pretrained, weights, photographs, tmp_path
):
    other = make_pretrained(seed=7)
    rule = dataclasses.replace(other.preprocessing, resize="caffe", image_size=80)
    other = dataclasses.replace(other, preprocessing=rule)
    safetensors_files.save(other, tmp_path / "other.safetensors")
    flags = ["--data.name", f"folder:{photographs}", "--crops", "10", "--output", str(tmp_path)]
    assert evaluate.main([str(weights), str(tmp_path / "other.safetensors"), *flags]) == 0
    held_out = [image_files(photographs)[9]]
    expected = np.mean([by_hand(n, held_out, crops=10) for n in (pretrained, other)], axis=0)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    np.testing.assert_allclose(report["loss"], -np.log(expected[0, 3]), rtol=1e-4)
    assert len(report["weights"]) == 2


def test_what_is_counted_of_an_image():
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


def test_an_image_without_a_label_and_a_model_without_numbers_are_refused(
    weights, photographs, tmp_path, capsys
):
    flags = ["--data.name", f"folder:{photographs}", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flax_alexnet.data.sources.FolderSource.read", unlabelled)
        assert evaluate.main([str(weights), *flags]) == 2
    assert "has no label" in capsys.readouterr().err
    broken = make_pretrained()
    broken.params["fc7"]["bias"][0] = np.nan
    safetensors_files.save(broken, tmp_path / "nan.safetensors")
    assert evaluate.main([str(tmp_path / "nan.safetensors"), *flags]) == 2
    assert "not finite" in capsys.readouterr().err


def unlabelled(source, index):
    return Record(source.paths[index].read_bytes(), -1, "x.png")
