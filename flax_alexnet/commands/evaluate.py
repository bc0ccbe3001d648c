"""`python -m flax_alexnet evaluate WEIGHTS …`: the accuracy of one or more trained models."""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flax_alexnet.config.cli import NO_DATASET, UseDataConfig, check_batch, command, parse
from flax_alexnet.data.examples import Example, open_split, read_examples, summarize
from flax_alexnet.data.sources import FOLDER, Source, place_of
from flax_alexnet.inference.batches import check_numbers, infer, log_probabilities
from flax_alexnet.training.run_directory import recorded
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.inputs import read_json
from flax_alexnet.utils.outputs import Write, new_files
from flax_alexnet.utils.plotting import plot_confusion
from flax_alexnet.utils.text import write_table
from flax_alexnet.weights.labels import match_labels
from flax_alexnet.weights.load import files_of, load
from flax_alexnet.weights.pretrained import Pretrained, check_classifier

OUTPUTS = ("evaluation.json", "classes.csv", "confusion.csv", "confusion.png")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measures the loss and the accuracy of a trained model, or of an ensemble of several.

    A run is evaluated on the held-out images of its own dataset; --data.name chooses another
    dataset.
    """

    weights: tyro.conf.Positional[tuple[Path, ...]]
    """Weight files (see convert), or working directories of runs; several are an ensemble, whose
    probabilities are averaged."""
    data: UseDataConfig = NO_DATASET
    match_by_order: bool = False
    """Match the classes of the dataset and of the model by their order, if neither names nor
    numbers match."""
    crops: Literal[1, 2, 10] = 1
    """1 for the central crop, 2 for it and its mirror image, 10 for the paper's ten crops."""
    output: Path | None = None
    """A folder for evaluation.json, classes.csv, confusion.csv and confusion.png; none: evaluation
    in the run, or FILE-evaluation beside a weight file. A number is added if it holds another
    evaluation."""
    batch_size: int = 64
    """Images that a model sees at once (times --crops)."""
    overwrite: bool = False
    """Replace existing files with these names, even if they are not an evaluation."""


@dataclasses.dataclass
class Evaluation:
    """What was counted, over the images that could be read, each once.

    Attributes:
      confusion: int64[classes, classes]; rows are the right classes, columns the likeliest ones.
      top5: int64[classes]; images of a class that is among the five likeliest.
      loss: sum of −log of the right class's probability, in nats.
      problems: names of images that could not be read, and why.
    """

    confusion: np.ndarray
    top5: np.ndarray
    loss: float = 0.0
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, label: int, log_probabilities: np.ndarray) -> None:
        """Counts an image, float[classes]; ties are decided by the class number."""
        own = log_probabilities[label]
        better = (log_probabilities > own).sum() + (log_probabilities[:label] == own).sum()
        self.confusion[label, int(np.argmax(log_probabilities))] += 1
        self.top5[label] += bool(better < 5)
        self.loss -= float(own)

    def summary(self) -> dict[str, Any]:
        """Counts and means; accuracies are fractions."""
        images = int(self.confusion.sum())
        return {
            "images": images,
            "not_read": len(self.problems),
            "loss": self.loss / images,
            "top1": float(np.trace(self.confusion)) / images,
            "top5": float(self.top5.sum()) / images,
        }


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    config = parse(EvaluateConfig, argv, None, "flax_alexnet evaluate")
    check_batch(config.batch_size)
    if not config.weights:
        raise UserError("no weights: name weight files, or working directories of runs")
    run(config)


