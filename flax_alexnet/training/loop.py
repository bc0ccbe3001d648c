"""A training run, from its configuration to the report."""

import collections
import contextlib
import functools
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.config.schema import Config, OptimizerConfig
from flax_alexnet.data.augment import preprocess
from flax_alexnet.data.dataset import mean_image
from flax_alexnet.data.loader import evaluation_batches, training_batches
from flax_alexnet.data.prefetch import ahead
from flax_alexnet.models.alexnet import implementations, make_model
from flax_alexnet.parallel.distributed import (
    is_main,
    nobody_waits,
    signals_reach,
    stop_requests,
    total,
)
from flax_alexnet.training.build import (
    collected,
    compile_steps,
    initialize,
    make_optimizer,
    no_totals,
    state_template,
    use_compilation_cache,
)
from flax_alexnet.training.divergence import (
    dead_units,
    divergence,
    largest_activation,
    new_plateau,
    plateau_remedies,
    plateau_warning,
)
from flax_alexnet.training.epochs import Epochs
from flax_alexnet.training.logger import Clock, RunLog, SilentLog, Throughput
from flax_alexnet.training.optimizer import applied_rate, backoff, reduce_on_plateau, with_backoff
from flax_alexnet.training.report import RETRY_SECONDS, finish, layer_table, stopped_in
from flax_alexnet.training.run_directory import SAVED, SECONDS, record
from flax_alexnet.training.setup import Ready, check_and_open
from flax_alexnet.training.step import Totals, TrainState, create_state
from flax_alexnet.utils.errors import STOPPED, UserError
from flax_alexnet.utils.host_memory import keep_for_reuse
from flax_alexnet.weights.pretrained import Params

LOOK_BACK = 2  # steps between making one and looking at its loss
LEAST_BACKOFF = 1 / 8  # of the rate: after three halvings a run that diverges ends
REMEDY = (
    "start again in a new --workdir with a lower --optimizer.learning-rate or with "
    "--optimizer.clip-norm"
)
SAMPLE = 64  # pictures that a diagnosis looks at


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
    if config.keep_memory:
        keep_for_reuse()
    with contextlib.ExitStack() as held:
        # Who looks for transfers in a program of their own (JAX_TRANSFER_GUARD) need not see ours.
        held.enter_context(jax.transfer_guard("allow"))
        ready = check_and_open(config, held)
        with nobody_waits():
            return run(config, ready, started)


