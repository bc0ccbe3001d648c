"""Exact resume: a run that is killed again and again ends with the bits of one that is not.

Claimed of `python -m flax_alexnet.train`: killed with SIGKILL at any moment and started again with
the same command, a run ends with the same parameters, optimizer state and schedule, it has seen the
same images in the same order, and its metrics.jsonl has no step too few or too many.

Here a small run is made once without a kill. Then the same command is started, its process group
is killed at a chosen moment, and so on until the run ends; then a new run begins, until there have
been enough kills. Moments are chosen from outside, by what the run has printed and written: while
it starts, compiles (with its programs in the cache or none), steps, writes metrics, evaluates,
saves or draws its report, and at random. Which phase a kill has met is read from what it left.

Of each run that has ended every array of its last checkpoint is compared, byte for byte, and every
line of metrics.jsonl but for its images per second. A line is written at every step, and the loss
of a step follows from its images and from their places in the batch, which determine how each is
cropped, mirrored and coloured: other images, or another order, would show there.

Run (16 to 31 minutes on two cores, `--quick` one; no data is needed):

    python experiments/benchmarks/soak.py --phases training
"""

import collections
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from flax_alexnet.data import synthetic
from flax_alexnet.training.run_directory import PACKAGES

STEPS, EVERY = 72, 12  # steps of a run, and between two evaluations, each followed by a checkpoint
BATCH = 8
IMAGES = {
    "train": BATCH * EVERY,
    "test": 16 * BATCH,
}  # an epoch, and what takes longer than a step
FLAGS = (
    *("--steps", str(STEPS), "--log-every", "1", "--batch-size", str(BATCH)),
    *("--optimizer.schedule", "plateau", "--optimizer.patience", "1"),
    *("--optimizer.drop-factor", "0.7", "--augment.color-noise", "cuda-convnet"),
)
MODEL: tuple[str, ...] = (
    "--model.width",
    "0.05",
    "--data.image-size",
    "36",
    "--augment.crop-size",
    "32",
)
QUICK_MODEL = (  # compiles sooner, and has no dropout
    *("--model.variant", "cuda_convnet_19pct", "--model.width", "0.1"),
    *("--data.image-size", "16", "--augment.crop-size", "12"),
)
PHASES = ("start-up", "compilation", "step", "metrics", "evaluation", "save", "report")
ONCE = ("start-up", "compilation", "report")  # in the life of a process; and these take seconds
ANY, COLD = "any moment", "compilation without a cache"
MOMENTS = (*PHASES, *PHASES, *[ANY] * 5, COLD)
QUICK_MOMENTS = ("save", "metrics", "evaluation")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kills runs, and compares what becomes of them with a run that was left alone."""

    output: Path = Path("results")
    """Where soak_training.json and soak_training.csv go."""
    kills: int = 100
    """How many."""
    seed: int = 0
    """Determines the order of the moments, and how long after its beginning a phase is ended."""
    quick: bool = False
    """Three kills of a model that compiles sooner, into soak_training_quick.json and .csv."""


class Life(NamedTuple):
    """A process of a run, from its start to its end."""

    phase: str  # the one in which it ended
    seconds: float
    start: int | None  # the step that it went on from, if it got so far
    reached: int  # the last step in metrics.jsonl
    code: int  # exit code; -9 when it was killed
    said: str


def main(argv: Sequence[str] | None = None) -> int:
    """Kills runs; returns 0 where each has ended as the one that was left alone, else 1."""
    arguments = tyro.cli(Arguments, args=argv)
    rng = np.random.default_rng(arguments.seed)
    model, name, aims = MODEL, "soak_training", in_any_order(MOMENTS, rng)
    if arguments.quick:
        arguments = dataclasses.replace(arguments, kills=len(QUICK_MOMENTS))
        model, name, aims = QUICK_MODEL, "soak_training_quick", itertools.cycle(QUICK_MOMENTS)
    absl.logging.set_verbosity(absl.logging.ERROR)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        synthetic.EXAMPLES.update(IMAGES)
        synthetic.builder(Path(folder) / "data").download_and_prepare()
        rows, mismatches = soak(Path(folder), model, arguments.kills, aims, rng)
    kills = [row for row in rows if row["exit_code"] == -signal.SIGKILL]
    result = {
        "kills": len(kills),
        "runs": rows[-1]["run"],
        "mismatches": mismatches,
        "kills_by_phase": {p: sum(row["phase"] == p for row in kills) for p in PHASES},
        "steps_between_checkpoints": EVERY,
        "most_steps_made_again": max(row["made_again"] or 0 for row in rows),
        "seconds": round(time.monotonic() - began),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "command": " ".join(["python -m flax_alexnet.train", *model, *FLAGS]),
    }
    write_results(arguments.output, name, result, rows)
    return 1 if mismatches else 0


def write_results(
    folder: Path, name: str, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Prints a result, and writes it and the rows that it was counted from into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(result, indent=2))


def in_any_order(moments: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """All of `moments`, then all of them again, and so on, each time in another order."""
    while True:
        yield from (str(moment) for moment in rng.permutation(moments))


def soak(
    folder: Path, model: Sequence[str], kills: int, aims: Iterator[str], rng: np.random.Generator
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each life of all runs in `folder`, and in what these differ from what they should.

    The data must be there.
    """
    usual: dict[str, float] = {}  # seconds of each phase, as last seen
    flags = ("--data.data-dir", str(folder / "data"), *model, *FLAGS)
    reference = folder / "reference"
    life = live(folder, reference, flags, "", usual, rng)
    if life.code:
        raise RuntimeError(f"the run that is left alone does not end:\n{life.said}")
    usual[COLD], usual[ANY] = usual["compilation"], life.seconds - usual["compilation"]
    expected = remains(reference)

    rows: list[dict[str, Any]] = []
    mismatches: list[str] = []
    made, run, workdir, reached = 0, 1, folder / "run1", 0
    while made < kills or workdir.exists():
        aim = next(aims) if made < kills else ""
        life = live(folder, workdir, flags, aim, usual, rng)
        made += life.code == -signal.SIGKILL
        again = None if life.start is None else reached - life.start
        rows.append(
            {
                "run": run,
                "aim": aim,
                "phase": life.phase,
                "exit_code": life.code,
                "seconds": f"{life.seconds:.2f}",
                "start_step": life.start,
                "last_step": life.reached,
                "made_again": again,
            }
        )
        print(f"{made} kills: {rows[-1]}", flush=True)
        reached = life.reached
        if life.code == -signal.SIGKILL:
            continue
        if life.code:
            last = life.said.strip().splitlines()[-1:]
            mismatches.append(f"run {run} does not go on (exit code {life.code}): {last}")
        else:
            mismatches += [f"run {run}: {what}" for what in differences(expected, remains(workdir))]
        shutil.rmtree(workdir)
        run, workdir, reached = run + 1, folder / f"run{run + 1}", 0
    return rows, mismatches


