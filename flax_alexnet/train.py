"""`python -m flax_alexnet.train --workdir runs/`: trains a net, from the flags to the report."""

import collections
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.augment import preprocess
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
from flax_alexnet.cluster import is_main, join, nobody_waits, stop_requests, total
from flax_alexnet.config import Config, OptimizerConfig
from flax_alexnet.data.ahead import ahead
from flax_alexnet.data.examples import mean_image
from flax_alexnet.data.loader import training_batches
from flax_alexnet.diagnosis import (
    dead_units,
    divergence,
    largest_activation,
    on_plateau,
    plateau_warning,
)
from flax_alexnet.errors import STOPPED, UserError, exit_code, leave
from flax_alexnet.model import AlexNet
from flax_alexnet.optimizer import applied_rate, backoff, reduce_on_plateau, with_backoff
from flax_alexnet.preflight import Ready, check_and_open
from flax_alexnet.recipes import parse_config
from flax_alexnet.report import draw_report, layer_table, peak_memory
from flax_alexnet.reporting import RunLog, SilentLog, Throughput
from flax_alexnet.sharding import Layout
from flax_alexnet.step import Totals, TrainState, create_state
from flax_alexnet.weights.finetuning import adapt
from flax_alexnet.weights.pretrained import Params
from flax_alexnet.workdir import record, write_json

