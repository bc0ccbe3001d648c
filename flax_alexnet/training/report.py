"""What a run prints at its start and writes at its end: `report/` and `summary.json`."""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.checkpoint.manager import digest
from flax_alexnet.config.schema import Config
from flax_alexnet.data.augment import preprocess
from flax_alexnet.data.dataset import Examples
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.alexnet import AlexNet, implementations
from flax_alexnet.models.architectures import architecture
from flax_alexnet.ops.dispatch import current_platform
from flax_alexnet.parallel.distributed import is_main
from flax_alexnet.training.build import gather_params
from flax_alexnet.training.due import Schedule
from flax_alexnet.training.logger import Clock, average_throughput, read_metrics
from flax_alexnet.training.run_directory import versions, write_json
from flax_alexnet.training.setup import Setup
from flax_alexnet.training.signals import handles_signals, stop_requests
from flax_alexnet.training.step import TrainState
from flax_alexnet.utils.errors import STOPPED, UserError
from flax_alexnet.utils.outputs import replacing
from flax_alexnet.utils.plotting import plot_curves, plot_kernels, plot_predictions

RETRY_SECONDS = 10  # seconds between attempts to write the last files of a run


def layer_table(model: nn.Module, crop_size: int) -> str:
    """The layers with their shapes and parameters, to print."""
    images = jnp.zeros((1, crop_size, crop_size, 3))
    return model.tabulate(
        jax.random.key(0), images, depth=1, console_kwargs={"width": 100, "force_terminal": False}
    )


def introduce(config: Config, setup: Setup, model: AlexNet, schedule: Schedule, start: int) -> None:
    """Prints what is about to happen."""
    print(layer_table(model, config.augment.crop_size))
    epochs, data, total_steps = schedule.epochs, setup.data, schedule.total_steps
    if setup.history.changes and start:
        print(
            f"from step {start:,} on, {'; '.join(setup.history.changes)}. {epochs.seen(start):,} "
            f"images have been seen, epoch {epochs.epoch(start):.2f}: the run continues with the "
            "next image"
        )
    if setup.start and start == 0:
        print(setup.start.message)
    if setup.frozen:
        print(f"frozen: {', '.join(sorted(setup.frozen))}")
    if config.model.initialization == "he":
        print("initial values are He et al.'s, since the variant's own ones may stall (see README)")
    rows = config.batch_size // jax.device_count()
    dtype = jnp.dtype(config.model.dtype)
    print(implementations(setup.layout.layers, current_platform(), dtype, rows=rows))
    mesh = " x ".join(f"{name} {size}" for name, size in setup.layout.mesh.shape.items())
    stops = "Ctrl-C stops" if handles_signals() else "No signal stops it outside the main thread"
    print(
        f"{config.recipe}: {len(data.train):,} images of {data.dataset.name} in "
        f"{len(data.dataset.label_names)} classes, {len(data.eval):,} to test on; steps "
        f"{start:,} to {total_steps:,} with {config.batch_size} images each on "
        f"{jax.device_count()} {jax.default_backend()} device(s) of {jax.process_count()} "
        f"process(es), layout {setup.layout.name} ({mesh}). {stops}; the same command goes on.",
        flush=True,
    )
    if start > total_steps:
        print(f"the run has made {start:,} steps already; it keeps them and makes no more")


def finish(
    config: Config,
    setup: Setup,
    model: AlexNet,
    state: TrainState,
    evaluated: dict[str, float],
    clock: Clock,
) -> int:
    """Draws the report, writes the summary, and prints the last line; returns an exit code."""
    params = gather_params(state.evaluated, setup.layout)
    if not is_main():
        return 0
    metrics = read_metrics(config.workdir / "metrics.jsonl")
    summary = {
        "step": int(state.step),
        **evaluated,
        "seconds": clock.seconds(),
        "images_per_second": average_throughput(metrics),
        "peak_memory_bytes": peak_memory(),
        "params_sha256": digest(params),
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "layout": setup.layout.name,
        "mesh": dict(setup.layout.mesh.shape),
        "versions": versions(),
    }

    def report() -> None:
        draw_report(
            config.workdir / "report",
            metrics,
            params,
            config.preprocessing(np.asarray(state.mean)),
            model,
            setup.data.eval,
            setup.data.dataset.label_names,
        )
        clock.keep()
        write_json(config.workdir / "summary.json", summary)  # last: it marks the run as complete

    if not keep_trying(report, config.save_patience):
        print("stopped; the same command writes the report", flush=True)
        return STOPPED
    print(
        f"test accuracy {evaluated['eval_top1']:.2%} after {summary['step']:,} steps and "
        f"{summary['seconds']:.0f} s; everything is in {config.workdir}"
    )
    return 0


def draw_report(
    folder: Path,
    metrics: Sequence[dict[str, Any]],
    params: Any,
    preprocessing: Preprocessing,
    model: AlexNet,
    examples: Examples,
    label_names: Sequence[str],
) -> None:
    """Draws the curves, the first layer's kernels, and eight predictions into `folder`.

    Raises:
      OSError: an image cannot be written, or has disappeared when the last one is written.
    """
    with replacing(folder / "curves.png") as path:
        plot_curves(metrics, path)
    with replacing(folder / "conv1.png") as path:
        plot_kernels(params["conv1"]["kernel"], path, architecture(model.variant).groups)
    order = np.random.default_rng(0).permutation(len(examples))
    batch = examples.take(order[:8].tolist())
    images, labels = batch["image"], batch["label"]
    logits: Any = jax.jit(model.apply)({"params": params}, preprocess(images, preprocessing))
    probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    with replacing(folder / "predictions.png") as path:
        plot_predictions(images, labels.tolist(), probabilities, label_names, path)
    for name in ("curves.png", "conv1.png", "predictions.png"):
        os.stat(folder / name)  # raises OSError where the folder was moved away meanwhile


def peak_memory() -> int:
    """Peak memory in bytes, of the first device if it reports it, else of the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on macOS in bytes
    resident *= 1 if sys.platform == "darwin" else 1024
    return statistics.get("peak_bytes_in_use") or resident


def keep_trying(action: Callable[[], None], minutes: float) -> bool:
    """Runs `action`, and retries it for `minutes` if it fails, for example on a full disk.

    Returns:
      True if it succeeded; False if a signal to stop ended the attempts.

    Raises:
      UserError: it did not succeed in that time.
    """
    until = time.monotonic() + 60 * minutes
    with stop_requests(alone=True) as stop_requested:
        while True:
            try:
                action()
                return True
            except (UserError, OSError) as error:
                reason = str(error)
                if isinstance(error, OSError) and error.filename:
                    reason = f"cannot write {error.filename}: {error.strerror}"
                left = until - time.monotonic()
                if left <= 0:
                    raise UserError(f"{reason}; make room, and the same command goes on") from None
                print(f"{reason}; trying again for {math.ceil(left / 60)} minutes", flush=True)
            if stopped_in(min(RETRY_SECONDS, left), stop_requested):
                return False


def stopped_in(seconds: float, stop_requested: Callable[[bool], bool]) -> bool:
    """Waits for `seconds` or until a stop is requested; returns whether one is requested."""
    until = time.monotonic() + seconds
    while not (stop := stop_requested(True)) and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
    return stop
