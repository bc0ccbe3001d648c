"""A training run, from its configuration to the report."""

import contextlib
import math
import time
from collections.abc import Callable

import jax

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.config.schema import Config, OptimizerConfig
from flax_alexnet.parallel.distributed import exit_on_error, is_main
from flax_alexnet.training.build import empty_totals, use_compilation_cache
from flax_alexnet.training.divergence import DivergenceMonitor, PlateauMonitor, plateau_remedies
from flax_alexnet.training.logger import Clock, RunLog, SilentLog, Throughput, say_line
from flax_alexnet.training.optimizer import (
    applied_rate,
    backoff,
    drop_on_plateau,
    with_backoff,
)
from flax_alexnet.training.report import RETRY_SECONDS, finish, introduce, stopped_in
from flax_alexnet.training.run_directory import SAVED, SECONDS, record
from flax_alexnet.training.setup import Setup, set_up
from flax_alexnet.training.signals import stop_requests
from flax_alexnet.training.step import Totals, TrainState
from flax_alexnet.training.trainer import Trainer, make_trainer
from flax_alexnet.utils.errors import STOPPED
from flax_alexnet.utils.host_memory import keep_for_reuse

LOOK_BACK = 2  # steps between the dispatch of a step and the check of its loss


def train(config: Config) -> int:
    """Trains as `config` says, starting from the newest checkpoint in its working directory.

    Returns:
      0 when the run is complete; 75 when SIGTERM or Ctrl-C ended it early. In that case its state
      is saved, and starting it again resumes it.

    Raises:
      UserError: `config`, the data or the working directory is not valid, which is reported before
        anything is compiled; or the loss is not finite.
    """
    started = time.monotonic()
    if config.keep_memory:
        keep_for_reuse()
    with contextlib.ExitStack() as resources:
        # JAX_TRANSFER_GUARD helps to debug a user's own program; our transfers are intended.
        resources.enter_context(jax.transfer_guard("allow"))
        setup = set_up(config, resources)
        with exit_on_error():
            return run(config, setup, started)


def run(config: Config, setup: Setup, started: float) -> int:
    """Trains with the given setup, see `train`; `started` is a time of the monotonic clock."""
    workdir = config.workdir
    clock = Clock(workdir / SECONDS, started)
    say = say_line if is_main() else _say_nothing
    if config.compilation_cache:
        use_compilation_cache()
    checkpoints = Checkpoints(
        workdir / "checkpoints", 60 * config.save_patience, say, marker=workdir / SAVED
    )
    trainer = make_trainer(config, setup, checkpoints)
    epochs, total_steps = trainer.schedule.epochs, trainer.schedule.total_steps
    step, state = trainer.newest()
    complete = step >= total_steps and setup.history.summarized == step
    if is_main():
        changed = {"batch_sizes": epochs.parts} if len(epochs.parts) > 1 else {}
        record(workdir, setup.identity | changed)
        introduce(config, setup, trainer.model, trainer.schedule, step)
        if complete:
            print(f"this run is complete; everything is in {workdir}")
    if complete:
        return 0
    log = RunLog(workdir, step, total_steps, clock) if is_main() else SilentLog()
    with contextlib.closing(log), contextlib.closing(checkpoints):
        stopped, state, evaluated = fit(trainer, step, state, log, say)
    if stopped:
        return STOPPED
    if not evaluated:  # all steps had been made, but the run was killed before its report
        evaluated = trainer.evaluate(state)
    return finish(config, setup, trainer.model, state, evaluated, clock)


