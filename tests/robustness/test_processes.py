"""Real processes: they follow one process, end together, resume in other numbers, and agree."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flax_alexnet
from flax_alexnet.commands.prepare import prepare
from tests.images import make_folder

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.sh"
HEARTBEAT = 5
# 64 images make 4 steps an epoch: evaluations and checkpoints at 10, 20 … 40. The 20 images of
# the test set do not divide into batches of 16. A checkpoint is seen while later steps go on, but
# before the next one is saved: so who is stopped at 20 has steps left on the slowest disk.
STEPS = 40
FLAGS = [
    *("--model.width", "0.05", "--batch-size", "16", "--steps", str(STEPS), "--epochs", "100"),
    *("--log-every", "1", "--eval-epochs", "2.5", "--optimizer.schedule", "plateau"),
    *("--parallel.heartbeat-timeout", str(HEARTBEAT)),
    # At higher rates what rounding changes grows with each step, on some machines beyond 1e-5.
    *("--optimizer.learning-rate", "0.001"),
]


def start(processes, workdir, data_dir, *more, restarts=0, devices=4):
    """Starts the launcher on so many CPU devices in all; its output goes to a file."""
    flags = ["--workdir", str(workdir), "--data.data-dir", str(data_dir), *FLAGS, *more]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "JAX_COMPILATION_CACHE_DIR": str(data_dir / "compiled"),
        "RESTARTS": str(restarts),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with workdir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            ["bash", str(LAUNCHER), str(processes), *flags],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(launcher, workdir):
    code = launcher.wait(timeout=400)
    assert code == 0, workdir.with_suffix(".log").read_text()[-3000:]
    return results(workdir)


def results(workdir):
    """Losses of training and of evaluation, and the steps of both."""
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line["train_loss"] for line in lines if "train_loss" in line]
    evaluation = [line["eval_loss"] for line in lines if "eval_loss" in line]
    accuracy = [line["eval_top1"] for line in lines if "eval_top1" in line]
    steps = [(line["step"], "train_loss" in line) for line in lines]
    return training, evaluation, accuracy, steps


def assert_same(some, others):
    np.testing.assert_allclose(some[0], others[0], rtol=1e-5)
    np.testing.assert_allclose(some[1], others[1], rtol=1e-5)
    np.testing.assert_allclose(some[2], others[2], atol=1e-6)  # of exactly 20 images
    assert some[3] == others[3]


@pytest.fixture(scope="module")
def single(data_dir, tmp_path_factory):
    """What one process reaches."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    losses = finish(start(1, workdir, data_dir), workdir)
    assert len(losses[0]) == STEPS
    return losses


@pytest.mark.slow
def test_a_few_steps_of_two_processes_are_those_of_one(data_dir, tmp_path):
    few = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        few.append(finish(start(processes, workdir, data_dir, "--steps", "3"), workdir))
    assert_same(*few)


@pytest.mark.slow
def test_two_processes_follow_one(single, data_dir, tmp_path):
    workdir = tmp_path / "run"
    assert_same(finish(start(2, workdir, data_dir), workdir), single)
    log = workdir.with_suffix(".log").read_text()
    assert log.count("test accuracy") == 1, "only one process talks"
    assert len(list((workdir / "tensorboard").iterdir())) == 1, "and writes"


