"""Opens and checks data, devices and the working directory before anything is compiled."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flax_alexnet.checkpoint.manager import check_steps, digest, set_aside_damaged
from flax_alexnet.config.cli import check_device
from flax_alexnet.config.schema import (
    CONTENT,
    FREE_TO_CHANGE,
    LOCAL,
    Config,
    OptimizerConfig,
    flatten,
    frozen_layers,
    layer_values,
)
from flax_alexnet.data.bad_records import BadRecords, limits
from flax_alexnet.data.dataset import Examples, open_examples
from flax_alexnet.data.sources import Dataset, Source, open_dataset, place_of
from flax_alexnet.models.architectures import Layer, Weighted, architecture, infer_shapes
from flax_alexnet.parallel.distributed import gather, is_main, say_if_slow
from flax_alexnet.parallel.layouts import Layout, make_layout
from flax_alexnet.parallel.meeting import difference, disagreement
from flax_alexnet.parallel.program import program, settings
from flax_alexnet.training.build import LayerSettings
from flax_alexnet.training.epochs import Epochs, Part
from flax_alexnet.training.logger import read_metrics
from flax_alexnet.training.run_directory import (
    SAVED,
    claim,
    locked,
    recorded,
    summarized_step,
)
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import check_room
from flax_alexnet.weights.finetuning import Start, start_from
from flax_alexnet.weights.load import load


@dataclasses.dataclass(frozen=True)
class Data:
    """The images of a run.

    Attributes:
      dataset: both splits, and the names of their classes.
      train: the images to train on.
      eval: the images to evaluate on.
      bad: the unreadable images of the training split and of the evaluation split.
      share: the images that this process checks, and sums for the mean image.
    """

    dataset: Dataset
    train: Examples
    eval: Examples
    bad: tuple[BadRecords, BadRecords]
    share: slice

    def report(self) -> list[str]:
        """A line for each split in which new unreadable images were found since the last call."""
        return [line for records in self.bad if (line := records.report())]


@dataclasses.dataclass(frozen=True)
class History:
    """What the working directory records about the run so far.

    Attributes:
      changes: changes of the configuration since the last start of the run.
      epochs: the epochs of the steps made so far.
      summarized: the step of the run's summary, if there is one.
      evaluations: the step, epoch and loss of each evaluation.
    """

    changes: list[str]
    epochs: Epochs
    summarized: int | None
    evaluations: list[tuple[int, float, float]]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run needs, before anything is compiled.

    Attributes:
      data: the images.
      num_classes: outputs of the model.
      layout: how arrays and layers are split over the devices.
      start: the values taken from `--init-from`, if it is given.
      frozen: names of the layers that keep their values.
      layer_settings: what the optimizer does differently for some layers.
      identity: the description of the configuration and the data that `config.json` stores.
      history: what the working directory records about the run so far.
    """

    data: Data
    num_classes: int
    layout: Layout
    start: Start | None
    frozen: frozenset[str]
    layer_settings: LayerSettings
    identity: dict[str, Any]
    history: History


def set_up(config: Config, resources: contextlib.ExitStack) -> Setup:
    """Opens what a run needs, and locks its working directory until `resources` is closed.

    Raises:
      UserError: `config`, the data or the working directory is not valid on one of the processes,
        or the configurations of the processes differ. All processes raise it.
    """
    error, setup, devices = "", None, use_devices()
    about = flatten(config) | program()
    try:
        setup = _set_up(config, devices, resources)
        about |= setup.identity
    except UserError as mistake:
        error = str(mistake)
    agree(about, error)
    assert setup is not None, "an error has ended all processes"
    # The main process has moved damaged checkpoints away; now all processes must see the same ones.
    left = sorted(path.name for path in config.workdir.glob("checkpoints/*") if path.name.isdigit())
    seen = {
        "checkpoints": left,
        "batch_sizes": setup.history.epochs.parts,
        "summary": setup.history.summarized,
        "evaluations": setup.history.evaluations,
    }
    agree(seen, error="")
    return setup


def layer_settings(config: OptimizerConfig, names: Sequence[str]) -> LayerSettings:
    """What the flags of the optimizer say of some of the layers `names`.

    Raises:
      UserError: a value is not PATTERN=NUMBER, or a pattern matches no layer.
    """
    return LayerSettings(
        rates=layer_values("optimizer.layer-rates", config.layer_rates, names),
        decays=layer_values("optimizer.layer-decays", config.layer_decays, names),
        ends=layer_values("optimizer.freeze-epochs", config.freeze_epochs, names),
    )


