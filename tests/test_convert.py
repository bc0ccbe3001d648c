"""Weight files of other systems: what is read, what is refused, and the command."""

import argparse
import collections
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import pickle
import sys
import zipfile
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_alexnet.checkpoint.manifest import sha256
from flax_alexnet.commands.convert import main
from flax_alexnet.models.activations import features
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import digests, name_maps, safetensors_files
from flax_alexnet.weights.labels import (
    imagenet_labels,
    imagenet_synsets,
    match_labels,
    read_labels,
)
from flax_alexnet.weights.load import CAFFE, load, read
from flax_alexnet.weights.pretrained import LPIPS_HEADS

CONVOLUTIONS = {  # torchvision's, in its own order
    "features.0": (64, 3, 11, 11),
    "features.3": (192, 64, 5, 5),
    "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3),
    "features.10": (256, 256, 3, 3),
}


@pytest.fixture(scope="module")
def trunk():
    """Torchvision's convolution layers by its names, with random values."""
    rng = np.random.default_rng(0)
    return {
        f"{layer}.{name}": rng.standard_normal(sides, np.float32)
        for layer, shape in CONVOLUTIONS.items()
        for name, sides in (("weight", shape), ("bias", shape[:1]))
    }


def assert_is_trunk(net, trunk):
    for index, layer in enumerate(CONVOLUTIONS, 1):
        kernel, bias = net.params[f"conv{index}"]["kernel"], net.params[f"conv{index}"]["bias"]
        np.testing.assert_array_equal(kernel, np.moveaxis(trunk[f"{layer}.weight"], (0, 1), (3, 2)))
        np.testing.assert_array_equal(bias, trunk[f"{layer}.bias"])
    assert not net.is_classifier


@pytest.fixture
def no_torch(monkeypatch):
    """A machine without PyTorch."""

    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "torch":
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def refused(capsys, *argv):
    """The one line with which the command refuses."""
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# What `torch.save` writes, without PyTorch.


class Named:
    """A name that is written into a pickle as it is."""

    def __init__(self, module, name):
        self.path = module, name

    def __call__(self):
        raise NotImplementedError


@dataclasses.dataclass
class Tensor:
    """A tensor, whose fields may be set to what cannot be."""

    storage: tuple
    offset: int
    shape: tuple
    strides: tuple

    def __reduce__(self):
        rebuild = Named("torch._utils", "_rebuild_tensor_v2")
        return rebuild, (self.storage, self.offset, self.shape, self.strides, False, {})


