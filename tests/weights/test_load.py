"""Any path to a trained model, or every misfit at once."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_alexnet.models.activations import features
from flax_alexnet.weights import name_maps
from flax_alexnet.weights.load import load
from tests.foreign_files import (
    CAFFE_SHAPES,
    CONVOLUTIONS,
    KINDS,
    caffemodel,
    legacy_pth,
    refused,
    zip_pth,
)


def test_every_misfit_is_listed(trunk, tmp_path, capsys):
    tensors = dict(trunk)
    del tensors["features.0.bias"]
    tensors["features.3.weight"] = np.zeros((192, 64, 3, 3), np.float32)
    tensors["features.1.running_mean"] = np.zeros(64, np.float32)
    tensors["classifier.6.bias"] = np.zeros(10, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    line = refused(capsys, tmp_path / "model.safetensors", tmp_path / "out.safetensors")
    for part in (
        "features.0.bias is missing, expected 64",
        "features.3.weight is 192×64×3×3, expected 192×64×5×5",
        "features.1.running_mean 64 is not expected",
        "classifier.1.weight is missing, expected 4096×9216",
        "classifier.6.weight is missing, expected 10×4096",
    ):
        assert part in line
    assert not (tmp_path / "out.safetensors").exists()


def test_number_of_classes():
    """A fine-tuned model's last layer says how many there are."""
    zero = np.float32(0)
    dense = {"classifier.1": (4096, 9216), "classifier.4": (4096, 4096), "classifier.6": (7, 4096)}
    shapes = CONVOLUTIONS | dense
    tensors = {f"{k}.weight": np.broadcast_to(zero, v) for k, v in shapes.items()}
    tensors |= {f"{k}.bias": np.broadcast_to(zero, v[:1]) for k, v in shapes.items()}
    params, classes = name_maps.read_params(name_maps.TORCHVISION, tensors, "torchvision", "model")
    assert classes == 7
    assert params["fc8"]["kernel"].shape == (4096, 7)


def upright(shape, rows):
    """Kernels of 1 above their middle row and -1 below it; `rows` is the axis of rows."""
    values = np.sign((shape[rows] - 1) / 2 - np.arange(shape[rows]))
    values = values.reshape([-1 if axis == rows else 1 for axis in range(4)])
    return np.ascontiguousarray(np.broadcast_to(values, shape), np.float32)


def upright_file(kind, folder):
    """A trunk of such kernels, in a file of each system: (out, in, h, w) or (h, w, in, out)."""
    path = folder / f"model.{kind.partition(' ')[0]}"
    torchvision = {f"{name}.weight": upright(shape, 2) for name, shape in CONVOLUTIONS.items()}
    torchvision |= {f"{name}.bias": np.zeros(s[0], np.float32) for name, s in CONVOLUTIONS.items()}
    match kind:
        case "pth":
            return zip_pth(path, torchvision)
        case "pth of old":
            return legacy_pth(path, torchvision)
        case "safetensors":
            save_file(torchvision, path)
        case "npz":
            shapes = {f"conv{i}": shape for i, shape in enumerate(CONVOLUTIONS.values(), 1)}
            kernels = {
                f"{k}/kernel": upright((h, w, i, o), 0) for k, (o, i, h, w) in shapes.items()
            }
            biases = {f"{k}/bias": np.zeros(shape[0], np.float32) for k, shape in shapes.items()}
            np.savez(path, **kernels, **biases)
        case "npy":
            layers = {
                name: [upright((h, w, i, o), 0), np.zeros(o, np.float32)]
                for name, (o, i, h, w) in CAFFE_SHAPES.items()
            }
            np.save(path, layers, allow_pickle=True)
        case _:
            kernels = {name: upright(shape, 2) for name, shape in CAFFE_SHAPES.items()}
            return caffemodel(path, kind.rpartition(" ")[2], values=kernels)
    return path


# Random values do not show kernels that lie on their side, where those that are expected do too.
@pytest.mark.parametrize(
    "kind", ["pth", "pth of old", "safetensors", "npz", "npy", *(f"caffemodel {g}" for g in KINDS)]
)
def test_kernels_stand_upright(kind, tmp_path):
    """They see where an image is bright above and dark below; not it turned, nor it flipped."""
    pretrained = load(upright_file(kind, tmp_path))
    edge = np.zeros((256, 256, 3), np.uint8)
    edge[:128] = 255
    images = pretrained.preprocess(np.stack([edge, edge.swapaxes(0, 1), edge[::-1]]))
    seen = features(pretrained.model, pretrained.params, images, ["conv1"])["conv1"]
    above, turned, flipped = np.asarray(seen[:, 2:-2, 2:-2].max((1, 2, 3)))  # but for the border
    assert above > 500
    assert max(turned, flipped) < 2
    for layer in CAFFE_SHAPES:
        kernel = pretrained.params[layer]["kernel"]
        np.testing.assert_array_equal(kernel, upright(kernel.shape, 0))
