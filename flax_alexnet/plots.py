"""The pictures of a report: curves, first-layer kernels, predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # without pyplot, whose backend is the user's choice


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and top-1 error of training and evaluation over epochs, from lines of metrics."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("loss", "loss (nats)", lambda v: v),
        ("top1", "top-1 error (%)", lambda v: 100 - 100 * v),
    )
    for axis, (name, label, value) in zip(axes, panels, strict=True):
        for part, style in (("train", {"alpha": 0.7}), ("eval", {"marker": "o", "markersize": 3})):
            points = [
                (line["epoch"], value(line[f"{part}_{name}"]))
                for line in metrics
                if f"{part}_{name}" in line
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label={"eval": "test"}.get(part, part), **style
                )
        axis.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def plot_kernels(kernels: np.ndarray, path: Path) -> None:
    """First-layer kernels, float[h, w, 3, n], as n colour tiles, each scaled to its own range."""
    height, width, _, count = kernels.shape
    columns = 16 if count > 32 else 8
    rows = -(-count // columns)
    sheet = np.ones((rows * (height + 1) + 1, columns * (width + 1) + 1, 3))
    for index in range(count):
        kernel = kernels[..., index]
        # Grey is zero, so that tiles can be compared in sign and colour.
        tile = 0.5 + 0.5 * kernel / max(float(np.abs(kernel).max()), 1e-12)
        top, left = (
            1 + n * (side + 1)
            for n, side in zip(divmod(index, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = tile
    figure = Figure(figsize=(10, 10 * sheet.shape[0] / sheet.shape[1] + 0.4))
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest")
    axis.set_title(f"{count} kernels of conv1, {height}×{width}×3")
    axis.axis("off")
    _save(figure, path)


def plot_predictions(
    images: np.ndarray,
    labels: Sequence[int],
    probabilities: np.ndarray,
    label_names: Sequence[str],
    path: Path,
) -> None:
    """Pictures with their five likeliest classes as bars, as in the paper's Figure 4 (left).

    Args:
      images: uint8[n, h, w, 3], 8 or fewer.
      labels: the right class of each.
      probabilities: float[n, classes].
      label_names: of the classes; a class beyond them is shown by its number.
      path: the PNG to write.
    """

    def name(label: int) -> str:
        return label_names[label] if label < len(label_names) else f"class {label}"

    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.9 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, height_ratios=[2, 1] * rows, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        picture, bars = axes[2 * row, column], axes[2 * row + 1, column]
        picture.imshow(image)
        picture.set_title(name(label), fontsize=10)
        best = np.argsort(-probabilities[index], kind="stable")[:5]
        colors = ["tab:red" if other == label else "lightsteelblue" for other in best]
        bars.barh(range(len(best)), probabilities[index][best], color=colors)
        bars.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
        for place, other in enumerate(best):
            bars.text(0.02, place, name(other), va="center", fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
