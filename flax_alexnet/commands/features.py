"""`python -m flax_alexnet features WEIGHTS …`: activations of many images into one file."""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from flax_alexnet.config.cli import (
    NO_DATASET,
    UseDataConfig,
    check_batch,
    check_flag,
    check_png,
    command,
    parse,
)
from flax_alexnet.data.examples import (
    Example,
    find_images,
    open_split,
    read_examples,
    summarize,
)
from flax_alexnet.data.sources import NO_LABEL, Source
from flax_alexnet.inference.batches import check_numbers, infer, on_devices
from flax_alexnet.inference.feature_file import READ, SUFFIXES, UNREADABLE, FeatureFile, nearest
from flax_alexnet.models.activations import features
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import check_not_read, check_room, new_files
from flax_alexnet.utils.plotting import plot_neighbours
from flax_alexnet.weights.load import files_of, load
from flax_alexnet.weights.pretrained import Pretrained, check_layers


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """Writes the features of images into one file; another start resumes where it stopped."""

    weights: tyro.conf.Positional[Path]
    """A weight file (see convert), or the --workdir of a run."""
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders (with subfolders) or globs; or none, with a dataset in --data.name."""
    data: UseDataConfig = NO_DATASET
    layers: tuple[str, ...] = ("fc7",)
    """Activations: conv1, norm1, pool1, … conv5, fc6, fc7, logits."""
    output: Path = Path("features.h5")
    """The file: .h5 (HDF5) or .npy (NumPy)."""
    nearest: Path | None = None
    """A .png file for the nearest neighbours of some images, by the features of the last of
    --layers, as in the paper's Figure 4 (right)."""
    queries: tuple[str, ...] = ()
    """Images for --nearest, by the end of their names; none: five images, evenly spaced."""
    neighbours: int = 6
    """Number of neighbours of each image, for --nearest."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """euclidean: the paper's distance; cosine: the distance of features scaled to unit length,
    which suits maps such as conv5."""
    batch_size: int = 64
    """Images that the model sees at once."""
    overwrite: bool = False
    """Replace an existing figure of --nearest."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    config = parse(FeaturesConfig, argv, None, "flax_alexnet features")
    check_batch(config.batch_size)
    check_flag("neighbours", config.neighbours, config.neighbours >= 1, "1 or more")
    check_flag("output", config.output, config.output.suffix in SUFFIXES, "a .h5 or .npy file")
    check_png("nearest", config.nearest)
    if bool(config.images) == bool(config.data.name):
        raise UserError("name either images or a dataset with --data.name")
    run(config)


def run(config: FeaturesConfig) -> None:
    """Writes and draws what `config` asks for."""
    if config.data.name:
        source, note = open_split(**vars(config.data))
        if note:
            print(note, flush=True)
    else:
        source = find_images(config.images)
    named = find_queries(source, config.queries)
    inputs = [*files_of(config.weights), *source.paths]
    check_not_read(config.output, inputs)
    layers = tuple(dict.fromkeys(config.layers))
    pretrained = load(config.weights)
    with (
        new_files([config.nearest], inputs, overwrite=config.overwrite) as write,
        contextlib.closing(open_file(pretrained, source, layers, config.output)) as file,
    ):
        before = extract(pretrained, source, layers, file, min(config.batch_size, len(source)))
        bad = np.flatnonzero(file["status"][:] == UNREADABLE)
        problems = [
            (source.name(int(row)), file["problem"][row].decode(errors="replace")) for row in bad
        ]
        print(summarize(problems, len(source)))
        earlier = f" ({before:,} were there)" if before else ""
        print(f"{', '.join(layers)} of {len(source):,} images{earlier}: {config.output}")
        if len(bad) == len(source):
            raise UserError("none of the images could be read")
        if config.nearest:
            queries = choose_queries(source, file, named)
            rows, distances = nearest(file, layers[-1], queries, config.neighbours, config.distance)
            check_numbers(distances, "the neighbours of images")
            with write(config.nearest) as path:
                draw_nearest(pretrained, source, queries, rows, distances, path)
    if config.nearest:
        print(f"wrote {config.nearest}")


def open_file(
    pretrained: Pretrained, source: Source, layers: Sequence[str], path: Path
) -> FeatureFile:
    """The file for the features of all images of a source, made if it is not there.

    Raises:
      UserError: an unknown layer, one that the model lacks the parameters for, or a file of
      something
        else.
    """
    size = pretrained.preprocessing.crop_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    function = functools.partial(features, pretrained.model, layers=tuple(layers))
    check_layers(pretrained, layers)
    shapes = jax.eval_shape(function, pretrained.params, image)
    names = [source.name(index) for index in range(len(source))]
    sizes = {layer: shapes[layer].shape[1:] for layer in layers}
    if not path.exists():
        check_room(path, len(names) * 4 * sum(math.prod(shape) for shape in sizes.values()))
    return FeatureFile(path, names, sizes)


