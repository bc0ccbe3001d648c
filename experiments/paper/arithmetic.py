"""The paper's numbers that follow from arithmetic: neurons, parameters, views, and days.

Nothing is trained, and no data is read. Run (a second; from the root of the repository):

    python experiments/paper/arithmetic.py
"""

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro

from flax_alexnet.models.architectures import PAPER, Weighted, infer_shapes

SIZE, CROP = 256, 224
IMAGES, EPOCHS = 1_281_167, 90  # of ILSVRC-2012, and "roughly 90 cycles" (section 5)
# Figure 2: "150,528-dimensional, and the number of neurons in the network's remaining layers is
# given by 253,440–186,624–64,896–64,896–43,264–4096–4096–1000".
FIGURE_2 = (253_440, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000)
RESULTS = Path(__file__).resolve().parents[1] / "results"


class Row(NamedTuple):
    """A number of the paper beside ours."""

    section: str
    what: str
    paper: str
    ours: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The paper's numbers that follow from arithmetic."""

    output: Path = Path("results")
    """Folder of arithmetic.csv."""
    bench: Path = RESULTS / "bench_nvidia_h200.json"
    """What bench.py has measured, for the images a second of one GPU of today."""


def rows(bench: Path) -> list[Row]:
    """All numbers."""
    layers = PAPER.scaled(PAPER.num_classes)
    infos = [info for info in infer_shapes(layers, CROP, CROP) if isinstance(info.layer, Weighted)]
    neurons = [math.prod(info.shape) for info in infos]
    result = [
        Row("3.5", "input values", "150,528", f"{CROP * CROP * 3:,}"),
        *(
            Row(
                "3.5",
                f"neurons of {info.layer.name}",
                f"{theirs:,}",
                f"{ours:,}",
                "" if ours == theirs else "55 · 55 · 96; Figure 2 has 55 · 48 · 96",
            )
            for info, theirs, ours in zip(infos, FIGURE_2, neurons, strict=True)
        ),
        Row(
            "abstract",
            "neurons",
            "650,000",
            f"{sum(neurons):,}",
            f"with the numbers of Figure 2 they would be {sum(FIGURE_2):,}",
        ),
        Row("abstract", "parameters", "60 million", f"{sum(i.parameters for i in infos):,}"),
        Row(
            "4.1",
            "different crops and flips of an image",
            "2048",
            f"{2 * (SIZE - CROP + 1) ** 2:,}",
            f"{2 * (SIZE - CROP) ** 2:,} if the last row and column of places are left out",
        ),
    ]
    measured = json.loads(bench.read_text())
    rates = {row["row"]: row["rates"]["ours"] for row in measured["rows"]}
    rate = rates["train/paper/1024"]
    result.append(
        Row(
            "5",
            f"time of {EPOCHS} epochs",
            "5 to 6 days, two GTX 580",
            f"{IMAGES * EPOCHS / rate / 60:.0f} minutes, one H200",
            f"computed from {rate:,.0f} images/s of the training step, without reading images",
        )
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the numbers and writes them to a file; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    table = rows(arguments.bench)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "arithmetic.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *table])
    for row in table:
        note = f" ({row.note})" if row.note else ""
        print(f"{row.what}: {row.ours}, in the paper {row.paper}{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
