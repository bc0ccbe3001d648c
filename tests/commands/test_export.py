"""StableHLO programs, and what `python -m flax_alexnet export` says of mistakes.

ONNX and SavedModel take packages of their own: tests/parity/test_exported_programs.py.
"""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from flax_alexnet.commands import export
from flax_alexnet.models.architectures import ARCHITECTURES
from flax_alexnet.ops import onednn
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import safetensors_files
from tests.small_models import random_images, small_pretrained


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors_files.save(small_pretrained("cuda_convnet_19pct"), path)
    return path


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=() if variant in ("paper", "torchvision") else pytest.mark.slow)
        for variant in ARCHITECTURES
    ],
)
def test_stablehlo_gives_what_the_model_gives(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(onednn, "_passed", lambda: False)  # no program for others has it
    pretrained = small_pretrained(variant)
    path = tmp_path / "model.stablehlo"
    write, _ = export.FORMATS["stablehlo"]
    write(pretrained, "logits", path)
    images = random_images(pretrained, 2)
    logits = jax.jit(
        lambda x: pretrained.model.apply({"params": pretrained.params}, pretrained.preprocess(x))
    )(images)
    program = export.load_exported(path)
    if variant == "cuda_convnet_18pct":
        # The exported program has a branch for the average pooling of each platform. Without it,
        # XLA fuses the pooling with the normalization that follows, and rounds at other places.
        np.testing.assert_allclose(program(images), logits, rtol=2e-6)
    else:
        np.testing.assert_array_equal(program(images), logits)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_a_program_needs_nothing_of_this_package(tmp_path):
    pretrained = small_pretrained("cuda_convnet_19pct", dtype="bfloat16")
    export.export(pretrained, tmp_path / "model.stablehlo", layer="conv2")
    images = random_images(pretrained, 2)
    np.save(tmp_path / "images.npy", images)
    code = """if True:
        import sys, jax, jax.export, numpy as np
        program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
        np.save("features.npy", program.call(np.load("images.npy")))
        assert "flax_alexnet" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    full = dataclasses.replace(
        pretrained, config=dataclasses.replace(pretrained.config, dtype="float32")
    )
    expected = full.model.apply(
        {"params": pretrained.params}, pretrained.preprocess(images), last="conv2"
    )
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, rtol=1e-5, atol=1e-6)


def test_the_command_writes_a_trunk_up_to_a_layer(weights, tmp_path, capsys):
    pretrained = safetensors_files.read(weights)
    trunk = dataclasses.replace(
        pretrained, params={k: v for k, v in pretrained.params.items() if k != "fc10"}
    )
    safetensors_files.save(trunk, tmp_path / "trunk.safetensors")
    arguments = [str(tmp_path / "trunk.safetensors"), str(tmp_path / "new" / "trunk.stablehlo")]
    assert export.main([*arguments, "--layer", "pool1"]) == 0
    assert "uint8[b, 23, 23, 3] to pool1, float32[b, 9, 9, 6]" in capsys.readouterr().out
    assert export.main([*arguments, "--overwrite"]) == 2
    assert "has no fc10" in capsys.readouterr().err


def test_a_program_that_is_wrong_is_not_left_behind(tmp_path, monkeypatch):
    pretrained = small_pretrained("cuda_convnet_19pct")
    path = tmp_path / "model.stablehlo"
    path.write_text("an older one")
    right = export.FORMATS["stablehlo"][0]

    def wrong(*arguments):
        program = right(*arguments)
        return lambda images: program(images) * 1.01

    monkeypatch.setitem(export.FORMATS, "stablehlo", (wrong, ""))
    with pytest.raises(UserError, match="was not written"):
        export.export(pretrained, path)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "an older one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{weights}"], "Missing from flax_alexnet export"),
        (["{weights}", "model.zip"], "unknown ending '.zip'"),
        (["{weights}", "model.onnx", "--format", "zip"], "invalid choice 'zip'"),
        (["{weights}", "model.stablehlo", "--layer", "conv9"], "did you mean 'conv"),
        (["{weights}", "model.stablehlo", "--layers", "conv1"], "did you mean --layer?"),
        (["{weights}", "folder"], "it is a folder; take another path"),
        (["{weights}", "file/model.stablehlo"], "cannot write file/model.stablehlo"),
        (["nowhere.safetensors", "model.onnx"], "no weights nowhere.safetensors"),
    ],
)
def test_mistakes_get_one_line(arguments, message, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert export.main([word.format(weights=weights) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize(
    ("package", "output", "extra"),
    [("onnx", "model.onnx", "onnx"), ("tensorflow", "model", "prepare")],
)
def test_a_package_that_is_missing(package, output, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        export.export(small_pretrained("cuda_convnet_19pct"), tmp_path / output)
    assert f"needs the package {package}: pip install 'flax-alexnet[{extra}]'" in str(caught.value)


def test_a_damaged_program(tmp_path):
    path = tmp_path / "model.stablehlo"
    export.export(small_pretrained("cuda_convnet_19pct"), path, layer="conv1")
    for data in (b"", path.read_bytes()[:1000], b"no program at all, but a text that is longer"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no exported StableHLO program"):
            export.load_exported(path)


def test_importing_leaves_the_optional_packages_alone():
    code = """if True:
        import sys, flax_alexnet.commands.export, flax_alexnet.commands.hub
        print({"tensorflow", "torch", "onnx", "onnxruntime"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
