"""Figures of a run, of what a model has learned, and of its predictions.

Functions of plain arrays, each of which writes one PNG; folders on the way to it are made.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.inputs import check_regular

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
RC = "matplotlibrc"  # which matplotlib reads where a command is run, before all others
USUAL = "DejaVu Sans"  # the font that matplotlib brings along


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and top-1 error of training and evaluation over epochs, from lines of metrics."""
    figure = _figure((10, 4))
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
        axis.set(xlabel="epoch", ylabel=label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def color_selectivity(kernels: np.ndarray) -> np.ndarray:
    """How much kernels respond to colour rather than to brightness.

    A kernel's energy is the sum of its squares. Each pixel is a vector (red, green, blue), and has
    a part along grey, (1, 1, 1) / √3; the measure is the share of the energy that is not there.

    Args:
      kernels: float[h, w, 3, n], for RGB images.

    Returns:
      float[n] in [0, 1]: 0 where red, green and blue are alike, 2/3 where there is but one of them,
      1 where the three add up to nothing at each pixel; 0 for a kernel of zeros.
    """
    kernels = np.asarray(kernels, np.float64)
    energy = (kernels**2).sum((0, 1, 2))
    grey = (kernels.sum(2) ** 2).sum((0, 1)) / 3
    share = 1 - grey / np.where(energy > 0, energy, 1)
    return np.where(energy > 0, share.clip(0, 1), 0)


def plot_kernels(kernels: np.ndarray, path: Path, groups: int = 1) -> None:
    """First-layer kernels as colour tiles, as in the paper's Figure 3.

    The towers of a model with groups are drawn apart. In each the kernels stand in the order of
    their `color_selectivity`, which the bar below a tile shows; the number is the channel's.

    Args:
      kernels: float[h, w, 3, n]. Grey is zero, and each is scaled to its own range, so that tiles
        can be compared in sign and colour.
      path: the PNG to write.
      groups: towers, each with n / groups kernels that follow one another.
    """
    kernels = np.asarray(kernels, np.float32)
    height, width, _, count = kernels.shape
    selectivity = color_selectivity(kernels)
    scale = np.maximum(np.abs(kernels).max((0, 1, 2)), 1e-12)
    tiles = np.moveaxis(0.5 + 0.5 * kernels / scale, -1, 0)
    towers = np.split(np.arange(count), groups)
    columns = min(16 if count > 32 else 8, len(towers[0]))
    rows = -(-len(towers[0]) // columns)
    cell = 0.62  # inches
    size = (max(columns * cell, 6), groups * (1.2 * rows * cell + 0.45))
    figure = _figure(size)
    axes = figure.subplots(groups, 1, squeeze=False).flat
    for number, (axis, tower) in enumerate(zip(axes, towers, strict=True), 1):
        channels = tower[np.argsort(selectivity[tower], kind="stable")]
        name = f"Tower {number}" if groups > 1 else "conv1"
        axis.set_title(
            f"{name}: {len(channels)} kernels of {height}×{width}×3; "
            f"colour selectivity {selectivity[channels].mean():.2f} on average",
            fontsize=11,
        )
        _tiles(axis, tiles[channels], columns, cell_height=1.2)
        for place, channel in enumerate(channels):
            row, column = divmod(place, columns)
            left, below = column, 1.2 * row + 1.04
            axis.text(left, below + 0.02, str(channel), fontsize=5, color="grey", va="center")
            for end, color in ((1.0, "gainsboro"), (selectivity[channel], "tab:red")):
                axis.hlines(below, left + 0.3, left + 0.3 + 0.62 * end, color, linewidth=2.5)
    _save(figure, path)


def plot_activations(
    image: np.ndarray,
    activations: Mapping[str, np.ndarray],
    path: Path,
    channels: int = 16,
) -> None:
    """An image, and what each layer makes of it.

    Of a map, the channels of the largest mean size are drawn with their numbers, each scaled to
    its own range; of a dense layer, all units in their order.

    Args:
      image: uint8[h, w, 3], what the model saw.
      activations: {name: float[h, w, c] or float[units]}, as `features` gives them for one image.
      path: the PNG to write.
      channels: how many of a map are drawn.
    """
    columns = min(4, 1 + len(activations))
    rows = -(-(1 + len(activations)) // columns)
    figure = _figure((3 * columns, 3.2 * rows))
    image_axis, *panels = figure.subplots(rows, columns, squeeze=False).flat
    image_axis.imshow(image)
    image_axis.set_title("image, {}×{}×{}".format(*image.shape), fontsize=10)
    image_axis.axis("off")
    for axis in panels[len(activations) :]:
        axis.axis("off")
    for axis, (name, values) in zip(panels, activations.items(), strict=False):
        values = np.asarray(values, np.float32)
        axis.set_title(f"{name}, {'×'.join(map(str, values.shape))}", fontsize=10)
        if values.ndim == 1:
            _stems(axis, values)
            continue
        strength = np.abs(values).mean((0, 1))
        strongest = np.argsort(-strength, kind="stable")[:channels]
        across = int(np.ceil(len(strongest) ** 0.5))
        _tiles(axis, np.moveaxis(values[..., strongest], -1, 0), across)
        for place, channel in enumerate(strongest):
            row, column = divmod(place, across)
            shade = {"facecolor": "black", "alpha": 0.4, "linewidth": 0, "pad": 0.6}
            left, top = column + 0.04, row + 0.04
            axis.text(left, top, str(channel), fontsize=5, color="white", va="top", bbox=shade)
    _save(figure, path)


def plot_grad_cam(image: np.ndarray, maps: np.ndarray, names: Sequence[str], path: Path) -> None:
    """An image, and over it where a model sees each of some classes: red most, blue not at all.

    Args:
      image: uint8[h, w, 3], what the model saw.
      maps: float[n, h', w'], ≥ 0, as `grad_cam` gives them for that image; brought to its size
        (bilinear), and each scaled to its own range.
      names: what stands above each map.
      path: the PNG to write.
    """
    columns = min(6, 1 + len(maps))
    rows = -(-(1 + len(maps)) // columns)
    figure = _figure((2.6 * columns, 2.9 * rows))
    image_axis, *panels = figure.subplots(rows, columns, squeeze=False).flat
    for axis in (image_axis, *panels):
        axis.axis("off")
    image_axis.imshow(image)
    size = image.shape[1::-1]
    for axis, heat, name in zip(panels, maps, names, strict=False):
        heat = np.asarray(Image.fromarray(np.float32(heat)).resize(size, Image.Resampling.BILINEAR))
        axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
        axis.imshow(heat, cmap="jet", vmin=0, vmax=max(float(heat.max()), 1e-12), alpha=0.5)
        _title(axis, name)
    _save(figure, path)


def plot_confusion(matrix: np.ndarray, label_names: Sequence[str], path: Path) -> None:
    """Which classes are taken for which.

    Args:
      matrix: int[n, n], how many images of the class of the row were taken for the class of the
        column. Colours are shares of the row; rows without images are grey. Up to 20 classes the
        counts are written, and up to 60 the names; beyond, the most frequent confusions are listed.
      label_names: of the classes; a class beyond them is shown by its number.
      path: the PNG to write.
    """
    matrix = np.asarray(matrix)
    count, total = len(matrix), int(matrix.sum())
    image_axes = matrix.sum(1, keepdims=True)
    shares = np.where(image_axes > 0, matrix / np.maximum(image_axes, 1), np.nan)
    side = float(np.clip(0.45 * count, 3.5, 10))  # inches; 1000 classes have a pixel each
    figure = _figure((side + 2, side + (1 if count <= 60 else 3)))
    from matplotlib.colors import PowerNorm  # after `_figure`, which imports matplotlib first

    axis = figure.subplots()
    # A root shows faint confusions beside a strong diagonal.
    norm = PowerNorm(1 / 2 if count <= 60 else 1 / 3, 0, 1)
    drawn = axis.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    axis.set_facecolor("gainsboro")  # seen where a row has no shares
    figure.colorbar(drawn, ax=axis, shrink=0.6, label="share of the images of a class")
    axis.set(xlabel="predicted class", ylabel="right class")
    _title(axis, f"{np.trace(matrix) / max(total, 1):.1%} of {total:,} images right", length=60)
    if count <= 60:
        names = [_short(_name(label_names, label), 24) for label in range(count)]
        style: dict[str, Any] = {"fontsize": 9 if count <= 20 else 6, "parse_math": False}
        axis.set_xticks(range(count), names, rotation=90, **style)
        axis.set_yticks(range(count), names, **style)
    else:
        figure.supxlabel(_confusions(matrix, label_names), fontsize=9, parse_math=False)
    if count <= 20:
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.4 else "black"
            text = str(matrix[row, column])
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)


def _confusions(matrix: np.ndarray, label_names: Sequence[str], most: int = 10) -> str:
    """A line for each of the most frequent confusions."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    lines = [
        f"{wrong[row, column]} of {matrix[row].sum()} images of {_name(label_names, row)} "
        f"taken for {_name(label_names, column)}"
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
    return "\n".join(_short(line, 120) for line in lines)


def plot_neighbours(
    queries: np.ndarray,
    neighbours: np.ndarray,
    distances: np.ndarray,
    query_names: Sequence[str],
    neighbour_names: Sequence[Sequence[str]],
    path: Path,
) -> None:
    """Images with those nearest to them, as in the paper's Figure 4 (right).

    Args:
      queries: uint8[n, h, w, 3], the first column, in a frame.
      neighbours: uint8[n, k, h, w, 3], the nearest first.
      distances: float[n, k], written below the neighbours.
      query_names: of files or classes, written above the images.
      neighbour_names: likewise, k for each query.
      path: the PNG to write.
    """
    rows, columns = neighbours.shape[:2]
    figure = _figure((1.6 * (columns + 1), 2 * rows))
    for row, axes in enumerate(figure.subplots(rows, columns + 1, squeeze=False)):
        names = [query_names[row], *neighbour_names[row]]
        below = ["query", *(f"{distance:.4g}" for distance in distances[row])]
        for axis, image, name, text in zip(
            axes, [queries[row], *neighbours[row]], names, below, strict=True
        ):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.set_title(_short(name, 24), fontsize=7, parse_math=False)
            axis.set_xlabel(text, fontsize=8)
            axis.spines[:].set_visible(axis is axes[0])
            axis.spines[:].set(linewidth=3, color="tab:red")
    _save(figure, path)


def plot_distance(a: np.ndarray, b: np.ndarray, distance: np.ndarray, path: Path) -> None:
    """Two images, and where they differ.

    Args:
      a: uint8[h, w, 3].
      b: likewise.
      distance: float[h, w], ≥ 0, such as `lpips` gives with `spatial`; its mean is written above.
      path: the PNG to write.
    """
    figure = _figure((10, 0.3 + 3 * a.shape[0] / a.shape[1]))
    *image_axes, there = figure.subplots(1, 3)
    for axis, image, name in zip(image_axes, (a, b), "ab", strict=True):
        axis.imshow(image)
        _title(axis, name)
    drawn = there.imshow(distance, cmap="magma", vmin=0, vmax=max(float(distance.max()), 1e-12))
    _title(there, f"distance, {distance.mean():.4f} on average")
    for axis in (*image_axes, there):
        axis.axis("off")
    figure.colorbar(drawn, ax=there, shrink=0.8)
    _save(figure, path)


def plot_predictions(
    images: np.ndarray,
    labels: Sequence[int] | None,
    probabilities: np.ndarray,
    label_names: Sequence[str],
    path: Path,
    titles: Sequence[str] | None = None,
) -> None:
    """Images with their five likeliest classes as bars, as in the paper's Figure 4 (left).

    Args:
      images: uint8[n, h, w, 3], up to 64 or so.
      labels: the right class of each, whose bar is red; None or -1 where nobody knows.
      probabilities: float[n, classes].
      label_names: of the classes; a class beyond them is shown by its number.
      path: the PNG to write.
      titles: what stands above each image, such as the file's name; none: the right class.
    """
    known = [-1] * len(images) if labels is None else labels
    if titles is None:
        titles = [_name(label_names, label) if label >= 0 else "" for label in known]
    columns = min(4 if len(images) <= 16 else 8, len(images))
    rows = -(-len(images) // columns)
    figure = _figure((2.6 * columns, 3.9 * rows))
    axes = figure.subplots(2 * rows, columns, height_ratios=[2, 1] * rows, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        image_axis, bars = axes[2 * row, column], axes[2 * row + 1, column]
        image_axis.imshow(image)
        _title(image_axis, titles[index])
        best = np.argsort(-probabilities[index], kind="stable")[:5]
        colors = ["tab:red" if other == known[index] else "lightsteelblue" for other in best]
        bars.barh(range(len(best)), probabilities[index][best], color=colors)
        bars.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
        for place, other in enumerate(best):
            name = _short(_name(label_names, other), 36)
            bars.text(0.02, place, name, va="center", fontsize=8, parse_math=False)
    _save(figure, path)


def _tiles(axis: "Axes", tiles: np.ndarray, columns: int, cell_height: float = 1.0) -> None:
    """Draws [n, h, w] or [n, h, w, 3], row by row, tiles a little less than 1 × 1 wide and high."""
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        top = row * cell_height
        axis.imshow(tile, extent=(column, column + 0.94, top + 0.94, top), interpolation="nearest")
    rows = -(-len(tiles) // columns)
    axis.set(xlim=(-0.03, columns - 0.03), ylim=(rows * cell_height, -0.03))
    axis.axis("off")


def _stems(axis: "Axes", values: np.ndarray) -> None:
    """Draws float[units] as a line for each unit, and says how many are active and how much."""
    axis.vlines(np.arange(len(values)), 0, values, linewidth=max(0.5, 100 / len(values)))
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlim=(-0.7, len(values) - 0.3), xticks=[], yticks=[], box_aspect=1)
    axis.set_xlabel(f"{np.mean(values != 0):.0%} not zero, largest {values.max():.3g}", fontsize=9)


def _name(label_names: Sequence[str], label: int) -> str:
    return label_names[label] if label < len(label_names) else f"class {label}"


def _short(text: str, length: int) -> str:
    """At most `length` characters: from a longer text the middle is left out.

    A character that no font has is escaped.
    """
    text = text.encode(errors="replace").decode()  # file names need not be Unicode
    text = "".join(c if _font(c) else ascii(c)[1:-1] for c in text)
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def _title(axis: "Axes", text: str, length: int = 30) -> None:
    axis.set_title(_short(text, length), fontsize=10, parse_math=False)  # a name may have dollars


def _figure(size: tuple[float, float]) -> "Figure":
    # Without pyplot, whose backend is the user's choice; and not before something is drawn, since
    # every command imports this module, and few draw.
    try:
        if os.path.exists(RC):
            check_regular(RC)  # matplotlib would wait for a pipe
        from matplotlib.figure import Figure
    except (OSError, ValueError) as error:
        raise UserError(
            f"matplotlib does not start ({cause(error)}): see {RC} here, and MPLBACKEND"
        ) from None
    return Figure(figsize=size, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib.text import Text  # late, as in `_figure`

    for text in figure.findobj(Text):
        assert isinstance(text, Text), "what was asked for"
        others = {_font(c) for c in text.get_text() if not c.isascii()} - {""}
        text.set_fontfamily([*text.get_fontfamily(), *sorted(others)])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")


@functools.cache
def _font(character: str) -> str:
    """The font that has a character: `USUAL`, else the first of the system's; "" where none has."""
    from matplotlib.font_manager import FontProperties, fontManager, weight_dict

    def has(name: str) -> bool:
        path = fontManager.findfont(FontProperties(family=[name]))
        return ord(character) in _characters(path)

    if has(USUAL):
        return USUAL
    upright = sorted(
        entry.name
        for entry in fontManager.ttflist
        if (entry.style, entry.stretch) == ("normal", "normal")
        and weight_dict.get(str(entry.weight), entry.weight) == weight_dict["normal"]
        and not entry.name.startswith("Last Resort")  # has a box for every character
    )
    return next((name for name in upright if has(name)), "")


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """The characters that a font file has."""
    from matplotlib.font_manager import get_font

    return frozenset(get_font(path).get_charmap())
