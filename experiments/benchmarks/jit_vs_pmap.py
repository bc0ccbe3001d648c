"""The same training step compiled with `jit` over a mesh and with `pmap`: results and speed.

`pmap` was how JAX programs trained on many devices until `jit` could do it: the function sees one
device's share of the batch, and sums over devices are the programmer's. Here the pure step of this
package is compiled both ways. For `pmap` the optimizer first takes the mean of the gradients over
the devices; nothing else differs. Dropout and augmentation are off, since under `pmap` each device
would draw for its own share, and the draws would depend on the number of devices.

Run (a minute on two cores; no data is needed):

    python experiments/benchmarks/jit_vs_pmap.py
"""

import csv
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if "jax" not in sys.modules:  # under test the number of devices is set already
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

from flax_alexnet.data.augment import preprocess
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.models.architectures import architecture
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.training.optimizer import create_optimizer
from flax_alexnet.training.step import create_state, train_step

CLASSES = 10
SIZE = 64


@dataclasses.dataclass(frozen=True)
class Arguments:
    """`jit` against `pmap`."""

    output: Path = Path("results")
    """Where jit_vs_pmap.csv goes."""
    batch_size: int = 64
    """Images in a step, over all devices."""
    rounds: int = 40
    """How often each is timed, in turn, for five steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compares the two; returns 0, or 1 where they do not agree."""
    arguments = tyro.cli(Arguments, args=argv)
    model = AlexNet("notebook", CLASSES, width=0.25, dropout_rate=0.0, initialization="he")
    runs = {"jit": with_jit(model), "pmap": with_pmap(model)}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.batch_size, SIZE, SIZE, 3), np.uint8)
    batch = {"image": images, "label": rng.integers(0, CLASSES, len(images)).astype(np.int32)}
    losses: dict[str, list[float]] = {
        name: [run(batch) for _ in range(5)] for name, run in runs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(5):
                run(batch)
            seconds[name].append((time.perf_counter() - start) / 5)
    difference = max(abs(a / b - 1) for a, b in zip(losses["jit"], losses["pmap"], strict=True))
    ratios = [a / b for a, b in zip(seconds["pmap"], seconds["jit"], strict=True)]
    print(f"{jax.device_count()} devices, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print(f"largest relative difference of five losses: {difference:.1e}")
    print(f"time of a step, pmap to jit: {statistics.median(ratios):.2f} (median of rounds)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "jit_vs_pmap.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "jit_seconds", "pmap_seconds", "pmap_to_jit"])
        for index, row in enumerate(zip(seconds["jit"], seconds["pmap"], ratios, strict=True)):
            writer.writerow([index, *(f"{value:.4f}" for value in row)])
    return 0 if difference < 1e-5 else 1


def step_of(model: AlexNet, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The pure step, without random augmentation."""

    def centre(key: jax.Array, images: jax.Array, mean: jax.Array) -> jax.Array:
        del key
        return preprocess(images, Preprocessing(SIZE, "paper", SIZE, mean, 1 / 64))

    return functools.partial(train_step, model=model, optimizer=optimizer, augment=centre)


def state_of(model: AlexNet, optimizer: optax.GradientTransformation) -> Any:
    """The same initial state for both."""
    mean = jnp.full((SIZE, SIZE, 3), 127.0)
    create = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=SIZE)
    return jax.jit(create)(jax.random.key(0), mean)


def with_jit(model: AlexNet) -> Callable[[dict[str, np.ndarray]], float]:
    """A function that makes a step with a whole batch and returns its loss."""
    layout = make_layout("data", architecture("notebook").scaled(CLASSES, 0.25))
    optimizer = create_optimizer(0.01)
    state = jax.device_put(state_of(model, optimizer), layout.replicated)
    step = jax.jit(
        step_of(model.clone(partition=layout.partition), optimizer),
        in_shardings=(layout.replicated, layout.batch, layout.replicated),
        out_shardings=layout.replicated,
        donate_argnums=0,
    )
    key = jax.random.key(1)

    def run(batch: dict[str, np.ndarray]) -> float:
        nonlocal state
        state, loss = step(state, layout.put(batch, len(batch["label"])), key)
        return float(loss)

    return run


def with_pmap(model: AlexNet) -> Callable[[dict[str, np.ndarray]], float]:
    """The same by `pmap`: batches and state have a leading axis of devices."""
    count = jax.device_count()
    mean_gradients = optax.stateless(lambda updates, _: lax.pmean(updates, "devices"))
    optimizer = optax.chain(mean_gradients, create_optimizer(0.01))
    state = jax.tree.map(lambda x: jnp.stack([x] * count), state_of(model, optimizer))
    step = jax.pmap(
        step_of(model, optimizer), axis_name="devices", in_axes=(0, 0, None), donate_argnums=0
    )
    key = jax.random.key(1)

    def run(batch: dict[str, np.ndarray]) -> float:
        nonlocal state
        shares = {name: rows.reshape(count, -1, *rows.shape[1:]) for name, rows in batch.items()}
        state, loss = step(state, shares, key)
        return float(loss.mean())

    return run


if __name__ == "__main__":
    sys.exit(main())
