"""`python -m flax_alexnet predict WEIGHTS PICTURE …`: what pictures show, by a trained net."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from flax_alexnet.config.cli import check_batch, check_flag, check_png, command, parse
from flax_alexnet.data.examples import Example, find_images, read_examples, summarize
from flax_alexnet.data.sources import Source
from flax_alexnet.inference.batches import check_numbers, infer, log_probabilities
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import new_files
from flax_alexnet.utils.plotting import plot_predictions
from flax_alexnet.utils.text import write_table
from flax_alexnet.weights.load import files_of, load
from flax_alexnet.weights.pretrained import Pretrained, check_classifier

MOST_PLOTTED = 64


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Classifies pictures with a trained net."""

    weights: tyro.conf.Positional[Path]
    """A weight file (see convert), or the --workdir of a run."""
    pictures: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders with all below them, or globs."""
    top: int = 5
    """Classes shown for each picture, the likeliest first."""
    crops: Literal[1, 10] = 1
    """1 for the central crop, 10 for the mean over the paper's ten crops."""
    output: Path | None = None
    """A .json or .csv file for the predictions; none: only the table."""
    plot: Path | None = None
    """A .png file for the pictures with their classes as bars, as in Figure 4 (left)."""
    batch_size: int = 32
    """Pictures that the net sees at once."""
    overwrite: bool = False
    """Replace files that are there."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A picture and its likeliest classes."""

    picture: Example
    probabilities: np.ndarray | None  # float32[classes]; None where it could not be read

    def best(self, count: int) -> list[tuple[int, float]]:
        """The likeliest classes with their probabilities, the likeliest first."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(label), float(self.probabilities[label])) for label in order]


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    config = parse(PredictConfig, argv, None, "flax_alexnet predict")
    check_flag("top", config.top, config.top >= 1, "1 or more")
    check_png("plot", config.plot)
    check_batch(config.batch_size)
    suffix = config.output.suffix if config.output else ".json"
    check_flag("output", config.output, suffix in (".json", ".csv"), "a .json or .csv file")
    predict(config)


def predict(config: PredictConfig) -> None:
    """Prints, writes and draws what `config` asks for.

    Raises:
      UserError: weights or pictures that are not there, or not one picture that could be
        read, or a net that gives what is not a number.
    """
    source = find_images(config.pictures)
    net = load(config.weights)
    check_classifier(net)
    inputs = [*files_of(config.weights), *source.paths]
    files = (config.output, config.plot)
    with new_files(files, inputs, overwrite=config.overwrite) as write:
        kept: list[Prediction] = []
        rows: list[dict[str, Any]] = []
        problems: list[tuple[str, str]] = []
        for prediction in predictions(net, source, config.crops, config.batch_size):
            print(_line(net, prediction, config.top), flush=True)
            picture = prediction.picture
            if config.output:
                rows.append(_row(net, prediction, config.top))
            if picture.image is None:
                problems.append((picture.name, picture.problem))
            elif config.plot and len(kept) < MOST_PLOTTED:
                kept.append(prediction)
        print(summarize(problems, len(source)))
        if config.output:
            with write(config.output) as path:
                _write(path, rows)
        if config.plot and kept:
            with write(config.plot) as path:
                _draw(net, kept, path)
    if config.output:
        print(f"wrote {config.output}")
    if len(problems) == len(source):
        raise UserError("none of the pictures could be read")
    if config.plot:
        left_out = len(source) - len(problems) - len(kept)
        print(f"wrote {config.plot}" + (f" without the last {left_out}" if left_out else ""))


def predictions(
    net: Pretrained, source: Source, crops: int = 1, batch_size: int = 32
) -> Iterator[Prediction]:
    """Every picture of a source, in order, with the probabilities of its classes.

    Raises:
      UserError: the net gives what is not a number.
    """
    rule = net.preprocessing
    pictures = read_examples(source, rule.image_size, rule.resize)
    batch_size = min(batch_size, len(source))
    for picture, row in infer(log_probabilities(net, crops), pictures, batch_size):
        if row is not None:
            check_numbers(row, picture.name)
        yield Prediction(picture, None if row is None else np.exp(row))


def _line(net: Pretrained, prediction: Prediction, top: int) -> str:
    said = prediction.picture.problem or "  ".join(
        f"{probability:6.1%} {net.name(label)}" for label, probability in prediction.best(top)
    )
    return f"{prediction.picture.name}: {said}"


def _row(net: Pretrained, prediction: Prediction, top: int) -> dict[str, Any]:
    return {
        "name": prediction.picture.name,
        "problem": prediction.picture.problem,
        "predictions": [
            {"label": label, "name": net.name(label), "probability": probability}
            for label, probability in prediction.best(top)
        ],
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=2, ensure_ascii=False)
            return
        write_table(file, _cells(rows))


def _cells(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    yield ["name", "problem", "rank", "label", "class", "probability"]
    for row in rows:
        start = [row["name"], row["problem"]]
        for rank, best in enumerate(row["predictions"], 1):
            yield [*start, rank, *best.values()]
        if not row["predictions"]:
            yield [*start, "", "", "", ""]


def _draw(net: Pretrained, predictions: list[Prediction], path: Path) -> None:
    images = np.stack([p.picture.image for p in predictions if p.picture.image is not None])
    probabilities = np.stack([p.probabilities for p in predictions if p.probabilities is not None])
    names = [Path(p.picture.name).name for p in predictions]
    plot_predictions(images, None, probabilities, net.label_names, path, titles=names)
