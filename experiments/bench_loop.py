"""What the training loop costs beside the device's work: the share of a step's time on the host.

The loop of `flax_alexnet.train` (read, batch, put on devices, dispatch, log) is timed against the
compiled step alone, on a batch that lies on the devices already; both in turn in one run, on the
notebook's net at 224 pixels and batch 64. What the loop takes longer is not device time.

Run, from the project's root, with nothing else running (six minutes on two cores):

    python experiments/bench_loop.py
"""

import csv
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from flax_alexnet.architectures import architecture
from flax_alexnet.build import (
    compile_steps,
    initialize,
    make_model,
    make_optimizer,
    no_totals,
    state_template,
)
from flax_alexnet.data.loader import ahead, training_batches
from flax_alexnet.recipes import RECIPES
from flax_alexnet.sharding import make_layout
from flax_alexnet.step import create_state

LOG_EVERY = 4  # steps between waits for the device: more often than any recipe has it


class Pictures:
    """Random squares in memory, as a small dataset is once it is decoded."""

    def __init__(self, count: int, size: int):
        self._images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self._images[index], "label": np.int32(index % 1000)}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The share of a step that is not device time."""

    output: Path = Path("experiments/results")
    """Where bench_loop.csv goes."""
    batch_size: int = 64
    """Pictures in a step."""
    rounds: int = 8
    """How often each is timed, in turn, for four steps."""
    quick: bool = False
    """A small net: shows that it works, and nothing about the share."""


def main(argv: Sequence[str] | None = None) -> int:
    """Times both; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    recipe = RECIPES["notebook"]
    if arguments.quick:
        arguments = dataclasses.replace(arguments, batch_size=8, rounds=2)
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, width=0.05),
            augment=dataclasses.replace(recipe.augment, crop_size=64),
            data=dataclasses.replace(recipe.data, image_size=72),
        )
    config = dataclasses.replace(recipe, batch_size=arguments.batch_size)
    size, batch_size = config.data.image_size, config.batch_size
    model = make_model(config.model, 1000)
    layers = architecture(config.model.variant).scaled(1000, config.model.width)
    layout = make_layout("data", layers)
    optimizer = make_optimizer(config.optimizer, steps_per_epoch=1000.0)
    init = functools.partial(
        create_state, model=model, optimizer=optimizer, crop_size=config.augment.crop_size
    )
    template = state_template(init, size, layout)
    state = initialize(init, jax.random.key(0), np.zeros((size, size, 3), np.float32), template)
    step_fn, _ = compile_steps(config, model, optimizer, layout, template)
    key = jax.random.key(1)
    batches = training_batches(Pictures(512, size), batch_size, seed=0)
    placed = ahead(layout.put(batch, batch_size) for batch in batches)
    resident = next(placed)
    state, loss = step_fn(state, resident, key)
    loss.block_until_ready()

    rows = []
    for index in range(arguments.rounds):
        start = time.perf_counter()
        for batch in itertools.islice(placed, LOG_EVERY):
            state, loss = step_fn(state, batch, key)
        float(loss)
        state = state.replace(totals=no_totals(layout))
        loop = (time.perf_counter() - start) / LOG_EVERY
        start = time.perf_counter()
        for _ in range(LOG_EVERY):
            state, loss = step_fn(state, resident, key)
        loss.block_until_ready()
        alone = (time.perf_counter() - start) / LOG_EVERY
        rows.append((index, loop, alone, 1 - alone / loop))
        print(f"round {index}: loop {loop:.3f} s, step alone {alone:.3f} s a step", flush=True)
    share = 1 - statistics.median(alone for _, _, alone, _ in rows) / statistics.median(
        loop for _, loop, _, _ in rows
    )
    print(f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), batch {batch_size}")
    print(f"share of a step that is not device time: {share:.1%} (of the medians of rounds)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / ("bench_loop_quick.csv" if arguments.quick else "bench_loop.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "loop_seconds", "alone_seconds", "share"])
        writer.writerows([index, *(f"{value:.4f}" for value in row)] for index, *row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
