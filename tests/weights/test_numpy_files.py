"""Arrays of NumPy as weights."""

import io
import zipfile

import numpy as np

from flax_alexnet.weights.load import load
from tests.foreign_files import CAFFE_SHAPES, refused


def test_npz_sizes(tmp_path, capsys):
    """A header that asks for more than is there, and one of objects."""
    path = tmp_path / "model.npz"
    giant = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**50,)}
    np.lib.format.write_array_header_1_0(giant, header)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("conv1/kernel.npy", giant.getvalue())
    assert "not as long as it says" in refused(capsys, path, tmp_path / "out.safetensors")
    np.savez(path, a=np.array([{}], object))
    assert "no array of numbers" in refused(capsys, path, tmp_path / "out.safetensors")


def test_npy(tmp_path, capsys):
    path, out = tmp_path / "model.npy", tmp_path / "out.safetensors"
    rng = np.random.default_rng(0)
    layers = {
        name: [rng.standard_normal((h, w, i, o), np.float32), rng.random(o, np.float32)]
        for name, (o, i, h, w) in CAFFE_SHAPES.items()
    }
    np.save(path, layers, allow_pickle=True)
    pretrained = load(path)
    assert pretrained.config.variant == "caffe"
    kernel, bias = layers["conv1"]
    np.testing.assert_array_equal(pretrained.params["conv1"]["kernel"], kernel[:, :, ::-1])
    np.testing.assert_array_equal(pretrained.params["conv5"]["kernel"], layers["conv5"][0])
    np.testing.assert_array_equal(pretrained.params["conv1"]["bias"], bias)
    capsys.readouterr()
    for bad, part in (
        (np.ones(3), "one array"),
        ({"conv1": [layers, bias]}, "something else than arrays"),
        ({"conv1": [np.array([bias, None], object)]}, "array of objects"),
        ({"conv1": [print]}, "builtins.print"),
        ({"conv1": [kernel, bias]}, "conv2[0] is missing, expected 5×5×48×256"),
    ):
        np.save(path, bad, allow_pickle=True)
        assert part in refused(capsys, path, out)
