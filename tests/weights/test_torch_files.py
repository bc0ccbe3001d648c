"""PyTorch's state dicts, read without PyTorch."""

import argparse
import collections
import dataclasses
import itertools
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_alexnet.commands.convert import main
from flax_alexnet.weights.labels import (
    imagenet_labels,
)
from flax_alexnet.weights.load import load
from tests.foreign_files import (
    Named,
    Tensor,
    assert_is_trunk,
    legacy_pth,
    refused,
    torch_tensor,
    zip_pth,
)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("write", [zip_pth, legacy_pth])
@pytest.mark.usefixtures("no_torch")
def test_pth_without_torch(write, order, trunk, tmp_path):
    pretrained = load(write(tmp_path / "model.pth", trunk, order))
    assert_is_trunk(pretrained, trunk)
    assert (pretrained.config.variant, pretrained.num_classes) == ("torchvision", 1000)
    assert pretrained.label_names == imagenet_labels()


def test_views_and_checkpoints(trunk, tmp_path):
    """Transposed tensors that share a storage, in a checkpoint of a model in `DataParallel`."""
    turned = {name: np.asfortranarray(value) for name, value in trunk.items()}
    tensors = {f"module.{n}": torch_tensor(str(k), v) for k, (n, v) in enumerate(turned.items())}
    raw = {name: value.ravel(order="K") for name, value in turned.items()}
    tensors["module.features.8.bias"].storage = tensors["module.features.10.bias"].storage
    checkpoint = {"epoch": 3, "state_dict": tensors}
    pretrained = load(zip_pth(tmp_path / "model.pth", raw, value=checkpoint))
    assert_is_trunk(pretrained, trunk | {"features.8.bias": trunk["features.10.bias"]})


def checkpoints(tensors):
    """Forms in which people have a state dict, and what is said of each."""

    def before(prefix):
        return {prefix + name: tensor for name, tensor in tensors.items()}

    yield "a list beside", {"model": tensors, "losses": [1.0, 2.0]}, ""
    yield "tutorial", {"epoch": 1, "model_state_dict": tensors, "loss": 0.4}, ""
    yield "Lightning", {"state_dict": before("model."), "epoch": 1}, "model.features.0.weight is"
    yield "torch.compile", before("_orig_mod."), "_orig_mod.features.0.weight is read as features."
    yield "both", before("module._orig_mod."), "module._orig_mod.features.0.weight is read as"
    yield "own module", before("backbone.net."), "backbone.net.features.0.weight is read as"
    within = {name.replace("features.", "features.module."): t for name, t in tensors.items()}
    yield "within", {"state_dict": within}, "features.module.0.weight is read as features.0.weight"
    yield "nested", {"net": {"state_dict": before("module.")}}, "module.features.0.weight is read"
    yield "own names", before("mymodule."), "mymodule.features.0.weight is read as features.0"
    odd = {"features.0.bias": tensors["features.0.bias"]}
    average = {"state_dict": tensors, "state_dict_ema": odd}
    yield "average", average, "its state_dict is taken, and not state_dict_ema"
    beside = before("model.") | {"loss.weight": odd["features.0.bias"]}
    yield "loss", {"state_dict": beside}, "left out is what has not this prefix: loss.weight"
    moments = {0: {"step": 1, "momentum_buffer": odd["features.0.bias"]}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}
    strange = Tensor(("storage", Named("torch", "QUInt8Storage"), "x", "cpu", 1), 0, (1,), (1,))
    objects = {
        "optimizer": optimizer,
        "args": argparse.Namespace(rate=0.1, path=pathlib.PurePath("a")),
        "score": np.float64(1),
        "counts": collections.Counter("a"),
        "quantized": strange,
        (1, 2): "another key",
    }
    yield "objects", {"model": tensors, **objects}, ""


@pytest.mark.parametrize("write", [zip_pth, legacy_pth])
def test_checkpoints(write, trunk, tmp_path, capsys):
    """The state dict is found, whatever the file's ending; a wrapper's names are taken off."""
    keys = {zip_pth: map(str, range(len(trunk))), legacy_pth: (name.upper() for name in trunk)}
    view = [None] * (write is legacy_pth)
    tensors = {
        name: torch_tensor(key, value, *view)
        for key, (name, value) in zip(keys[write], trunk.items(), strict=True)
    }
    endings = itertools.cycle([".pth.tar", ".bin", ".ckpt", ".pt", ""])
    for (what, value, said), ending in zip(checkpoints(tensors), endings, strict=False):
        assert_is_trunk(load(write(tmp_path / f"model{ending}", trunk, value=value)), trunk)
        notes = capsys.readouterr().err
        assert said in notes, what
        assert notes.count("\n") == bool(said), what


