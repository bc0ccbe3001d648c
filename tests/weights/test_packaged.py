"""Models that come with the package."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from flax_alexnet.commands import evaluate, predict
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import packaged, safetensors_files
from flax_alexnet.weights.load import load
from tests.small_models import make_pretrained

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tfds"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of packaged models with one in it; the current folder is another, and empty."""
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "packaged")
    (tmp_path / "packaged").mkdir()
    safetensors_files.save(make_pretrained(), tmp_path / "packaged" / "small.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "packaged"


def test_a_name_is_as_good_as_a_path(folder):
    assert packaged.packaged_names() == ["small"]
    by_name, by_path = load("small"), load(folder / "small.safetensors")
    assert by_name.config == by_path.config
    np.testing.assert_array_equal(
        by_name.params["conv1"]["kernel"], by_path.params["conv1"]["kernel"]
    )


def test_what_is_here_comes_first(folder):
    other = make_pretrained(seed=1)
    safetensors_files.save(other, Path("mine.safetensors"))
    shutil.move("mine.safetensors", "small")
    np.testing.assert_array_equal(
        load("small").params["conv1"]["kernel"], other.params["conv1"]["kernel"]
    )
    assert packaged.find(folder / "small") == folder / "small"  # a path is never a name


@pytest.mark.usefixtures("folder")
def test_another_name_is_told_which_there_are():
    with pytest.raises(UserError, match=r"no weights big: .*; small come with the package"):
        load("big")


@pytest.mark.usefixtures("folder")
def test_commands_take_a_name(photographs, capsys):
    assert predict.main(["small", str(photographs), "--output", "predictions.csv"]) == 0
    assert Path("predictions.csv").exists()
    capsys.readouterr()


@pytest.mark.parametrize("name", packaged.packaged_names())
def test_a_model_has_the_error_that_it_states(name, tmp_path, monkeypatch, capsys):
    """On the whole test set, by the command that a user would type."""
    if not (DATA / "cifar10").exists():
        pytest.skip(f"CIFAR-10 is not in {DATA}")
    monkeypatch.chdir(tmp_path)
    stated = float(load(name).source["test error"])
    flags = ["--data.name", "cifar10", "--data.data-dir", str(DATA), "--batch-size", "500"]
    assert evaluate.main([name, *flags]) == 0
    assert f"top-1 {1 - stated:.2%}" in capsys.readouterr().out
    assert (tmp_path / f"{name}-evaluation" / "evaluation.json").exists()
