"""Tables 1 and 2 of the paper: the models of ImageNet, their errors over one crop and over ten.

Each row is trained by the recipe `krizhevsky2012`, or with what the original code changed in the
file of that number (`layers/layers-147.cfg` and so on), and is evaluated beside the numbers that
the paper and the logs of the original code have. Table 1 is of ILSVRC-2010, of which the test
images have labels; Table 2 is of ILSVRC-2012 and its validation images. A run that was interrupted
goes on when the script is started again, and finished rows are kept.

It was not run at full size here: that takes an accelerator and the images, which ImageNet gives to
registered users. `--quick` makes a stand-in of a thousand small classes, trains narrow models on it
for some steps, and proves the way from images to tables. Run (13 trainings of 90 epochs; `--quick`
some minutes on two cores):

    python -m flax_alexnet prepare --data.name imagenet2012 --data.data-dir imagenet2012
    python experiments/paper/imagenet.py --table 2 --data-dir imagenet2012
"""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from arms import changed, with_fields, without
from PIL import Image

import flax_alexnet
from flax_alexnet.commands.evaluate import evaluate
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.models.architectures import ORIGINAL, Conv, Dense, Layer
from flax_alexnet.training.loop import train
from flax_alexnet.utils.errors import UserError, exit_code
from flax_alexnet.weights.labels import match_labels

CROPS = (1, 10)
CLASSES, SIDE = 1000, 232  # of the stand-in, and pixels of its images
MEMBERS = 5  # models of Table 2's average


def one_tower(layer: Layer) -> Sequence[Layer]:
    """#145-half: the kernels of one tower, but for conv5 and the dense layers."""
    fields: dict[str, dict[str, object]] = {
        "conv1": {"features": 48},
        "norm1": {"groups": 1},
        "conv2": {"features": 128, "groups": 1},
        "norm2": {"groups": 1},
        "conv3": {"features": 192},
        "conv4": {"features": 192, "groups": 1},
        "conv5": {"groups": 1},
    }
    return with_fields(**fields)(layer)


def no_overlap(layer: Layer) -> Sequence[Layer]:
    """#147: pooling windows of 2 × 2, and paddings that leave 13 × 13 pixels for conv3."""
    pool = {"kernel_size": 2, "padding": "CEIL"}
    fields: dict[str, dict[str, object]] = {
        **{f"pool{stage}": pool for stage in (1, 2, 5)},
        "conv2": {"padding": (1, 1)},
        "conv4": {"padding": (0, 0)},
        "conv5": {"padding": (0, 0)},
    }
    return with_fields(**fields)(layer)


def apart(layer: Layer) -> Sequence[Layer]:
    """#150: towers that meet in the last layer only, with 160 kernels each in conv2.

    A dense layer in two groups is a convolution of which the kernel is as large as the map.
    """
    match layer:
        case Dense(name="fc6"):
            return [Conv("fc6", 8192, 6, groups=2, bias=1.0)]
        case Dense(name="fc7"):
            return [Conv("fc7", 8192, 1, groups=2, bias=1.0)]
    return with_fields(conv2={"features": 320}, conv3={"groups": 2})(layer)


changed(ORIGINAL, "original_half", one_tower)
changed(ORIGINAL, "original_no_norm", without("norm1", "norm2", "map_norm2"))
changed(ORIGINAL, "original_pool2", no_overlap)
changed(ORIGINAL, "original_apart", apart)

