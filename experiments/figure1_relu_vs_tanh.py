"""Figure 1 of the paper: ReLU against tanh on CIFAR-10, by training error over epochs.

The paper (section 3.1) trains a four-layer convolutional network without regularization and finds
that with ReLU it reaches 25 % training error six times faster than with tanh, "the learning rates
for each network chosen independently to make training as fast as possible". Here the net is that
of the original code (`cuda_convnet_cifar10`), without weight decay or augmentation; each
activation function first tries every learning rate for a short while and goes on with the best.

Run, from the project's root (about 40 minutes on two cores; `--quick` takes one):

    python experiments/figure1_relu_vs_tanh.py --data-dir ../shared/data/tfds
"""

import csv
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import tyro
from matplotlib.figure import Figure

from flax_alexnet.build import compile_steps, make_model, make_optimizer
from flax_alexnet.data.examples import CachedExamples, Examples, mean_image
from flax_alexnet.data.loader import training_batches
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.errors import UserError, exit_code
from flax_alexnet.recipes import RECIPES
from flax_alexnet.sharding import make_mesh, put_batch, replicated
from flax_alexnet.step import create_state, zero_totals
from flax_alexnet.train import use_compilation_cache

TARGET = 0.25  # training error
CLAIM = 6.0  # times fewer epochs, in the paper

Curve = list[tuple[float, float]]  # (epoch, training error)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """ReLU against tanh on CIFAR-10."""

    data_dir: Path | None = None
    """Where the prepared cifar10 lies; none: the home's tensorflow_datasets."""
    output: Path = Path("experiments/results")
    """Where figure1.png and figure1.csv go."""
    rates: tuple[float, ...] = (0.001, 0.002, 0.004)
    """Learning rates to choose from."""
    trial_epochs: float = 0.5
    """Epochs that each rate is tried for."""
    max_epochs: float = 30.0
    """Where to give up waiting for 25 % training error."""
    quick: bool = False
    """A minute's run on few pictures: shows that it works, and nothing about ReLU."""


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
    curves: dict[tuple[str, float], Curve] = {}
    best = {}
    for activation in ("relu", "tanh"):
        runs = {rate: training_error(examples, activation, rate) for rate in arguments.rates}
        for rate, points in runs.items():
            curve = curves[activation, rate] = []
            while not curve or curve[-1][0] < arguments.trial_epochs:
                curve.append(report(activation, rate, next(points)))
        trials = {rate: curves[activation, rate][-1][1] for rate in arguments.rates}
        rate = best[activation] = min(trials, key=trials.__getitem__)
        curve = curves[activation, rate]  # only the best goes on
        while curve[-1][1] > TARGET and curve[-1][0] < arguments.max_epochs:
            curve.append(report(activation, rate, next(runs[rate])))
    reached = {name: epochs_to(TARGET, curves[name, rate]) for name, rate in best.items()}
    finding = describe(reached, arguments.max_epochs)
    print(finding)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "figure1_quick" if arguments.quick else "figure1"
    write_csv(curves, best, arguments.output / f"{name}.csv")
    plot(curves, best, finding, arguments.output / f"{name}.png")
    return 0


def training_error(
    examples: Examples, activation: str, rate: float
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
    mesh, key = make_mesh(), jax.random.key(0)
    model = make_model(config.model, 10)
    optimizer = make_optimizer(config.optimizer, steps_per_epoch=1.0)
    init = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=32)
    state = jax.jit(init, out_shardings=replicated(mesh))(key, mean_image(examples))
    step_fn, _ = compile_steps(config, model, optimizer, mesh)
    every = max(1, len(examples) // config.batch_size // 2)
    batches = training_batches(examples, config.batch_size, seed=0)
    for step, batch in enumerate(batches, start=1):
        state, _ = step_fn(state, put_batch(batch, mesh), key)
        if step % every == 0:
            error = 1 - float(state.totals["top1"] / state.totals["images"])
            state = state.replace(totals=jax.device_put(zero_totals(), replicated(mesh)))
            yield step * config.batch_size / len(examples), error


def report(activation: str, rate: float, point: tuple[float, float]) -> tuple[float, float]:
    """Prints a point of a curve, and passes it on."""
    print(
        f"{activation} {rate:g}: epoch {point[0]:5.2f}  training error {point[1]:.2%}", flush=True
    )
    return point


def epochs_to(target: float, curve: Curve) -> float:
    """The epoch at which a curve falls to `target`, between its points; infinity if it does not."""
    before = (0.0, 1.0)
    for point in curve:
        if point[1] <= target:
            share = (before[1] - target) / (before[1] - point[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return math.inf


def describe(reached: dict[str, float], max_epochs: float) -> str:
    """What was measured, beside what the paper claims."""
    said = ", ".join(
        f"{name} after {epochs:.1f} epochs"
        if math.isfinite(epochs)
        else f"{name} not within {max_epochs:g} epochs"
        for name, epochs in reached.items()
    )
    if math.isfinite(reached["relu"]):
        more = "" if math.isfinite(reached["tanh"]) else "more than "
        ratio = min(reached["tanh"], max_epochs) / reached["relu"]
        said += f": {more}{ratio:.1f} times fewer with ReLU"
    return f"25 % training error: {said} (the paper: {CLAIM:g} times)"


def write_csv(curves: dict[tuple[str, float], Curve], best: dict[str, float], path: Path) -> None:
    """One line a point."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["activation", "learning_rate", "best", "epoch", "training_error"])
        for (activation, rate), curve in curves.items():
            for epoch, error in curve:
                row = [activation, rate, int(best[activation] == rate)]
                writer.writerow([*row, f"{epoch:.3f}", f"{error:.4f}"])


def plot(
    curves: dict[tuple[str, float], Curve],
    best: dict[str, float],
    finding: str,
    path: Path,
) -> None:
    """The best curves in full, the trials of other rates faintly."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for (activation, rate), curve in curves.items():
        chosen = best[activation] == rate
        color = {"relu": "tab:blue", "tanh": "tab:orange"}[activation]
        style = {"linestyle": "-" if activation == "relu" else "--", "color": color}
        label = f"{activation}, rate {rate:g}" if chosen else None
        axis.plot(*zip(*curve, strict=True), label=label, alpha=1 if chosen else 0.25, **style)
    axis.axhline(TARGET, color="grey", linewidth=0.8)
    axis.set(xlabel="epoch", ylabel="training error", ylim=(0, 0.9), xlim=(0, None))
    axis.set_title(finding.replace(": ", "\n", 1), fontsize=9)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
