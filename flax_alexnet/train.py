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
import optax
from jax.sharding import Mesh

from flax_alexnet.architectures import architecture, trace
from flax_alexnet.augment import augment, preprocess
from flax_alexnet.checkpoint import Checkpoints, digest
from flax_alexnet.config import (
    FREE_TO_CHANGE,
    AugmentConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    exit_code,
    flatten,
)
from flax_alexnet.data.loader import evaluation_batches, training_batches
from flax_alexnet.data.sources import Dataset, Examples, mean_image, open_dataset, open_examples
from flax_alexnet.errors import UserError
from flax_alexnet.model import AlexNet
from flax_alexnet.optimizer import (
    applied_rate,
    create_optimizer,
    create_schedule,
    reduce_on_plateau,
)
from flax_alexnet.plots import plot_curves, plot_kernels, plot_predictions
from flax_alexnet.recipes import parse_config
from flax_alexnet.reporting import RunLog, Throughput, read_metrics
from flax_alexnet.sharding import make_mesh, put_batch, replicated, split_batch
from flax_alexnet.step import Totals, TrainState, create_state, eval_step, train_step, zero_totals
from flax_alexnet.workdir import claim, need_room, write_json

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after a mistake of the user, or 130 after Ctrl-C."""
    try:
        return train(parse_config(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return exit_code(error)


def train(config: Config) -> int:
    """Trains as `config` says, from the newest checkpoint in its working directory on.

    Returns:
      0 when the run is complete, 130 when Ctrl-C ended it early; starting again goes on.

    Raises:
      UserError: something in `config`, the data or the working directory does not fit; said before
        anything is compiled.
    """
    started = time.monotonic()
    data, workdir, batch_size = config.data, config.workdir, config.batch_size
    dataset = open_dataset(data.name, data.data_dir, data.train_split, data.eval_split)
    num_classes = config.model.num_classes or len(dataset.label_names)
    check(config, dataset, num_classes)
    claim(
        workdir,
        flatten(config),
        free_to_change=FREE_TO_CHANGE,
        allow_changes=config.allow_changes,
    )
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

    train_examples = open_examples(dataset.train, data.image_size)
    eval_examples = open_examples(dataset.eval, data.image_size)
    init_fn = functools.partial(
        create_state, model=model, optimizer=optimizer, crop_size=config.augment.crop_size
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = restore_or_create(checkpoints, init_fn, key, train_examples, data.image_size, mesh)
    start = int(state.step)

    print(layer_table(model, config.augment.crop_size))
    print(
        f"{config.recipe}: {len(dataset.train):,} pictures of {dataset.name} in "
        f"{len(dataset.label_names)} classes, {len(dataset.eval):,} to test on; steps {start:,} to "
        f"{total_steps:,} with {batch_size} pictures each on {jax.device_count()} "
        f"{jax.default_backend()} device(s). Ctrl-C stops; the same command goes on.",
        flush=True,
    )
    log = RunLog(workdir, start, total_steps)
    rate = Throughput(batch_size)
    batches = training_batches(
        train_examples,
        batch_size,
        seed=config.seed,
        start_step=start,
        threads=data.threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    evaluated: dict[str, float] = {}
    loss = None
    with contextlib.closing(log), contextlib.closing(checkpoints), interruptible() as interrupted:
        for step in range(start + 1, total_steps + 1):
            last_loss = loss
            state, loss = step_fn(state, put_batch(next(batches), mesh), key)
            # The host waits for the step before this one, while the device is busy with this one.
            if last_loss is not None and not np.isfinite(last_loss):
                raise UserError(
                    f"the loss is {last_loss} at step {step - 1}: start again in a new --workdir "
                    f"with a lower --optimizer.learning-rate than {config.optimizer.learning_rate}"
                )
            rate.step()
            log.advance()
            epoch = step / steps_per_epoch
            if step % config.log_every == 0 or step == total_steps:
                means = train_means(state.totals)
                means["learning_rate"] = float(applied_rate(state.opt_state))
                log.write({"step": step, "epoch": epoch, **means, **rate.lap()})
                state = state.replace(totals=jax.device_put(zero_totals(), replicated(mesh)))
            if step == total_steps or epoch // config.eval_epochs > (
                (step - 1) / steps_per_epoch // config.eval_epochs
            ):
                evaluated = evaluate(eval_fn, state, eval_examples, batch_size, data.threads, mesh)
                log.write({"step": step, "epoch": epoch, **evaluated})
                if config.optimizer.schedule == "plateau":
                    state = lower_rate(state, evaluated, config.optimizer)
                checkpoints.save(step, state, evaluated)
                rate.restart()
            if interrupted() and step < total_steps:
                checkpoints.save(step, state)
                log.say(f"stopped at step {step:,}; the same command goes on from there")
                return INTERRUPTED

    if not evaluated:  # the run had been complete before
        evaluated = evaluate(eval_fn, state, eval_examples, batch_size, data.threads, mesh)
    summary = {
        "step": total_steps,
        **evaluated,
        "seconds": time.monotonic() - started,
        "images_per_second": rate.average(),
        "peak_memory_bytes": peak_memory(),
        "params_sha256": digest(state.params),
    }
    write_json(workdir / "summary.json", summary)
    report(workdir, state, model, eval_examples, dataset.label_names, config.augment)
    print(
        f"test accuracy {evaluated['eval_top1']:.2%} after {total_steps:,} steps and "
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
    devices = jax.device_count()
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
    need_room(existing_parent(config.workdir), 4 * 2 * 4 * parameters)


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up from `path` that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is quicker."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flax_alexnet"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def make_model(config: ModelConfig, num_classes: int) -> AlexNet:
    """The net that a configuration describes."""
    return AlexNet(
        variant=config.variant,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        dropout_rate=config.dropout_rate,
        width=config.width,
        relu_logits=config.relu_logits,
        initialization=config.initialization,
        activation={"relu": nn.relu, "tanh": nn.tanh}[config.activation],
    )


def layer_table(model: nn.Module, crop_size: int) -> str:
    """The layers with their shapes and parameters, to print."""
    images = jnp.zeros((1, crop_size, crop_size, 3))
    return model.tabulate(
        jax.random.key(0), images, depth=1, console_kwargs={"width": 100, "force_terminal": False}
    )


def make_optimizer(config: OptimizerConfig, steps_per_epoch: float) -> optax.GradientTransformation:
    """The optimizer that a configuration describes, with its epochs turned into steps."""
    schedule = create_schedule(
        config.learning_rate,
        boundaries=[round(epoch * steps_per_epoch) for epoch in config.drop_epochs],
        drop_factor=config.drop_factor,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
    )
    return create_optimizer(
        schedule,
        config.momentum,
        config.weight_decay,
        rule=config.rule,
        bias_rate=config.bias_rate,
        decay_biases=config.decay_biases,
        clip_norm=config.clip_norm,
    )


def compile_steps(
    config: Config, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[..., tuple[TrainState, jax.Array]], Callable[..., Totals]]:
    """The training and the evaluation step as jitted functions over the mesh.

    The state is replicated and given up to the step (its buffers are used again); batches come
    split over the devices, and XLA adds the sum of gradients over them.
    """
    whole, split = replicated(mesh), split_batch(mesh)
    settings = config.augment
    augment_fn = functools.partial(
        augment,
        crop_size=settings.crop_size,
        crop=settings.random_crop,
        flip=settings.flip,
        noise=settings.color_noise,
        scale=settings.scale,
    )
    step_fn = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, augment=augment_fn),
        in_shardings=(whole, split, whole),
        out_shardings=whole,
        donate_argnums=0,
    )
    preprocess_fn = functools.partial(
        preprocess, crop_size=settings.crop_size, scale=settings.scale
    )
    eval_fn = jax.jit(
        functools.partial(eval_step, model=model, preprocess=preprocess_fn),
        in_shardings=(whole, whole, whole, split),
        out_shardings=whole,
    )
    return step_fn, eval_fn


def restore_or_create(
    checkpoints: Checkpoints,
    init_fn: Callable[..., TrainState],
    key: jax.Array,
    examples: Examples,
    image_size: int,
    mesh: Mesh,
) -> TrainState:
    """The newest saved state, or that before the first step; on the devices either way."""
    whole = replicated(mesh)
    latest = checkpoints.latest_step()
    if latest is None:
        mean = mean_image(examples)
        return jax.jit(init_fn, out_shardings=whole)(jax.random.fold_in(key, 2**32 - 1), mean)
    mean_shape = jax.ShapeDtypeStruct((image_size, image_size, 3), jnp.float32)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(init_fn, key, mean_shape),
    )
    return checkpoints.restore(latest, template)


def evaluate(
    eval_fn: Callable[..., Totals],
    state: TrainState,
    examples: Examples,
    batch_size: int,
    threads: int,
    mesh: Mesh,
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy over all examples, each counted once."""
    totals = jax.device_put(zero_totals(), replicated(mesh))
    for batch in evaluation_batches(
        examples,
        batch_size,
        threads=threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        totals = eval_fn(totals, state.params, state.mean, put_batch(batch, mesh))
    images = float(totals["images"])
    return {f"eval_{name}": float(totals[name]) / images for name in ("loss", "top1", "top5")}


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
    # Evenly over the pictures, and not in step with any regular order of their classes.
    chosen = [examples[i * (len(examples) - 1) // 8 + i % 2] for i in range(min(8, len(examples)))]
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
