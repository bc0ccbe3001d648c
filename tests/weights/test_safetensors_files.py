"""Our own weight files, the models in them, and working directories of runs as weights."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flax_alexnet.commands.convert import main as convert
from flax_alexnet.commands.export import export
from flax_alexnet.commands.hub import save_folder
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import writing
from flax_alexnet.weights import safetensors_files, torch_files
from flax_alexnet.weights.load import load
from tests.small_models import make_pretrained

RULE = {
    "image_size": 72,
    "resize": "torchvision",
    "crop_size": 64,
    "scale": 1.0,
    "channel_order": "RGB",
}


def rewritten(weights, path, change):
    """The file with its tensors and metadata changed."""
    with safe_open(weights, framework="numpy") as file:
        metadata = json.loads(file.metadata()[safetensors_files.KEY])
    tensors = load_file(weights)
    change(tensors, metadata)
    save_file(tensors, path, {safetensors_files.KEY: json.dumps(metadata)})
    return path


def test_a_model_comes_back_as_it_was_saved(pretrained, weights):
    again = load(weights)
    assert again.config == pretrained.config
    assert again.label_names == pretrained.label_names
    assert again.source == pretrained.source
    assert again.is_classifier
    rules = [dataclasses.asdict(n.preprocessing) for n in (pretrained, again)]
    assert [rule.pop("mean").tolist() for rule in rules] == [[120, 110, 100]] * 2
    assert rules[0] == rules[1]
    jax.tree.map(np.testing.assert_array_equal, again.params, pretrained.params)


def test_the_same_model_gives_the_same_bytes(pretrained, weights, tmp_path):
    safetensors_files.save(pretrained, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_rules(pretrained, weights, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        safetensors_files.save(pretrained, tmp_path / "ours.safetensors")
        with writing(tmp_path / "their.safetensors") as partial:
            torch_files.write({"a": np.zeros(1, np.float32)}, partial)
        save_folder(pretrained, tmp_path / "folder", "user/name")
        export(pretrained, tmp_path / "model.stablehlo")
        again = [str(weights), str(tmp_path / "ours.safetensors"), "--overwrite"]
        assert convert(again) == 0
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {oct(mode)}


def test_heads_and_a_mean_image_travel_too(pretrained, tmp_path):
    mean = np.arange(72 * 72 * 3, dtype=np.float32).reshape(72, 72, 3)
    rule = dataclasses.replace(pretrained.preprocessing, mean=mean, scale=0.5)
    counts = [layer["kernel"].shape[-1] for layer in pretrained.params.values()][:5]
    heads = {f"lin{i}": np.full((1, 1, count, 1), i, np.float32) for i, count in enumerate(counts)}
    safetensors_files.save(
        dataclasses.replace(pretrained, preprocessing=rule, lpips_heads=heads), tmp_path / "x"
    )
    again = safetensors_files.read(tmp_path / "x")
    np.testing.assert_array_equal(again.preprocessing.mean, mean)
    assert again.preprocessing.scale == 0.5
    jax.tree.map(np.testing.assert_array_equal, dict(again.lpips_heads), heads)


def test_every_tensor_that_does_not_fit_is_listed_at_once(weights, tmp_path):
    def change(tensors, metadata):
        del metadata
        del tensors["params/conv2/bias"]
        tensors["params/conv9/bias"] = np.zeros(3, np.float32)
        tensors["params/fc8/kernel"] = np.zeros((2, 2), np.float32)

    path = rewritten(weights, tmp_path / "bad.safetensors", change)
    with pytest.raises(UserError) as error:
        load(path)
    said = str(error.value)
    assert "params/conv2/bias is missing, expected 10" in said
    assert "params/conv9/bias 3 is not expected" in said
    assert "params/fc8/kernel is 2×2, expected 205×4" in said


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("format", 99, "has the format 99; expected 1"),
        ("model", {"variant": "papre", "num_classes": 4}, "did you mean 'paper'"),
        ("model", {"size": 3}, "damaged"),
        ("model", {"variant": "torchvision", "num_classes": None}, "such a value of sizes"),
        (
            "model",
            {"variant": "torchvision", "num_classes": 4, "width": "a"},
            "such a value of width",
        ),
        ("model", {"variant": ["paper"], "num_classes": 4}, "damaged"),
        (
            "model",
            {"variant": "torchvision", "num_classes": 4, "width": 0.05, "activation": "gelu"},
            "such a value of activation",
        ),
        ("preprocessing", {**RULE, "crop_size": "x"}, "damaged"),
        ("preprocessing", {**RULE, "crop_size": 73}, "such a value of crop_size"),
        ("preprocessing", {**RULE, "resize": "toorchvision"}, "such a value of resize"),
        ("preprocessing", {**RULE, "scale": [1, 2]}, "damaged"),
        ("label_names", ["one"], "such a value of label_names"),
        ("label_names", [1, 2, 3, 4], "such a value of label_names"),
        ("source", "x", "such a value of source"),
        ("preprocessing", {"channel_order": "BGR"}, "not for RGB"),
        ("preprocessing", [], "damaged"),
        ("label_names", 7, "damaged"),
        ("label_names", "abcd", "such a value of label_names"),
        ("label_names", dict.fromkeys("abcd"), "such a value of label_names"),
    ],
)
def test_metadata_that_does_not_fit_is_one_line(weights, tmp_path, name, value, says):
    def change(tensors, metadata):
        del tensors
        metadata[name] = value

    with pytest.raises(UserError, match=says) as error:
        load(rewritten(weights, tmp_path / "bad.safetensors", change))
    assert "\n" not in str(error.value)


def test_files_that_are_none(weights, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no weights"):
        load(tmp_path / "nothing.safetensors")
    for part in (0, 5, 1000, -1):
        (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:part])
        with pytest.raises(UserError, match=r"cut\.safetensors"):
            load(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"no working directory of a run.* expected a \.safetens"):
        load(tmp_path / "folder")
    with pytest.raises(UserError, match=r"no config.json; did you mean .*cut\.safetensors\?"):
        load(tmp_path)
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    for near in ("run/checkpoints", "run/checkpoints/2"):
        with pytest.raises(UserError, match=r"did you mean .*run\?"):
            load(tmp_path / near)
    with pytest.raises(UserError, match="cannot write"):
        safetensors_files.save(make_pretrained(), weights / "below" / "a" / "file")


def test_a_file_with_the_old_name_of_a_variant(tmp_path):
    pretrained = make_pretrained("cuda_convnet_19pct", 4, 16, 20)
    old = dataclasses.replace(pretrained.config, variant="cuda_convnet_cifar10")
    path = tmp_path / "old.safetensors"
    safetensors_files.save(pretrained, path)
    header = path.read_bytes()
    assert header.count(b"cuda_convnet_19pct") == 1
    changed = header.replace(b"cuda_convnet_19pct", b"cuda_convnet_cifar10")
    length = int.from_bytes(header[:8], "little") + 2
    path.write_bytes(length.to_bytes(8, "little") + changed[8:])
    assert old.variant.encode() in path.read_bytes()
    assert safetensors_files.read(path).config == pretrained.config
