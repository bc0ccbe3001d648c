"""Which claims of the paper hold on CIFAR-10: trains what each of them compares.

A claim compares arms: recipes that differ in one thing, trained with the same seeds. Its rule was
fixed before the runs: the effect of each seed is a difference between runs of that seed, and the
claim holds if the 95 % interval of the mean effect is above zero, does not hold if it is below
zero, and cannot be told apart from none if it contains zero (`verdicts.py`).

The models are those of the original code on 24 × 24 crops, on a schedule of ten epochs, unless an
arm says otherwise (`arms.py`). Claims share the runs of an arm. Each finished run is appended to
`claims.csv`; started again, also on another machine with that file, the script trains what is
missing, and a run that was interrupted goes on.

It reads CIFAR-10 as TFDS prepares it. Run (about eight hours on two cores; `--quick` a minute):

    python -m flax_alexnet prepare --data.name cifar10
    python experiments/paper/claims.py
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from arms import ARMS, RATES, TARGET
from measures import PROBABILITIES, average, make_halves
from runner import Job, Runner
from verdicts import Claim, Effect, Run, Runs, describe, judge, read_runs

from flax_alexnet.data.sources import Source, open_dataset
from flax_alexnet.utils.errors import STOPPED, UserError, exit_code


def _lower(measure: str, better: str, worse: str) -> Effect:
    """How much less of a measure an arm has than another, in points of a hundred."""

    def effect(runs: Mapping[str, Run]) -> float:
        return 100 * (runs[worse].last(measure) - runs[better].last(measure))

    return Effect((better, worse), effect)


def _less_overfitting(better: str, worse: str) -> Effect:
    """How much less the loss of an arm grows from training images to test images."""

    def gap(run: Run) -> float:
        return run.last("test_loss") - run.last("sample_loss")

    def effect(runs: Mapping[str, Run]) -> float:
        return gap(runs[worse]) - gap(runs[better])

    return Effect((better, worse), effect, "nats")


def _within(more: str, less: str) -> Effect:
    """How much more of a measure the base runs have than of another, in points."""

    def effect(runs: Mapping[str, Run]) -> float:
        return 100 * (runs["base"].last(more) - runs["base"].last(less))

    return Effect(("base",), effect)


STARTS = ("start", "start_biases_of_one")


def _times_longer(runs: Mapping[str, Run]) -> float:
    """The logarithm of how many times longer tanh takes to the target."""
    relu, tanh = (runs[f"{name}_best"].epochs_to("train_error", TARGET) for name in RATES)
    return math.log(tanh / relu) if math.isfinite(tanh) else math.inf


def _average_gain(runs: Mapping[str, Run]) -> float:
    """How much less error the average has on some of the test images, in points."""
    run = runs["ensemble"]
    return 100 * (run.last("single_error") - run.last("average_error"))


def _dropout_iterations(runs: Mapping[str, Run]) -> float:
    """The logarithm of how many times longer dropout takes to 40 % training error."""
    with_dropout, without = (
        runs[arm].epochs_to("train_error", 0.4) for arm in ("dense_dropout", "dense")
    )
    return math.log(with_dropout / without) if math.isfinite(with_dropout) else math.inf


def _faster_start(runs: Mapping[str, Run]) -> float:
    """The difference of the mean training error over the first epoch, in points."""
    plain, ones = (runs[arm].mean("train_error") for arm in STARTS)
    return 100 * (plain - ones)


def _fewer_dead(runs: Mapping[str, Run]) -> float:
    """The difference of the mean share of dead units in conv2 and conv3, in points."""
    plain, ones = (
        sum(runs[arm].last(f"dead_{layer}") for layer in ("conv2", "conv3")) / 2 for arm in STARTS
    )
    return 100 * (plain - ones)


CLAIMS = (
    Claim(
        "relu",
        "3.1",
        "A four-layer model reaches 25 % training error in fewer epochs with ReLU than with tanh",
        Effect(("relu_best", "tanh_best"), _times_longer, "times"),
        "6 times",
    ),
    Claim(
        "half",
        "3.2",
        "Two towers have a lower error than one of half the kernels",
        _lower("test_error", "towers", "half"),
        "1.7 and 1.2 points (top-1, top-5)",
    ),
    Claim(
        "apart",
        "3.2",
        "Towers that exchange their maps at conv3 have a lower error than towers that never do",
        _lower("test_error", "towers", "apart"),
        "1.2 and 1.1 points (log of #150)",
    ),
    Claim(
        "norm",
        "3.3",
        "Normalization across maps lowers the error (11pct with and without its norms)",
        _lower("test_error", "11pct", "11pct_no_norm"),
        "2 points on CIFAR-10",
    ),
    Claim(
        "norm_13pct",
        "3.3",
        "The model of 11 % has a lower error than the one of 13 %, which also has a narrower layer",
        _lower("test_error", "11pct", "13pct"),
        "2 points on CIFAR-10",
    ),
    Claim(
        "map_norm",
        "3.3",
        "Normalization within maps lowers the error (18pct; not in the paper's text)",
        _lower("test_error", "base", "no_norm"),
    ),
    Claim(
        "pooling",
        "3.4",
        "Overlapping pooling (3 × 3, stride 2) has a lower error than 2 × 2",
        _lower("test_error", "base", "pool2"),
        "0.4 and 0.3 points (top-1, top-5)",
    ),
    Claim(
        "pooling_overfits",
        "3.4",
        "Models with overlapping pooling are slightly more difficult to overfit",
        _less_overfitting("not_augmented", "pool2_not_augmented"),
    ),
    Claim(
        "augmentation",
        "4.1",
        "Random crops and flips lower the error",
        _lower("test_error", "base", "not_augmented"),
    ),
    Claim(
        "augmentation_overfits",
        "4.1",
        "Without random crops and flips the model overfits",
        _less_overfitting("base", "not_augmented"),
    ),
    Claim(
        "ten_crops",
        "4.1",
        "The mean over ten crops has a lower error than the central crop",
        _within("test_error", "test_error_10_crops"),
        "1.5 and 1.3 points (top-1, top-5)",
    ),
    Claim(
        "color_noise",
        "4.1",
        "Colour noise lowers the error",
        _lower("test_error", "color_noise", "base"),
        "more than 1 point",
    ),
    Claim(
        "dropout_overfits",
        "4.2",
        "Without dropout a model with a wide dense layer overfits",
        _less_overfitting("dense_dropout", "dense"),
    ),
    Claim(
        "dropout_iterations",
        "4.2",
        "Dropout needs more iterations to converge (to 40 % training error)",
        Effect(("dense_dropout", "dense"), _dropout_iterations, "times"),
        "about 2 times",
    ),
    Claim(
        "decay",
        "5",
        "A decay of 0.0005 lowers the training error",
        _lower("sample_error", "paper_decay", "no_decay"),
    ),
    Claim(
        "biases",
        "5",
        "Biases of one accelerate the early learning (mean training error of an epoch)",
        Effect(STARTS, _faster_start),
    ),
    Claim(
        "biases_dead",
        "5",
        "Biases of one leave fewer units that no image makes positive, after one epoch",
        Effect(STARTS, _fewer_dead),
    ),
    Claim(
        "ensemble",
        "6",
        "The average of five models has a lower error than one of them",
        Effect(("ensemble",), _average_gain),
        "2.6 and 1.8 points (top-1, top-5)",
    ),
    Claim(
        "pretraining",
        "6",
        "A model of half of the classes has a lower error if it was trained on the others before",
        _lower("test_error", "second_half_pretrained", "second_half"),
        "1.7 and 1.6 points (top-1, top-5; with 15 million images)",
    ),
    Claim(
        "towers_color",
        "6.1",
        "In every run the kernels of one tower are more selective for colour",
        Effect(("towers",), lambda runs: runs["towers"].last("color_chance"), "chance"),
        "in every run",
    ),
    Claim(
        "neighbours",
        "6.1",
        "Neighbours in the last hidden layer share the class more often than those in pixels",
        _within("neighbours_features", "neighbours_pixels"),
    ),
    Claim(
        "without_conv2",
        "7",
        "Without a middle layer (conv2) the error is higher",
        _lower("test_error", "base", "without_conv2"),
        "about 2 points",
    ),
    Claim(
        "without_conv3",
        "7",
        "Without a middle layer (conv3) the error is higher",
        _lower("test_error", "base", "without_conv3"),
        "about 2 points",
    ),
    Claim(
        "narrow",
        "7",
        "A model of half the width has a higher error",
        _lower("test_error", "base", "narrow"),
    ),
    Claim(
        "wide",
        "7",
        "A model of one and a half times the width has a lower error",
        _lower("test_error", "wide", "base"),
    ),
    *(
        Claim(name, "later", f"The error is lower with {what}", _lower("test_error", name, "base"))
        for name, what in {
            "he": "He et al.'s initial values",
            "cosine": "a cosine schedule with warm-up",
            "label_smoothing": "label smoothing of 0.1",
            "mixup": "mixup of 0.2",
            "resized_crops": "random resized crops",
            "average": "a moving average of the weights",
            "modern": "all of these together",
        }.items()
    ),
    Claim(
        "flips",
        "later",
        "The error is lower for the mean of an image and its mirror image",
        _within("test_error", "test_error_2_crops"),
    ),
)
# Arms that claims name, and the arms that are trained for them.
DERIVED = {
    **{
        f"{activation}_best": tuple(f"{activation}_{rate}" for rate in rates)
        for activation, rates in RATES.items()
    },
    "ensemble": ("base",),
}
PUBLISHED = ("80sec", "19pct", "18pct", "13pct_published", "11pct_shortened")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The claims of the paper on CIFAR-10."""

    data_dir: Path | None = None
    """Folder with the prepared cifar10; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    output: Path = Path("results")
    """Folder of claims.csv, to which finished runs are appended."""
    workdir: Path = Path("runs/claims")
    """Folder of the runs, which go on if they are interrupted."""
    only: tuple[str, ...] = ()
    """Names of claims or arms; none: all."""
    hours: float = math.inf
    """Hours after which the runs stop; the same command goes on."""
    workers: int = 0
    """Runs at a time, each on its own cores; 0: one for each core."""
    quick: bool = False
    """Two seeds of narrow models on few images, whose results mean nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and prints the verdicts; returns an exit code."""
    arguments = tyro.cli(Arguments, args=argv)
    path = arguments.output / ("claims_quick.csv" if arguments.quick else "claims.csv")
    folder = arguments.workdir / ("quick" if arguments.quick else "full")
    runner = Runner(path, folder, arguments.data_dir, arguments.quick)
    until = time.monotonic() + 3600 * arguments.hours
    complete = True
    try:
        arms = arms_of(arguments.only)
        dataset = open_dataset("cifar10", arguments.data_dir)
        if any("{folder}" in flag for arm in arms for flag in ARMS[arm].flags):
            make_halves(dataset, folder, 50 if arguments.quick else sys.maxsize)
        # What has been trained decides what is trained next: the rates of section 3.1.
        while complete and (jobs := missing(arms, read_runs(path), arguments.quick)):
            complete = runner.train(jobs, arguments.workers, until)
        if "base" in arms and complete:
            append_average(runner, dataset.eval, read_runs(path))
    except UserError as error:
        return exit_code(error)
    runs = with_best(read_runs(path))
    for claim in CLAIMS:
        if not arguments.only or claim.name in arguments.only:
            print(describe(claim, judge(claim, runs)))
    return 0 if complete else STOPPED


def arms_of(names: Sequence[str]) -> list[str]:
    """The arms of claims and arms that are named; none: all.

    Raises:
      UserError: there is no such claim or arm.
    """
    known = {claim.name: claim.effect.arms for claim in CLAIMS} | {arm: (arm,) for arm in PUBLISHED}
    arms: dict[str, None] = {}
    for name in names or known:
        if name not in known and name not in ARMS:
            raise UserError(f"unknown claim or arm {name}; expected some of {', '.join(known)}")
        for arm in known.get(name, (name,)):
            for own in DERIVED.get(arm, (arm,)):
                start = ARMS[own].start
                arms |= dict.fromkeys((start, own) if start else (own,))
    return list(arms)


def missing(arms: Sequence[str], runs: Runs, quick: bool) -> list[Job]:
    """The runs of these arms that are not there, seed by seed.

    So a claim has some seeds early. Of the rates of an activation function all are tried with the
    first seed, and the best one with the others.
    """
    best = best_arms(runs)
    jobs = []
    for arm in arms:
        activation = arm.partition("_")[0]
        tried = activation in RATES and arm != best.get(activation)
        seeds = 1 if tried else min(ARMS[arm].seeds, 2 if quick else sys.maxsize)
        jobs += [(arm, seed) for seed in range(seeds) if (arm, seed) not in runs]
    return sorted(jobs, key=lambda job: job[1])


def best_arms(runs: Runs) -> dict[str, str]:
    """The arm of each activation function that is first at the target, once all are tried."""
    best = {}
    for activation in RATES:
        tried = [arm for arm in DERIVED[f"{activation}_best"] if (arm, 0) in runs]
        if len(tried) == len(RATES[activation]):
            best[activation] = min(
                tried, key=lambda arm: runs[arm, 0].epochs_to("train_error", TARGET)
            )
    return best


def with_best(runs: Runs) -> Runs:
    """The runs, and those of each activation function's best rate under a name of their own."""
    return runs | {
        (f"{activation}_best", seed): run
        for activation, best in best_arms(runs).items()
        for (arm, seed), run in runs.items()
        if arm == best
    }


def append_average(runner: Runner, test: Source, runs: Runs) -> None:
    """Appends the errors of the average of the base models, a part of the test images each."""
    seeds = [seed for arm, seed in runs if arm == "base"]
    if ("ensemble", 0) in runs or runner.quick:
        return
    folders = [runner.folder / f"base-{seed}" for seed in seeds]
    if absent := [folder for folder in folders if not (folder / PROBABILITIES).exists()]:
        print(f"ensemble: not measured, since {absent[0]} is not there; it was trained elsewhere")
        return
    labels = np.array([test.read(index).label for index in range(len(test))])
    for fold, (single, together) in enumerate(average(folders, labels)):
        measures = [("single_error", 0.0, single), ("average_error", 0.0, together)]
        runner.append(("ensemble", fold), measures, 0)


if __name__ == "__main__":
    sys.exit(main())