class TorchPickler(pickle._Pickler):
    """Protocol 2, with storages as persistent ids."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def save_pers(self, identity):
        self.save(identity, save_persistent_id=False)
        self.write(pickle.BINPERSID)

    def save(self, value, save_persistent_id=True):
        # Only the tuple itself is an id, and not when it is written as one.
        if not save_persistent_id:
            return self.save_tuple(value)
        return super().save(value)

    def save_named(self, named):
        self.write("c{}\n{}\n".format(*named.path).encode())

    dispatch[Named] = save_named


def torch_pickle(value):
    stream = io.BytesIO()
    TorchPickler(stream, 2).dump(value)
    return stream.getvalue()


def torch_tensor(key, value, *view):
    names = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long"}
    kind = Named("torch", names[value.dtype.str[1:]] + "Storage")
    strides = tuple(stride // value.itemsize for stride in value.strides)
    return Tensor(("storage", kind, key, "cpu", value.size, *view), 0, value.shape, strides)


def zip_pth(path, arrays, order="little", value=None, compression=zipfile.ZIP_STORED):
    tensors = {n: torch_tensor(str(key), v) for key, (n, v) in enumerate(arrays.items())}
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("net/data.pkl", torch_pickle(value or tensors))
        file.writestr("net/byteorder", order)
        for key, array in enumerate(arrays.values()):
            data = array.astype(array.dtype.newbyteorder(order)).tobytes()
            file.writestr(f"net/data/{key}", data)
    return path


def legacy_pth(path, arrays, order="little", value=None):
    tensors = {n: torch_tensor(n.upper(), v, None) for n, v in arrays.items()}
    facts = {"little_endian": order == "little"}
    parts = [0x1950A86A20F9469CFC6C, 1001, facts, value or tensors]
    data = b"".join(map(torch_pickle, [*parts, [name.upper() for name in arrays]]))
    for array in arrays.values():
        data += array.size.to_bytes(8, order)
        data += array.astype(array.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("write", [zip_pth, legacy_pth])
@pytest.mark.usefixtures("no_torch")
def test_pth_without_torch(write, order, trunk, tmp_path):
    net = load(write(tmp_path / "net.pth", trunk, order))
    assert_is_trunk(net, trunk)
    assert (net.config.variant, net.num_classes) == ("torchvision", 1000)
    assert net.label_names == imagenet_labels()


def test_views_and_checkpoints(trunk, tmp_path):
    """Transposed tensors that share a storage, in a checkpoint of a net in `DataParallel`."""
    turned = {name: np.asfortranarray(value) for name, value in trunk.items()}
    tensors = {f"module.{n}": torch_tensor(str(k), v) for k, (n, v) in enumerate(turned.items())}
    raw = {name: value.ravel(order="K") for name, value in turned.items()}
    tensors["module.features.8.bias"].storage = tensors["module.features.10.bias"].storage
    checkpoint = {"epoch": 3, "state_dict": tensors}
    net = load(zip_pth(tmp_path / "net.pth", raw, value=checkpoint))
    assert_is_trunk(net, trunk | {"features.8.bias": trunk["features.10.bias"]})


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
        assert_is_trunk(load(write(tmp_path / f"net{ending}", trunk, value=value)), trunk)
        notes = capsys.readouterr().err
        assert said in notes, what
        assert notes.count("\n") == bool(said), what


def test_objects_beside_the_tensors_are_not_made(trunk, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    tensors = {n: torch_tensor(str(key), v) for key, (n, v) in enumerate(trunk.items())}
    path = zip_pth(tmp_path / "net.pth", trunk, value={"args": Evil(), "state_dict": tensors})
    assert_is_trunk(load(path), trunk)
    assert not (tmp_path / "canary").exists()


def test_formats_are_told_by_content(trunk, net, tmp_path, capsys):
    tensors = {f"_orig_mod.{name}": value for name, value in trunk.items()}
    save_file(tensors, tmp_path / "pytorch_model.bin")
    assert_is_trunk(load(tmp_path / "pytorch_model.bin"), trunk)
    assert "_orig_mod.features.0.bias is read as features.0.bias" in capsys.readouterr().err
    first = set()
    for count in range(0, 256, 8):  # it begins with a length, which may begin as another mark
        safetensors_files.save(
            dataclasses.replace(net, source={"file": count * "x"}), tmp_path / "net.ckpt"
        )
        assert load(tmp_path / "net.ckpt").config == net.config
        first.add((tmp_path / "net.ckpt").read_bytes()[:1])
    assert b"\x80" in first
    with (tmp_path / "net").open("wb") as file:
        np.savez(file, **{"conv1/kernel": np.zeros(1)})
    assert "conv1/bias is missing" in refused(capsys, tmp_path / "net", tmp_path / "x.safetensors")
    caffemodel(tmp_path / "net.bin")
    assert load(tmp_path / "net.bin").config.variant == "caffe"
    capsys.readouterr()
    for start, said in (
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"<!doctype html>", "a web page"),
        (bytes(257) + b"ustar", "a tar archive"),
        (b"other", "expected a .safetensors, a .pth"),
    ):
        (tmp_path / "net.pth").write_bytes(start + bytes(600))
        assert said in refused(capsys, tmp_path / "net.pth", tmp_path / "x.safetensors")


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
    path = caffemodel(tmp_path / "net.caffemodel")
    assert main([str(path), str(tmp_path / "ours.safetensors")]) == 0
    capsys.readouterr()
    argv = (tmp_path / "ours.safetensors", tmp_path / "back.safetensors", "--format", "torchvision")
    assert main([str(word) for word in argv]) == 2
    assert "variant caffe" in capsys.readouterr().err


def test_every_misfit_is_listed(trunk, tmp_path, capsys):
    tensors = dict(trunk)
    del tensors["features.0.bias"]
    tensors["features.3.weight"] = np.zeros((192, 64, 3, 3), np.float32)
    tensors["features.1.running_mean"] = np.zeros(64, np.float32)
    tensors["classifier.6.bias"] = np.zeros(10, np.float32)
    save_file(tensors, tmp_path / "net.safetensors")
    line = refused(capsys, tmp_path / "net.safetensors", tmp_path / "out.safetensors")
    for part in (
        "features.0.bias is missing, expected 64",
        "features.3.weight is 192×64×3×3, expected 192×64×5×5",
        "features.1.running_mean 64 is not expected",
        "classifier.1.weight is missing, expected 4096×9216",
        "classifier.6.weight is missing, expected 10×4096",
    ):
        assert part in line
    assert not (tmp_path / "out.safetensors").exists()


def test_types(trunk, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    for dtype in (np.float16, np.float64, jnp.bfloat16):
        save_file({name: value.astype(dtype) for name, value in trunk.items()}, path)
        net = load(path)
        assert net.params["conv1"]["kernel"].dtype == np.float32
        rounded = {name: value.astype(dtype).astype(np.float32) for name, value in trunk.items()}
        assert_is_trunk(net, rounded)
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
    path = tmp_path / "net.safetensors"
    save_file(trunk | {"features.0.weight": np.zeros((64, 1, 11, 11), np.float32)}, path)
    out = tmp_path / "out.safetensors"
    assert "grey pictures, and does not say" in refused(capsys, path, out)


def test_number_of_classes():
    """A fine-tuned net's last layer says how many there are."""
    zero = np.float32(0)
    dense = {"classifier.1": (4096, 9216), "classifier.4": (4096, 4096), "classifier.6": (7, 4096)}
    shapes = CONVOLUTIONS | dense
    tensors = {f"{k}.weight": np.broadcast_to(zero, v) for k, v in shapes.items()}
    tensors |= {f"{k}.bias": np.broadcast_to(zero, v[:1]) for k, v in shapes.items()}
    params, classes = name_maps.read_params(name_maps.TORCHVISION, tensors, "torchvision", "net")
    assert classes == 7
    assert params["fc8"]["kernel"].shape == (4096, 7)