def children(launcher):
    listed = subprocess.run(
        ["ps", "-o", "pid=,stat=", "--ppid", str(launcher.pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def wait_for(launcher, workdir, checkpoint):
    """Waits until `checkpoint` is there."""
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / str(checkpoint)).exists():
        assert launcher.poll() is None, workdir.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_one(launcher, workdir, checkpoint, victim):
    """Kills a process once `checkpoint` is there; seconds until the others have ended."""
    wait_for(launcher, workdir, checkpoint)
    processes = children(launcher)
    assert len(processes) == 4
    os.kill(processes[victim], signal.SIGKILL)
    killed = time.monotonic()
    while set(processes) & set(children(launcher)):
        assert time.monotonic() < killed + 120
        time.sleep(0.05)
    return time.monotonic() - killed


@pytest.fixture(scope="module")
def lost(data_dir, tmp_path_factory):
    """Four processes of which one is killed, then that which the others meet at.

    Gives the launcher, the working directory, copies of what was left the first time, and the
    seconds until the others had ended, each time.
    """
    workdir = tmp_path_factory.mktemp("lost") / "run"
    launcher = start(4, workdir, data_dir, restarts=2)
    seconds = [kill_one(launcher, workdir, 10, victim=1)]
    left = tmp_path_factory.mktemp("left")
    for name in ("two", "one"):  # long before those that are started again can write
        shutil.copytree(workdir, left / name)
    seconds.append(kill_one(launcher, workdir, 20, victim=0))
    return launcher, workdir, left, seconds


@pytest.mark.slow
def test_when_one_is_killed_the_others_end(lost):
    assert max(lost[3]) <= HEARTBEAT + 5


@pytest.mark.slow
def test_four_processes_start_again_and_follow_one(lost, single):
    launcher, workdir, _, _ = lost
    assert_same(finish(launcher, workdir), single)
    said = workdir.with_suffix(".log").read_text()
    for process in range(4):  # none of the eight had ended well
        assert said.count(f"process {process} ended with exit code") == 2
    assert "process 1 ended with exit code 137" in said
    assert "process 0 ended with exit code 137" in said


@pytest.mark.slow
def test_signals_stop_all_at_the_same_step_and_they_go_on_from_there(single, data_dir, tmp_path):
    workdir = tmp_path / "run"
    for checkpoint in (10, 20):
        launcher = start(2, workdir, data_dir)
        wait_for(launcher, workdir, checkpoint)
        if checkpoint == 10:  # one of the processes
            os.kill(children(launcher)[1], signal.SIGTERM)
        else:  # the launcher, which tells all
            launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=100) == 75, workdir.with_suffix(".log").read_text()[-3000:]
        stopped = re.search(r"stopped at step (\d+);", workdir.with_suffix(".log").read_text())
        assert (workdir / "checkpoints" / stopped[1]).exists()
    assert_same(finish(start(2, workdir, data_dir), workdir), single)


@pytest.mark.parametrize(("processes", "name"), [(2, "two"), (1, "one")])
@pytest.mark.slow
def test_what_four_saved_others_resume(lost, single, data_dir, processes, name):
    workdir = lost[2] / name
    saved = [path.name for path in (workdir / "checkpoints").iterdir()]
    saved = max(int(name) for name in saved if name.isdigit())
    assert saved in (10, 20)
    assert_same(finish(start(processes, workdir, data_dir), workdir), single)
    assert f"steps {saved} to {STEPS}" in workdir.with_suffix(".log").read_text()


@pytest.mark.slow
def test_a_run_goes_on_in_other_numbers_of_processes_and_devices_and_back(
    single, data_dir, tmp_path
):
    workdir = tmp_path / "run"
    for processes, devices, checkpoint in ((2, 2, 10), (1, 4, 20)):
        launcher = start(processes, workdir, data_dir, devices=devices)
        wait_for(launcher, workdir, checkpoint)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=100) == 75, workdir.with_suffix(".log").read_text()[-3000:]
        on = f"on {devices} cpu device(s) of {processes} process(es)"
        assert on in workdir.with_suffix(".log").read_text()
    assert_same(finish(start(2, workdir, data_dir, devices=8), workdir), single)
    assert "on 8 cpu device(s) of 2 process(es)" in workdir.with_suffix(".log").read_text()


@pytest.mark.slow
def test_who_is_stopped_for_less_than_the_heartbeat_costs_nothing(single, data_dir, tmp_path):
    workdir = tmp_path / "run"
    launcher = start(2, workdir, data_dir)
    for victim, checkpoint in ((1, 10), (0, 20)):
        wait_for(launcher, workdir, checkpoint)
        stopped = children(launcher)[victim]
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(HEARTBEAT - 2)
        os.kill(stopped, signal.SIGCONT)
    assert_same(finish(launcher, workdir), single)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_who_is_stopped_for_longer_is_lost_to_the_others(single, data_dir, tmp_path, victim):
    workdir = tmp_path / "run"
    launcher = start(4, workdir, data_dir, restarts=1)
    wait_for(launcher, workdir, 10)
    processes = children(launcher)
    os.kill(processes[victim], signal.SIGSTOP)
    stopped = time.monotonic()
    while set(children(launcher)) & set(processes) != {processes[victim]}:
        assert time.monotonic() < stopped + HEARTBEAT + 5
        time.sleep(0.05)
    os.kill(processes[victim], signal.SIGCONT)
    assert_same(finish(launcher, workdir), single)
    said = workdir.with_suffix(".log").read_text()
    for process in set(range(4)) - {victim}:
        assert said.count(f"process {process} ended with exit code 3\n") == 1
    assert f"process {victim} ended with exit code" in said, "once it went on"
    assert f"error: another process was lost: nothing was heard of process {victim} for 5 s" in said


