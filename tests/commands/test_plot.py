"""`plot`: which figures it draws."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.commands.plot import main
from flax_alexnet.weights import safetensors_files
from tests.small_models import make_pretrained


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, its trunk, and two images."""
    folder = tmp_path_factory.mktemp("plot")
    pretrained = make_pretrained("cuda_convnet_19pct", 3, 16, 20, width=0.2)
    pretrained = dataclasses.replace(pretrained, label_names=("cat", "dog", "cow"))
    safetensors_files.save(pretrained, folder / "model.safetensors")
    trunk = {name: values for name, values in pretrained.params.items() if name.startswith("conv")}
    safetensors_files.save(
        dataclasses.replace(pretrained, params=trunk), folder / "trunk.safetensors"
    )
    for name in ("one.png", "two.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(
            folder / name
        )
    return folder


def test_command(folder, figures, tmp_path, capsys):
    images = [str(folder / "one.png"), str(folder / "two.png")]
    assert main([str(folder / "model.safetensors"), *images, "--output", str(tmp_path)]) == 0
    written = [
        f"{stem}_{kind}.png" for stem in ("one", "two") for kind in ("activations", "grad_cam")
    ]
    expected = [tmp_path / name for name in ["conv1.png", *written]]
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in expected]
    assert sorted(tmp_path.iterdir()) == sorted(expected)
    _, activations, grad_cam, *_ = figures
    assert titles(activations)[-2:] == ["pool3, 2×2×13", "logits, 3"]
    pretrained = safetensors_files.read(folder / "model.safetensors")
    image = pretrained.open(images[0])
    np.testing.assert_array_equal(grad_cam.axes[0].images[0].get_array(), image[2:18, 2:18])
    logits = np.asarray(
        pretrained.model.apply({"params": pretrained.params}, pretrained.preprocess(image[None]))
    )[0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities)
    shown = [f"{pretrained.label_names[label]} ({probabilities[label]:.1%})" for label in order]
    assert titles(grad_cam)[1:] == shown


def test_command_with_chosen_layers_and_classes(folder, figures, tmp_path):
    arguments = [str(folder / "model.safetensors"), str(folder / "one.png"), f"--output={tmp_path}"]
    assert main([*arguments, "--layers", "pool2", "--classes", "cow", "0"]) == 0
    assert [title.split(",")[0] for title in titles(figures[1])] == ["image", "pool2"]
    assert [title.split()[0] for title in titles(figures[2])[1:]] == ["cow", "cat"]


def test_command_on_a_trunk(folder, tmp_path):
    arguments = [str(folder / "trunk.safetensors"), str(folder / "one.png")]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"conv1.png", "one_activations.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WEIGHTS|PATH"),
        (["none.safetensors"], "no weights none.safetensors"),
        (["model.safetensors", "none.png"], "cannot read image none.png"),
        (["model.safetensors", "model.safetensors"], "it is no image"),
        (["model.safetensors", "one.png", "./one.png"], "2 images are called one"),
        (["model.safetensors", "--layers", "conv4"], "'conv4': did you mean 'conv"),
        (["trunk.safetensors", "--layers", "logits"], "no fc10, which logits needs"),
        (["model.safetensors", "--classes", "cats"], "'cats': did you mean 'cat'"),
        (["model.safetensors", "--classes", "3"], "cat, dog, cow, a number up to 2"),
        (["model.safetensors", "--classes", "1" * 5000], "cat, dog, cow, a number up to 2"),
        (["trunk.safetensors", "--classes", "0"], "has no fc10"),
        (["model.safetensors", "--output", "one.png"], "cannot write one.png/conv1.png"),
        (["model.safetensors", "--outptu", "x"], "did you mean --output"),
    ],
)
def test_mistakes_are_said_in_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in message.split("|"))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "it is no regular file"),
        (lambda path: path.write_bytes(b"backend: \xff\n"), "'utf-8' codec can't decode"),
    ],
)
def test_a_matplotlibrc_that_cannot_be_read_is_said(folder, tmp_path, make, said):
    make(tmp_path / "matplotlibrc")
    command = [sys.executable, "-m", "flax_alexnet", "plot", folder / "model.safetensors"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # matplotlib may say something before
    assert last.startswith(f"error: matplotlib does not start ({said}")
    assert not list(tmp_path.rglob("*.png"))