def test_objects_beside_the_tensors_are_not_made(trunk, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    tensors = {n: torch_tensor(str(key), v) for key, (n, v) in enumerate(trunk.items())}
    path = zip_pth(tmp_path / "model.pth", trunk, value={"args": Evil(), "state_dict": tensors})
    assert_is_trunk(load(path), trunk)
    assert not (tmp_path / "canary").exists()


def test_types(trunk, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    for dtype in (np.float16, np.float64, jnp.bfloat16):
        save_file({name: value.astype(dtype) for name, value in trunk.items()}, path)
        pretrained = load(path)
        assert pretrained.params["conv1"]["kernel"].dtype == np.float32
        rounded = {name: value.astype(dtype).astype(np.float32) for name, value in trunk.items()}
        assert_is_trunk(pretrained, rounded)
    save_file(trunk | {"features.0.bias": np.zeros(64, np.int8)}, path)
    assert "features.0.bias" in refused(capsys, path, tmp_path / "out.safetensors")
    bad = trunk["features.6.weight"].copy()
    bad[0, 0, 0, :2] = np.nan, np.inf
    save_file(trunk | {"features.6.weight": bad}, path)
    load(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "2 in conv3/kernel" in line


def test_grey_torchvision(trunk, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file(trunk | {"features.0.weight": np.zeros((64, 1, 11, 11), np.float32)}, path)
    out = tmp_path / "out.safetensors"
    assert "grey images, and does not say" in refused(capsys, path, out)


def bad_pth(folder, trunk):
    """Files that are refused, and a part of what is said."""
    name, value = "features.0.bias", trunk["features.0.bias"]
    good = torch_tensor("0", value)

    def lying(**changes):
        tensor = dataclasses.replace(good, **changes)
        return zip_pth(folder / "model.pth", {"a": value}, value={"a": tensor})

    kind = good.storage[1]
    giant = ("storage", kind, "0", "cpu", 2**60)
    beyond = "beyond its storage"
    yield lying(shape=(2**40,), strides=(0,)), beyond
    yield lying(shape=(65,), strides=(1,)), beyond
    yield lying(offset=60), beyond
    yield lying(offset=-1), "no sense"
    yield lying(strides=(-1,)), "no sense"
    yield lying(strides=(1, 1)), "no sense"
    yield lying(storage=giant), "has 256 bytes"
    yield lying(storage=("storage", kind, "../x", "cpu", 64)), "no item named"
    yield lying(storage=("storage", Named("torch", "Size"), "0", "cpu", 64)), "unknown type"
    yield zip_pth(folder / "model.pth", {"a": value}, value={"a": 1}), "it holds no tensors"
    yield zip_pth(folder / "model.pth", {"a": value}, value={"b": good, name: 1}), "is no tensor"
    yield zip_pth(folder / "model.pth", {"a": value}, value=[good]), "no dictionary"
    evil = {"a": Named("posix", "system")}
    for entries in (evil, {name: evil["a"], "b": good}, {"model": evil["a"], "a": 1}, evil["a"]):
        yield zip_pth(folder / "model.pth", {"a": value}, value=entries), "asks for posix.system"
    several = {"teacher": {name: good}, "student": {name: good}}
    yield (
        zip_pth(folder / "model.pth", {"a": value}, value=several),
        "several models, teacher, student",
    )
    several = {f"teacher.{name}": good, f"student.{name}": good}
    yield zip_pth(folder / "model.pth", {"a": value}, value=several), "models, student., teacher."
    twice = {f"module.{name}": good, name: good}
    yield zip_pth(folder / "model.pth", {"a": value}, value=twice), f"it has {name} twice"
    zeros = {"a": np.zeros(10_000, np.float32)}
    deflated = zip_pth(folder / "model.pth", zeros, compression=zipfile.ZIP_DEFLATED)
    yield deflated, "compressed"
    for write in (zip_pth, legacy_pth):
        path = write(folder / "model.pth", trunk)
        path.write_bytes(path.read_bytes()[:-1000])
        yield path, "cannot read"
    changed = bytearray(zip_pth(folder / "model.pth", trunk).read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / "model.pth").write_bytes(changed)
    yield folder / "model.pth", "CRC"


def test_bad_pth(tmp_path, trunk, capsys):
    for path, part in bad_pth(tmp_path, trunk):
        assert part in refused(capsys, path, tmp_path / "out.safetensors")


def test_real_trunk(shared_data, tmp_path):
    """Torchvision's trained convolutions with LPIPS heads, from another project's `.npz`."""
    path = shared_data / "alexnet_owt" / "features_and_lpips.npz"
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 0
    pretrained = load(tmp_path / "out.safetensors")
    with np.load(path) as arrays:
        for name in arrays.files:
            layer, _, part = name.partition("/")
            ours = pretrained.params[layer][part] if part else pretrained.lpips_heads[layer]
            np.testing.assert_array_equal(ours, arrays[name])