@pytest.mark.parametrize(
    "layout", [name_maps.TORCHVISION, name_maps.CAFFE, name_maps.CAFFE_TENSORFLOW]
)
@pytest.mark.parametrize("path", ["conv1/kernel", "conv2/kernel", "fc6/kernel", "fc7/kernel"])
def test_layouts_are_inverted(layout, path):
    shape = {"conv1/kernel": (5, 4, 3, 7), "conv2/kernel": (5, 4, 2, 7)}.get(path, (24, 7))
    value = np.random.default_rng(0).standard_normal(shape, np.float32)
    theirs = layout.theirs(path, value, (2, 3, 4))
    assert theirs.shape == layout.their_shape(shape)
    np.testing.assert_array_equal(layout.ours(path, theirs, (2, 3, 4)), value)


def bad_pth(folder, trunk):
    """Files that are refused, and a part of what is said."""
    name, value = "features.0.bias", trunk["features.0.bias"]
    good = torch_tensor("0", value)

    def lying(**changes):
        tensor = dataclasses.replace(good, **changes)
        return zip_pth(folder / "net.pth", {"a": value}, value={"a": tensor})

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
    yield zip_pth(folder / "net.pth", {"a": value}, value={"a": 1}), "it holds no tensors"
    yield zip_pth(folder / "net.pth", {"a": value}, value={"b": good, name: 1}), "is no tensor"
    yield zip_pth(folder / "net.pth", {"a": value}, value=[good]), "no dictionary"
    evil = {"a": Named("posix", "system")}
    for entries in (evil, {name: evil["a"], "b": good}, {"model": evil["a"], "a": 1}, evil["a"]):
        yield zip_pth(folder / "net.pth", {"a": value}, value=entries), "asks for posix.system"
    several = {"teacher": {name: good}, "student": {name: good}}
    yield zip_pth(folder / "net.pth", {"a": value}, value=several), "several nets, teacher, student"
    several = {f"teacher.{name}": good, f"student.{name}": good}
    yield zip_pth(folder / "net.pth", {"a": value}, value=several), "nets, student., teacher."
    twice = {f"module.{name}": good, name: good}
    yield zip_pth(folder / "net.pth", {"a": value}, value=twice), f"it has {name} twice"
    zeros = {"a": np.zeros(10_000, np.float32)}
    deflated = zip_pth(folder / "net.pth", zeros, compression=zipfile.ZIP_DEFLATED)
    yield deflated, "compressed"
    for write in (zip_pth, legacy_pth):
        path = write(folder / "net.pth", trunk)
        path.write_bytes(path.read_bytes()[:-1000])
        yield path, "cannot read"
    changed = bytearray(zip_pth(folder / "net.pth", trunk).read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / "net.pth").write_bytes(changed)
    yield folder / "net.pth", "CRC"


def test_bad_pth(tmp_path, trunk, capsys):
    for path, part in bad_pth(tmp_path, trunk):
        assert part in refused(capsys, path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "suffix", ["pth", "safetensors", "caffemodel", "npy", "npz", "binaryproto"]
)
@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"\x93NUMPY", b"PK\x03\x04", None]
)
def test_no_weights(suffix, content, tmp_path, capsys):
    path = tmp_path / f"net.{suffix}"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert str(path) in refused(capsys, path, tmp_path / "out.safetensors")