def use_devices() -> int:
    """The number of devices of all processes; UserError where JAX finds none."""
    several = jax.distributed.is_initialized()
    waiting = say_if_slow("this process waits for JAX to find the devices of all processes")
    with waiting if several else contextlib.nullcontext():
        return check_device(jax.device_count)


def agree(about: Mapping[str, Any], error: str) -> None:
    """Raises UserError on all processes if one reports an error or their descriptions differ."""
    own = json.dumps({"error": error, "run": about})
    reports = [json.loads(text) for text in gather(own, "open their data and agree on the run")]
    several = len(reports) > 1
    for process, other in enumerate(reports):
        if other["error"]:
            where = f"process {process}: " if several else ""
            raise UserError(where + other["error"])
    digests = {name: f"the digest of {what}" for name, what in CONTENT.items()}
    shared = [
        {digests.get(name, name): v for name, v in other["run"].items() if name not in LOCAL}
        for other in reports
    ]
    if differs := difference(dict(enumerate(shared))):
        raise UserError(disagreement(differs))


def _set_up(config: Config, devices: int, resources: contextlib.ExitStack) -> Setup:
    known = recorded(config.workdir)
    dataset = _open_dataset(config, known)
    num_classes = _num_classes(config, dataset)
    layers = architecture(config.model.variant).scaled(num_classes, config.model.width)
    layout = make_layout(config.parallel.layout, layers, config.parallel.mesh)
    names = [layer.name for layer in layers if isinstance(layer, Weighted)]
    frozen = frozen_layers(config, names)
    start, origin = _start(config, num_classes, dataset.label_names, frozen)
    check_batch_size(config.batch_size, devices)
    check_sizes(config, layers)
    identity = _identity(config, dataset) | origin
    before, changes = _claim(config, identity, known, resources)
    return Setup(
        data=_open_data(config, dataset),
        num_classes=num_classes,
        layout=layout,
        start=start,
        frozen=frozen,
        layer_settings=layer_settings(config.optimizer, names),
        identity=identity,
        history=History(
            changes=changes,
            epochs=Epochs(len(dataset.train), recorded_parts(before, config)),
            summarized=summarized_step(config.workdir),
            evaluations=_evaluations(config.workdir / "metrics.jsonl"),
        ),
    )


def _open_dataset(config: Config, known: Mapping[str, Any]) -> Dataset:
    """Opens both splits; a resumed run keeps the order of the classes that it has recorded."""
    data = config.data
    dataset = open_dataset(
        data.name,
        data.data_dir,
        data.train_split,
        data.eval_split,
        data.image_key,
        data.label_key,
        known.get("dataset.label_names", ()),
    )
    if dataset.note and is_main():
        print(dataset.note, flush=True)
    return dataset


def _num_classes(config: Config, dataset: Dataset) -> int:
    """The number of outputs: `--model.num-classes`, or the number of classes of the dataset."""
    num_classes = config.model.num_classes or len(dataset.label_names)
    if num_classes < len(dataset.label_names):
        raise UserError(
            f"--model.num-classes is {num_classes}, but {dataset.name} has "
            f"{len(dataset.label_names)} classes; give at least as many, or leave it out"
        )
    return num_classes


def _start(
    config: Config, num_classes: int, label_names: Sequence[str], frozen: frozenset[str]
) -> tuple[Start | None, dict[str, str]]:
    """The values taken from `--init-from`, and their digest for the identity of the run."""
    if not config.init_from:
        return None, {}
    pretrained = load(config.init_from)
    start = start_from(pretrained, config, num_classes, label_names)
    if random_layers := sorted(frozen & start.random_layers):
        raise UserError(
            f"--freeze names {', '.join(random_layers)}, which --init-from does not give and would "
            "stay random; freeze others"
        )
    return start, {"init_from.sha256": digest(pretrained.params)}


def check_batch_size(batch_size: int, devices: int) -> None:
    """Raises UserError where a batch cannot be split over the devices."""
    if batch_size % devices:
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of the number of devices, {devices}; the "
            f"nearest multiple is {max(1, round(batch_size / devices)) * devices}"
        )


