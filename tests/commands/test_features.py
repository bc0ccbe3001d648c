"""`features`: one file, which goes on where it was killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from flax_alexnet.commands import features
from flax_alexnet.inference.feature_file import READ, FeatureFile
from flax_alexnet.weights import safetensors_files
from tests.images import image_files
from tests.small_models import make_pretrained


def test_features_that_are_not_finite_are_said(huge, photographs, tmp_path, capsys):
    """Their rows tell them from those of images that could not be read."""
    (tmp_path / "bad.png").write_bytes(b"bad")
    output = tmp_path / "features.npy"
    flags = ["--output", str(output), "--batch-size", "8"]
    assert features.main([str(huge), str(photographs), str(tmp_path / "bad.png"), *flags]) == 0
    said = capsys.readouterr()
    assert "warning: the model gives what is not a finite number for 12 images (the" in said.err
    assert "12 of 13 images read" in said.out
    assert (column(output, "status") == READ).sum() == 12


def column(path, name):
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")[name]
    with h5py.File(path) as file:
        return file[name][:]


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
def test_features_of_a_folder_are_in_one_file(pretrained, weights, photographs, tmp_path, suffix):
    (tmp_path / "bad.png").write_bytes(b"bad")
    output = tmp_path / f"features{suffix}"
    flags = ["--layers", "conv5", "fc7", "--output", str(output), "--batch-size", "8"]
    assert features.main([str(weights), str(tmp_path / "bad.png"), str(photographs), *flags]) == 0
    files = image_files(photographs)
    names = [name.decode() for name in column(output, "name")]
    assert names == [str(tmp_path / "bad.png"), *map(str, files)]
    assert column(output, "status").tolist() == [2] + [1] * 12
    assert column(output, "problem")[0] == b"it is no image in a known format"
    images = pretrained.preprocess(np.stack([pretrained.open(file) for file in files]))
    _, state = pretrained.model.apply(
        {"params": pretrained.params}, images, mutable=["intermediates"]
    )
    for layer in ("conv5", "fc7"):
        values = column(output, layer)
        assert np.isnan(values[0]).all()
        expected = state["intermediates"][layer]
        assert values[1:].shape == expected.shape
        np.testing.assert_allclose(values[1:], expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_dataset_have_labels(weights, photographs, tmp_path):
    output = tmp_path / "features.h5"
    flags = ["--data.name", f"folder:{photographs}", "--data.split", "train"]
    assert features.main([str(weights), *flags, "--output", str(output)]) == 0
    assert column(output, "label").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
def test_features_go_on_where_they_were_killed(weights, photographs, tmp_path, suffix):
    """Killed in the second batch, when its values are written, but not yet that they are there."""
    whole, killed = (tmp_path / f"{name}{suffix}" for name in ("whole", "killed"))
    flags = ["--batch-size", "8", "--layers", "fc7", "conv1"]
    assert features.main([str(weights), str(photographs), *flags, "--output", str(whole)]) == 0
    program = """
import sys, time
from flax_alexnet.inference.feature_file import FeatureFile
from flax_alexnet.commands.features import main

put, calls = FeatureFile._put, []

def slow_put(self, rows, values):
    calls.append(rows)
    if len(calls) == 4:
        print("written", flush=True)
        time.sleep(60)
    put(self, rows, values)

FeatureFile._put = slow_put
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, str(weights), str(photographs), *flags]
    with subprocess.Popen([*command, "--output", str(killed)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert column(killed, "status").tolist() == [1] * 8 + [0] * 4
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        original = FeatureFile.write
        patch.setattr(FeatureFile, "write", lambda *a: (seen.append(a[1]), original(*a)))
        assert features.main([str(weights), str(photographs), *flags, "--output", str(killed)]) == 0
    assert seen == [[8, 9, 10, 11]]
    for name in ("name", "label", "status", "fc7", "conv1"):
        np.testing.assert_array_equal(column(killed, name), column(whole, name))


def test_images_that_have_changed_or_could_not_be_read_are_tried_again(
    weights, photographs, tmp_path, capsys
):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    files = image_files(folder)
    whole = files[5].read_bytes()
    files[5].write_bytes(b"bad")
    flags = [str(weights), str(folder), "--layers", "fc7", "--output"]
    output, fresh = str(tmp_path / "features.h5"), str(tmp_path / "fresh.h5")
    assert features.main([*flags, output]) == 0
    files[5].write_bytes(whole)
    files[2].write_bytes(files[9].read_bytes())
    capsys.readouterr()
    assert features.main([*flags, output]) == 0
    said = capsys.readouterr().out
    assert "1 images have changed since they were read, and are read again" in said
    assert "fc7 of 12 images (10 were there)" in said
    assert features.main([*flags, fresh]) == 0
    assert Path(output).read_bytes() == Path(fresh).read_bytes()
    values = column(Path(output), "fc7")
    np.testing.assert_array_equal(values[2], values[9])
    assert np.isfinite(values[5]).all()


def test_images_of_any_time_have_features(weights, photographs, tmp_path, capsys):
    """A stamp has 64 bits, which end with the year 2262."""
    image = tmp_path / "a.png"
    shutil.copy(photographs / "class a" / "0.png", image)
    for seconds in (-(2**31), 2**34):
        os.utime(image, (seconds, seconds))
        flags = ["--output", str(tmp_path / f"{seconds}.npy")]
        for _ in range(2):
            assert features.main([str(weights), str(image), *flags]) == 0
        assert "(1 were there)" in capsys.readouterr().out


def test_a_file_of_other_features_is_left_alone(weights, photographs, tmp_path, capsys):
    output = tmp_path / "features.npy"
    flags = ["--layers", "fc7", "--output", str(output)]
    assert features.main([str(weights), str(photographs), *flags]) == 0
    before = output.read_bytes()
    safetensors_files.save(make_pretrained(seed=3), tmp_path / "other.safetensors")
    for weights_of, where, more, says in (
        (tmp_path / "other.safetensors", photographs, [], "of another model"),
        (weights, photographs / "class a", [], "other columns or rows"),
        (weights, photographs, ["--layers", "fc6"], "other columns or rows"),
        (weights, photographs, ["--layers", "fc9"], "did you mean 'fc"),
        (weights, photographs, ["--queries", "nobody"], "0 images have names"),
    ):
        assert features.main([str(weights_of), str(where), *flags, *more]) == 2
        assert says in capsys.readouterr().err
    assert output.read_bytes() == before


def test_fewer_layers_do_not_go_on_in_a_file_of_more(weights, photographs, tmp_path, capsys):
    output = tmp_path / "features.h5"
    flags = [str(weights), str(photographs), "--output", str(output), "--layers"]
    assert features.main([*flags, "conv1", "fc7"]) == 0
    assert features.main([*flags, "fc7"]) == 2
    assert "it has other columns" in capsys.readouterr().err


def test_a_file_that_was_cut_off_is_not_mended(weights, photographs, tmp_path, capsys):
    output = tmp_path / "features.npy"
    flags = [str(weights), str(photographs), "--output", str(output)]
    assert features.main(flags) == 0
    output.write_bytes(output.read_bytes()[:-9])
    before = output.read_bytes()
    assert features.main(flags) == 2
    assert "cannot use" in capsys.readouterr().err
    assert output.read_bytes() == before
