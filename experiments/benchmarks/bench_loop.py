"""What the training loop costs beside the device's work: the share of a step's time on the host.

The loop of `flax_alexnet.train` (read, batch, put on devices, dispatch, log) is timed with a step
that does nothing in the place of the compiled one: that is the host's work. Beside it the compiled
step alone is timed, on a batch that lies on the devices already: the notebook's model at 224 pixels
and batch 64. Most of the host's work is done while the device computes; as if none were, the share
of a step that is not device time is at most host / (host + device). (Timing the whole loop against
the step alone would need steps that vary by less than what is sought; here they vary by a tenth.)

Run, with nothing else running (three minutes on two cores; no data is needed):

    python experiments/benchmarks/bench_loop.py
"""

import contextlib
import csv
import dataclasses
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flax_alexnet.config.recipes import RECIPES
from flax_alexnet.data.dataset import Batch, Examples
from flax_alexnet.data.loader import training_batches
from flax_alexnet.data.prefetch import prefetch
from flax_alexnet.models.alexnet import make_model
from flax_alexnet.models.architectures import architecture
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.training.build import (
    compile_steps,
    empty_totals,
    initialize,
    make_optimizer,
    state_template,
)
from flax_alexnet.training.logger import Clock, RunLog, Throughput
from flax_alexnet.training.loop import train_means
from flax_alexnet.training.optimizer import applied_rate
from flax_alexnet.training.step import create_state

LOG_EVERY = 10  # steps between lines of metrics; recipes have 50 or more


class Images(Examples):
    """Random squares in memory, as a small dataset is once it is decoded."""

    def __init__(self, count: int, size: int):
        self._images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Batch:
        rows = np.asarray(indices)
        mask = np.ones(len(rows), bool)
        return {"image": self._images[rows], "label": (rows % 1000).astype(np.int32), "mask": mask}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The share of a step that is not device time."""

    output: Path = Path("results")
    """Where bench_loop.csv goes."""
    batch_size: int = 64
    """Images in a step."""
    rounds: int = 3
    """How often each is timed, in turn."""
    steps: int = 2
    """Steps of the compiled program in a round."""
    quick: bool = False
    """A small model: shows that it works, and nothing about the share."""


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
    model = make_model(**vars(config.model) | {"num_classes": 1000})
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
    batches = training_batches(Images(512, size), batch_size, seed=0)
    placed = prefetch(layout.put(batch, batch_size) for batch in batches)
    resident = next(placed)
    state, loss = step_fn(state, resident, key)
    loss.block_until_ready()

    def loop_seconds(step: Callable[..., Any], state: Any, steps: int) -> tuple[float, Any]:
        """Seconds a step of the loop as `train` runs it, with its logs."""
        clock = Clock(Path(folder) / "seconds", time.monotonic())
        log, rate = RunLog(Path(folder), 0, steps, clock), Throughput(batch_size)
        start = time.perf_counter()
        for number, batch in zip(range(1, steps + 1), placed, strict=False):
            state, loss = step(state, batch, key)
            rate.step()
            log.advance()
            if number % LOG_EVERY == 0:
                float(loss)
                rate.pause()
                means = train_means(state.totals)
                means["learning_rate"] = float(applied_rate(state.opt_state))
                log.write({"step": number, "epoch": 0.0, **means, **rate.lap()})
                state = state.replace(totals=empty_totals(layout))
        seconds = (time.perf_counter() - start) / steps
        log.close()
        return seconds, state

    def nothing(state: Any, batch: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        del batch, key
        return state.replace(totals=dict.fromkeys(state.totals, one)), one

    one = jax.block_until_ready(jax.device_put(jnp.ones(()), layout.replicated))
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        loop_seconds(nothing, state, LOG_EVERY)  # compiles what logging needs
        for _ in range(arguments.rounds):
            host, _ = loop_seconds(nothing, state, 4 * LOG_EVERY)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                state, loss = step_fn(state, resident, key)
            loss.block_until_ready()
            rows.append((host, (time.perf_counter() - start) / arguments.steps))
    host, device = (statistics.median(column) for column in zip(*rows, strict=True))
    share = host / (host + device)
    print(f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), batch {batch_size}")
    print(f"host {1e3 * host:.1f} ms, device {1e3 * device:.0f} ms a step (medians of rounds)")
    print(f"share of a step that is not device time: at most {share:.2%} (the goal: 3%)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / ("bench_loop_quick.csv" if arguments.quick else "bench_loop.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "host_seconds", "device_seconds"])
        writer.writerows([i, *(f"{value:.5f}" for value in row)] for i, row in enumerate(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