def fit(
    trainer: Trainer,
    step: int,
    state: TrainState,
    log: RunLog | SilentLog,
    say: Callable[[str], None],
) -> tuple[bool, TrainState, dict[str, float]]:
    """Makes the training steps after `step`, which ended in `state`, and saves the last state.

    Returns:
      Whether a signal stopped the run, the last state, and its evaluation if there is one, else {}.
    """
    config, data, schedule = trainer.config, trainer.setup.data, trainer.schedule
    checkpoints, key = trainer.checkpoints, trainer.key
    batches, throughput = trainer.batches_from(step), Throughput(config.batch_size)
    divergence = DivergenceMonitor(
        trainer.model, trainer.inspect, stops=config.on_divergence == "stop"
    )
    plateau = plateau_monitor(trainer, step)
    evaluated: dict[str, float] = {}
    with stop_requests() as stop_requested:
        while step < schedule.total_steps:
            # The host dispatches a step and continues. It waits for the device only where it needs
            # the results: to log, to evaluate or to save. It checks a loss only after it has
            # dispatched two more steps, so that the check does not stall the device either.
            step += 1
            state, loss = trainer.step_fn(state, next(batches), key)
            divergence.add(step, loss)
            throughput.step()
            log.advance()
            epoch = min(schedule.epochs.epoch(step), config.epochs)
            due = schedule.due(step)
            stop = stop_requested(due.line or due.evaluation) and not due.last
            wait = due.line or due.evaluation or stop
            diverged = divergence.first_not_finite(keep=0 if wait else LOOK_BACK)
            if wait:
                throughput.pause()
            if (due.evaluation or due.last) and not diverged:
                evaluated = trainer.evaluate(state)
                diverged = 0 if math.isfinite(evaluated["eval_loss"]) else step
            if diverged:
                rate = float(applied_rate(state.opt_state)) or config.optimizer.learning_rate
                lowered = float(backoff(state.opt_state)) / 2
                text = divergence.explain(diverged, rate, state, checkpoints.latest_step(), lowered)
                checkpoints.saved()
                step, state = trainer.newest()
                state = state.replace(opt_state=with_backoff(state.opt_state, lowered))
                batches = trainer.batches_from(step)
                log.rewind(step)
                say(f"{text}; the run goes back to step {step:,} with {lowered:g} times the rate")
                continue
            if due.line:
                means = train_means(state.totals)
                means["learning_rate"] = float(applied_rate(state.opt_state))
                log.write({"step": step, "epoch": epoch, **means, **throughput.lap()})
                state = state.replace(totals=empty_totals(trainer.setup.layout))
                checkpoints.look()
            if due.evaluation or due.last:
                log.write({"step": step, "epoch": epoch, **evaluated})
                for line in (*data.report(), *plateau.look(epoch, evaluated["eval_loss"], state)):
                    say(line)
                if due.evaluation and config.optimizer.schedule == "plateau":
                    state = lower_rate(state, evaluated, config.optimizer)
                checkpoints.save(step, state, evaluated, first=log.sync)
            if stop:
                checkpoints.save(step, state, first=log.sync)
                say_stopped(step, checkpoints, say)
                return True, state, {}

        # If the last save failed, for example on a full disk, it is retried here. This happens only
        # in a run of one process; with several, a failed save ends all of them.
        while not checkpoints.saved():
            if stopped_in(RETRY_SECONDS, stop_requested):
                say_stopped(step, checkpoints, say)
                return True, state, {}
            checkpoints.save(step, state, evaluated, first=log.sync)
    return False, state, evaluated


def plateau_monitor(trainer: Trainer, start: int) -> PlateauMonitor:
    """Creates the monitor of a loss that does not move, with the evaluations up to step `start`."""
    config, setup = trainer.config, trainer.setup
    remedies = plateau_remedies(
        pretrained=config.init_from is not None,
        frozen=bool(setup.frozen),
        initialization=config.model.initialization,
        scale=config.augment.scale,
    )
    before = [(epoch, loss) for step, epoch, loss in setup.history.evaluations if step <= start]
    classes = len(setup.data.dataset.label_names)
    return PlateauMonitor(trainer.model, trainer.inspect, classes, before, remedies)


def say_stopped(step: int, checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
    """Says at which step a signal stopped the run, and from which step it resumes."""
    saved = step if checkpoints.saved() else checkpoints.latest_step() or 0
    say(f"stopped at step {step:,}; the same command goes on from step {saved:,}")


def train_means(totals: Totals) -> dict[str, float]:
    """Mean loss and accuracy of training since the totals were set to zero."""
    images = float(totals["images"])
    return {f"train_{name}": float(totals[name]) / images for name in ("loss", "top1")}


def lower_rate(
    state: TrainState, evaluated: dict[str, float], config: OptimizerConfig
) -> TrainState:
    """Applies the "plateau" schedule after an evaluation, and returns the new state."""
    opt_state = drop_on_plateau(
        state.opt_state,
        1 - evaluated["eval_top1"],
        patience=config.patience,
        drop_factor=config.drop_factor,
        max_drops=config.max_drops,
    )
    return state.replace(opt_state=opt_state)


def _say_nothing(text: str) -> None:
    del text
