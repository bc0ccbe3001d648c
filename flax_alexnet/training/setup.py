"""What is opened and checked before anything is compiled: data, devices, working directory."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flax_alexnet.checkpoint.manager import digest, need_steps, set_aside_damaged
from flax_alexnet.config.cli import check_device
from flax_alexnet.config.schema import (
    CONTENT,
    FREE_TO_CHANGE,
    LOCAL,
    Config,
    flatten,
    frozen_layers,
    layer_rates,
)
from flax_alexnet.data.bad_records import BadRecords, Limit, limits
from flax_alexnet.data.dataset import Examples, open_examples
from flax_alexnet.data.sources import Dataset, Source, open_dataset, place_of
from flax_alexnet.models.architectures import Conv, Dense, Layer, architecture, trace
from flax_alexnet.parallel.distributed import gather, is_main, said_if_long
from flax_alexnet.parallel.layouts import Layout, make_layout
from flax_alexnet.parallel.meeting import difference, disagreement
from flax_alexnet.parallel.program import program, settings
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
from flax_alexnet.utils.outputs import need_room
from flax_alexnet.weights.finetuning import Start, start_from
from flax_alexnet.weights.load import load


class Ready(NamedTuple):
    """What a run needs, in order."""

    dataset: Dataset
    train: Examples
    eval: Examples
    bad: tuple[BadRecords, BadRecords]  # of both
    num_classes: int
    layout: Layout
    start: Start | None  # what is taken from --init-from
    frozen: frozenset[str]  # layers that keep their values
    layer_rates: dict[str, float]
    share: slice  # of the pictures: those that this process tries, and adds up for their mean
    identity: dict[str, Any]  # the configuration and the data, as JSON has them
    changes: list[str]  # in it since the run was here last
    epochs: Epochs  # of the steps made so far
    summarized: int | None  # the step of the run's summary
    evaluations: list[tuple[int, float, float]]  # step, epoch and loss of those made before


def check_and_open(config: Config, held: contextlib.ExitStack) -> Ready:
    """Opens what a run needs, and locks its working directory for as long as `held` is open.

    Raises:
      UserError: something in `config`, the data or the working directory does not fit, here or on
        another process of the run, or the processes' configurations differ. All processes raise.
    """
    error, ready, devices = "", None, use_devices()
    about = flatten(config) | program()
    try:
        ready = _open(config, devices, held)
        about |= ready.identity
    except UserError as mistake:
        error = str(mistake)
    agree(about, error)
    assert ready is not None, "an error has ended all processes"
    # Now that the main process has set aside what is damaged, all must see the same.
    left = sorted(path.name for path in config.workdir.glob("checkpoints/*") if path.name.isdigit())
    seen = {
        "checkpoints": left,
        "batch_sizes": ready.epochs.parts,
        "summary": ready.summarized,
        "evaluations": ready.evaluations,
    }
    agree(seen, error="")
    return ready


def use_devices() -> int:
    """The number of devices of all processes; UserError where JAX finds none."""
    several = jax.distributed.is_initialized()
    waiting = said_if_long("this process waits for JAX to find the devices of all processes")
    with waiting if several else contextlib.nullcontext():
        return check_device(jax.device_count)


def agree(about: Mapping[str, Any], error: str) -> None:
    """Raises UserError on every process where one has an error, or is not about the same."""
    own = json.dumps({"error": error, "run": about})
    said = [json.loads(text) for text in gather(own, "open their data and agree on the run")]
    several = len(said) > 1
    for process, other in enumerate(said):
        if other["error"]:
            where = f"process {process}: " if several else ""
            raise UserError(where + other["error"])
    digests = {name: f"the digest of {what}" for name, what in CONTENT.items()}
    shared = [
        {digests.get(name, name): v for name, v in other["run"].items() if name not in LOCAL}
        for other in said
    ]
    if differs := difference(dict(enumerate(shared))):
        raise UserError(disagreement(differs))


def _open(config: Config, devices: int, held: contextlib.ExitStack) -> Ready:
    data, parallel, known = config.data, config.parallel, recorded(config.workdir)
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
    num_classes = config.model.num_classes or len(dataset.label_names)
    if num_classes < len(dataset.label_names):
        raise UserError(
            f"--model.num-classes is {num_classes}, but {dataset.name} has "
            f"{len(dataset.label_names)} classes; give at least as many, or leave it out"
        )
    layers = architecture(config.model.variant).scaled(num_classes, config.model.width)
    layout = make_layout(parallel.layout, layers, parallel.mesh)
    names = [layer.name for layer in layers if isinstance(layer, Conv | Dense)]
    frozen, rates = frozen_layers(config, names), layer_rates(config, names)
    start = None
    if config.init_from:
        net = load(config.init_from)
        start = start_from(net, config, num_classes, dataset.label_names)
        if frozen & start.anew:
            raise UserError(
                f"--freeze names {', '.join(sorted(frozen & start.anew))}, which --init-from does "
                "not give and would stay random; freeze others"
            )
    if config.batch_size % devices:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide by the {devices} devices; the "
            f"nearest that does is {max(1, round(config.batch_size / devices)) * devices}"
        )
    check_room(config, layers)
    of_train, of_eval = dataset.train.digest(), dataset.eval.digest()
    identity = flatten(config) | {  # with other data it would be another run
        "dataset.train": len(dataset.train),
        "dataset.eval": len(dataset.eval),
        "dataset.train_digest": of_train.content,
        "dataset.eval_digest": of_eval.content,
        "dataset.times": of_train.times + of_eval.times,
        "dataset.folder": str(place_of(data.name, data.data_dir)),
        "dataset.label_names": list(dataset.label_names),
        **settings(),
    }
    if config.init_from:
        identity["init_from.sha256"] = digest(net.params)
    before, changes = claim(
        config.workdir,
        identity,
        free_to_change=FREE_TO_CHANGE | (CONTENT.keys() - known.keys()),  # as of an older version
        allow_changes=config.allow_changes,
    )
    if is_main():
        if known.get("dataset.times", identity["dataset.times"]) != identity["dataset.times"]:
            print(
                "pictures were written anew since the run was here last, with the same sizes, "
                "beginnings and ends: they are taken for the same",
                flush=True,
            )
        held.enter_context(locked(config.workdir))
        for line in set_aside_damaged(config.workdir / "checkpoints", config.workdir / "damaged"):
            print(line, flush=True)
        need_steps(config.workdir / "checkpoints", config.workdir / SAVED)
    share = slice(jax.process_index(), None, jax.process_count())
    limit_of_train, limit_of_eval = limits(dataset, data.max_bad)
    bad = (
        _bad_records(config, "train", dataset.train, limit_of_train),
        _bad_records(config, "eval", dataset.eval, limit_of_eval),
    )
    return Ready(
        dataset,
        _open_examples(config, dataset.train, share, bad[0]),
        _open_examples(config, dataset.eval, share, bad[1]),
        bad,
        num_classes,
        layout,
        start,
        frozen,
        rates,
        share,
        identity,
        changes,
        Epochs(len(dataset.train), recorded_parts(before, config)),
        summarized_step(config.workdir),
        _evaluations(config.workdir / "metrics.jsonl"),
    )


def recorded_parts(before: Mapping[str, Any], config: Config) -> tuple[Part, ...]:
    """The batch sizes of a run's steps, as its configuration has them."""
    recorded = before.get("batch_sizes") or [[0, before.get("batch_size", config.batch_size)]]
    parts = tuple(Part(step, size) for step, size in recorded)
    steps = [part.step for part in parts]
    if steps != sorted({0, *steps}) or min(part.batch_size for part in parts) < 1:
        raise UserError(
            f"{config.workdir / 'config.json'} has batch_sizes {recorded}, where steps from 0 on, "
            "each with a batch size, are expected; mend it, or take another --workdir"
        )
    return parts


