"""How cost grows: a training step's images/s and peak of memory over what it depends on.

Batch (1 … 512), image size (64 … 448), CPU devices in one process (1 … 8), and threads that decode
prepared pictures (1 … all cores), each beside the line of what does not depend on it at all, or
grows as it does: what is there at the smallest, carried on. Each point is a process of its own.

    python experiments/bench_growth.py

With nothing else running it takes ten minutes on two cores.
"""

import csv
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro
from matplotlib.figure import Figure
from works import Work, Worker

BATCHES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SIZES: tuple[int, ...] = (64, 112, 160, 224, 288, 352, 448)
DEVICES: tuple[int, ...] = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times steps of growing size."""

    output: Path = Path("experiments/results")
    """Where bench_growth.csv and .png go."""
    variant: str = "torchvision"
    """The net."""
    rounds: int = 3
    """How often each step is timed."""
    quick: bool = False
    """A tiny net and two points each: shows that it works."""


class Point(NamedTuple):
    """What was measured at a value of what grows."""

    axis: str
    value: int
    images_per_second: float
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes and draws all points; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    variant, size, batch, rounds = arguments.variant, 224, 64, arguments.rounds
    batches, sizes, devices = BATCHES, SIZES, DEVICES
    if arguments.quick:
        variant, size, batch, rounds = "cuda_convnet_cifar10", 32, 8, 1
        batches, sizes, devices = (8,), (24, 32), (2,)
    cases = [
        *(("batch", value, {"batch": value, "size": size}, 1) for value in batches),
        *(("image size", value, {"batch": 16, "size": value}, 1) for value in sizes),
        *(("CPU devices", value, {"batch": batch, "size": size}, value) for value in devices),
    ]
    points = []
    for axis, value, model, count in cases:
        work = Work(
            "ours_train",
            {"variant": variant, **model},
            {"JAX_NUM_CPU_DEVICES": str(count), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        worker = Worker(work)
        seconds = statistics.median([worker.seconds() for _ in range(rounds)])
        worker.close()
        points.append(Point(axis, value, model["batch"] / seconds, worker.peak))
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
        # Pixels cost alike, so that images of twice the side come at a quarter of the rate.
        slope = -2 if axis == "image size" else 0
        ideal = [rates[-1] * (value / values[-1]) ** slope for value in values]
        above, below = grid[0][column], grid[1][column]
        above.plot(values, rates, "o-", label="measured")
        above.plot(values, ideal, "k--", label="linear, from the largest")
        above.set(ylabel="images/s", xscale="log", yscale="log")
        above.legend()
        below.plot(values, memory, "o-")
        below.set(xlabel=axis, ylabel="peak memory (GiB)", xscale="log", ylim=(0, None))
        for each in (above, below):
            each.set_xticks(values, [str(value) for value in values])
            each.minorticks_off()
            each.grid(alpha=0.3)
    figure.savefig(arguments.output / f"{name}.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
