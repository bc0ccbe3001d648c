"""A long run: its memory does not grow, it leaves nothing behind, and it ends quickly.

Claimed of `flax_alexnet.train`: over 10,000 steps, with evaluations and checkpoints, the resident
memory grows by less than 2 % after the first 1,000; no file descriptor, thread or segment of shared
memory is left behind; and the process ends in less than 10 s after its last line of metrics.

Here a process trains twice: a few steps, which leave behind what JAX and others keep for as long as
a process lives, and then the 10,000. What it holds is counted after each; its memory is looked at
from outside, at each line of metrics. The model is as small as models can be: what leaks at a step,
a line of metrics, an evaluation or a save leaks all the same.

None of Python's threads may be left. Pools of libraries in C++ (XLA's, TensorStore's) start a
thread when all that they have are busy, and may end it when it has long been idle: their number may
change by a few, but by less than one an evaluation, as it would where each left one behind.

Run (a minute on two cores; no data is needed):

    python experiments/benchmarks/long_run.py
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro
from matplotlib.figure import Figure

from flax_alexnet import train
from flax_alexnet.data import synthetic
from flax_alexnet.training.run_directory import PACKAGES

FIRST = 600  # steps of the short run, with an evaluation and two saves
EVERY = 500  # steps between evaluations, each followed by a checkpoint
BATCH = 2
IMAGES = {"train": 10 * BATCH, "test": 2 * BATCH}
FLAGS = (
    *("--model.variant", "cuda_convnet_19pct", "--model.width", "0.1"),
    *("--data.image-size", "12", "--augment.crop-size", "8", "--batch-size", str(BATCH)),
    *("--log-every", "50", "--eval-epochs", str(EVERY * BATCH // IMAGES["train"])),
    *("--epochs", "1000000"),
)
SHARED = "/dev/shm"  # where segments of shared memory have names
HELD = "held: "  # how a line starts in which the process says what it holds
LARGEST_GROWTH, LONGEST_EXIT = 0.02, 10  # share; seconds


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains for many steps, and looks at what grows."""

    output: Path = Path("results")
    """Where long_run.json and long_run.png go."""
    steps: int = 10_000
    """Steps of the long run, of which the first tenth does not count."""
    train_in: Path | None = None
    """Train in this folder, where the data is, and do nothing else: the process that is watched."""


class Watched(NamedTuple):
    """What a process that trains twice showed."""

    memory: list[tuple[int, int]]  # (step, resident bytes) of the long run
    held: list[dict[str, int]]  # after each run
    segments: list[str]  # of shared memory that were not there before, and that nobody uses
    exit_seconds: float  # from the last line of metrics to the end of the process


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the run; returns 0 where all that is claimed has held, else 1."""
    arguments = tyro.cli(Arguments, args=argv)
    if arguments.train_in:
        return train_twice(arguments.train_in, arguments.steps)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        synthetic.EXAMPLES.update(IMAGES)
        synthetic.builder(Path(folder) / "data").download_and_prepare()
        watched = watch(Path(folder), arguments.steps)
    first, last = first_and_last(arguments.steps / 10, watched.memory)
    growth = last / first - 1
    before, after = watched.held
    left = {kind: after[kind] - before[kind] for kind in after}
    left["segments"] = len(watched.segments)
    result = {
        "steps": arguments.steps,
        "resident_bytes": round(last),
        "growth_after_a_tenth": round(growth, 5),
        "left_behind": left,
        "exit_seconds": round(watched.exit_seconds, 2),
        "seconds": round(time.monotonic() - began),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "command": " ".join(["python -m flax_alexnet.train", *FLAGS]),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "long_run.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(watched.memory, first, arguments.output / "long_run.png")
    print(json.dumps(result, indent=2))
    most = dict.fromkeys(left, 0) | {"native_threads": arguments.steps // EVERY - 1}
    holds = growth < LARGEST_GROWTH and watched.exit_seconds < LONGEST_EXIT
    return 0 if holds and all(left[kind] <= most[kind] for kind in left) else 1


def train_twice(folder: Path, steps: int) -> int:
    """Trains `FIRST` and then `steps` steps; prints what the process holds after each."""
    before = held_now()
    for name, count in (("short", FIRST), ("long", steps)):
        where = ("--workdir", str(folder / name), "--data.data-dir", str(folder / "data"))
        if code := train.main([*where, *FLAGS, "--steps", str(count)]):
            return code
        gc.collect()
        until = time.monotonic() + 5  # threads that have been told to end need a moment
        while (held := held_now())["threads"] > before["threads"] and time.monotonic() < until:
            time.sleep(0.05)
        before = held
        print(f"{HELD}{json.dumps(held)}", flush=True)
    return 0


def held_now() -> dict[str, int]:
    """How many descriptors of this process are open, its threads of Python, and all others."""
    threads = threading.active_count()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threads,
        "native_threads": len(os.listdir("/proc/self/task")) - threads,
    }


def watch(folder: Path, steps: int) -> Watched:
    """Starts a process that trains twice in `folder`, and looks at it until it ends."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, "--train-in", str(folder), "--steps", str(steps)]
    memory: list[tuple[int, int]] = []
    held: list[dict[str, int]] = []
    last = time.monotonic()
    segments = set(os.listdir(SHARED))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step "):
                last = time.monotonic()
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                if held:
                    memory.append((int(line.split()[1]), pages * os.sysconf("SC_PAGE_SIZE")))
            elif line.startswith(HELD):
                held.append(json.loads(line.removeprefix(HELD)))
    seconds = time.monotonic() - last
    if process.returncode:
        raise RuntimeError(f"training ended with exit code {process.returncode}")
    until = time.monotonic() + 5  # others may be about to map a segment, or to remove one
    while (left := ownerless() - segments) and time.monotonic() < until:
        time.sleep(0.05)
    return Watched(memory, held, sorted(left), seconds)


def ownerless() -> set[str]:
    """Our segments of shared memory that no process has mapped or open, as other programs may."""
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            used.update(re.findall(rf"{SHARED}/(\S+)", (process / "maps").read_text()))
            used.update(os.path.basename(os.readlink(link)) for link in (process / "fd").iterdir())
    own = set()
    for entry in os.scandir(SHARED):
        with contextlib.suppress(OSError):  # it is gone
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                own.add(entry.name)
    return own - used


def first_and_last(step: float, memory: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Resident bytes in the first and in the last tenth of what follows `step`.

    Medians, since a line may fall into an evaluation or a save, which take memory for a moment.
    """
    later = [resident for at, resident in memory if at > step]
    tenth = -(-len(later) // 10)
    return statistics.median(later[:tenth]), statistics.median(later[-tenth:])


def plot(memory: Sequence[tuple[int, int]], base: float, path: Path) -> None:
    """Draws the resident memory over the steps, and what it may be at most where it was `base`."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([step for step, _ in memory], [resident / 2**20 for _, resident in memory])
    limit = base * (1 + LARGEST_GROWTH) / 2**20
    axis.axhline(limit, color="black", linestyle="--", label=f"{LARGEST_GROWTH:.0%} more")
    axis.set(xlabel="step", ylabel="resident memory (MiB)", ylim=(0.94 * limit, 1.02 * limit))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
