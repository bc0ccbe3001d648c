"""A run whose disk is full for a while, and then read-only: it says so, and ends as any other."""

import json
import os
import subprocess
import sys

import pytest
from tensorboardX.proto import event_pb2

from flax_alexnet.errors import UserError
from flax_alexnet.train import keep_trying

# Trains twice: undisturbed, and in a small file system of its own that is full from step 8 to 20
# (where the system permits none, that is made up where files are written) and, made up so,
# read-only from step 26 to 32.
DRIVER = """
import contextlib, errno, os, shutil, subprocess, sys, time
from pathlib import Path
from flax_alexnet import reporting, train

where, *flags = sys.argv[1:]
usual, small = Path(where) / "usual", Path(where) / "small"
assert train.main(["--workdir", str(usual), *flags]) == 0

small.mkdir()
mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(small)]
permitted = subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
filling = small / "filling"

def fill():
    with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with filling.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))

def inject(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))
    reporting.Lines.flush = reporting.Events.flush = shutil.disk_usage = fail

def undo(usual=(reporting.Lines.flush, reporting.Events.flush, shutil.disk_usage)):
    reporting.Lines.flush, reporting.Events.flush, shutil.disk_usage = usual

plan = {8: lambda: inject(errno.ENOSPC), 20: undo, 26: lambda: inject(errno.EROFS), 32: undo}
if permitted:
    plan |= {8: fill, 20: filling.unlink}
saved = {8: 6, 26: 24}  # the checkpoint that is to be there before
write = reporting.RunLog.write

def watched(log, metrics):
    if "train_loss" in metrics and (event := plan.get(metrics["step"])):
        while not (small / "run/checkpoints" / str(saved.get(metrics["step"], 6))).exists():
            time.sleep(0.01)
        event()
    write(log, metrics)

reporting.RunLog.write = watched
code = train.main(["--workdir", str(small / "run"), *flags])
shutil.copytree(small / "run", Path(where) / "run")
sys.exit(code)
"""
FLAGS = [
    *("--model.width", "0.05", "--batch-size", "8", "--steps", "40", "--epochs", "100"),
    *("--log-every", "2", "--eval-epochs", "0.75", "--no-compilation-cache"),
]


def lines(workdir):
    rows = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def events(workdir):
    """The steps of all losses that TensorBoard would show."""
    steps = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            steps += [event.step for v in event.summary.value if v.tag == "train_loss"]
            data = data[16 + size :]
    return steps


def test_a_run_lives_through_a_full_disk_and_a_read_only_one(data_dir, tmp_path):
    flags = ["--data.data-dir", str(data_dir), *FLAGS]
    command = [sys.executable, "-c", DRIVER, str(tmp_path), *flags]
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own, "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        command = [*own, *command]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    for step, reason in ((12, "No space left on device"), (18, "No space left on device")):
        assert f"checkpoints/{step} could not be saved: {reason}; step 6 is intact" in said
    assert "checkpoints/30 could not be saved: Read-only file system; step 24 is intact" in said
    # Once for each time that it lasts; but a small file may have room in its last block.
    assert said.count("cannot write metrics") in (1, 2)
    assert "Traceback" not in done.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "usual"), "no line is missing or doubled"
    assert events(tmp_path / "run") == list(range(2, 41, 2))
    both = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "usual")]
    assert both[0]["params_sha256"] == both[1]["params_sha256"]
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"36", "40"} <= saved


def test_the_report_is_tried_again_until_patience_ends(monkeypatch, capsys):
    monkeypatch.setattr("flax_alexnet.train.RETRY_SECONDS", 0.01)
    attempts = []

    def action():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError(28, "No space left on device", "report/curves.png")

    keep_trying(action, minutes=1)
    assert capsys.readouterr().out.count("report/curves.png'; trying again for 1 minutes") == 2
    attempts.clear()
    with pytest.raises(UserError, match="make room, and the same command goes on"):
        keep_trying(action, minutes=0)
    assert len(attempts) == 1
