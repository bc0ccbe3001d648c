"""What holds for all commands that use a trained model."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from flax_alexnet.commands import evaluate, export, features, plot, predict


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (predict.main, ["{photographs}", "--output", "out.json", "--plot", "out.png"]),
        (predict.main, ["{photographs}", "--output", "out.csv", "--crops", "10"]),
        (evaluate.main, ["--data.name", "folder:{photographs}", "--output", "out"]),
        (features.main, ["{photographs}", "--output", "out.npy", "--nearest", "out.png"]),
        (export.main, ["out.stablehlo"]),
        (plot.main, ["{photographs}/class a/0.png", "--output", ".", "--layers", "pool5"]),
    ],
)
def test_a_model_of_huge_weights_is_refused(
    huge, photographs, tmp_path, monkeypatch, capsys, command, arguments
):
    monkeypatch.chdir(tmp_path)
    assert command([str(huge), *(a.format(photographs=photographs) for a in arguments)]) == 2
    said = capsys.readouterr()
    *warnings, error = said.err.splitlines()
    assert error.startswith("error: the model returns values that are not finite for ")
    assert len(warnings) == (command is features.main)
    assert "nan" not in said.out
    # Features that are there stay, and the kernels are drawn before anything is computed.
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {"out.npy", "conv1.png"}


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
            predict.main([str(weights), str(folder), "--output", str(output), "--plot", str(plot)])
            == 0
        )
        assert "caf\\xe9.png" in output.read_text().replace("\\\\", "\\")
    for suffix in ("h5", "npy"):
        flags = ["--output", str(tmp_path / f"features.{suffix}")]
        assert features.main([str(weights), str(folder), *flags]) == 0
    assert "1 of 2 images read; 1 not" in capsys.readouterr().out


def test_what_is_read_is_not_written_over(weights, photographs, tmp_path, capsys):
    image = tmp_path / "image.png"
    image.write_bytes((photographs / "class a" / "0.png").read_bytes())
    before = image.read_bytes()
    for command, flag in ((predict.main, "--plot"), (features.main, "--nearest")):
        more = [] if command is predict.main else ["--output", str(tmp_path / "f.npy")]
        assert command([str(weights), str(image), flag, str(image), *more]) == 2
        assert "would be overwritten" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_outputs_into_a_run_or_a_dataset_replace_nothing(run, photographs, tmp_path, capsys):
    dataset = tmp_path / "dataset"
    shutil.copytree(photographs, dataset)
    image = dataset / "class a" / "confusion.png"
    (dataset / "class a" / "0.png").rename(image)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = ["--data.name", f"folder:{dataset}", "--data.split", "all"]
    for command, flags, output in (
        (predict.main, [str(dataset), "--output", str(run / "config.json")], run / "config.json"),
        (evaluate.main, [*data, "--output", str(image.parent)], image),
    ):
        for more in ([], ["--overwrite"]):
            assert command([str(run), *flags, *more]) == 2
            why = "is an input of this command and would be overwritten; take another path"
            said = f"error: {output} {why}\n"
            assert capsys.readouterr().err == said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_images_of_predictions_and_neighbours_are_drawn(weights, photographs, tmp_path):
    plot, near = tmp_path / "predictions.png", tmp_path / "near.png"
    assert predict.main([str(weights), str(photographs), "--plot", str(plot)]) == 0
    flags = ["--output", str(tmp_path / "f.npy"), "--nearest", str(near), "--neighbours", "3"]
    assert (
        features.main([str(weights), str(photographs), *flags, "--queries", "class b/1.png"]) == 0
    )
    for path in (plot, near):
        with Image.open(path) as image:
            assert image.width > 200


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (predict.main, ["{weights}"], "no images"),
        (predict.main, ["nothing.safetensors", "{photographs}"], "no weights"),
        (predict.main, ["{weights}", "{photographs}", "--crops", "3"], "crops"),
        (predict.main, ["{weights}", "{photographs}", "--output", "x.txt"], "a .json or .csv file"),
        (predict.main, ["{weights}", "{photographs}", "--batch-size", "0"], "--batch-size is 0"),
        (predict.main, ["{weights}", "{photographs}", "--plto", "x"], "did you mean --plot"),
        (evaluate.main, [], "no weights"),
        (evaluate.main, ["{weights}"], "name a dataset with --data.name"),
        (evaluate.main, ["{weights}", "--data.name", "folder:nothing"], "no folder nothing"),
        (
            evaluate.main,
            ["{weights}", "--data.name", "folder:{photographs}", "--data.split", "x"],
            "all",
        ),
        (features.main, ["{weights}"], "name either images or a dataset"),
        (features.main, ["{weights}", "{photographs}", "--output", "x.csv"], "a .h5 or .npy file"),
        (
            features.main,
            ["{weights}", "{photographs}", "--layers", "conv6"],
            "did you mean 'conv5'",
        ),
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
