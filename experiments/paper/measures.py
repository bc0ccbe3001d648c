"""What is measured of a run on CIFAR-10 when it has been trained."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flax_alexnet
from flax_alexnet.config.schema import Config
from flax_alexnet.data.dataset import CachedExamples
from flax_alexnet.data.sources import Dataset, open_dataset
from flax_alexnet.inference.batches import log_probabilities
from flax_alexnet.models.activations import map_names
from flax_alexnet.training.divergence import dead_units
from flax_alexnet.training.logger import read_metrics
from flax_alexnet.utils.plotting import color_selectivity
from flax_alexnet.weights.pretrained import Pretrained

BATCH = 500
SAMPLE = 10_000  # training images on which a trained model is measured again
QUERIES = 1_000  # test images whose neighbours are looked for
NEIGHBOURS = 6  # the paper's Figure 4 shows six
PERMUTATIONS = 10_000
FOLDS = 10  # parts of the test images, of which each gives an effect of an average of models
PROBABILITIES = "probabilities.npy"
HALVES = ("first_half", "second_half")  # folders of half of the classes each


class Measure(NamedTuple):
    """A number that was measured, and the epoch after which it was."""

    name: str
    epoch: float
    value: float


def measure(config: Config, extra: Sequence[str] = ()) -> list[Measure]:
    """The measures of a complete run, whose working directory is that of `config`.

    Args:
      config: the configuration of the run.
      extra: measures besides losses and errors: "crops" (the test error over two and ten crops),
        "neighbours", "towers", "dead" and "probabilities", which are saved in the run's folder.
    """
    result = curves(config)
    pretrained = flax_alexnet.load(config.workdir)
    data = config.data
    dataset = open_dataset(data.name, data.data_dir, data.train_split, data.eval_split)
    train, test = (CachedExamples(source, 32) for source in (dataset.train, dataset.eval))
    sample = train.take(range(min(SAMPLE, len(train))))
    everything = test.take(range(len(test)))

    def add(name: str, value: float) -> None:
        result.append(Measure(name, config.epochs, float(value)))

    for name, value in zip(("loss", "error"), loss_and_error(pretrained, sample), strict=True):
        add(f"sample_{name}", value)
    if "crops" in extra:
        for crops in (2, 10):
            add(f"test_error_{crops}_crops", loss_and_error(pretrained, everything, crops)[1])
    if "probabilities" in extra:
        probabilities = np.exp(outputs(pretrained, everything["image"]))
        np.save(config.workdir / PROBABILITIES, probabilities.astype(np.float16))
    if "dead" in extra:
        seen = pretrained.preprocess(sample["image"][:BATCH])
        for layer, share in dead_units(pretrained.model, pretrained.params, seen).items():
            add(f"dead_{layer}", share)
    if "neighbours" in extra:
        images = sample["image"], everything["image"][:QUERIES]
        labels = sample["label"], everything["label"][:QUERIES]
        pixels = [part.reshape(len(part), -1) for part in images]
        features = [last_hidden(pretrained, part) for part in images]
        for name, (known, queries) in (("pixels", pixels), ("features", features)):
            add(f"neighbours_{name}", same_class(known, queries, *labels))
    if "towers" in extra:
        first, second, chance = towers(np.asarray(pretrained.params["conv1"]["kernel"]))
        add("color_first_tower", first)
        add("color_second_tower", second)
        add("color_chance", chance)
    return result


def curves(config: Config) -> list[Measure]:
    """The losses and errors that the run has logged."""
    result = []
    for line in read_metrics(config.workdir / "metrics.jsonl"):
        for name, value in line.items():
            kind, _, what = name.partition("_")
            kind = {"eval": "test"}.get(kind, kind)
            if kind in ("train", "test") and what in ("loss", "top1"):
                is_loss = what == "loss"
                label = f"{kind}_{'loss' if is_loss else 'error'}"
                result.append(Measure(label, line["epoch"], value if is_loss else 1 - value))
    return result


def reached(workdir: Path, target: float) -> bool:
    """Whether the training error of a run has fallen to a target."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return any(1 - line["train_top1"] <= target for line in lines if "train_top1" in line)


