"""Models to and from the Hugging Face Hub: a folder, and a client that notes what it is told."""

import dataclasses
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from safetensors.numpy import save_file

from flax_alexnet.commands import hub
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import safetensors_files
from tests.small_models import small_pretrained


@pytest.fixture
def pretrained():
    named = {"label_names": tuple("abcdefg"), "source": {"file": "x", "format": "y", "sha256": "z"}}
    return dataclasses.replace(small_pretrained("cuda_convnet_19pct"), **named)


@pytest.fixture
def weights(pretrained, tmp_path):
    safetensors_files.save(pretrained, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def assert_same_model(ours, theirs):
    assert (ours.config, ours.label_names, ours.source) == (
        theirs.config,
        theirs.label_names,
        theirs.source,
    )
    for layer, values in theirs.params.items():
        for name, value in values.items():
            np.testing.assert_array_equal(ours.params[layer][name], value)
    np.testing.assert_array_equal(ours.preprocessing.mean, theirs.preprocessing.mean)


def test_through_a_folder(pretrained, weights, tmp_path, capsys):
    folder, pulled = str(tmp_path / "folder"), tmp_path / "pulled.safetensors"
    assert hub.main(["push", weights, "me/alexnet", "--folder", folder]) == 0
    assert hub.main(["pull", folder, str(pulled)]) == 0
    assert_same_model(safetensors_files.read(pulled), pretrained)
    assert_same_model(hub.from_hub(folder), pretrained)
    assert hub.main(["push", weights, "me/alexnet", "--folder", folder]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_card_says_what_a_user_needs(pretrained, tmp_path):
    hub.save_folder(pretrained, tmp_path / "whole", "me/alexnet", "cc-by-4.0", "57.1 % top-1")
    card = (tmp_path / "whole" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "flax_alexnet",
        "license": "cc-by-4.0",
        "pipeline_tag": "image-classification",
        "tags": ["alexnet", "flax", "jax", "cuda_convnet_19pct"],
    }
    parameters = sum(value.size for layer in pretrained.params.values() for value in layer.values())
    for fact in (f"{parameters:,}", "7 classes, named", "57.1 % top-1", "23×23", "SHA-256 z"):
        assert fact in text
    assert "times (0.02, 0.03, 0.01)" in text

    trunk = dataclasses.replace(
        pretrained, params={k: v for k, v in pretrained.params.items() if k != "fc10"}
    )
    card = hub.model_card(trunk, "me/trunk")
    assert "pipeline_tag: image-feature-extraction" in card
    assert "license: unknown" in card
    assert "Accuracy" not in card


def test_the_python_of_the_card_runs(pretrained, tmp_path, monkeypatch):
    hub.save_folder(pretrained, tmp_path / "me" / "alexnet", "me/alexnet")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save("image.jpg")
    code = (tmp_path / "me" / "alexnet" / "README.md").read_text().split("```")[1]
    names = {}
    exec(code.removeprefix("python\n"), names)
    assert names["images"].shape == (1, 18, 18, 3)


def test_what_is_uploaded(weights, tmp_path, monkeypatch, capsys):
    told = []

    class Client:
        def __init__(self, **_):
            pass

        def create_repo(self, repository, **options):
            told.append((repository, options))
            return f"https://hub/{repository}"

        def upload_folder(self, repo_id, folder_path):
            told.append(repo_id)
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    assert hub.main(["push", weights, "me/alexnet", "--private"]) == 0
    assert capsys.readouterr().out == "https://hub/me/alexnet\n"
    assert told == [("me/alexnet", {"private": True, "exist_ok": True}), "me/alexnet"]
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "README.md",
        "model.safetensors",
    }
    assert_same_model(
        hub.from_hub(tmp_path / "hub"), safetensors_files.read(tmp_path / "model.safetensors")
    )


def test_only_the_weights_are_downloaded(pretrained, weights, monkeypatch):
    asked = []

    def download(*arguments, **options):
        asked.append((arguments, options))
        return weights

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same_model(hub.from_hub("me/alexnet", "v1"), pretrained)
    assert asked == [(("me/alexnet", "model.safetensors"), {"revision": "v1"})]


def test_weights_of_another_library(tmp_path):
    save_file({"classifier.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is not one of flax_alexnet"):
        hub.from_hub(tmp_path)


def refused(kind, status, text):
    """An answer of the Hub, as the client raises it."""
    return kind(text, response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HTTPError("no route to host"), "cannot be reached (no route to host); check the network"),
        (LocalEntryNotFoundError("not there,\nnor in the cache"), "not there, nor in the cache"),
        (OfflineModeIsEnabled("offline"), "offline"),
        (LocalTokenNotFoundError("no token"), "log in with: hf auth login"),
        (HFValidationError("a name is too long"), "a name is too long"),
        (KeyError("url"), "KeyError 'url'"),  # as where a proxy answers in the place of the Hub
        (ImportError("no package\nfor SOCKS"), "ImportError no package for SOCKS"),
        (refused(RepositoryNotFoundError, 404, "long\ntext"), "log in with: hf auth login"),
        (refused(HfHubHTTPError, 403, "Forbidden"), "log in with: hf auth login"),
        (refused(HfHubHTTPError, 400, "Bad\n\nlicence"), "Bad licence"),
        (refused(RevisionNotFoundError, 404, "404\n\nRevision v1"), "404 Revision v1"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    error, message, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    for command in (["pull", "me/model", "pulled.safetensors"], ["push", weights, "me/model"]):
        assert hub.main(command) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pusch"], "did you mean 'push'?"),
        (["push", "model.safetensors"], "USER/NAME"),
        (["push", "nowhere.safetensors", "me/model"], "no weights nowhere.safetensors"),
        (
            ["push", "nowhere.safetensors", "me/model", "--licence", "mit"],
            "did you mean --license?",
        ),
        (["pull", "me/model", "model.onnx"], "does not end in .safetensors"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert hub.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
