"""Checkpoints of the original code."""

import zipfile

import numpy as np
import pytest

from flax_alexnet.models.architectures import architecture
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import load
from flax_alexnet.weights.convnet_files import read_checkpoint, read_data_meta
from tests.foreign_files import (
    OptionsParser,
    convnet_checkpoint,
    convnet_layers,
    convnet_meta,
    convnet_towers,
    dump_python2,
)
from tests.small_models import make_pretrained


def cifar_model(variant, num_classes=10):
    size = architecture(variant).image_size
    return make_pretrained(variant, num_classes, size, 32, width=1.0)


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name, layer in expected.items():
        for part in ("kernel", "bias"):
            np.testing.assert_array_equal(params[name][part], layer[part], err_msg=name)


CIFAR = ["80sec", "19pct", "18pct", "13pct", "11pct"]


@pytest.mark.parametrize("name", CIFAR)
def test_the_models_of_cifar_are_told_apart_and_read(name, tmp_path):
    pretrained = cifar_model(f"cuda_convnet_{name}")
    path = tmp_path / "140.1"
    path.write_bytes(dump_python2(convnet_checkpoint(convnet_layers(pretrained))))
    loaded = load.load(path)
    assert (loaded.config.variant, loaded.num_classes) == (f"cuda_convnet_{name}", 10)
    assert_same(loaded.params, pretrained.params)
    rule = loaded.preprocessing
    crop = 24 if name in ("13pct", "11pct") else 32
    assert (rule.image_size, rule.crop_size, rule.scale) == (32, crop, 1.0)


def test_two_towers_are_put_together(tmp_path):
    """By the names of layers, as the code of 2014 has them; a narrow model is enough."""
    pretrained = make_pretrained("original", 7, 224, 256, width=1.0, seed=1)
    path = tmp_path / "90.1"
    path.write_bytes(dump_python2(convnet_checkpoint(convnet_towers(pretrained))))
    found = read_checkpoint(path)
    assert (found.variant, found.num_classes) == ("original", 7)
    assert_same(found.params, pretrained.params)


def test_a_compressed_checkpoint_is_the_same(tmp_path):
    pretrained = cifar_model("cuda_convnet_18pct", 4)
    path = tmp_path / "10.2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", dump_python2(convnet_checkpoint(convnet_layers(pretrained))))
    loaded = load.load(path)
    assert loaded.num_classes == 4
    assert_same(loaded.params, pretrained.params)


def test_the_mean_image_and_the_names_of_classes_are_in_batches_meta(tmp_path):
    path = tmp_path / "batches.meta"
    path.write_bytes(dump_python2(convnet_meta()))
    mean, names = read_data_meta(path)
    assert names == ("airplane", "automobile")
    assert mean[5, 7, 2] == convnet_meta()["data_mean"][2 * 1024 + 5 * 32 + 7, 0]

    checkpoint = tmp_path / "140.1"
    checkpoint.write_bytes(
        dump_python2(convnet_checkpoint(convnet_layers(cifar_model("cuda_convnet_13pct", 2))))
    )
    pretrained, _ = load.read(checkpoint, mean=path)
    np.testing.assert_array_equal(pretrained.preprocessing.mean, mean)
    assert pretrained.label_names == names


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("model_state"), "it has no model_state with layers"),
        (lambda c: c.update(model_state=[]), "it has no model_state with layers"),
        (lambda c: c["model_state"]["layers"].pop(), "is of a model with the layers conv1, conv2"),
        (lambda c: c["model_state"]["layers"][1].pop("biases"), "cannot be read|cannot read"),
        (
            lambda c: c["model_state"]["layers"][1]["weights"].append(np.zeros(3, np.float32)),
            "conv1 reads 1 layers by 2 weights",
        ),
        (
            lambda c: c["model_state"]["layers"][1].update(weights=[np.zeros((9, 9), np.float32)]),
            r"does not fit cuda_convnet_19pct: conv1 has arrays of \[\(9, 9\)",
        ),
        (
            lambda c: c["model_state"]["layers"][1].update(weights=[OptionsParser()]),
            "conv1 has something else than arrays of numbers",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, says, tmp_path):
    content = convnet_checkpoint(convnet_layers(cifar_model("cuda_convnet_19pct")))
    change(content)
    path = tmp_path / "140.1"
    path.write_bytes(dump_python2(content))
    with pytest.raises(UserError, match=says) as error:
        load.load(path)
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_meta_of_another_kind(tmp_path):
    path = tmp_path / "140.1"
    path.write_bytes(
        dump_python2(convnet_checkpoint(convnet_layers(cifar_model("cuda_convnet_19pct"))))[:-2000]
    )
    with pytest.raises(UserError, match=r"cannot read .* as a checkpoint of cuda-convnet"):
        load.load(path)
    other = tmp_path / "batches.meta"
    for content in ({"data_mean": np.zeros(10, np.float32)}, {"nothing": 1}, [1]):
        other.write_bytes(dump_python2(content))
        with pytest.raises(UserError, match=r"cannot read .* as a batches\.meta"):
            read_data_meta(other)
