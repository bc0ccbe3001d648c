"""How cost grows: a training step's images/s and peak of memory over what it depends on.

Batch (1 … 512), image size (64 … 448), CPU devices in one process (1 … 8), and threads that decode
prepared images (1 … all cores). Beside each stands what it were if a pixel always cost the same,
devices that share their cores took nothing of them, and threads did not wait for one another. Each
point is a process of its own.

    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python experiments/benchmarks/bench_growth.py --photographs imagenet-sample-images

With nothing else running it takes ten minutes on two cores. Without photographs the threads are
left out; the others need no data.
"""

import csv
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro
from bench import prepared_images
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from photographs import find_photographs
from works import Work, Worker

from flax_alexnet.utils.errors import UserError, exit_code

BATCHES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SIZES: tuple[int, ...] = (64, 112, 160, 224, 288, 352, 448)
DEVICES: tuple[int, ...] = (1, 2, 4, 8)
THREADS = "input threads"
# How images/s grow with a value in the ideal: to its power of so much.
POWERS = {"image size": -2, THREADS: 1}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times steps of growing size."""

    output: Path = Path("results")
    """Where bench_growth.csv and .png go."""
    photographs: Path | None = None
    """A folder of JPEGs, of which 200 are taken, for the threads; none: these are left out."""
    variant: str = "torchvision"
    """The model."""
    rounds: int = 3
    """How often each step is timed."""
    quick: bool = False
    """A tiny model and two points each: shows that it works."""


class Point(NamedTuple):
    """What was measured at a value of what grows."""

    axis: str
    value: int
    images_per_second: float
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes and draws all points; returns 0, or 2 where data is not there."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        photographs = find_photographs(arguments.photographs) if arguments.photographs else []
    except UserError as error:
        return exit_code(error)
    variant, size, batch, rounds = arguments.variant, 224, 64, arguments.rounds
    batches, sizes, devices = BATCHES, SIZES, DEVICES
    if arguments.quick:
        variant, size, batch, rounds = "cuda_convnet_19pct", 32, 8, 1
        batches, sizes, devices = (8,), (24, 32), (2,)
    models = [
        *(("batch", value, {"batch": value, "size": size}, 1) for value in batches),
        *(("image size", value, {"batch": 16, "size": value}, 1) for value in sizes),
        *(("CPU devices", value, {"batch": batch, "size": size}, value) for value in devices),
    ]
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for axis, value, model, count in models:
            env = {"JAX_NUM_CPU_DEVICES": str(count), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            step = Work("ours_train", {"variant": variant, **model}, env)
            cases.append((axis, value, step, model["batch"]))
        if not photographs:
            print(f"{THREADS}: left out, since no --photographs are given", flush=True)
        elif not arguments.quick:
            _, reading = prepared_images(photographs, Path(folder))
            for count in range(1, (os.cpu_count() or 1) + 1):
                work = Work("ours_batches", reading | {"threads": count})
                cases.append((THREADS, count, work, reading["images"]))
        points: list[Point] = []
        for axis, value, work, images in cases:
            worker = Worker(work)
            seconds = statistics.median([worker.seconds() for _ in range(rounds)])
            worker.close()
            points.append(Point(axis, value, images / seconds, worker.peak))
            print(*points[-1], flush=True)
            save(points, arguments)
    return 0


def save(points: Sequence[Point], arguments: Arguments) -> None:
    """Writes the table and the plot."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "bench_growth_quick" if arguments.quick else "bench_growth"
    with (arguments.output / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows(points)
    axes = list(dict.fromkeys(point.axis for point in points))
    figure = Figure(figsize=(4 * len(axes), 6), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        of_axis = [point for point in points if point.axis == axis]
        values = [point.value for point in of_axis]
        rates = [point.images_per_second for point in of_axis]
        memory = [point.peak_bytes / 2**30 for point in of_axis]
        # From the largest, where what a step costs besides its images counts least.
        base = 0 if axis in (THREADS, "CPU devices") else -1
        ideal = [rates[base] * (value / values[base]) ** POWERS.get(axis, 0) for value in values]
        above, below = grid[0][column], grid[1][column]
        above.plot(values, rates, "o-", label="measured")
        above.plot(values, ideal, "k--", label="linear")
        above.set(ylabel="images/s", xscale="log", yscale="log")
        above.legend()
        below.plot(values, memory, "o-")
        below.set(xlabel=axis, ylabel="peak memory (GiB)", xscale="log", ylim=(0, None))
        above.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        above.yaxis.set_major_formatter(ScalarFormatter())
        for each in (above, below):
            each.set_xticks(values, [str(value) for value in values])
            each.minorticks_off()
            each.grid(alpha=0.3)
    figure.savefig(arguments.output / f"{name}.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