def live(
    folder: Path,
    workdir: Path,
    flags: Sequence[str],
    aim: str,
    usual: dict[str, float],
    rng: np.random.Generator,
) -> Life:
    """One start of a run, which is killed as `aim` says or ends by itself.

    Args:
      folder: where compiled programs are kept, and what the process says.
      workdir: the run's.
      flags: the others of the command.
      aim: a phase, which is ended the first, second or third time that it is seen, within the time
        that it usually takes; or `COLD`, `ANY`, or nothing, to let the process go on to its end.
      usual: seconds of each phase, which are brought up to date.
      rng: for the choices.
    """
    cache, output = folder / "programs", folder / "said"
    if aim == COLD:
        shutil.rmtree(cache)
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "flax_alexnet.train", "--workdir", str(workdir), *flags]
    target = "compilation" if aim == COLD else aim
    times = 1 if target in ONCE else rng.integers(1, 4)
    left_over = saves_under_way(workdir)
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    began = entered = time.monotonic()
    kill_at = began + rng.uniform(0, usual[ANY]) if aim == ANY else math.inf
    phase = ""
    while process.poll() is None:
        now = time.monotonic()
        seen = phase_of(workdir, read(output), left_over)
        if seen != phase:
            usual[phase] = now - entered
            phase, entered = seen, now
            times -= phase == target
            if phase == target and times == 0:
                # A line of metrics is written in less time than it takes to look.
                kill_at = now + (phase != "metrics") * rng.uniform(0, usual.get(aim, 0))
        if now >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001 if phase in ONCE else 0.0001)
    code, seconds = process.wait(), time.monotonic() - began
    said = read(output)
    return Life(
        phase=phase_of(workdir, said, left_over),
        seconds=seconds,
        start=start_of(said),
        reached=last_line(workdir)[0],
        code=code,
        said=said,
    )