def extract(
    pretrained: Pretrained,
    source: Source,
    layers: Sequence[str],
    file: FeatureFile,
    batch_size: int = 64,
) -> int:
    """Writes the features of all images that `file` does not have yet, a batch at a time.

    Images that could not be read, and those whose files have changed since, are tried again. A
    model may give what is not finite, of which a line warns.

    Returns:
      How many were there before.

    Raises:
      UserError: those that it has are not this model's, or it cannot be written.
    """
    stamps = np.array([source.stamp(row) for row in range(len(source))], np.int64).reshape(-1, 2)
    same = (file["size"] == stamps[:, 0]) & (file["changed"] == stamps[:, 1])
    there = (file["status"] == READ) & same
    function = _function(pretrained, layers)
    _check_same(pretrained, function, source, layers, file, np.flatnonzero(there))
    if changed := np.count_nonzero((file["status"] == READ) & ~same):
        print(f"{changed:,} images have changed since they were read, and are read again")
    todo = np.flatnonzero(~there).tolist()
    rule = pretrained.preprocessing
    examples = read_examples(source, rule.image_size, rule.resize, todo)
    results = infer(function, examples, batch_size)
    before = len(source) - len(todo)
    bar = tqdm(results, total=len(source), initial=before, unit="image", disable=None)
    results = iter(bar)
    odd: list[str] = []
    for start in range(0, len(todo), batch_size):
        rows = todo[start : start + batch_size]
        batch = list(itertools.islice(results, len(rows)))
        columns: dict[str, Any] = {
            layer: np.stack(
                [
                    np.full(file.types[layer].shape, np.nan, np.float32)
                    if row is None
                    else row[layer]
                    for _, row in batch
                ]
            )
            for layer in layers
        }
        odd += [
            example.name
            for example, row in batch
            if row is not None and not all(np.isfinite(row[layer]).all() for layer in layers)
        ]
        columns["label"] = [example.label for example, _ in batch]
        columns["problem"] = [example.problem.encode() for example, _ in batch]
        columns["size"], columns["changed"] = stamps[rows].T
        status = np.array([UNREADABLE if row is None else READ for _, row in batch], np.uint8)
        file.write(rows, columns, status)
    if odd:  # their rows say that they were read, and not that they could not
        print(
            f"warning: the model gives what is not a finite number for {len(odd):,} images (the "
            f"first: {odd[0]}): its weights are too large or damaged",
            file=sys.stderr,
        )
    return before


def _function(pretrained: Pretrained, layers: Sequence[str]) -> Callable[[jax.Array], Any]:
    def of_batch(model: AlexNet, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        values = features(model, params, pretrained.preprocess(images), layers)
        return {layer: value.astype(jnp.float32) for layer, value in values.items()}

    return on_devices(pretrained, of_batch)


def _check_same(
    pretrained: Pretrained,
    function: Callable[[jax.Array], Any],
    source: Source,
    layers: Sequence[str],
    file: FeatureFile,
    there: np.ndarray,
) -> None:
    """Raises UserError unless labels, and what the first of the rows gives, are the file's."""
    labels = file["label"][:]
    if any(source.label(int(row)) not in (NO_LABEL, labels[row]) for row in there):
        raise UserError(
            f"{file.path} has the classes in another order; take another --output, or remove it"
        )
    for row in there[:1]:
        rule = pretrained.preprocessing
        examples = read_examples(source, rule.image_size, rule.resize, [int(row)])
        ((_, values),) = infer(function, examples, 1)
        if values is None or not all(
            np.allclose(
                values[layer],
                file[layer][row],
                rtol=1e-3,
                atol=1e-3 * np.abs(values[layer]).max(),
                equal_nan=True,
            )
            for layer in layers
        ):
            raise UserError(
                f"{file.path} holds the features of another model, or the images have changed; "
                "take another --output, or remove it"
            )


def find_queries(source: Source, endings: Sequence[str]) -> list[int]:
    """The rows of the images whose names end so.

    Raises:
      UserError: an ending that no name has, or several have.
    """
    result = []
    names = [source.name(index) for index in range(len(source))] if endings else []
    for ending in endings:
        rows = [row for row, name in enumerate(names) if name.endswith(ending)]
        if len(rows) != 1:
            raise UserError(f"--queries {ending}: {len(rows)} images have names that end so")
        result += rows
    return result


def choose_queries(source: Source, file: FeatureFile, named: Sequence[int]) -> list[int]:
    """The rows that were named, or five, evenly spaced, of those that could be read.

    Raises:
      UserError: one that was named could not be read, or only one could.
    """
    status = file["status"][:]
    for row in named:
        if status[row] != READ:
            raise UserError(f"{source.name(row)} could not be read; choose other --queries")
    there = np.flatnonzero(status == READ)
    if len(there) < 2:
        raise UserError("only one image could be read, and it has no neighbour")
    count = min(5, len(there))
    spaced = [there[(2 * place + 1) * len(there) // (2 * count)] for place in range(count)]
    return list(named) or [int(row) for row in spaced]


def draw_nearest(
    pretrained: Pretrained,
    source: Source,
    queries: Sequence[int],
    rows: np.ndarray,
    distances: np.ndarray,
    path: Path,
) -> None:
    """Draws the images of `queries` with their neighbours, which `nearest` has found."""
    rule = pretrained.preprocessing
    shown = np.concatenate([np.array(queries)[:, None], rows], axis=1)
    examples = read_examples(source, rule.image_size, rule.resize, shown.reshape(-1).tolist())
    images = np.stack([_shown(example, rule.image_size) for example in examples])
    images = images.reshape(*shown.shape, *images.shape[1:])
    names = [[Path(source.name(int(row))).stem for row in line] for line in shown]
    plot_neighbours(
        images[:, 0],
        images[:, 1:],
        distances,
        [line[0] for line in names],
        [line[1:] for line in names],
        path,
    )


def _shown(example: Example, size: int) -> np.ndarray:
    blank = np.full((size, size, 3), 255, np.uint8)  # for a file that has gone meanwhile
    return blank if example.image is None else example.image
