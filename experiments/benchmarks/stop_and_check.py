"""What stopping costs, and what looking at a checkpoint costs: two figures of docs/reliability.md.

Claimed: after SIGTERM a run of the recipe quickstart finishes its step, saves and has ended within
10 s; and the digests of a checkpoint cost little beside writing and reading it.

Five runs of quickstart get a SIGTERM at other moments of their first hundreds of steps. Then a
state with the parameters and velocities of the `paper` model (488 MB of random numbers, which no
compression makes smaller) is saved, its manifest is made once more, checked, and it is restored.

Run, with nothing else running (two minutes on two cores; no data is needed):

    python experiments/benchmarks/stop_and_check.py
"""

import csv
import dataclasses
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from flax_alexnet.checkpoint.manager import UNLISTED, Checkpoints, manifest
from flax_alexnet.checkpoint.manifest import damage, write_manifest
from flax_alexnet.utils.errors import STOPPED

LINES = (1, 2, 2, 3, 4)  # of metrics that each run has written when it is stopped
PARAMETERS = 60_965_224  # of the paper's model


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times stops and checks."""

    output: Path = Path("results")
    """Where stop_and_check.csv goes."""
    quick: bool = False
    """One stop of a run on the first tiny batch, and a small state."""


def seconds_to_stop(workdir: Path, lines: int, flags: Sequence[str] = ()) -> float:
    """Starts quickstart, stops it once it has written so many lines: seconds until it has ended."""
    command = [sys.executable, "-u", "-m", "flax_alexnet.train", "--workdir", str(workdir), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for text in process.stdout:
            lines -= text.startswith("step ")
            if lines == 0:
                break
        sent = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        code = process.wait()
    assert code == STOPPED, f"it ended with exit code {code}"
    return time.perf_counter() - sent


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def checks(folder: Path, parameters: int) -> dict[str, float]:
    """Seconds of saving, of digests, of checking and of restoring a state of random numbers."""
    draw = np.random.default_rng(0).standard_normal
    state = {name: jax.numpy.asarray(draw(parameters, np.float32)) for name in ("params", "trace")}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in state.items()
    }
    checkpoints = Checkpoints(folder)

    def save() -> None:
        checkpoints.save(1, state)
        assert checkpoints.saved()

    name = manifest(1)
    seconds = {
        "save, digests included": timed(save),
        "digests alone": timed(lambda: write_manifest(folder / "1", name, UNLISTED | {name})),
        "check": timed(lambda: damage(folder / "1", name, UNLISTED)),
        "restore": timed(lambda: jax.block_until_ready(checkpoints.restore(1, template))),
    }
    checkpoints.close()
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    parameters = 10_000 if arguments.quick else PARAMETERS
    flags = ["--log-every", "5", "--model.width", "0.05"] if arguments.quick else []
    rows: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        stops = [
            seconds_to_stop(Path(folder) / f"run{number}", lines, flags)
            for number, lines in enumerate(LINES[:1] if arguments.quick else LINES)
        ]
        rows += [("stop, median", statistics.median(stops)), ("stop, longest", max(stops))]
        rows += checks(Path(folder) / "checkpoints", parameters).items()
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "stop_and_check_quick.csv" if arguments.quick else "stop_and_check.csv"
    with (arguments.output / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "seconds"))
        writer.writerows((what, f"{seconds:.2f}") for what, seconds in rows)
    for what, seconds in rows:
        print(f"{what:>24}: {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