def test_flags(trunk, tmp_path, capsys):
    path, out = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
    assert "no weights" in refused(capsys, path, out)
    save_file(trunk, path)
    assert "expected a .safetensors" in refused(capsys, path, tmp_path / "out.pth")
    assert "would be written over" in refused(capsys, path, path)
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


NAMES = imagenet_labels()
NUMBERED = [f"{synset} {name}" for synset, name in zip(imagenet_synsets(), NAMES, strict=True)]
WORDS = [f"{line}, other word" for line in NUMBERED]


LISTS = {
    "CRLF": ("\r\n".join(NAMES) + "\r\n", NAMES),
    "blank lines at the end": ("\ufeff" + "\n".join(NAMES) + "\n \n\n", NAMES),
    "synset_words.txt of Caffe": ("\n".join(WORDS), WORDS),
    "synsets": ("\n".join(imagenet_synsets()), imagenet_synsets()),
    "JSON": (json.dumps(NAMES), NAMES),
    "imagenet_class_index.json of Keras": (
        json.dumps({str(i): line.split(" ", 1) for i, line in enumerate(NUMBERED)}),
        NUMBERED,
    ),
    "JSON by numbers": (json.dumps(dict(sorted((str(i), n) for i, n in enumerate(NAMES)))), NAMES),
    "Python": ("{" + ",\n ".join(f"{i}: {n!r}" for i, n in enumerate(NAMES)) + "}", NAMES),
    "numbered lines": ("".join(f"{i}: '{n}',\n" for i, n in enumerate(NAMES)), NAMES),
}


@pytest.mark.parametrize(("text", "expected"), LISTS.values(), ids=LISTS)
def test_lists_of_labels_as_people_have_them(tmp_path, text, expected):
    """And folders of some of ImageNet's classes match all of them by WordNet's numbers."""
    (tmp_path / "labels").write_bytes(text.encode())
    names = read_labels(tmp_path / "labels", 1000)
    assert names == tuple(expected)
    labels, matched = match_labels(["n02007558", "n01440764"], names, 1000)
    assert (labels.tolist(), matched) == ([130, 0], True)


def test_classes_of_one_name_are_told_apart_by_their_numbers(tmp_path):
    (tmp_path / "labels").write_text("\n".join(name.split(" (")[0] for name in NAMES))
    names = read_labels(tmp_path / "labels", 1000)
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert len(set(names)) == 1000
    assert match_labels(["n03126707", "n01440764"], names, 1000)[0].tolist() == [517, 0]


def test_imagenets_classes_in_another_order_are_known_by_their_own_numbers():
    numbered = [f"{s} {n}" for s, n in zip(imagenet_synsets(), imagenet_labels(), strict=True)]
    names = numbered[:700] + numbered[:699:-1]  # most of them in their places
    labels, matched = match_labels(imagenet_synsets(), names, 1000)
    assert matched
    assert [names[label] for label in labels] == numbered
    bare = list(imagenet_labels()[:700] + imagenet_labels()[:699:-1])
    with pytest.raises(UserError, match="1000 of the dataset's 1000 classes are not among"):
        match_labels([*imagenet_synsets()[:-1], "n99999999"], bare, 1001)
    assert not match_labels(imagenet_synsets(), bare, 1000)[1]