def average(folders: Sequence[Path], labels: np.ndarray) -> list[tuple[float, float]]:
    """The errors of single models and of their average, over each of `FOLDS` parts of the images.

    Args:
      folders: of runs whose probabilities were saved.
      labels: int[n], of the test images.
    """
    probabilities = [np.load(folder / PROBABILITIES).astype(np.float32) for folder in folders]
    single = np.mean([p.argmax(1) != labels for p in probabilities], axis=0)
    together = np.mean(probabilities, axis=0).argmax(1) != labels
    parts = zip(np.array_split(single, FOLDS), np.array_split(together, FOLDS), strict=True)
    return [(float(one.mean()), float(other.mean())) for one, other in parts]


def make_halves(dataset: Dataset, folder: Path, most: int) -> None:
    """Writes the first five and the last five classes of CIFAR-10 as folders of images, once.

    Args:
      dataset: CIFAR-10.
      folder: gets the folders `first_half` and `second_half`, if they are not there.
      most: images of each class in a split at most.
    """
    if all((folder / half).exists() for half in HALVES):
        return
    partial = folder / "halves.partial"  # until all of them are written
    shutil.rmtree(partial, ignore_errors=True)
    for split, source in (("train", dataset.train), ("test", dataset.eval)):
        counts = np.zeros(len(source.label_names), int)
        for index in range(len(source)):
            record = source.read(index)
            label = record.label
            half = HALVES[2 * label // len(counts)]
            place = partial / half / split / source.label_names[label]
            place.mkdir(parents=True, exist_ok=True)
            if counts[label] < most:
                kind = "png" if record.image.startswith(b"\x89PNG") else "jpg"
                (place / f"{counts[label]:05}.{kind}").write_bytes(record.image)
                counts[label] += 1
            if counts.min() >= most:
                break
    for half in HALVES:
        shutil.rmtree(folder / half, ignore_errors=True)
        (partial / half).rename(folder / half)


def outputs(pretrained: Pretrained, images: np.ndarray, crops: int = 1) -> np.ndarray:
    """Log-probabilities, float32[n, classes]."""
    return in_parts(log_probabilities(pretrained, crops), images)


def in_parts(compute: Callable[[jax.Array], jax.Array], images: np.ndarray) -> np.ndarray:
    """The results of a function of images, computed `BATCH` images at a time."""
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(compute(jnp.asarray(part))) for part in parts])


def loss_and_error(
    pretrained: Pretrained, batch: dict[str, np.ndarray], crops: int = 1
) -> tuple[float, float]:
    """The mean loss, and the share of images whose likeliest class is not the right one."""
    log_probability, labels = outputs(pretrained, batch["image"], crops), batch["label"]
    loss = -log_probability[np.arange(len(labels)), labels].mean()
    return float(loss), float((log_probability.argmax(1) != labels).mean())


def last_hidden(pretrained: Pretrained, images: np.ndarray) -> np.ndarray:
    """The activations of the last hidden layer, float32[n, features]."""
    layer = map_names(pretrained.config.variant)[-1]

    @jax.jit
    def compute(images: jax.Array) -> jax.Array:
        seen = pretrained.preprocess(images)
        maps = flax_alexnet.features(pretrained.model, pretrained.params, seen, [layer])[layer]
        return maps.reshape(len(images), -1)

    return in_parts(compute, images)


def same_class(
    known: np.ndarray, queries: np.ndarray, known_labels: np.ndarray, labels: np.ndarray
) -> float:
    """The share of the nearest neighbours of the queries, by Euclid, that have their class."""
    known, queries = known.astype(np.float32), queries.astype(np.float32)
    distances = (known**2).sum(1) - 2 * queries @ known.T
    nearest = np.argpartition(distances, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    return float((known_labels[nearest] == labels[:, None]).mean())


def towers(kernels: np.ndarray) -> tuple[float, float, float]:
    """Whether the two halves of the first layer's kernels differ in their colour selectivity.

    Args:
      kernels: float[h, w, 3, n]; the first n / 2 are those of the first tower.

    Returns:
      The mean colour selectivity of each tower, and the share of random halves of the kernels that
      differ as much or more (a permutation test).
    """
    selectivity = color_selectivity(kernels)
    half = len(selectivity) // 2

    def difference(values: np.ndarray) -> np.ndarray:
        return np.abs(values[..., :half].mean(-1) - values[..., half:].mean(-1))

    draws = np.random.default_rng(0)
    shuffled = draws.permuted(np.tile(selectivity, (PERMUTATIONS, 1)), axis=1)
    actual = difference(selectivity)
    chance = (1 + (difference(shuffled) >= actual - 1e-12).sum()) / (1 + PERMUTATIONS)
    return float(selectivity[:half].mean()), float(selectivity[half:].mean()), float(chance)