def phase_of(workdir: Path, said: str, left_over: set[tuple[str, int]]) -> str:
    """What a process is about, by what it has said and written; `left_over` from those before."""
    start = start_of(said)
    if start is None:
        return "start-up"
    if saves_under_way(workdir) - left_over:
        return "save"
    if start == STEPS:
        return "report"
    line = said[said.rfind("\nstep ") + 1 :]
    if not line.startswith("step "):
        return "compilation"
    step, evaluated = int(line.split()[1]), "test loss" in line
    if not line.endswith("\n") or last_line(workdir) != (step, evaluated):
        return "metrics"
    if evaluated and not (workdir / "checkpoints" / str(step)).exists():
        return "save"
    if step == STEPS:
        return "report"
    return "evaluation" if (step + 1) % EVERY == 0 else "step"  # with the step before it


def read(path: Path) -> str:
    """A file's text, the last character of which may be half written."""
    return path.read_text(errors="replace")


def start_of(said: str) -> int | None:
    """The step that a process says it goes on from."""
    found = re.search(r"steps (\d+) to \d+ with", said)
    return int(found[1]) if found else None


def saves_under_way(workdir: Path) -> set[tuple[str, int]]:
    """Orbax's temporary folders, with what tells one of them from another of the same name."""
    try:
        with os.scandir(workdir / "checkpoints") as entries:
            return {(entry.name, entry.inode()) for entry in entries if "tmp" in entry.name}
    except FileNotFoundError:
        return set()


def last_line(workdir: Path) -> tuple[int, bool]:
    """The step of the last whole line of metrics, and whether it is of an evaluation."""
    path = workdir / "metrics.jsonl"
    lines = read(path).splitlines(keepends=True)[-2:] if path.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    last = json.loads(lines[-1]) if lines else {"step": 0}
    return last["step"], "eval_loss" in last


class Remains(NamedTuple):
    """What a run leaves, without what may differ."""

    arrays: dict[str, np.ndarray]  # of its last checkpoint: all of the training state
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]


def remains(workdir: Path) -> Remains:
    """What the run has left in `workdir`."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    folder = (workdir / "checkpoints" / str(max(steps)) / "default").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        leaves = jax.tree_util.tree_leaves_with_path(reader.restore(folder, restore_args=kinds))
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    summary = json.loads((workdir / "summary.json").read_text())
    measured = ("images_per_second", "seconds", "peak_memory_bytes")
    return Remains(
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
        [without(json.loads(line), measured) for line in lines],
        without(summary, measured),
    )


def without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """`values` but for `names`."""
    return {name: value for name, value in values.items() if name not in names}


def differences(expected: Remains, found: Remains) -> list[str]:
    """In what a run that was killed differs from one that was not; nothing where it does not."""
    result = []
    for name in sorted(expected.arrays.keys() | found.arrays.keys()):
        a, b = expected.arrays.get(name), found.arrays.get(name)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            result.append(f"{name} is not the same array")
        elif a.tobytes() != b.tobytes():
            result.append(f"{name} has other bits")
    made = collections.Counter(line["step"] for line in found.metrics if "train_loss" in line)
    result += [f"step {n} was logged {made[n]} times" for n in range(1, STEPS + 1) if made[n] != 1]
    lines = enumerate(itertools.zip_longest(expected.metrics, found.metrics), 1)
    differing = next((number for number, (a, b) in lines if a != b), None)
    if differing:
        result.append(f"metrics.jsonl differs from line {differing} on")
    result += [
        f"{name} in summary.json was {expected.summary.get(name)}, is now {found.summary.get(name)}"
        for name in sorted(expected.summary.keys() | found.summary.keys())
        if expected.summary.get(name) != found.summary.get(name)
    ]
    return result


if __name__ == "__main__":
    sys.exit(main())