def run(config: EvaluateConfig) -> None:
    """Measures, prints and writes what `config` asks for."""
    models = [load(path) for path in config.weights]
    data, held_out = config.data, HeldOut(None, None)
    if not data.name:
        data, held_out = _own_dataset(config.weights, data)
    source, note = open_split(**vars(data))
    if note:
        print(note, flush=True)
    changed = ""
    if held_out.images not in (None, len(source)):
        changed = f"{held_out.images:,} images were held out in training, and {len(source):,}"
    elif held_out.digest is not None and held_out.digest != source.digest().content:
        changed = "other images were held out in training than"
    if changed:
        print(
            f"warning: {data.name} has changed: {changed} are now, some of which it may have been "
            "trained on",
            file=sys.stderr,
        )
    for pretrained in models:
        check_classifier(pretrained)
        if (pretrained.num_classes, pretrained.label_names) != (
            models[0].num_classes,
            models[0].label_names,
        ):
            raise UserError("the models differ in their classes; evaluate them one by one")
    labels = _match(source.label_names, models[0], config.match_by_order)
    origin = {
        "dataset": data.name,
        **{name: value and str(value) for name, value in vars(data).items() if name != "name"},
        "crops": config.crops,
        "weights": [
            {"path": str(path.resolve()), **pretrained.source}
            for path, pretrained in zip(config.weights, models, strict=True)
        ],
    }
    if data.name.startswith(FOLDER):
        origin["dataset"] = f"{FOLDER}{place_of(data.name)}"
    folder = _free_folder(config.output or default_output(config.weights[0]), origin)
    # What `_free_folder` gives holds this very evaluation, or none.
    overwrite = config.overwrite or (folder / OUTPUTS[0]).is_file()
    files = [folder / name for name in OUTPUTS]
    part = data.split or "what training holds out (--data.split takes other parts)"
    print(f"{data.name}: {len(source):,} images, {part}", flush=True)
    with new_files(
        files,
        [*itertools.chain(*map(files_of, config.weights)), *source.paths],
        overwrite=overwrite,
    ) as write:
        evaluation = evaluate(models, source, labels, config.crops, config.batch_size)
        print(summarize(evaluation.problems, len(source)))
        if not evaluation.confusion.any():
            raise UserError(f"none of the images of {data.name} could be read")
        _write(write, files, evaluation, models[0], origin)
    summary = evaluation.summary()
    print(
        f"{data.name}, {len(models)} model(s), {config.crops} crop(s): loss "
        f"{summary['loss']:.4f}, top-1 {summary['top1']:.2%}, top-5 {summary['top5']:.2%}"
    )
    print(f"everything is in {folder}")


class HeldOut(NamedTuple):
    """What a run evaluated on; None where it does not say it, or other images are asked for."""

    images: int | None
    digest: str | None


def _own_dataset(weights: Sequence[Path], flags: UseDataConfig) -> tuple[UseDataConfig, HeldOut]:
    """The dataset of runs, with the changes in `flags`, and what the first run has held out.

    Raises:
      UserError: a weight file, or runs on different datasets.
    """
    runs = [recorded(path) for path in weights]
    for path, run in zip(weights, runs, strict=True):
        if not run:
            raise UserError(
                f"{path} does not say which images it was trained on: name a dataset with "
                "--data.name"
            )
    fields = {field.name: f"data.{field.name}" for field in dataclasses.fields(UseDataConfig)}
    fields["split"] = "data.eval_split"
    own: list[dict[str, Any]] = [
        {name: run.get(key) for name, key in fields.items()} for run in runs
    ]
    for data, run in zip(own, runs, strict=True):
        # A relative path was one from where the training was started.
        place = run.get("dataset.folder", "")
        if place and Path(place).is_dir():
            data |= (
                {"name": f"{FOLDER}{place}"}
                if data["name"].startswith(FOLDER)
                else {"data_dir": place}
            )
    if any(other != own[0] for other in own):
        raise UserError("the runs were trained on different datasets: name one with --data.name")
    data = own[0] | {name: value for name, value in vars(flags).items() if value}
    data["data_dir"] = data["data_dir"] and Path(data["data_dir"])
    first = {} if flags.split else runs[0]
    held_out = HeldOut(first.get("dataset.eval"), first.get("dataset.eval_digest"))
    return UseDataConfig(**data), held_out


def _match(names: Sequence[str], pretrained: Pretrained, by_order: bool) -> np.ndarray:
    """The model's class of each of the dataset's; by their order only where that is allowed."""
    labels, matched = match_labels(names, pretrained.label_names, pretrained.num_classes)
    if matched:
        return labels
    pairs = ", ".join(
        f"{name} → {pretrained.name(label)}"
        for name, label in zip(names[:3], labels.tolist(), strict=False)
    )
    if not by_order:
        raise UserError(
            "neither names nor numbers tell which of the dataset's classes is which of the "
            f"model's: take the dataset it was trained for, or --match-by-order ({pairs}, …)"
        )
    print(f"warning: the classes are matched by their order alone: {pairs}, …", file=sys.stderr)
    return labels


