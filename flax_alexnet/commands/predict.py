"""`python -m flax_alexnet predict WEIGHTS IMAGE …`: classifies images with a trained model."""

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
    """Classifies images with a trained model."""

    weights: tyro.conf.Positional[Path]
    """A weight file (see convert), or the --workdir of a run."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders with all below them, or globs."""
    top: int = 5
    """Classes shown for each image, the likeliest first."""
    crops: Literal[1, 10] = 1
    """1 for the central crop, 10 for the mean over the paper's ten crops."""
    output: Path | None = None
    """A .json or .csv file for the predictions; none: only the table."""
    plot: Path | None = None
    """A .png file for the images with their classes as bars, as in Figure 4 (left)."""
    batch_size: int = 32
    """Images that the model sees at once."""
    overwrite: bool = False
    """Replace files that are there."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An image and its likeliest classes."""

    example: Example
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
      UserError: weights or images that are not there, or not one image that could be
        read, or a model that gives what is not a number.
    """
    source = find_images(config.images)
    pretrained = load(config.weights)
    check_classifier(pretrained)
    inputs = [*files_of(config.weights), *source.paths]
    files = (config.output, config.plot)
    with new_files(files, inputs, overwrite=config.overwrite) as write:
        kept: list[Prediction] = []
        rows: list[dict[str, Any]] = []
        problems: list[tuple[str, str]] = []
        for prediction in predictions(pretrained, source, config.crops, config.batch_size):
            print(_line(pretrained, prediction, config.top), flush=True)
            example = prediction.example
            if config.output:
                rows.append(_row(pretrained, prediction, config.top))
            if example.image is None:
                problems.append((example.name, example.problem))
            elif config.plot and len(kept) < MOST_PLOTTED:
                kept.append(prediction)
        print(summarize(problems, len(source)))
        if config.output:
            with write(config.output) as path:
                _write(path, rows)
        if config.plot and kept:
            with write(config.plot) as path:
                _draw(pretrained, kept, path)
    if config.output:
        print(f"wrote {config.output}")
    if len(problems) == len(source):
        raise UserError("none of the images could be read")
    if config.plot:
        left_out = len(source) - len(problems) - len(kept)
        print(f"wrote {config.plot}" + (f" without the last {left_out}" if left_out else ""))


def predictions(
    pretrained: Pretrained, source: Source, crops: int = 1, batch_size: int = 32
) -> Iterator[Prediction]:
    """Every image of a source, in order, with the probabilities of its classes.

    Raises:
      UserError: the model gives what is not a number.
    """
    rule = pretrained.preprocessing
    examples = read_examples(source, rule.image_size, rule.resize)
    batch_size = min(batch_size, len(source))
    for example, row in infer(log_probabilities(pretrained, crops), examples, batch_size):
        if row is not None:
            check_numbers(row, example.name)
        yield Prediction(example, None if row is None else np.exp(row))


def _line(pretrained: Pretrained, prediction: Prediction, top: int) -> str:
    text = prediction.example.problem or "  ".join(
        f"{probability:6.1%} {pretrained.name(label)}"
        for label, probability in prediction.best(top)
    )
    return f"{prediction.example.name}: {text}"


def _row(pretrained: Pretrained, prediction: Prediction, top: int) -> dict[str, Any]:
    return {
        "name": prediction.example.name,
        "problem": prediction.example.problem,
        "predictions": [
            {"label": label, "name": pretrained.name(label), "probability": probability}
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


def _draw(pretrained: Pretrained, predictions: list[Prediction], path: Path) -> None:
    images = np.stack([p.example.image for p in predictions if p.example.image is not None])
    probabilities = np.stack([p.probabilities for p in predictions if p.probabilities is not None])
    names = [Path(p.example.name).name for p in predictions]
    plot_predictions(images, None, probabilities, pretrained.label_names, path, titles=names)
