"""Figure 1 of the paper: ReLU against tanh on CIFAR-10, by training error over epochs.

The paper (section 3.1) trains a four-layer convolutional network without regularization and finds
that with ReLU it reaches 25 % training error six times faster than with tanh, "the learning rates
for each network chosen independently to make training as fast as possible". Here the model is that
of the original code (`cuda_convnet_19pct`), without weight decay or augmentation; each
activation function first tries every learning rate for a short while and goes on with the best.

It reads CIFAR-10 as TFDS prepares it. Run (an hour on two cores, `--quick` a minute):

    python -m flax_alexnet prepare --data.name cifar10
    python experiments/paper/figure1_relu_vs_tanh.py
"""

import csv
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import tyro
from matplotlib.figure import Figure

from flax_alexnet.config.recipes import RECIPES
from flax_alexnet.data.dataset import CachedExamples, Examples
from flax_alexnet.data.loader import training_batches
from flax_alexnet.data.mean_image import mean_image
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.models.alexnet import make_model
from flax_alexnet.models.architectures import architecture
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.training.build import (
    compile_steps,
    empty_totals,
    initialize,
    make_optimizer,
    state_template,
    use_compilation_cache,
)
from flax_alexnet.training.step import create_state
from flax_alexnet.utils.errors import UserError, exit_code

TARGET = 0.25  # training error
CLAIM = 6.0  # times fewer epochs, in the paper