def default_output(weights: Path) -> Path:
    """Where an evaluation goes: into the run, or beside the file."""
    if weights.is_dir():
        return weights / "evaluation"
    return weights.with_name(f"{weights.stem}-evaluation")


def _free_folder(folder: Path, origin: Mapping[str, Any]) -> Path:
    """`folder`, or FOLDER-2 and so on: the first that holds no evaluation of anything else."""
    whole = folder.resolve()  # since "." has no name
    for number in itertools.count(1):
        path = folder if number == 1 else whole.with_name(f"{whole.name}-{number}")
        try:
            before = read_json(path / OUTPUTS[0])
            if {name: before.get(name) for name in origin} == origin:
                return path
        except FileNotFoundError:
            return path
        except OSError as error:
            raise UserError(f"cannot read {path / OUTPUTS[0]}: {error.strerror}") from None
        except (ValueError, AttributeError):
            pass  # whatever it is, it is not written over
    raise AssertionError("numbers have no end")


def evaluate(
    models: Sequence[Pretrained],
    source: Source,
    labels: np.ndarray,
    crops: int = 1,
    batch_size: int = 64,
) -> Evaluation:
    """Counts over all images of a source; of several models the probabilities are averaged.

    Args:
      models: classifiers with the same classes.
      source: images with labels.
      labels: the models' class of each of the source's, as `match_labels` gives.
      crops: 1, 2 or 10.
      batch_size: images at once.

    Raises:
      UserError: an image without a label, or a model that gives what is not a number.
    """
    classes = models[0].num_classes
    evaluation = Evaluation(np.zeros((classes, classes), np.int64), np.zeros(classes, np.int64))
    for example, row in _ensemble(models, source, crops, min(batch_size, len(source))):
        if row is None:
            evaluation.problems.append((example.name, example.problem))
            continue
        if not 0 <= example.label < len(labels):
            raise UserError(f"image {example.name} has no label; take a split with labels")
        check_numbers(row, example.name)
        evaluation.add(int(labels[example.label]), row)
    return evaluation


def _ensemble(
    models: Sequence[Pretrained], source: Source, crops: int, batch_size: int
) -> Iterator[tuple[Example, Any]]:
    """Each image with its log-probabilities; it is decoded once for all models with one rule."""
    rules: dict[Any, list[Pretrained]] = {}
    for pretrained in models:
        rules.setdefault(
            (pretrained.preprocessing.image_size, pretrained.preprocessing.resize), []
        ).append(pretrained)
    streams = []
    for (size, resize), group in rules.items():
        functions = [log_probabilities(pretrained, crops) for pretrained in group]
        stacked = functools.partial(_stack, functions)
        streams.append(infer(stacked, read_examples(source, size, resize), batch_size))
    for results in zip(*streams, strict=True):
        rows = [row for _, row in results if row is not None]
        with np.errstate(invalid="ignore"):  # a model that gives NaN is refused by name
            mean = np.logaddexp.reduce(np.concatenate(rows)) - np.log(len(models)) if rows else None
        yield results[0][0], mean


def _stack(functions: Sequence[Callable[..., jax.Array]], images: jax.Array) -> jax.Array:
    return jnp.stack([function(images) for function in functions], axis=1)


def _write(
    write: Write,
    files: Sequence[Path],
    evaluation: Evaluation,
    pretrained: Pretrained,
    origin: Mapping[str, Any],
) -> None:
    """evaluation.json, classes.csv (a line a class), confusion.csv and confusion.png."""
    names = [pretrained.name(label) for label in range(pretrained.num_classes)]
    counts = evaluation.confusion.sum(axis=1)
    classes: list[Mapping[str, Any]] = [
        {
            "class": names[label],
            "images": int(count),
            "top1": evaluation.confusion[label, label] / count if count else "",
            "top5": evaluation.top5[label] / count if count else "",
        }
        for label, count in enumerate(counts)
    ]
    report = {
        **evaluation.summary(),
        **origin,
        "problems": dict(evaluation.problems),
    }
    with write(files[0]) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with write(files[1]) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        write_table(file, [list(classes[0]), *(list(row.values()) for row in classes)])
    with write(files[2]) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = ([name, *row] for name, row in zip(names, evaluation.confusion, strict=True))
        write_table(file, [["right class", *names], *rows])
    with write(files[3]) as partial:
        plot_confusion(evaluation.confusion, names, partial)
