"""`convert`: what it reads, writes, and refuses."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_alexnet.commands.convert import main
from flax_alexnet.weights.load import load
from flax_alexnet.weights.pretrained import LPIPS_HEADS
from tests.foreign_files import CONVOLUTIONS, caffemodel, legacy_pth, refused


@pytest.mark.usefixtures("no_torch")
def test_back_to_torchvision(trunk, tmp_path, capsys):
    save_file(trunk, tmp_path / "their.safetensors", {"format": "pt"})
    ours, back = tmp_path / "deep" / "ours.safetensors", tmp_path / "back.safetensors"
    assert main([str(tmp_path / "their.safetensors"), str(ours)]) == 0
    said = capsys.readouterr()
    digest = hashlib.sha256((tmp_path / "their.safetensors").read_bytes()).hexdigest()
    for part in (digest, "torchvision", "2,469,696", "tench", "123.675", "224", str(ours)):
        assert part in said.out
    assert said.err == ""
    assert main([str(ours), str(back), "--format", "torchvision"]) == 0
    result = load_file(back)
    assert result.keys() == trunk.keys()
    for name, value in trunk.items():
        np.testing.assert_array_equal(result[name], value)
    argv = (ours, tmp_path / "back.pth", "--format", "torchvision")
    assert "pip install" in refused(capsys, *argv)


def test_only_torchvision_goes_back(tmp_path, capsys):
    path = caffemodel(tmp_path / "model.caffemodel")
    assert main([str(path), str(tmp_path / "ours.safetensors")]) == 0
    capsys.readouterr()
    argv = (tmp_path / "ours.safetensors", tmp_path / "back.safetensors", "--format", "torchvision")
    assert main([str(word) for word in argv]) == 2
    assert "variant caffe" in capsys.readouterr().err


def test_flags(trunk, tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    assert "no weights" in refused(capsys, path, out)
    save_file(trunk, path)
    assert "expected a .safetensors" in refused(capsys, path, tmp_path / "out.pth")
    assert "would be overwritten" in refused(capsys, path, path)
    assert "not caffe" in refused(capsys, path, out, "--variant", "caffe")
    assert "--mean is for" in refused(capsys, path, out, "--mean", path)
    assert "--head is for" in refused(capsys, path, out, "--head", "fc8")
    assert "did you mean --heads" in refused(capsys, path, out, "--heds", path)
    refused(capsys, path)
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\n")
    assert "2 lines" in refused(capsys, path, out, "--labels", labels)
    labels.write_text("\n".join(f"name {index}" for index in range(1000)))
    assert main([str(path), str(out), "--labels", str(labels)]) == 0
    assert load(out).name(7) == "name 7"


def test_heads(trunk, tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(trunk, path)
    rng = np.random.default_rng(0)
    heads = {
        f"lin{stage}.model.1.weight": rng.random((1, shape[0], 1, 1), np.float32)
        for stage, shape in enumerate(CONVOLUTIONS.values())
    }
    alex = legacy_pth(tmp_path / "alex.pth", heads)
    assert main([str(path), str(out), "--heads", str(alex)]) == 0
    assert load(out).lpips_heads.keys() == set(LPIPS_HEADS)
    for name, head in load(out).lpips_heads.items():
        np.testing.assert_array_equal(head[0, 0, :, 0], heads[f"{name}.model.1.weight"][0, :, 0, 0])
    capsys.readouterr()
    out = tmp_path / "other.safetensors"
    assert "give it as --heads" in refused(capsys, alex, out)
    heads.pop("lin2.model.1.weight")
    short = legacy_pth(tmp_path / "short.pth", heads)
    line = refused(capsys, path, tmp_path / "new.safetensors", "--heads", short)
    assert "lin2.model.1.weight is missing, expected 1×384×1×1" in line