Activation = Literal["relu", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "tanh")
Curve = list[tuple[float, float]]  # (epoch, training error)
Curves = dict[tuple[Activation, float], Curve]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """ReLU against tanh on CIFAR-10."""

    data_dir: Path | None = None
    """Where the prepared cifar10 lies; none: TFDS_DATA_DIR or the home's tensorflow_datasets."""
    output: Path = Path("results")
    """Where figure1.png and figure1.csv go."""
    rates: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032)
    """Learning rates to choose from."""
    trial_epochs: float = 1.0
    """Epochs that each rate is tried for."""
    max_epochs: float = 30.0
    """Where to give up waiting for 25 % training error."""
    quick: bool = False
    """A minute's run on few images: shows that it works, and nothing about ReLU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns 0, or 2 where the data is not there."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        dataset = open_dataset(
            "cifar10", arguments.data_dir, "train[:512]" if arguments.quick else "train"
        )
    except UserError as error:
        return exit_code(error)
    if arguments.quick:
        arguments = dataclasses.replace(
            arguments, rates=(0.001, 0.002), trial_epochs=0.5, max_epochs=1.5
        )
    use_compilation_cache()
    examples = CachedExamples(dataset.train, 32)
    curves: Curves = {}
    path = arguments.output / ("figure1_quick" if arguments.quick else "figure1")
    path.parent.mkdir(parents=True, exist_ok=True)
    for activation in ACTIVATIONS:
        runs = {rate: training_error(examples, activation, rate) for rate in arguments.rates}
        for rate in runs:
            curves[activation, rate] = []

        def advance(rate: float, activation: Activation = activation, runs: dict = runs) -> None:
            epoch, error = next(runs[rate])
            print(
                f"{activation} {rate:g}: epoch {epoch:5.2f}  training error {error:.2%}", flush=True
            )
            curves[activation, rate].append((epoch, error))
            save(curves, path)  # each time, so that a run that is stopped leaves what it has

        for rate in runs:
            while epochs(curves[activation, rate]) < arguments.trial_epochs:
                advance(rate)
        rate = best_rates(curves)[activation]
        while curves[activation, rate][-1][1] > TARGET:
            if epochs(curves[activation, rate]) >= arguments.max_epochs:
                break
            advance(rate)
    print(describe(curves))
    return 0


def training_error(
    examples: Examples, activation: Activation, rate: float
) -> Iterator[tuple[float, float]]:
    """Trains for ever; yields (epoch, training error of the half epoch before it)."""
    recipe = RECIPES["cifar10"]
    config = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, activation=activation),
        augment=dataclasses.replace(recipe.augment, flip=False),
        optimizer=dataclasses.replace(
            recipe.optimizer,
            learning_rate=rate,
            weight_decay=0.0,
            schedule="constant",
            drop_epochs=(),
        ),
    )
    key, model = jax.random.key(0), make_model(**vars(config.model) | {"num_classes": 10})
    layout = make_layout("data", architecture(config.model.variant).scaled(10))
    optimizer = make_optimizer(config.optimizer, steps_per_epoch=1.0)
    init = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=32)
    template = state_template(init, 32, layout)
    state = initialize(init, key, mean_image(examples), template)
    step_fn, _ = compile_steps(config, model, optimizer, layout, template)
    every = math.ceil(len(examples) / config.batch_size / 2)
    batches = training_batches(examples, config.batch_size, seed=0)
    for step, batch in enumerate(batches, start=1):
        state, _ = step_fn(state, layout.put(batch, config.batch_size), key)
        if step % every == 0:
            error = 1 - float(state.totals["top1"] / state.totals["images"])
            state = state.replace(totals=empty_totals(layout))
            yield step * config.batch_size / len(examples), error


def epochs(curve: Curve) -> float:
    """How long a curve is."""
    return curve[-1][0] if curve else 0.0


def best_rates(curves: Curves) -> dict[Activation, float]:
    """The rate of each activation function with the least error at the end of the trials."""
    best: dict[Activation, float] = {}
    for activation in sorted({activation for activation, _ in curves}):
        trials = {rate: curve for (name, rate), curve in curves.items() if name == activation}
        length = min(len(curve) for curve in trials.values())
        if length:
            best[activation] = min(trials, key=lambda rate: trials[rate][length - 1][1])
    return best


def epochs_to(target: float, curve: Curve) -> float:
    """The epoch at which a curve falls to `target`, between its points; infinity if it does not."""
    before = (0.0, 1.0)
    for point in curve:
        if point[1] <= target:
            share = (before[1] - target) / (before[1] - point[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return math.inf


def describe(curves: Curves) -> str:
    """What was measured, beside what the paper claims.

    Where one of the two was stopped before 25 %, the lowest error that both reached is compared.
    """
    found = {name: curves[name, rate] for name, rate in best_rates(curves).items()}
    missed = [name for name, curve in found.items() if math.isinf(epochs_to(TARGET, curve))]
    lowest = max(
        (min(error for _, error in curve) for curve in found.values() if curve), default=1.0
    )
    level = max(TARGET, lowest)
    reached = {name: epochs_to(level, curve) for name, curve in found.items()}
    said = f"{level:.0%} training error: "
    said += ", ".join(f"{name} after {epoch:.1f} epochs" for name, epoch in reached.items())
    if {"relu", "tanh"} <= reached.keys():
        said += f", {reached['tanh'] / reached['relu']:.1f} times fewer with ReLU"
    said += f" (the paper: {CLAIM:g} times fewer to {TARGET:.0%})"
    for name in missed:
        said += f"; {name} was stopped after {epochs(found[name]):.1f} epochs"
    return said


def save(curves: Curves, path: Path) -> None:
    """Writes the curves as CSV, a line a point, and draws them, the best in full."""
    best = best_rates(curves)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["activation", "learning_rate", "best", "epoch", "training_error"])
        for (activation, rate), curve in curves.items():
            chosen = int(best.get(activation) == rate)
            writer.writerows(
                [activation, rate, chosen, f"{epoch:.3f}", f"{error:.4f}"] for epoch, error in curve
            )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for (activation, rate), curve in curves.items():
        chosen = best.get(activation) == rate
        color, line = {"relu": ("tab:blue", "-"), "tanh": ("tab:orange", "--")}[activation]
        axis.plot(
            *zip(*curve, strict=True) if curve else ((), ()),
            label=f"{activation}, rate {rate:g}" if chosen else None,
            color=color,
            linestyle=line,
            alpha=1 if chosen else 0.25,
        )
    axis.axhline(TARGET, color="grey", linewidth=0.8)
    axis.set(xlabel="epoch", ylabel="training error", ylim=(0, 0.9), xlim=(0, None))
    axis.set_title(describe(curves).replace(" (", "\n(", 1), fontsize=9)
    if best:
        axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    sys.exit(main())
