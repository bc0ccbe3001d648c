"""What a finished run leaves behind: `report/` with its pictures, and `summary.json`."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.architectures import architecture
from flax_alexnet.augment import preprocess
from flax_alexnet.config import AugmentConfig
from flax_alexnet.data.examples import Examples
from flax_alexnet.model import AlexNet
from flax_alexnet.plots import plot_curves, plot_kernels, plot_predictions
from flax_alexnet.reporting import read_metrics


def layer_table(model: nn.Module, crop_size: int) -> str:
    """The layers with their shapes and parameters, to print."""
    images = jnp.zeros((1, crop_size, crop_size, 3))
    return model.tabulate(
        jax.random.key(0), images, depth=1, console_kwargs={"width": 100, "force_terminal": False}
    )


def draw_report(
    workdir: Path,
    params: Any,
    mean: jax.Array,
    model: AlexNet,
    examples: Examples,
    label_names: Sequence[str],
    settings: AugmentConfig,
) -> None:
    """Draws `report/`: the curves, the first layer's kernels, and eight predictions."""
    plot_curves(read_metrics(workdir / "metrics.jsonl"), workdir / "report" / "curves.png")
    groups = architecture(model.variant).groups
    plot_kernels(params["conv1"]["kernel"], workdir / "report" / "conv1.png", groups)
    order = np.random.default_rng(0).permutation(len(examples))
    chosen = [examples[int(index)] for index in order[:8]]
    images = np.stack([example["image"] for example in chosen])
    seen = preprocess(jnp.asarray(images), mean, crop_size=settings.crop_size, scale=settings.scale)
    logits: Any = model.apply({"params": params}, seen)
    labels = [int(example["label"]) for example in chosen]
    probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    path = workdir / "report" / "predictions.png"
    plot_predictions(images, labels, probabilities, label_names, path)


def peak_memory() -> int:
    """Bytes: the most that the first device has used where it tells, else the process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on macOS in bytes
    resident *= 1 if sys.platform == "darwin" else 1024
    return statistics.get("peak_bytes_in_use") or resident