LOOK_BACK = 2  # steps between making one and looking at its loss
LEAST_BACKOFF = 1 / 8  # of the rate: after three halvings a run that diverges ends
REMEDY = (
    "start again in a new --workdir with a lower --optimizer.learning-rate or with "
    "--optimizer.clip-norm, or go on with --on-divergence rollback"
)
PLATEAU_EPOCHS = 5  # in which a loss that does not move is worth a warning
SAMPLE = 64  # pictures that a diagnosis looks at
RETRY_SECONDS = 10  # between attempts to write what is left at the end


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after a mistake of the user, or as `train` does.

    Ctrl-C before the first step gives 130.
    """
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
      0 when the run is complete; 75 when SIGTERM or Ctrl-C ended it early, and what it had done is
      saved: starting again goes on.

    Raises:
      UserError: something in `config`, the data or the working directory does not fit, which is
        said before anything is compiled; or the loss is not finite.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as held:
        ready = check_and_open(config, held)
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
    checkpoints = Checkpoints(workdir / "checkpoints", 60 * config.save_patience)

    def start_with() -> tuple[np.ndarray, Params]:
        if ready.start:
            return ready.start.mean, ready.start.params
        return mean_image(ready.train, ready.share, total), {}

    def newest() -> TrainState:
        return restore_or_create(checkpoints, init_fn, key, start_with, template)

    def batches_from(step: int) -> Iterator[dict[str, jax.Array]]:
        batches = training_batches(
            ready.train,
            batch_size,
            seed=config.seed,
            start_step=step,
            threads=config.data.threads,
            rows=layout.rows(batch_size),
        )
        return ahead(layout.put(batch, batch_size) for batch in batches)

    state = newest()
    step = start = int(state.step)
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
    checkpoints.say = log.say
    rate = Throughput(batch_size)
    batches = batches_from(start)
    losses: collections.deque[tuple[int, jax.Array]] = collections.deque()  # not yet looked at

    def evaluations_due(step: int) -> int:
        return math.floor(step / (config.eval_epochs * steps_per_epoch) + 1e-9)

    evaluated: dict[str, float] = {}
    classes, warned = len(ready.dataset.label_names), False
    with (
        contextlib.closing(log),
        contextlib.closing(checkpoints),
        stop_requests() as stop_requested,
    ):
        while step < total_steps:
            # The host goes on as soon as the step is in the device's queue, and waits for it only
            # where its results are needed: to log, to evaluate, to save. A loss is looked at once
            # the device is two steps further, so that nobody waits for that either.
            step += 1
            state, loss = step_fn(state, next(batches), key)
            losses.append((step, loss))
            rate.step()
            log.advance()
            epoch = step / steps_per_epoch
            last = step == total_steps
            logged = step % config.log_every == 0 or last
            due = evaluations_due(step) > evaluations_due(step - 1)
            stop = stop_requested(logged or due) and not last
            wait = logged or due or stop
            diverged = first_not_finite(losses, keep=0 if wait else LOOK_BACK)
            if wait:
                rate.pause()
            if (due or last) and not diverged:
                evaluated = evaluate_fn(state)
                diverged = 0 if math.isfinite(evaluated["eval_loss"]) else step
            if diverged:
                found = largest_activation(model, *inside(config, ready, state))
                made = float(applied_rate(state.opt_state)) or config.optimizer.learning_rate
                said = divergence(diverged, made, *found, checkpoints.latest_step())
                lowered = backoff(state.opt_state) / 2
                if config.on_divergence == "stop" or float(lowered) < LEAST_BACKOFF:
                    raise UserError(f"{said}: {REMEDY}")
                checkpoints.saved()
                state = newest()
                state = state.replace(opt_state=with_backoff(state.opt_state, lowered))
                step = int(state.step)
                batches = batches_from(step)
                losses.clear()
                log.rewind(step)
                log.say(f"{said}; back at step {step:,} with {float(lowered):g} of the rate")
                continue
            if logged:
                means = train_means(state.totals)
                means["learning_rate"] = float(applied_rate(state.opt_state))
                log.write({"step": step, "epoch": epoch, **means, **rate.lap()})
                state = state.replace(totals=no_totals(layout))
                checkpoints.look()
            if due or last:
                log.write({"step": step, "epoch": epoch, **evaluated})
                early = 1 <= epoch <= PLATEAU_EPOCHS and not warned
                if early and on_plateau(evaluated["eval_loss"], classes):
                    warned = True
                    dead = dead_units(model, *inside(config, ready, state))
                    log.say(plateau_warning(classes, dead))
                if due and config.optimizer.schedule == "plateau":
                    state = lower_rate(state, evaluated, config.optimizer)
                checkpoints.save(step, state, evaluated, first=log.sync)
            if stop:
                checkpoints.save(step, state, first=log.sync)
                saved = step if checkpoints.saved() else checkpoints.latest_step() or 0
                log.say(f"stopped at step {step:,}; the same command goes on from step {saved:,}")
                return STOPPED

        while not checkpoints.saved():  # a full disk, say: there is nothing else left to do
            time.sleep(RETRY_SECONDS)
            checkpoints.save(step, state, evaluated, first=log.sync)

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
    params = collected(state.params, ready.layout)
    if not is_main():
        return
    mean = jnp.asarray(np.asarray(state.mean))
    summary = {
        "step": int(state.step),
        **evaluated,
        "seconds": time.monotonic() - started,
        "images_per_second": images_per_second,
        "peak_memory_bytes": peak_memory(),
        "params_sha256": digest(params),
    }

    def report() -> None:
        draw_report(
            config.workdir,
            params,
            mean,
            model,
            ready.eval,
            ready.dataset.label_names,
            config.augment,
        )
        write_json(config.workdir / "summary.json", summary)  # last: it marks the run as complete

    keep_trying(report, config.save_patience)
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


def collected(params: Params, layout: Layout) -> Params:
    """All parameters on this host, from all devices; all processes must call it."""
    collect = jax.jit(lambda tree: tree, out_shardings=layout.replicated)
    return jax.tree.map(np.asarray, collect(params))


def inside(config: Config, ready: Ready, state: TrainState) -> tuple[Params, jax.Array]:
    """Parameters on this host, and pictures as they come to the net; all processes must call it."""
    sample = [ready.train[index]["image"] for index in range(min(SAMPLE, len(ready.train)))]
    images = preprocess(
        jnp.asarray(np.stack(sample)),
        jnp.asarray(np.asarray(state.mean)),
        crop_size=config.augment.crop_size,
        scale=config.augment.scale,
    )
    return collected(state.params, ready.layout), images


def first_not_finite(losses: collections.deque[tuple[int, jax.Array]], keep: int) -> int:
    """Takes all (step, loss) but the last `keep`: the first step without a finite loss, or 0."""
    while len(losses) > keep:
        step, loss = losses.popleft()
        if not math.isfinite(float(loss)):
            return step
    return 0


def keep_trying(action: Callable[[], None], minutes: float) -> None:
    """Does what a full disk may hinder, again and again for so many minutes.

    Raises:
      UserError: it could not be done.
    """
    until = time.monotonic() + 60 * minutes
    while True:
        try:
            return action()
        except (UserError, OSError) as error:
            left = until - time.monotonic()
            if left <= 0:
                raise UserError(f"{error}; make room, and the same command goes on") from None
            print(f"{error}; trying again for {math.ceil(left / 60)} minutes", flush=True)
        time.sleep(min(RETRY_SECONDS, left))


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


if __name__ == "__main__":
    leave(main)
