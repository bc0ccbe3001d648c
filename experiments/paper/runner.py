"""Trains arms with several seeds, several at a time, and appends what was measured to a file."""

import contextlib
import csv
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from arms import ARMS
from verdicts import COLUMNS, LAST, read_runs

from flax_alexnet.training.signals import stop_requests
from flax_alexnet.utils.errors import STOPPED

Job = tuple[str, int]  # an arm and a seed


@dataclasses.dataclass(frozen=True)
class Runner:
    """Trains what a file of measures lacks.

    Attributes:
      path: the file, to which each finished run is appended.
      folder: of the working directories of the runs, which go on if they are interrupted.
      data_dir: the folder with the prepared cifar10; None: the usual one.
      quick: whether the runs are short and mean nothing.
    """

    path: Path
    folder: Path
    data_dir: Path | None
    quick: bool

    def train(self, jobs: Sequence[Job], workers: int, until: float) -> bool:
        """Trains jobs, and returns whether all are in the file afterwards.

        Args:
          jobs: what is to be trained, in this order where it can be.
          workers: runs at a time, each on its own cores; 0: one for each core.
          until: at this time of the monotonic clock, or on Ctrl-C or SIGTERM, the runs stop and
            save their state.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = list(jobs)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        slots = range(min(workers or len(cores) or 1, len(waiting)))
        running: dict[int, tuple[subprocess.Popen[bytes], Job]] = {}
        stopping = False
        with stop_requests(alone=True) as stop_requested:
            while waiting or running:
                if not stopping and (stop_requested(True) or time.monotonic() > until):
                    # A second signal would end a run at once, before its state is saved.
                    stopping, waiting = True, []
                    for process, _ in running.values():
                        process.send_signal(signal.SIGTERM)
                for slot in slots:
                    job = self._next(waiting) if slot not in running else None
                    if job:
                        waiting.remove(job)
                        print(f"{job[0]} {job[1]}: begins, {len(waiting)} wait", flush=True)
                        running[slot] = self._start(job, cores[slot :: len(slots)])
                for slot, (process, job) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        print(f"{job[0]} {job[1]}: {self._finish(process, job)}", flush=True)
                time.sleep(0.2)
        done = read_runs(self.path)
        return all(job in done for job in jobs)

    def _next(self, waiting: Sequence[Job]) -> Job | None:
        """The first job that can begin: the run that it starts from must be complete."""
        done = read_runs(self.path) if any(ARMS[arm].start for arm, _ in waiting) else {}
        for arm, seed in waiting:
            start = ARMS[arm].start
            if start is None or (start, seed) in done:
                return arm, seed
        return None

    def _start(self, job: Job, cores: Sequence[int]) -> tuple[subprocess.Popen[bytes], Job]:
        """Starts a run in a process of its own, with its output in a file."""
        arm, seed = job
        command = [sys.executable, str(Path(__file__).with_name("arms.py")), arm, str(seed)]
        command += ["--workdir", str(self.folder / f"{arm}-{seed}")]
        if self.data_dir:
            command += ["--data-dir", str(self.data_dir)]
        if self.quick:
            command += ["--quick"]
        with self._log(job).open("wb") as log:
            # In a session of its own, a run does not get a Ctrl-C besides the signal from here.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        if cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)
        return process, job

    def _finish(self, process: subprocess.Popen[bytes], job: Job) -> str:
        """Appends the measures of a run that has ended to the file; returns how it ended."""
        if process.returncode in (STOPPED, -signal.SIGTERM):  # the latter before it had begun
            return "stopped; the same command goes on"
        if process.returncode:
            return f"exit code {process.returncode}, see {self._log(job)}"
        # Those of all sittings, if the run was interrupted.
        summary = self.folder / f"{job[0]}-{job[1]}" / "summary.json"
        seconds = round(json.loads(summary.read_text())["seconds"])
        self.append(job, json.loads(self._log(job).read_text().splitlines()[-1]), seconds)
        return f"done in {seconds} s"

    def append(
        self, job: Job, measures: Iterable[tuple[str, float, float]], seconds: float
    ) -> None:
        """Appends measures, a name, an epoch and a value each, to the file."""
        rows = [[*job, name, f"{epoch:.6g}", f"{value:.6g}", ""] for name, epoch, value in measures]
        rows.append([*job, LAST, 0, seconds, machine()])
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows] if is_new else rows)

    def _log(self, job: Job) -> Path:
        """The file with the output of a run."""
        return self.folder / f"{job[0]}-{job[1]}.log"


def machine() -> str:
    """The processor and the versions, in a few words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = platform.python_version()
    return f"{cores} cores of {platform.machine()}, Python {python}, jax {jax.__version__}"
