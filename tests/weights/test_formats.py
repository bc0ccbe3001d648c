"""Formats are told by content."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.load import load
from tests.foreign_files import assert_is_trunk, caffemodel, refused


def test_formats_are_told_by_content(trunk, pretrained, tmp_path, capsys):
    tensors = {f"_orig_mod.{name}": value for name, value in trunk.items()}
    save_file(tensors, tmp_path / "pytorch_model.bin")
    assert_is_trunk(load(tmp_path / "pytorch_model.bin"), trunk)
    assert "_orig_mod.features.0.bias is read as features.0.bias" in capsys.readouterr().err
    first = set()
    for count in range(0, 256, 8):  # it begins with a length, which may begin as another mark
        safetensors_files.save(
            dataclasses.replace(pretrained, source={"file": count * "x"}), tmp_path / "model.ckpt"
        )
        assert load(tmp_path / "model.ckpt").config == pretrained.config
        first.add((tmp_path / "model.ckpt").read_bytes()[:1])
    assert b"\x80" in first
    with (tmp_path / "model").open("wb") as file:
        np.savez(file, **{"conv1/kernel": np.zeros(1)})
    assert "conv1/bias is missing" in refused(
        capsys, tmp_path / "model", tmp_path / "x.safetensors"
    )
    caffemodel(tmp_path / "model.bin")
    assert load(tmp_path / "model.bin").config.variant == "caffe"
    capsys.readouterr()
    for start, said in (
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"<!doctype html>", "a web page"),
        (bytes(257) + b"ustar", "a tar archive"),
        (b"other", "expected a .safetensors, a .pth"),
    ):
        (tmp_path / "model.pth").write_bytes(start + bytes(600))
        assert said in refused(capsys, tmp_path / "model.pth", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "suffix", ["pth", "safetensors", "caffemodel", "npy", "npz", "binaryproto"]
)
@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"\x93NUMPY", b"PK\x03\x04", None]
)
def test_no_weights(suffix, content, tmp_path, capsys):
    path = tmp_path / f"model.{suffix}"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert str(path) in refused(capsys, path, tmp_path / "out.safetensors")
