"""Numerics at the edges: what is trained, and what is refused in a line."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from flax_alexnet.config.recipes import parse_config
from flax_alexnet.utils.errors import UserError


def train(*flags, **environment):
    command = [sys.executable, "-m", "flax_alexnet.train", *map(str, flags)]
    own = os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=own)


@pytest.fixture
def flags(tmp_path):
    """Of a run on one image of each class, in batches of one, with a feature a layer."""
    for split in ("train", "validation"):
        for number, name in enumerate("ab"):
            (tmp_path / "two" / split / name).mkdir(parents=True)
            image = Image.new("RGB", (72, 72), (90 * number, 60, 200))
            image.save(tmp_path / "two" / split / name / "0.png")
    return [
        *("--workdir", tmp_path / "run", "--data.name", f"folder:{tmp_path / 'two'}"),
        *("--batch-size", "1", "--epochs", "100", "--model.width", "0.001"),
        *("--optimizer.momentum", "0", "--no-compilation-cache", "--eval-epochs", "100"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x64", ["0", "1"])
def test_the_least_run_trains_and_goes_on_under_the_same_settings_alone(
    tmp_path, flags, dtype, x64
):
    settings, flags = {"JAX_ENABLE_X64": x64}, [*flags, "--model.dtype", dtype]
    for steps in (2, 4):
        done = train(*flags, "--steps", steps, **settings)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["step"] == steps
        assert summary["eval_loss"] == pytest.approx(0.69, abs=0.1)
    done = train(*flags, "--steps", 6, JAX_ENABLE_X64=str(1 - int(x64)))
    assert done.returncode == 2
    assert "(jax.enable_x64 was " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_one_image_is_learnt(tmp_path, data_dir):
    flags = ["--workdir", tmp_path / "run", "--data.data-dir", data_dir]
    flags += ["--data.train-split", "train[:1]", "--batch-size", 1, "--model.width", 0.1]
    done = train(*flags, "--eval-epochs", 24, "--no-compilation-cache")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["train_loss"] for line in map(json.loads, lines) if "train_loss" in line]
    assert len(losses) == 24  # epochs, of a step each
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_another_number_of_devices_goes_on(tmp_path, flags):
    more = ["--batch-size", "2"]
    for steps, devices in ((2, "1"), (4, "2"), (6, "1")):
        done = train(*flags, *more, "--steps", steps, JAX_NUM_CPU_DEVICES=devices)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["step"], summary["devices"]) == (steps, int(devices))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--optimizer.learning-rate", "0"), ("--model.num-classes", "1"), ("--model.width", "0")),
        ("--eval-epochs", "1e-320"),
    ],
)
def test_what_trains_nothing_is_refused(flag, value):
    with pytest.raises(UserError, match=f"{flag} is {value}.*; expected"):
        parse_config([flag, value])
