"""`python -m flax_alexnet.train --workdir runs/`: trains a net, from the flags to the report."""

import contextlib
import functools
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.architectures import architecture, trace
from flax_alexnet.augment import preprocess
from flax_alexnet.build import (
    compile_steps,
    evaluate,
    make_model,
    make_optimizer,
    restore_or_create,
)
from flax_alexnet.checkpoint import Checkpoints, digest
from flax_alexnet.config import FREE_TO_CHANGE, AugmentConfig, Config, OptimizerConfig, flatten
from flax_alexnet.data.examples import Examples, open_examples
from flax_alexnet.data.loader import training_batches
from flax_alexnet.data.sources import Dataset, open_dataset
from flax_alexnet.errors import INTERRUPTED, UserError, exit_code, first_line
from flax_alexnet.optimizer import applied_rate, reduce_on_plateau
from flax_alexnet.plots import plot_curves, plot_kernels, plot_predictions
from flax_alexnet.recipes import parse_config
from flax_alexnet.reporting import RunLog, Throughput, read_metrics
from flax_alexnet.sharding import make_mesh, put_batch, replicated
from flax_alexnet.step import Totals, TrainState, create_state, zero_totals
from flax_alexnet.workdir import claim, need_room, record, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after a mistake of the user, or 130 after Ctrl-C."""
    try:
        return train(parse_config(sys.argv[1:] if argv is None else argv))
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
    data, workdir, batch_size = config.data, config.workdir, config.batch_size
    dataset = open_dataset(data.name, data.data_dir, data.train_split, data.eval_split)
    num_classes = config.model.num_classes or len(dataset.label_names)
    check(config, dataset, num_classes)
    identity = flatten(config) | {  # with other data it would be another run
        "dataset.train": len(dataset.train),
        "dataset.eval": len(dataset.eval),
        "dataset.label_names": list(dataset.label_names),
    }
    claim(workdir, identity, free_to_change=FREE_TO_CHANGE, allow_changes=config.allow_changes)
    train_examples = open_examples(dataset.train, data.image_size)
    eval_examples = open_examples(dataset.eval, data.image_size)
    if config.compilation_cache:
        use_compilation_cache()

    mesh = make_mesh()
    key = jax.random.key(config.seed)
    model = make_model(config.model, num_classes)
    steps_per_epoch = len(dataset.train) / batch_size
    total_steps = math.ceil(config.epochs * steps_per_epoch)
    total_steps = min(total_steps, config.steps or total_steps)
    optimizer = make_optimizer(config.optimizer, steps_per_epoch)
    step_fn, eval_fn = compile_steps(config, model, optimizer, mesh)
    init_fn = functools.partial(
        create_state, model=model, optimizer=optimizer, crop_size=config.augment.crop_size
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = restore_or_create(checkpoints, init_fn, key, train_examples, data.image_size, mesh)
    record(workdir, identity)
    start = int(state.step)

    print(layer_table(model, config.augment.crop_size))
    if config.model.initialization == "he":
        print("initial values are He et al.'s, not the variant's own, which may stall (see README)")
    print(
        f"{config.recipe}: {len(dataset.train):,} pictures of {dataset.name} in "
        f"{len(dataset.label_names)} classes, {len(dataset.eval):,} to test on; steps {start:,} to "
        f"{total_steps:,} with {batch_size} pictures each on {jax.device_count()} "
        f"{jax.default_backend()} device(s). Ctrl-C stops; the same command goes on.",
        flush=True,
    )
    if start >= total_steps and (workdir / "summary.json").exists():
        print(f"this run is complete; everything is in {workdir}")
        return 0
    log = RunLog(workdir, start, total_steps)
    rate = Throughput(batch_size)
    batches = training_batches(
        train_examples, batch_size, seed=config.seed, start_step=start, threads=data.threads
    )

    def evaluations_due(step: int) -> int:
        return math.floor(step / (config.eval_epochs * steps_per_epoch) + 1e-9)

    evaluated: dict[str, float] = {}
    loss = None
    with contextlib.closing(log), contextlib.closing(checkpoints), interruptible() as interrupted:
        for step in range(start + 1, total_steps + 1):
            last_loss = loss
            state, loss = step_fn(state, put_batch(next(batches), mesh), key)
            if last_loss is not None:
                # The host waits for the step before, while the device is busy with this one.
                need_finite(last_loss, step - 1)
            rate.step()
            log.advance()
            epoch = step / steps_per_epoch
            due = evaluations_due(step) > evaluations_due(step - 1)
            last = step == total_steps
            if step % config.log_every == 0 or last:
                need_finite(loss, step)
                means = train_means(state.totals)
                means["learning_rate"] = float(applied_rate(state.opt_state))
                log.write({"step": step, "epoch": epoch, **means, **rate.lap()})
                state = state.replace(totals=jax.device_put(zero_totals(), replicated(mesh)))
            if due or last:
                evaluated = evaluate(eval_fn, state, eval_examples, batch_size, data.threads, mesh)
                need_finite(evaluated["eval_loss"], step)
                log.write({"step": step, "epoch": epoch, **evaluated})
                if due and config.optimizer.schedule == "plateau":
                    state = lower_rate(state, evaluated, config.optimizer)
                checkpoints.save(step, state, evaluated)
                rate.restart()
            if interrupted() and not last:
                need_finite(loss, step)
                checkpoints.save(step, state)
                log.say(f"stopped at step {step:,}; the same command goes on from there")
                return INTERRUPTED

    if not evaluated:  # all steps had been made, but the run was killed before its report
        evaluated = evaluate(eval_fn, state, eval_examples, batch_size, data.threads, mesh)
    report(workdir, state, model, eval_examples, dataset.label_names, config.augment)
    summary = {
        "step": int(state.step),
        **evaluated,
        "seconds": time.monotonic() - started,
        "images_per_second": rate.average(),
        "peak_memory_bytes": peak_memory(),
        "params_sha256": digest(state.params),
    }
    write_json(workdir / "summary.json", summary)
    print(
        f"test accuracy {evaluated['eval_top1']:.2%} after {summary['step']:,} steps and "
        f"{summary['seconds']:.0f} s; everything is in {workdir}"
    )
    return 0


def check(config: Config, dataset: Dataset, num_classes: int) -> None:
    """Raises UserError where the parts of a configuration do not fit each other or the machine."""
    if num_classes < len(dataset.label_names):
        raise UserError(
            f"--model.num-classes is {num_classes}, but {dataset.name} has "
            f"{len(dataset.label_names)} classes; give at least as many, or leave it out"
        )
    try:
        devices = jax.device_count()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"JAX finds no device ({first_line(error)}): see JAX_PLATFORMS") from None
    if jax.process_count() > 1:
        raise UserError("several processes are not supported yet; start one for all devices")
    if config.batch_size % devices:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide by the {devices} devices; the "
            f"nearest that does is {max(1, round(config.batch_size / devices)) * devices}"
        )
    layers = architecture(config.model.variant).scaled(num_classes, config.model.width)
    size = config.augment.crop_size
    try:
        parameters = sum(info.parameters for info in trace(layers, size, size))
    except UserError as error:
        raise UserError(f"--augment.crop-size {size}: {error}") from None
    # Parameters and velocity in float32; two latest, a best and one that is being written.
    checkpoints = 1 if (config.workdir / "checkpoints").exists() else 4
    need_room(config.workdir, checkpoints * 2 * 4 * parameters)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is quicker."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # the user has chosen a place
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flax_alexnet"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def layer_table(model: nn.Module, crop_size: int) -> str:
    """The layers with their shapes and parameters, to print."""
    images = jnp.zeros((1, crop_size, crop_size, 3))
    return model.tabulate(
        jax.random.key(0), images, depth=1, console_kwargs={"width": 100, "force_terminal": False}
    )


def need_finite(loss: float | jax.Array, step: int) -> None:
    """Raises UserError for a loss that is infinite or not a number."""
    if not np.isfinite(loss):
        raise UserError(
            f"the loss is {float(loss)} at step {step}: the run cannot go on; start again in a new "
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
    """Turns the first Ctrl-C into a question to ask between steps; a second one ends at once."""
    pressed = False

    def handle(signum: int, frame: Any) -> None:
        del signum, frame
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def peak_memory() -> int:
    """Bytes: the most that the first device has used where it tells, else the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on macOS in bytes
    resident *= 1 if sys.platform == "darwin" else 1024
    return statistics.get("peak_bytes_in_use") or resident


def report(
    workdir: Path,
    state: TrainState,
    model: nn.Module,
    examples: Examples,
    label_names: Sequence[str],
    settings: AugmentConfig,
) -> None:
    """Draws `report/`: the curves, the first layer's kernels, and eight predictions."""
    plot_curves(read_metrics(workdir / "metrics.jsonl"), workdir / "report" / "curves.png")
    plot_kernels(np.asarray(state.params["conv1"]["kernel"]), workdir / "report" / "conv1.png")
    order = np.random.default_rng(0).permutation(len(examples))
    chosen = [examples[int(index)] for index in order[:8]]
    images = np.stack([example["image"] for example in chosen])
    seen = preprocess(
        jnp.asarray(images), state.mean, crop_size=settings.crop_size, scale=settings.scale
    )
    logits: Any = model.apply({"params": state.params}, seen)
    labels = [int(example["label"]) for example in chosen]
    probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    path = workdir / "report" / "predictions.png"
    plot_predictions(images, labels, probabilities, label_names, path)


if __name__ == "__main__":
    sys.exit(main())
