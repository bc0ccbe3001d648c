"""`python -m flax_alexnet.train --workdir runs/`: trains a net, from the flags to the report."""

import contextlib
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.build import (
    compile_steps,
    evaluate,
    make_model,
    make_optimizer,
    no_totals,
    restore_or_create,
    state_template,
)
from flax_alexnet.checkpoint import Checkpoints, digest
from flax_alexnet.cluster import is_main, join, nobody_waits, total
from flax_alexnet.config import Config, OptimizerConfig
from flax_alexnet.data.ahead import ahead
from flax_alexnet.data.examples import mean_image
from flax_alexnet.data.loader import training_batches
from flax_alexnet.errors import INTERRUPTED, UserError, exit_code, leave
from flax_alexnet.model import AlexNet
from flax_alexnet.optimizer import applied_rate, reduce_on_plateau
from flax_alexnet.preflight import Ready, check_and_open
from flax_alexnet.recipes import parse_config
from flax_alexnet.report import draw_report, layer_table, peak_memory
from flax_alexnet.reporting import RunLog, SilentLog, Throughput
from flax_alexnet.step import Totals, TrainState, create_state
from flax_alexnet.weights.finetuning import adapt
from flax_alexnet.weights.pretrained import Params
from flax_alexnet.workdir import record, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after a mistake of the user, or 130 after Ctrl-C."""
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv, adapt=adapt)
        parallel = config.parallel
        join(
            parallel.coordinator,
            parallel.num_processes,
            parallel.process_id,
            parallel.heartbeat_timeout,
        )
        return train(config)
    except (UserError, KeyboardInterrupt) as error:
        return exit_code(error)


def train(config: Config) -> int:
    """Trains as `config` says, from the newest checkpoint in its working directory on.

    Returns:
      0 when the run is complete, 130 when Ctrl-C ended it early; starting again goes on.

    Raises:
      UserError: something in `config`, the data or the working directory does not fit, which is
        said before anything is compiled; or the loss is not finite.
    """
    started = time.monotonic()
    ready = check_and_open(config)
    with nobody_waits():
        return run(config, ready, started)


def run(config: Config, ready: Ready, started: float) -> int:
    """Trains on what is ready, as `train` says, since `started` by the monotonic clock."""
    layout, batch_size, workdir = ready.layout, config.batch_size, config.workdir
    steps_per_epoch = len(ready.train) / batch_size
    total_steps = math.ceil(config.epochs * steps_per_epoch)
    total_steps = min(total_steps, config.steps or total_steps)
    if config.compilation_cache:
        use_compilation_cache()

    key = jax.random.key(config.seed)
    model = make_model(config.model, ready.num_classes)
    optimizer = make_optimizer(config.optimizer, steps_per_epoch, ready.layer_rates)
    init_fn = functools.partial(
        create_state,
        model=model,
        optimizer=optimizer,
        crop_size=config.augment.crop_size,
        frozen=ready.frozen,
    )
    template = state_template(init_fn, config.data.image_size, layout)
    step_fn, eval_fn = compile_steps(config, model, optimizer, layout, template, ready.frozen)
    evaluate_fn = functools.partial(
        evaluate,
        eval_fn,
        examples=ready.eval,
        batch_size=batch_size,
        threads=config.data.threads,
        layout=layout,
    )
    checkpoints = Checkpoints(workdir / "checkpoints")

    def start_with() -> tuple[np.ndarray, Params]:
        if ready.start:
            return ready.start.mean, ready.start.params
        return mean_image(ready.train, ready.share, total), {}

    state = restore_or_create(checkpoints, init_fn, key, start_with, template)
    start = int(state.step)
    complete = start >= total_steps and ready.summarized
    if is_main():
        record(workdir, ready.identity)
        print(layer_table(model, config.augment.crop_size))
        introduce(config, ready, start, total_steps)
        if complete:
            print(f"this run is complete; everything is in {workdir}")
    if complete:
        return 0

    log = RunLog(workdir, start, total_steps) if is_main() else SilentLog()
    rate = Throughput(batch_size)
    batches = training_batches(
        ready.train,
        batch_size,
        seed=config.seed,
        start_step=start,
        threads=config.data.threads,
        rows=layout.rows(batch_size),
    )
    placed = ahead(layout.put(batch, batch_size) for batch in batches)

    def evaluations_due(step: int) -> int:
        return math.floor(step / (config.eval_epochs * steps_per_epoch) + 1e-9)

    evaluated: dict[str, float] = {}
    with contextlib.closing(log), contextlib.closing(checkpoints), interruptible() as interrupted:
        for step in range(start + 1, total_steps + 1):
            # The host goes on as soon as the step is in the device's queue, and waits for it only
            # where its results are needed: to log, to evaluate, to save.
            state, loss = step_fn(state, next(placed), key)
            rate.step()
            log.advance()
            epoch = step / steps_per_epoch
            due = evaluations_due(step) > evaluations_due(step - 1)
            last = step == total_steps
            stop = interrupted() and not last
            if step % config.log_every == 0 or due or last or stop:
                need_finite(float(loss), step)
                rate.pause()
            if step % config.log_every == 0 or last:
                means = train_means(state.totals)
                means["learning_rate"] = float(applied_rate(state.opt_state))
                log.write({"step": step, "epoch": epoch, **means, **rate.lap()})
                state = state.replace(totals=no_totals(layout))
            if due or last:
                evaluated = evaluate_fn(state)
                need_finite(evaluated["eval_loss"], step)
                log.write({"step": step, "epoch": epoch, **evaluated})
                if due and config.optimizer.schedule == "plateau":
                    state = lower_rate(state, evaluated, config.optimizer)
                checkpoints.save(step, state, evaluated)
            if stop:
                checkpoints.save(step, state)
                log.say(f"stopped at step {step:,}; the same command goes on from there")
                return INTERRUPTED

    if not evaluated:  # all steps had been made, but the run was killed before its report
        evaluated = evaluate_fn(state)
    finish(config, ready, model, state, evaluated, rate.average(), started)
    return 0


def finish(
    config: Config,
    ready: Ready,
    model: AlexNet,
    state: TrainState,
    evaluated: dict[str, float],
    images_per_second: float,
    started: float,
) -> None:
    """Draws the report, writes the summary, and prints the last line."""
    collect = jax.jit(lambda tree: tree, out_shardings=ready.layout.replicated)
    params = jax.tree.map(np.asarray, collect(state.params))
    if not is_main():
        return
    draw_report(
        config.workdir,
        params,
        jnp.asarray(np.asarray(state.mean)),
        model,
        ready.eval,
        ready.dataset.label_names,
        config.augment,
    )
    summary = {
        "step": int(state.step),
        **evaluated,
        "seconds": time.monotonic() - started,
        "images_per_second": images_per_second,
        "peak_memory_bytes": peak_memory(),
        "params_sha256": digest(params),
    }
    write_json(config.workdir / "summary.json", summary)
    print(
        f"test accuracy {evaluated['eval_top1']:.2%} after {summary['step']:,} steps and "
        f"{summary['seconds']:.0f} s; everything is in {config.workdir}"
    )


def introduce(config: Config, ready: Ready, start: int, total_steps: int) -> None:
    """Prints what is about to happen."""
    if ready.start and start == 0:
        print(ready.start.said)
    if ready.frozen:
        print(f"frozen: {', '.join(sorted(ready.frozen))}")
    if config.model.initialization == "he":
        print("initial values are He et al.'s, not the variant's own, which may stall (see README)")
    mesh = " x ".join(f"{name} {size}" for name, size in ready.layout.mesh.shape.items())
    print(
        f"{config.recipe}: {len(ready.train):,} pictures of {ready.dataset.name} in "
        f"{len(ready.dataset.label_names)} classes, {len(ready.eval):,} to test on; steps "
        f"{start:,} to {total_steps:,} with {config.batch_size} pictures each on "
        f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} "
        f"process(es), layout {ready.layout.name} ({mesh}). Ctrl-C stops; the same command goes "
        "on.",
        flush=True,
    )


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is quicker."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # the user has chosen a place
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flax_alexnet"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def need_finite(loss: float, step: int) -> None:
    """Raises UserError for a loss that is infinite or not a number."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}: the run cannot go on; start again in a new "
            "--workdir with a lower --optimizer.learning-rate"
        )


def train_means(totals: Totals) -> dict[str, float]:
    """Mean loss and accuracy of training since the totals were set to zero."""
    images = float(totals["images"])
    return {f"train_{name}": float(totals[name]) / images for name in ("loss", "top1")}


def lower_rate(
    state: TrainState, evaluated: dict[str, float], config: OptimizerConfig
) -> TrainState:
    """The state after an evaluation under the "plateau" schedule."""
    opt_state = reduce_on_plateau(
        state.opt_state,
        1 - evaluated["eval_top1"],
        patience=config.patience,
        drop_factor=config.drop_factor,
        max_drops=config.max_drops,
    )
    return state.replace(opt_state=opt_state)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question to ask between steps; a second one ends at once.

    Of several processes each would ask at another step, so there the first one ends at once.
    """
    if jax.process_count() > 1:
        yield lambda: False
        return
    pressed = False

    def handle(signum: int, frame: Any) -> None:
        del signum, frame
        nonlocal pressed
        pressed = True
        # The system's own action: Python's waits for the steps that the device was given already.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nstopping after the steps under way; Ctrl-C again to stop at once\n")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    leave(main)