def test_a_damaged_zip_is_said_in_a_line(tmp_path):
    path = tmp_path / "net.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for place in range(directory, len(whole)):
        for value in (0, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with pytest.raises(UserError):
                load(path)
    (tmp_path / "labels").write_text("a\nb\na")
    with pytest.raises(UserError, match="the name 'a' twice"):
        read_labels(tmp_path / "labels", 3)


def test_heads(trunk, tmp_path, capsys):
    path, out = tmp_path / "net.safetensors", tmp_path / "out.safetensors"
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


def test_real_trunk(shared_data, tmp_path):
    """Torchvision's trained convolutions with LPIPS heads, from another project's `.npz`."""
    path = shared_data / "alexnet_owt" / "features_and_lpips.npz"
    assert main([str(path), str(tmp_path / "out.safetensors")]) == 0
    net = load(tmp_path / "out.safetensors")
    with np.load(path) as arrays:
        for name in arrays.files:
            layer, _, part = name.partition("/")
            ours = net.params[layer][part] if part else net.lpips_heads[layer]
            np.testing.assert_array_equal(ours, arrays[name])


def test_digests(tmp_path):
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    path.write_bytes(b"other")
    digits = sha256(path)
    assert digits == hashlib.sha256(b"other").hexdigest()
    assert "expected 7be5be79" in digests.mismatch(path, digits)
    right = path.rename(tmp_path / f"alexnet-owt-{digits[:8]}.pth")
    assert digests.mismatch(right, digits) is None
    caffe = right.rename(tmp_path / "bvlc_alexnet.caffemodel")
    line = digests.mismatch(caffe, digits)
    assert hashlib.sha1(b"other").hexdigest() in line
    assert "9116a64c0fbe4459d18f4bb6b56d647b63920377" in line
    assert digests.mismatch(caffe.rename(tmp_path / "my.caffemodel"), digits) is None


def test_wrong_digest_is_said(trunk, tmp_path, capsys):
    load(zip_pth(tmp_path / "alexnet-owt-7be5be79.pth", trunk))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: alexnet-owt-7be5be79.pth")


def test_labels(shared_data):
    names, synsets = imagenet_labels(), imagenet_synsets()
    assert len({name.lower() for name in names}) == len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    known = {0: "tench", 134: "crane (bird)", 281: "tabby", 517: "crane (machine)"}
    assert {label: names[label] for label in known} == known
    by_synset = dict(zip(synsets, names, strict=True))
    for picture in (shared_data / "imagenet_samples").glob("*.JPEG"):
        synset, _, name = picture.stem.partition("_")
        words = name.replace("_", " ").lower()
        assert by_synset[synset].replace("'", "").lower().startswith(words.replace("'", ""))


# Caffe, written field by field as the format has it: (number, payload) pairs.


def varint(number):
    digits = b""
    while number > 127:
        digits += bytes([number % 128 + 128])
        number //= 128
    return digits + bytes([number])


def message(*fields):
    """Each field is (number, value): a whole number, or bytes, whose length is written first."""
    result = b""
    for number, value in fields:
        if isinstance(value, int):
            result += varint(number << 3) + varint(value)
        else:
            result += varint(number << 3 | 2) + varint(len(value)) + value
    return result


def blob(value, old=True):
    numbers = (5, value.astype("<f4").tobytes())
    if old:
        sides = (1,) * (4 - value.ndim) + value.shape
        return message(*enumerate(sides, 1), numbers)
    return message((7, message((1, b"".join(map(varint, value.shape))))), numbers)


CAFFE_SHAPES = {
    "conv1": (96, 3, 11, 11),
    "conv2": (256, 48, 5, 5),
    "conv3": (384, 256, 3, 3),
    "conv4": (384, 192, 3, 3),
    "conv5": (256, 192, 3, 3),
}
KINDS = {
    "new": {"conv": b"Convolution", "norm": b"LRN", "pool": b"Pooling"},
    "v1": {"conv": 4, "norm": 15, "pool": 17},
    "v0": {"conv": b"conv", "norm": b"lrn", "pool": b"pool"},
}


def caffemodel(path, generation="v1", order=("norm1", "pool1"), values=None, name=b"net"):
    """A trunk of Caffe's, in one of its three generations."""
    rng = np.random.default_rng(0)
    values = values or {}
    layers = []
    for layer in ("conv1", *order, "conv2", "conv3", "conv4", "conv5"):
        kind, title = KINDS[generation][layer[:4]], layer.encode()
        blobs = []
        if layer in CAFFE_SHAPES:
            shape = CAFFE_SHAPES[layer]
            kernel = values.get(layer, rng.standard_normal(shape, np.float32))
            blobs = [
                blob(kernel, generation != "new"),
                blob(kernel[:, 0, 0, 0], generation != "new"),
            ]
        if generation == "new":
            layers.append((100, message((1, title), (2, kind), *((7, b) for b in blobs))))
        elif generation == "v1":
            layers.append((2, message((4, title), (5, kind), *((6, b) for b in blobs))))
        else:
            old = message((1, title), (2, kind), *((50, b) for b in blobs))
            layers.append((2, message((1, old))))
    path.write_bytes(message((1, name), *layers))
    return path


@pytest.mark.parametrize("generation", KINDS)
def test_caffe_variants(generation, tmp_path, capsys):
    path = tmp_path / "net.caffemodel"
    first = load(caffemodel(path, generation))
    assert first.config.variant == "caffe"
    rule = first.preprocessing
    assert (rule.image_size, rule.resize, rule.crop_size, rule.scale) == (256, "caffe", 227, 1.0)
    np.testing.assert_allclose(rule.mean, [122.67891434, 116.66876762, 104.00698793])
    assert "BGR 104.007 116.669 122.679" in capsys.readouterr().err
    second = load(caffemodel(path, generation, ("pool1", "norm1")))
    assert second.config.variant == "caffenet"
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert load(caffemodel(path, generation, (), name=b"CaffeNet")).config.variant == "caffenet"
    caffemodel(path, generation, ())
    with pytest.raises(UserError, match="--variant caffe or caffenet"):
        load(path)
    assert read(path, "caffenet")[0].config.variant == "caffenet"
    with pytest.raises(UserError, match="did you mean 'caffenet'"):
        read(path, "cafenet")


def test_mean_image(tmp_path):
    """BGR, (c, h, w) becomes RGB, (h, w, c)."""
    path = caffemodel(tmp_path / "net.caffemodel")
    bgr = np.random.default_rng(0).random((3, 256, 256), np.float32)
    mean = tmp_path / "mean.binaryproto"
    mean.write_bytes(blob(bgr))
    net, notes = read(path, mean=mean)
    assert notes == []
    for channel in range(3):
        np.testing.assert_array_equal(net.preprocessing.mean[..., channel], bgr[2 - channel])
    mean.write_bytes(blob(bgr[:, :1, :1]))
    np.testing.assert_array_equal(read(path, mean=mean)[0].preprocessing.mean, bgr[::-1, 0, 0])
    for wrong in (bgr[:, :, :255], bgr[:, :200, :200], bgr[:2]):
        mean.write_bytes(blob(wrong))
        with pytest.raises(UserError, match="expected"):
            read(path, mean=mean)


def test_caffe_kernels(tmp_path):
    """Kernels of groups keep their order; only those of conv1 are turned from BGR to RGB."""
    rng = np.random.default_rng(1)
    values = {k: rng.standard_normal(shape, np.float32) for k, shape in CAFFE_SHAPES.items()}
    net = load(caffemodel(tmp_path / "net.caffemodel", values=values))
    for out, channel in ((0, 0), (95, 1), (17, 2)):
        ours = net.params["conv1"]["kernel"][:, :, channel, out]
        np.testing.assert_array_equal(ours, values["conv1"][out, 2 - channel])
    np.testing.assert_array_equal(
        net.params["conv2"]["kernel"][4, 3, 7, 200], values["conv2"][200, 7, 4, 3]
    )


def test_bad_caffemodel(tmp_path, capsys):
    path, out = tmp_path / "net.caffemodel", tmp_path / "out.safetensors"
    whole = caffemodel(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in refused(capsys, path, out)
    lying = message((1, 2**40), (2, 2**40), (3, 1), (4, 1), (5, b"1234"))
    path.write_bytes(message((100, message((1, b"conv1"), (7, lying)))))
    assert "has 1 numbers" in refused(capsys, path, out)
    path.write_bytes(message((1, b"CaffeNet")))
    assert "no weights" in refused(capsys, path, out)
    path.write_bytes(message(*[(100, b"")] * 20_000))
    assert "more than 10,000 layers" in refused(capsys, path, out)
    values = {"conv1": np.zeros((96, 3, 7, 7), np.float32)}
    line = refused(capsys, caffemodel(path, values=values), out)
    assert "conv1.blobs[0] is 96×3×7×7, expected 96×3×11×11" in line


def dense_tensors(layout, **shapes):
    """Layers of zeros by their names and shapes, (out, in), which take no memory."""
    kernel, bias = (layout.names[f"fc8/{part}"].removeprefix("fc8") for part in ("kernel", "bias"))
    result = {}
    for name, shape in shapes.items():
        sides = shape if layout.channels_first else shape[::-1]
        result[name + kernel] = np.broadcast_to(np.float32(0), sides)
        result[name + bias] = np.broadcast_to(np.float32(0), shape[:1])
    return result


FC6, FC7 = (4096, 9216), (4096, 4096)


@pytest.mark.parametrize("layout", [name_maps.CAFFE, name_maps.CAFFE_TENSORFLOW])
@pytest.mark.parametrize(
    ("shapes", "head", "classes", "said"),
    [
        ({"fc6": FC6, "fc7": FC7, "fc8": (5, 4096)}, None, 5, []),
        ({"fc6": FC6, "fc7": FC7}, None, None, []),
        ({"fc6": FC6, "fc7": FC7, "fc9": (5, 4096)}, None, 5, ["fc9 is taken for the last layer"]),
        ({"score": (4096, 4096), "fc7": FC7}, None, 4096, ["score is taken for the last layer"]),
        (
            {"a": FC6, "b": FC7, "c": (5, 4096)},
            None,
            5,
            ["a is taken for fc6", "b is taken for fc7", "c is taken for the last layer"],
        ),
        (
            {"fc7": FC7, "fc8": (5, 4096), "aux": (7, 4096)},
            "aux",
            7,
            ["aux is taken for the last layer", "fc8 is left out"],
        ),
        ({"fc7": FC7, "fc8": (5, 4096), "aux": (7, 4096)}, "fc8", 5, ["aux is left out"]),
        ({"b": FC7, "c": (4096, 4096)}, "c", 4096, ["b is taken for fc7"]),
    ],
)
def test_fine_tuned_caffe(layout, shapes, head, classes, said):
    """Their last layer bears another name, and others may, lest Caffe fill it from the file."""
    tensors, notes = name_maps.name_dense(layout, dense_tensors(layout, **shapes), "net", head)
    expected = {"fc8": (classes, 4096)} if classes else {}
    expected |= {"fc6": FC6} if FC6 in shapes.values() else {}
    expected |= {"fc7": FC7}
    found = dense_tensors(layout, **expected)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in found.items()}
    assert all(part in notes[0] for part in said)
    assert bool(notes) == bool(said)


@pytest.mark.parametrize(
    ("shapes", "head", "said"),
    [
        ({"fc8": (5, 4096), "aux": (7, 4096)}, None, "several last layers, fc8, aux: choose one"),
        ({"score": (5, 4096), "aux": (7, 4096)}, None, "several last layers, score, aux: choose"),
        ({"b": FC7, "c": (4096, 4096)}, None, "several last layers, b, c: choose"),
        ({"fc8": (5, 4096), "aux": (7, 4096)}, "au", "unknown last layer 'au': did you mean 'aux'"),
    ],
)
def test_several_last_layers_of_caffe(shapes, head, said):
    with pytest.raises(UserError, match=said):
        name_maps.name_dense(name_maps.CAFFE, dense_tensors(name_maps.CAFFE, **shapes), "net", head)


def test_layers_of_caffe_that_fit_nowhere_are_named(tmp_path, capsys):
    path, out = tmp_path / "net.caffemodel", tmp_path / "out.safetensors"
    whole = caffemodel(path).read_bytes()
    extra = message((1, b"extra"), (7, blob(np.zeros((5, 9), np.float32))))
    path.write_bytes(whole + message((100, extra)))
    assert "extra.blobs[0] 5×9 is not expected" in refused(capsys, path, out)
    path.write_bytes(whole + message((100, extra), (100, extra)))
    assert "it has extra.blobs[0] twice" in refused(capsys, path, out)
    caffemodel(path)
    assert "unknown last layer 'extra'" in refused(capsys, path, out, "--head", "extra")
    with pytest.raises(UserError, match="unknown last layer 'score'"):
        load(path, head="score")


def test_grey_caffe(tmp_path):
    """Grey is made of colours as OpenCV does, so a net of grey pictures sees what it was fed."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((96, 1, 11, 11), np.float32)
    path, mean = caffemodel(tmp_path / "net", values={"conv1": kernel}), tmp_path / "mean"
    image = rng.uniform(100, 150, (1, 256, 256)).astype(np.float32)
    mean.write_bytes(blob(image))
    net, (note,) = read(path, mean=mean)
    assert "it reads grey pictures" in note
    pictures = rng.integers(0, 256, (1, 256, 256, 3), np.uint8)
    ours = features(net.model, net.params, net.preprocess(pictures), ["conv1"])["conv1"]
    grey = pictures @ np.array([0.299, 0.587, 0.114]) - image
    expected = jax.lax.conv_general_dilated(
        jnp.asarray(grey[:, None, 14:241, 14:241], jnp.float32), kernel, (4, 4), "VALID"
    )
    expected = np.asarray(expected).transpose(0, 2, 3, 1) + net.params["conv1"]["bias"]
    np.testing.assert_allclose(ours, np.maximum(expected, 0), atol=1e-5 * abs(expected).max())
    with pytest.raises(UserError, match="has 1 channels, but the net reads 3"):
        read(caffemodel(tmp_path / "net"), mean=mean)


# The bugs of the demo beside the pretrained weights of guerzh/tf_weights.


def test_demo_padding(tmp_path):
    """It convolves with SAME, where the net was trained with VALID: 57 × 57 and not 55 × 55."""
    net = load(caffemodel(tmp_path / "net.caffemodel"))
    images = np.zeros((1, 256, 256, 3), np.uint8)
    outputs = jax.eval_shape(
        lambda x: features(net.model, net.params, net.preprocess(x), ["conv1", "conv5"]), images
    )
    assert outputs["conv1"].shape == (1, 55, 55, 96)
    assert outputs["conv5"].shape == (1, 13, 13, 256)


def test_demo_red(tmp_path):
    """It swaps red and blue by assigning views, so that blue is there twice and red is lost."""
    kernel = np.zeros(CAFFE_SHAPES["conv1"], np.float32)
    kernel[range(3), range(3), 0, 0] = 1  # units 0, 1, 2 see blue, green, red, as Caffe has them
    net = load(caffemodel(tmp_path / "net.caffemodel", values={"conv1": kernel}))
    picture = np.broadcast_to(np.array([200, 150, 130], np.uint8), (1, 256, 256, 3))  # RGB
    seen = features(net.model, net.params, net.preprocess(picture), ["conv1"])["conv1"]
    blue, green, red = seen[0, 20, 20, :3] - net.params["conv1"]["bias"][:3]
    np.testing.assert_allclose([red, green, blue], [200, 150, 130] - CAFFE.mean, rtol=1e-5)


def test_demo_mean(tmp_path):
    """It subtracts the mean from its first picture only."""
    net = load(caffemodel(tmp_path / "net.caffemodel"))
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    first, second = np.asarray(net.preprocess(np.stack([picture, picture])))
    np.testing.assert_array_equal(first, second)
    inside = picture[14:241, 14:241].astype(np.float32)
    np.testing.assert_allclose(second, inside - CAFFE.mean, rtol=1e-6)


# NumPy's files.


def test_npz_sizes(tmp_path, capsys):
    """A header that asks for more than is there, and one of objects."""
    path = tmp_path / "net.npz"
    giant = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**50,)}
    np.lib.format.write_array_header_1_0(giant, header)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("conv1/kernel.npy", giant.getvalue())
    assert "not as long as it says" in refused(capsys, path, tmp_path / "out.safetensors")
    np.savez(path, a=np.array([{}], object))
    assert "no array of numbers" in refused(capsys, path, tmp_path / "out.safetensors")


def test_npy(tmp_path, capsys):
    path, out = tmp_path / "net.npy", tmp_path / "out.safetensors"
    rng = np.random.default_rng(0)
    layers = {
        name: [rng.standard_normal((h, w, i, o), np.float32), rng.random(o, np.float32)]
        for name, (o, i, h, w) in CAFFE_SHAPES.items()
    }
    np.save(path, layers, allow_pickle=True)
    net = load(path)
    assert net.config.variant == "caffe"
    kernel, bias = layers["conv1"]
    np.testing.assert_array_equal(net.params["conv1"]["kernel"], kernel[:, :, ::-1])
    np.testing.assert_array_equal(net.params["conv5"]["kernel"], layers["conv5"][0])
    np.testing.assert_array_equal(net.params["conv1"]["bias"], bias)
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


# Kernels on their side. Random values do not tell, where those that are expected are turned too.


def upright(shape, rows):
    """Kernels of 1 above their middle row and -1 below it; `rows` is the axis of rows."""
    values = np.sign((shape[rows] - 1) / 2 - np.arange(shape[rows]))
    values = values.reshape([-1 if axis == rows else 1 for axis in range(4)])
    return np.ascontiguousarray(np.broadcast_to(values, shape), np.float32)


def upright_file(kind, folder):
    """A trunk of such kernels, in a file of each system: (out, in, h, w) or (h, w, in, out)."""
    path = folder / f"net.{kind.partition(' ')[0]}"
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


@pytest.mark.parametrize(
    "kind", ["pth", "pth of old", "safetensors", "npz", "npy", *(f"caffemodel {g}" for g in KINDS)]
)
def test_kernels_stand_upright(kind, tmp_path):
    """They see where a picture is bright above and dark below; not it turned, nor it flipped."""
    net = load(upright_file(kind, tmp_path))
    edge = np.zeros((256, 256, 3), np.uint8)
    edge[:128] = 255
    images = net.preprocess(np.stack([edge, edge.swapaxes(0, 1), edge[::-1]]))
    seen = features(net.model, net.params, images, ["conv1"])["conv1"]
    above, turned, flipped = np.asarray(seen[:, 2:-2, 2:-2].max((1, 2, 3)))  # but for the border
    assert above > 500
    assert max(turned, flipped) < 2
    for layer in CAFFE_SHAPES:
        kernel = net.params[layer]["kernel"]
        np.testing.assert_array_equal(kernel, upright(kernel.shape, 0))
