"""A run whose disk is full for a while, and then read-only: it says so, and ends as any other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.training import report
from flax_alexnet.training.logger import Clock, RunLog
from flax_alexnet.training.report import draw_report, keep_trying
from flax_alexnet.training.run_directory import write_json
from flax_alexnet.utils.errors import UserError

METRICS = {"step": 1, "epoch": 1, "eval_loss": 2, "eval_top1": 0, "train_loss": 2, "train_top1": 0}

# Trains twice: undisturbed, and in a small file system of its own that is full from step 8 to 20
# (where the system permits none, that is made up where files are written). From step 26 to 32 its
# checkpoints are read-only by a mount of their own, if permitted, and its metrics by making it up.
DRIVER = """
import contextlib, errno, os, shutil, subprocess, sys, threading, time
from pathlib import Path
from flax_alexnet import train
from flax_alexnet.training import logger
from flax_alexnet.utils.process import leave

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
    logger.Lines.flush = logger.Events.flush = fail
    if not permitted or number == errno.ENOSPC:
        shutil.disk_usage = fail

checkpoints = str(small / "run/checkpoints")

def read_only():
    inject(errno.EROFS)
    subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)

def writable():
    undo()
    subprocess.run(["umount", "--lazy", checkpoints], check=True)

def undo(usual=(logger.Lines.flush, logger.Events.flush, shutil.disk_usage)):
    logger.Lines.flush, logger.Events.flush, shutil.disk_usage = usual

plan = {8: lambda: inject(errno.ENOSPC), 20: undo, 26: lambda: inject(errno.EROFS), 32: undo}
if permitted:
    plan |= {8: fill, 20: filling.unlink, 26: read_only, 32: writable}
saved = {8: 6, 26: 24}  # the checkpoint that is to be there before
write = logger.RunLog.write

def watched(log, metrics):
    if "train_loss" in metrics and (event := plan.get(metrics["step"])):
        while not (small / "run/checkpoints" / str(saved.get(metrics["step"], 6))).exists():
            time.sleep(0.01)
        event()
    write(log, metrics)

logger.RunLog.write = watched
code = train.main(["--workdir", str(small / "run"), *flags])
shutil.copytree(small / "run", Path(where) / "run")
waiting = [t.name for t in threading.enumerate() if type(t).__name__ == "_SignalingThread"]
print("threads that wait for minutes:", waiting)  # Orbax's, where it finds a folder read-only
leave(lambda: code)
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


@pytest.mark.slow
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
    assert "threads that wait for minutes: []" in said
    assert lines(tmp_path / "run") == lines(tmp_path / "usual"), "no line is missing or doubled"
    assert events(tmp_path / "run") == [1, *range(2, 41, 2)]
    both = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "usual")]
    assert both[0]["params_sha256"] == both[1]["params_sha256"]
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"36", "40"} <= saved


def test_the_report_is_tried_again_until_patience_ends(monkeypatch, capsys):
    monkeypatch.setattr("flax_alexnet.training.report.RETRY_SECONDS", 0.01)
    attempts = []

    def action():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError(28, "No space left on device", "report/curves.png")

    assert keep_trying(action, minutes=1)
    said = "cannot write report/curves.png: No space left on device; trying again for 1 minutes\n"
    assert capsys.readouterr().out == 2 * said
    attempts.clear()
    with pytest.raises(UserError, match="make room, and the same command goes on"):
        keep_trying(action, minutes=0)
    assert len(attempts) == 1


def test_a_signal_ends_the_attempts_to_write_the_report():
    def action():
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device", "report/curves.png")

    assert not keep_trying(action, minutes=0.05)


@pytest.fixture
def half(monkeypatch):
    """Images are written to their half, and then there is no room; the error names no file."""

    def savefig(_, path, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.mark.usefixtures("half")
def test_an_image_that_cannot_be_written_is_named_and_the_one_before_stays(tmp_path, pretrained):
    before = tmp_path / "report" / "curves.png"
    before.parent.mkdir()
    before.write_bytes(b"whole")

    def action():
        draw_report(before.parent, [METRICS], pretrained.params, None, pretrained.model, [], [])

    with pytest.raises(UserError, match=f"cannot write {before}: No space left on device; make"):
        keep_trying(action, minutes=0)
    assert before.read_bytes() == b"whole"
    assert [path.name for path in before.parent.iterdir()] == ["curves.png"]


def test_a_report_whose_folder_is_moved_away_is_drawn_again(tmp_path, pretrained, monkeypatch):
    usual, moves = report.plot_predictions, [1]

    def moved(*arguments):
        if moves:
            moves.pop()
            (tmp_path / "report").rename(tmp_path / "elsewhere")
            (tmp_path / "report").mkdir()
        usual(*arguments)

    class Four:
        def __len__(self):
            return 4

        def take(self, indices):
            images = np.zeros((len(indices), 64, 64, 3), np.uint8)
            return {"image": images, "label": np.zeros(len(indices), int)}

    def action():
        rule = Preprocessing(64, "paper", 64, jnp.zeros((64, 64, 3)), 1 / 64)
        draw_report(
            tmp_path / "report",
            [METRICS],
            pretrained.params,
            rule,
            pretrained.model,
            Four(),
            "abcd",
        )

    monkeypatch.setattr(report, "plot_predictions", moved)
    monkeypatch.setattr(report, "RETRY_SECONDS", 0.01)
    assert keep_trying(action, minutes=1)
    names = ["conv1.png", "curves.png", "predictions.png"]
    assert sorted(os.listdir(tmp_path / "report")) == names


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    """Else a loss of power may leave an empty file where there was a whole one."""
    synced, fsync, replace = [], os.fsync, Path.replace

    def watched_fsync(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def watched_replace(path, target):
        assert synced[-1] == str(path)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_json(tmp_path / "config.json", {})
    RunLog(tmp_path, 0, 1, Clock(tmp_path / "seconds", 0.0)).close()
    partial = [Path(name).name for name in synced if ".partial/" in name]
    assert partial == ["config.json", "metrics.jsonl"]


def test_a_thread_that_waits_does_not_keep_a_command():
    code = (
        "import threading, time; from flax_alexnet.utils.process import leave\n"
        "threading.Thread(target=time.sleep, args=(300,)).start()\n"
        "leave(lambda: print('done') or 2)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (2, "done\n")