def _evaluations(path: Path) -> list[tuple[int, float, float]]:
    return [
        (line["step"], float(line["epoch"]), float(line["eval_loss"]))
        for line in read_metrics(path)
        if "eval_loss" in line
    ]


def _bad_records(config: Config, split: str, source: Source, limit: Limit) -> BadRecords:
    return BadRecords(config.workdir, split, len(source), limit, jax.process_index())


def _open_examples(config: Config, source: Source, share: slice, bad: BadRecords) -> Examples:
    """A split's pictures, tried where they were not before; says how many cannot be read."""
    data = config.data
    examples = open_examples(source, data.image_size, share, data.resize, bad.add)
    if (said := bad.news()) and is_main():
        print(said, flush=True)
    return examples


def check_room(config: Config, layers: tuple[Layer, ...]) -> None:
    """Raises UserError where the crop does not fit the net, or its checkpoints the disk."""
    size = config.augment.crop_size
    try:
        parameters = sum(info.parameters for info in trace(layers, size, size))
    except UserError as error:
        raise UserError(f"--augment.crop-size {size}: {error}") from None
    # Parameters and velocity in float32; two latest, a best and one that is being written.
    checkpoints = 1 if (config.workdir / "checkpoints").exists() else 4
    need_room(config.workdir, checkpoints * 2 * 4 * parameters)