def run(config: Config, ready: Ready, started: float) -> int:
    """Trains on what is ready, as `train` says, since `started` by the monotonic clock."""
    layout, batch_size, workdir = ready.layout, config.batch_size, config.workdir
    clock = Clock(workdir / SECONDS, started)
    if config.compilation_cache:
        use_compilation_cache()

    checkpoints = Checkpoints(
        workdir / "checkpoints", 60 * config.save_patience, marker=workdir / SAVED
    )
    start = checkpoints.latest_step() or 0
    epochs = ready.epochs.going_on(start, batch_size)
    steps_per_epoch = epochs.pictures / batch_size
    total_steps = epochs.steps(config.epochs)
    total_steps = min(total_steps, config.steps or total_steps)

    key = jax.random.key(config.seed)
    model = make_model(**vars(config.model) | {"num_classes": ready.num_classes})
    optimizer = make_optimizer(
        config.optimizer, steps_per_epoch, ready.layer_rates, epochs.first_step
    )
    init_fn = functools.partial(
        create_state,
        model=model,
        optimizer=optimizer,
        crop_size=config.augment.crop_size,
        frozen=ready.frozen,
    )
    template = state_template(init_fn, config.data.image_size, layout)
    step_fn, eval_fn = compile_steps(config, model, optimizer, layout, template, ready.frozen)

    def newest() -> tuple[int, TrainState]:
        """The newest step and state that were saved, or those before the first step.

        The step is in the state too, but to look there would be to wait until the device has drawn
        all parameters, which it does while the host traces and compiles the training step.
        """
        latest = checkpoints.latest_step()
        if latest is not None:
            return latest, checkpoints.restore(latest, template)
        if ready.start:
            mean, given = ready.start.mean, ready.start.params
        else:
            mean, given = mean_image(ready.train, ready.share, total), {}
        return 0, initialize(init_fn, jax.random.fold_in(key, 2**32 - 1), mean, template, given)

    def batches_from(step: int) -> Iterator[dict[str, jax.Array]]:
        batches = training_batches(
            ready.train,
            batch_size,
            seed=config.seed,
            start=epochs.seen(step),
            threads=config.data.threads,
            rows=layout.rows(batch_size),
        )
        return ahead(layout.put(batch, batch_size) for batch in batches)

    def evaluate(state: TrainState) -> dict[str, float]:
        """Loss, top-1 and top-5 accuracy over all pictures to test on, each counted once."""
        totals, threads, rows = no_totals(layout), config.data.threads, layout.rows(batch_size)
        for batch in evaluation_batches(ready.eval, batch_size, threads=threads, rows=rows):
            totals = eval_fn(totals, state.params, state.mean, layout.put(batch, batch_size))
        images = float(totals["images"])
        return {f"eval_{name}": float(totals[name]) / images for name in ("loss", "top1", "top5")}

    step, state = newest()
    complete = start >= total_steps and ready.summarized == start
    if is_main():
        changed = {"batch_sizes": epochs.parts} if len(epochs.parts) > 1 else {}
        record(workdir, ready.identity | changed)
        print(layer_table(model, config.augment.crop_size))
        introduce(config, ready, epochs, start, total_steps)
        if start > total_steps:
            print(f"it has made {start:,} steps already, which stay, and makes no more")
        if complete:
            print(f"this run is complete; everything is in {workdir}")
    if complete:
        return 0

    log = RunLog(workdir, start, total_steps, clock) if is_main() else SilentLog()
    checkpoints.say = log.say
    rate = Throughput(batch_size)
    batches = batches_from(start)
    losses: collections.deque[tuple[int, jax.Array]] = collections.deque()  # not yet looked at

    def evaluations_due(step: int) -> int:
        return math.floor(epochs.fraction(step) / config.eval_epochs + 1e-9)

    def line_due(step: int) -> bool:
        """Whether there is a line of metrics: the first shows the start, and each epoch has one."""
        short = steps_per_epoch < config.log_every and epochs.ends(step)
        return step % config.log_every == 0 or step in (1, total_steps) or short

    def stopped() -> int:
        saved = step if checkpoints.saved() else checkpoints.latest_step() or 0
        log.say(f"stopped at step {step:,}; the same command goes on from step {saved:,}")
        return STOPPED

    evaluated: dict[str, float] = {}
    classes = len(ready.dataset.label_names)
    evaluations = [(epoch, loss) for step, epoch, loss in ready.evaluations if step <= start]
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
            epoch = min(epochs.epoch(step), config.epochs)
            last = step == total_steps
            logged = line_due(step)
            due = evaluations_due(step) > evaluations_due(step - 1)
            stop = stop_requested(logged or due) and not last
            wait = logged or due or stop
            diverged = first_not_finite(losses, keep=0 if wait else LOOK_BACK)
            if wait:
                rate.pause()
            if (due or last) and not diverged:
                evaluated = evaluate(state)
                diverged = 0 if math.isfinite(evaluated["eval_loss"]) else step
            if diverged:
                found = largest_activation(model, *inside(config, ready, state))
                made = float(applied_rate(state.opt_state)) or config.optimizer.learning_rate
                said = divergence(diverged, made, *found, checkpoints.latest_step())
                lowered = backoff(state.opt_state) / 2
                if config.on_divergence == "stop":
                    raise UserError(f"{said}: {REMEDY}, or go on with --on-divergence rollback")
                if float(lowered) < LEAST_BACKOFF:
                    raise UserError(
                        f"{said}; it went back three times, down to 1/8 of the rate: {REMEDY}"
                    )
                checkpoints.saved()
                step, state = newest()
                state = state.replace(opt_state=with_backoff(state.opt_state, lowered))
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
                for bad in ready.bad:
                    if said := bad.news():
                        log.say(said)
                evaluations.append((epoch, evaluated["eval_loss"]))
                if new_plateau(evaluations, classes):
                    dead = dead_units(model, *inside(config, ready, state))
                    remedies = plateau_remedies(
                        pretrained=config.init_from is not None,
                        frozen=bool(ready.frozen),
                        initialization=config.model.initialization,
                        scale=config.augment.scale,
                    )
                    log.say(plateau_warning(classes, dead, remedies))
                if due and config.optimizer.schedule == "plateau":
                    state = lower_rate(state, evaluated, config.optimizer)
                checkpoints.save(step, state, evaluated, first=log.sync)
            if stop:
                checkpoints.save(step, state, first=log.sync)
                return stopped()

        # A full disk, say: there is nothing else left to do. Several processes do not get there,
        # since of these a save that fails ends all.
        while not checkpoints.saved():
            if stopped_in(RETRY_SECONDS, stop_requested):
                return stopped()
            checkpoints.save(step, state, evaluated, first=log.sync)

    if not evaluated:  # all steps had been made, but the run was killed before its report
        evaluated = evaluate(state)
    return finish(config, ready, model, state, evaluated, clock)


def introduce(config: Config, ready: Ready, epochs: Epochs, start: int, total_steps: int) -> None:
    """Prints what is about to happen."""
    if ready.changes and start:
        print(
            f"from step {start:,} on, {'; '.join(ready.changes)}. {epochs.seen(start):,} pictures "
            f"have been seen, epoch {epochs.epoch(start):.2f}: the run goes on with the next"
        )
    if ready.start and start == 0:
        print(ready.start.said)
    if ready.frozen:
        print(f"frozen: {', '.join(sorted(ready.frozen))}")
    if config.model.initialization == "he":
        print("initial values are He et al.'s, not the variant's own, which may stall (see README)")
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    rows = config.batch_size // jax.device_count()
    dtype = jnp.dtype(config.model.dtype)
    print(implementations(ready.layout.layers, platform, dtype, rows=rows))
    mesh = " x ".join(f"{name} {size}" for name, size in ready.layout.mesh.shape.items())
    stops = "Ctrl-C stops" if signals_reach() else "No signal stops it outside the main thread"
    print(
        f"{config.recipe}: {len(ready.train):,} pictures of {ready.dataset.name} in "
        f"{len(ready.dataset.label_names)} classes, {len(ready.eval):,} to test on; steps "
        f"{start:,} to {total_steps:,} with {config.batch_size} pictures each on "
        f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} "
        f"process(es), layout {ready.layout.name} ({mesh}). {stops}; the same command goes on.",
        flush=True,
    )


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