def run_each(tmp_path, data_dir, *each, port=None):
    """Processes with their own flags, environment and folder: exit codes and last lines."""
    port = port or 20_000 + os.getpid() % 20_000
    started = []
    for index, own in enumerate(each):
        common = {
            "workdir": tmp_path / "run",
            "data.data-dir": data_dir,
            "parallel.coordinator": f"localhost:{port}",
            "parallel.num-processes": len(each),
            "parallel.process-id": index,
        }
        command = [sys.executable, "-m", "flax_alexnet.train", *FLAGS]
        for name, value in (common | own.get("flags", {})).items():
            command += [f"--{name}", str(value)]
        environment = os.environ | own.get("environment", {})
        folder = own.get("folder")
        started.append(
            subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
            )
        )
    said = [process.communicate(timeout=200)[1] for process in started]
    errors = [[line for line in text.splitlines() if "error" in line] for text in said]
    return [process.returncode for process in started], errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (({}, {"seed": 1}), "the processes disagree: seed is 0 on process 0 and 1 on process"),
        pytest.param(
            ({}, {"data.name": "folder:gone"}), "process 1: no folder gone", marks=pytest.mark.slow
        ),
        pytest.param(
            ({"batch-size": 9},) * 2,
            "process 0: --batch-size 9 is not a multiple of the number of devices, 16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ({"parallel.mesh": 3},) * 2,
            "process 0: --parallel.mesh 3 does not fit",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ({"parallel.layout": "towers"},) * 2,
            "process 0: --parallel.layout towers needs a",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ({}, {"parallel.num-processes": 3}),
            "the number of processes is 2 on process 0 and 3 on process 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ({}, {}, {"parallel.process-id": 1}),
            "say that they are process 1: give each another --parallel.process-id",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_ends_every_process_with_the_same_line(tmp_path, data_dir, flags, message):
    codes, errors = run_each(tmp_path, data_dir, *({"flags": own} for own in flags))
    assert_one_line(codes, errors, message)


def assert_one_line(codes, errors, message):
    assert set(codes) == {2}, errors
    assert all(lines == errors[0] for lines in errors)
    assert len(errors[0]) == 1
    assert message in errors[0][0]


@pytest.mark.slow
def test_images_that_differ_between_processes_are_found(tmp_path, data_dir):
    """Of the same names and numbers, in folders of their own, as on disks of two machines."""
    each = []
    for process, size in enumerate((20, 30)):
        folder = tmp_path / f"{process}"
        pets = make_folder(folder / "pets", {"cat": 12, "dog": 13}, size)
        prepare(f"folder:{pets}", folder, image_size=64)
        each.append({"flags": {"data.name": "prepared_folder/pets", "data.data-dir": folder}})
    message = "the digest of the images to evaluate on is "
    assert_one_line(*run_each(tmp_path, data_dir, *each), message)


@pytest.mark.parametrize("kind", ["settings", "code", "images"])
@pytest.mark.slow
def test_processes_that_would_compute_something_else_end_with_a_line(
    data_dir, photographs, tmp_path, kind
):
    if kind == "settings":
        message = "jax.enable_x64 is False on process 0 and True on process 1"
        each = [{}, {"environment": {"JAX_ENABLE_X64": "1"}}]
    elif kind == "code":
        message = "the digest of the code of flax_alexnet is "
        package = Path(flax_alexnet.__file__).parent
        other = tmp_path / "other" / package.name
        shutil.copytree(package, other, ignore=shutil.ignore_patterns("__pycache__"))
        step = other / "training" / "step.py"
        step.write_text(step.read_text() + "# another\n")
        each = [{"folder": path.parent} for path in (package, other)]  # the first place for `-m`
    else:  # at the same place of two machines
        message = "the digest of the images to train on is "
        each = []
        for machine in ("one", "two"):
            shutil.copytree(photographs, tmp_path / machine / "images")
            each.append({"folder": tmp_path / machine, "flags": {"data.name": "folder:images"}})
        image = tmp_path / "two" / "images" / "class c" / "1.png"
        before = image.stat()
        pixels = 255 - np.asarray(Image.open(image))
        Image.fromarray(pixels).save(image)
        data = image.read_bytes()
        image.write_bytes(data[: before.st_size].ljust(before.st_size, b"\0"))
    assert_one_line(*run_each(tmp_path, data_dir, *each), message)


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_line_on_all(tmp_path, data_dir):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        own = {"flags": {"parallel.join-timeout": 3}}
        codes, errors = run_each(tmp_path, data_dir, own, own, port=port)
    assert codes == [2, 2]
    assert [len(lines) for lines in errors] == [1, 1]
    assert f"process 0 cannot listen at port {port} of this machine" in errors[0][0]
    assert f"process 1 does not reach process 0 at localhost:{port} within 3 s" in errors[1][0]


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *((code, 0, False) for code in (0, 1, 2, 130)),  # it is over, or would end so once more
        *((75, restarts, True) for restarts in (0, 10, 99)),  # a time limit
        *((137, restarts, restarts < 10) for restarts in (0, 9, 10)),  # a lost process
        (143, 3, True),
    ],
)
def test_slurm_gives_back_to_the_queue_what_can_go_on(tmp_path, code, restarts, again):
    for name, script in {"srun": f"exit {code}", "scontrol": "exit 0"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/said\n{script}\n')
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NAME": "alexnet", "SLURM_JOB_ID": "42"}
    job |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    environment = job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = LAUNCHER.with_name("slurm.sbatch")
    done = subprocess.run(["bash", str(script), "--seed", "1"], env=environment, check=False)
    assert done.returncode == code
    called = (tmp_path / "said").read_text().splitlines()
    assert called[0].startswith(
        "srun --cpus-per-task=8 python -m flax_alexnet.train --recipe paper"
    )
    assert called[0].endswith(" --workdir runs/alexnet --data.threads 8 --seed 1")
    assert called[1:] == ["scontrol requeue 42"] * again