def check_sizes(config: Config, layers: tuple[Layer, ...]) -> None:
    """Raises UserError if the crop is too small for the model or the disk for the checkpoints."""
    size = config.augment.crop_size
    try:
        parameters = sum(info.parameters for info in infer_shapes(layers, size, size))
    except UserError as error:
        raise UserError(f"--augment.crop-size {size}: {error}") from None
    # A checkpoint has parameters and velocity in float32. Up to four exist at a time: the latest
    # two, the best one, and one that is being written.
    checkpoints = 1 if (config.workdir / "checkpoints").exists() else 4
    check_room(config.workdir, checkpoints * 2 * 4 * parameters)


def _identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What identifies a run: its configuration, its data, and the settings of JAX."""
    of_train, of_eval = dataset.train.digest(), dataset.eval.digest()
    return flatten(config) | {
        "dataset.train": len(dataset.train),
        "dataset.eval": len(dataset.eval),
        "dataset.train_digest": of_train.content,
        "dataset.eval_digest": of_eval.content,
        "dataset.times": of_train.times + of_eval.times,
        "dataset.folder": str(place_of(config.data.name, config.data.data_dir)),
        "dataset.label_names": list(dataset.label_names),
        **settings(),
    }


def _claim(
    config: Config,
    identity: Mapping[str, Any],
    known: Mapping[str, Any],
    resources: contextlib.ExitStack,
) -> tuple[Mapping[str, Any], list[str]]:
    """Claims the directory for this run; returns its last configuration and what has changed."""
    before, changes = claim(
        config.workdir,
        identity,
        free_to_change=FREE_TO_CHANGE | (CONTENT.keys() - known.keys()),  # older runs lack some
        allow_changes=config.allow_changes,
    )
    if is_main():
        if known.get("dataset.times", identity["dataset.times"]) != identity["dataset.times"]:
            print(
                "image files were written again since the last start of the run, with the same "
                "sizes, first and last bytes: they are assumed to be unchanged",
                flush=True,
            )
        resources.enter_context(locked(config.workdir))
        for line in set_aside_damaged(config.workdir / "checkpoints", config.workdir / "damaged"):
            print(line, flush=True)
        check_steps(config.workdir / "checkpoints", config.workdir / SAVED)
    return before, changes


def _open_data(config: Config, dataset: Dataset) -> Data:
    """Opens both splits, and checks their images as `open_examples` does."""
    share = slice(jax.process_index(), None, jax.process_count())
    splits: dict[str, Source] = {"train": dataset.train, "eval": dataset.eval}
    bad = [
        BadRecords(config.workdir, split, len(source), limit, jax.process_index())
        for (split, source), limit in zip(
            splits.items(), limits(dataset, config.data.max_bad), strict=True
        )
    ]
    train, evaluation = (
        _open_examples(config, source, share, records)
        for source, records in zip(splits.values(), bad, strict=True)
    )
    return Data(dataset, train, evaluation, (bad[0], bad[1]), share)


def _open_examples(config: Config, source: Source, share: slice, bad: BadRecords) -> Examples:
    """Opens and checks the images of a split, and says how many of them cannot be read."""
    data = config.data
    examples = open_examples(source, data.image_size, share, data.resize, bad.add)
    if (line := bad.report()) and is_main():
        print(line, flush=True)
    return examples


def recorded_parts(before: Mapping[str, Any], config: Config) -> tuple[Part, ...]:
    """The batch sizes of a run's steps that its `config.json` records."""
    recorded = before.get("batch_sizes") or [[0, before.get("batch_size", config.batch_size)]]
    parts = tuple(Part(step, size) for step, size in recorded)
    steps = [part.step for part in parts]
    if steps != sorted({0, *steps}) or min(part.batch_size for part in parts) < 1:
        raise UserError(
            f"{config.workdir / 'config.json'} has batch_sizes {recorded}; expected pairs of a "
            "step, the first 0, and a batch size; repair it, or take another --workdir"
        )
    return parts


def _evaluations(path: Path) -> list[tuple[int, float, float]]:
    return [
        (line["step"], float(line["epoch"]), float(line["eval_loss"]))
        for line in read_metrics(path)
        if "eval_loss" in line
    ]