Errors = tuple[float, float]  # top-1 and top-5, in percent


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of a table.

    Attributes:
      flags: those of `python -m flax_alexnet.train`.
      published: top-1 and top-5 error by the number of crops, in percent.
      source: of the published numbers.
      members: models of other seeds, whose probabilities are averaged.
    """

    flags: tuple[str, ...]
    published: dict[int, Errors]
    source: str
    members: int = 1


def _original(variant: str = "original") -> tuple[str, ...]:
    return "--recipe", "krizhevsky2012", "--model.variant", variant


TABLES: dict[int, dict[str, Model]] = {
    1: {
        "145": Model(
            _original(),
            {1: (39.0247, 18.2953), 10: (37.4727, 16.9987)},
            "paper (37.5 and 17.0), log of #145-2010",
        ),
        "half": Model(_original("original_half"), {10: (39.1680, 18.2287)}, "log of #145-half"),
    },
    2: {
        "paper": Model(("--recipe", "paper"), {10: (40.7, 18.2)}, "paper, 1 CNN"),
        "145": Model(_original(), {10: (40.6640, 18.2100)}, "log of #145"),
        "five": Model(_original(), {10: (38.1, 16.4)}, "paper, 5 CNNs", MEMBERS),
        "170": Model(
            ("--recipe", "krizhevsky2013"),
            {1: (42.3407, 19.5827), 10: (40.5280, 18.0480)},
            "log of #170",
        ),
        "no_norm": Model(_original("original_no_norm"), {10: (42.0340, 19.3620)}, "log of #148"),
        "pool2": Model(_original("original_pool2"), {10: (41.0580, 18.5100)}, "log of #147"),
        "apart": Model(_original("original_apart"), {10: (41.8280, 19.3300)}, "log of #150"),
        "modern": Model(("--recipe", "modern"), {}, "what came later"),
    },
}


class Row(NamedTuple):
    """The errors of a model over so many crops, in percent."""

    table: int
    model: str
    crops: int
    top1: float
    top5: float
    paper_top1: float | None
    paper_top5: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The tables of the paper at ImageNet's size."""

    table: Literal[1, 2] = 2
    """1 for ILSVRC-2010, 2 for ILSVRC-2012."""
    data_name: str = "imagenet2012"
    """Name of the prepared dataset, or folder:PATH."""
    data_dir: Path | None = None
    """Folder with the prepared dataset; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    only: tuple[str, ...] = ()
    """Rows of the table; none: all."""
    output: Path = Path("results")
    """Folder of imagenet.csv, to which finished rows are appended."""
    workdir: Path = Path("runs/imagenet")
    """Folder of the runs, which go on if they are interrupted."""
    quick: bool = False
    """Narrow models on a stand-in of a thousand classes, whose results mean nothing."""


# With --quick: two steps, of models with a hundredth of the kernels.
QUICK = (
    *("--data.image-size", str(SIDE), "--batch-size", "64"),
    *("--model.width", "0.02", "--steps", "2", "--log-every", "1"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and evaluates the rows that are missing; returns an exit code."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        return run(arguments)
    except UserError as error:
        return exit_code(error)


def run(arguments: Arguments) -> int:
    """See `main`. Raises UserError for an unknown row, or data that is not there."""
    models = TABLES[arguments.table]
    if unknown := [name for name in arguments.only if name not in models]:
        raise UserError(f"no row {unknown[0]} in this table; expected some of {', '.join(models)}")
    if arguments.quick:
        folder = arguments.workdir / "stand-in"
        make_stand_in(folder)
        arguments = dataclasses.replace(arguments, data_name=f"folder:{folder}", data_dir=None)
    open_dataset(arguments.data_name, arguments.data_dir)
    path = arguments.output / ("imagenet_quick.csv" if arguments.quick else "imagenet.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = finished(path)
    for name in arguments.only or models:
        if (arguments.table, name) not in done:
            workdirs = []
            for seed in range(models[name].members):
                code, workdir = train_model(name, seed, arguments)
                if code:
                    return code
                workdirs.append(workdir)
            append(path, measure(name, workdirs, arguments))
    print(path.read_text(), end="")
    return 0


def train_model(name: str, seed: int, arguments: Arguments) -> tuple[int, Path]:
    """Trains a model of a row; returns the exit code of the training, and its folder."""
    flags = TABLES[arguments.table][name].flags
    # Rows of the same flags share their models.
    same = next(n for n, model in TABLES[arguments.table].items() if model.flags == flags)
    workdir = arguments.workdir / f"table{arguments.table}-{same}-{seed}"
    data = ["--data.name", arguments.data_name]
    if arguments.data_dir:
        data += ["--data.data-dir", str(arguments.data_dir)]
    quick = QUICK if arguments.quick else ()
    config = parse_config([*flags, *data, "--seed", str(seed), "--workdir", str(workdir), *quick])
    return train(config), workdir


def measure(name: str, workdirs: Sequence[Path], arguments: Arguments) -> list[Row]:
    """The errors of a model, or of an average of several, over one crop and ten."""
    published = TABLES[arguments.table][name]
    models = [flax_alexnet.load(workdir) for workdir in workdirs]
    source = open_dataset(arguments.data_name, arguments.data_dir).eval
    labels, _ = match_labels(source.label_names, models[0].label_names, models[0].num_classes)
    rows = []
    for crops in CROPS:
        summary = evaluate(models, source, labels, crops).summary()
        top1, top5 = (100 * (1 - summary[top]) for top in ("top1", "top5"))
        paper_top1, paper_top5 = published.published.get(crops, (None, None))
        ours = arguments.table, name, crops, top1, top5
        rows.append(Row(*ours, paper_top1, paper_top5, published.source))
    return rows


def finished(path: Path) -> set[tuple[int, str]]:
    """The tables and rows that a file has."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(int(row["table"]), row["model"]) for row in csv.DictReader(file)}


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to the file."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows] if is_new else rows)


def make_stand_in(folder: Path) -> None:
    """Writes a thousand classes of one small image each for training and for validation."""
    if (folder / "validation" / f"class_{CLASSES - 1:04}").is_dir():
        return
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        color = rng.integers(0, 256, 3)
        for split in ("train", "validation"):
            place = folder / split / f"class_{label:04}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(color + rng.integers(-40, 40, (4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(place / "image.jpg")


if __name__ == "__main__":
    sys.exit(main())
