"""`python -m flax_alexnet lpips WEIGHTS A B`: how different images look, by LPIPS."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from flax_alexnet.config.cli import check_flag, check_png, command, parse
from flax_alexnet.data.decode import DecodeError, decode_whole, read_file
from flax_alexnet.data.examples import find_images, summarize
from flax_alexnet.inference.batches import check_numbers
from flax_alexnet.models.lpips import lpips, signed
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import new_files
from flax_alexnet.utils.plotting import plot_distance
from flax_alexnet.utils.text import printable, write_table
from flax_alexnet.weights.load import files_of, load
from flax_alexnet.weights.pretrained import LPIPS_HEADS, Pretrained


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """The perceptual distance (LPIPS) of two images, or of all pairs in two folders.

    Images are not resized, so the two images of a pair must have the same size.
    """

    weights: tyro.conf.Positional[Path]
    """torchvision's model or its trunk, with LPIPS heads (convert --heads)."""
    a: tyro.conf.Positional[Path]
    """An image, or a folder."""
    b: tyro.conf.Positional[Path]
    """An image, or a folder with images of the same names (suffixes may differ)."""
    output: Path | None = None
    """A .csv file for the distances; none: only the terminal."""
    plot: Path | None = None
    """A .png file that shows where two images differ; not for folders."""
    overwrite: bool = False
    """Replace files that are there."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    config = parse(LpipsConfig, argv, None, "flax_alexnet lpips")
    check_png("plot", config.plot)
    csv_named = config.output is None or config.output.suffix == ".csv"
    check_flag("output", config.output, csv_named, "a .csv file")
    run(config)


def run(config: LpipsConfig) -> None:
    """Measures, prints and writes what `config` asks for."""
    pairs = find_pairs(config.a, config.b)
    if config.plot and len(pairs) > 1:
        raise UserError("--plot is for two images; leave it out for folders")
    inputs = [*files_of(config.weights), *(file for _, *files in pairs for file in files)]
    files = (config.output, config.plot)
    with new_files(files, inputs, overwrite=config.overwrite) as write:
        pretrained = load(config.weights)
        check_heads(pretrained)
        distance = jax.jit(lpips, static_argnames="spatial")
        rows: list[tuple[str, str]] = []
        values: list[float] = []
        problems: list[tuple[str, str]] = []
        for name, first, second in pairs:
            try:
                a, b = (decode_whole(read_file(path)) for path in (first, second))
                if a.shape != b.shape:
                    raise DecodeError(
                        f"{_size(a)} against {_size(b)} pixels; bring them to one size"
                    )
                images = signed(a[None]), signed(b[None])
                value = float(distance(pretrained.params, pretrained.lpips_heads, *images)[0])
                check_numbers(value, "these images")
            except (DecodeError, UserError) as error:
                problems.append((name, str(error)))
                rows.append((name, str(error)))
                continue
            values.append(value)
            rows.append((name, f"{value:.6f}"))
            print(f"{name}: {value:.5f}")
            if config.plot:
                there = distance(pretrained.params, pretrained.lpips_heads, *images, spatial=True)[
                    0
                ]
                with write(config.plot) as path:
                    plot_distance(a, b, np.asarray(there), path)
        if len(pairs) > 1 or problems:
            print(summarize(problems, len(pairs), "pairs"))
        if config.output:
            with (
                write(config.output) as path,
                path.open("w", newline="", encoding="utf-8") as file,
            ):
                write_table(file, [("pair", "lpips"), *rows])
    if not values:
        raise UserError("no pair of images could be compared")
    if config.plot:
        print(f"wrote {config.plot}")
    if len(values) > 1:
        print(f"mean of {len(values):,} pairs: {np.mean(values):.5f}")


def find_pairs(a: Path, b: Path) -> list[tuple[str, Path, Path]]:
    """(name, image, image) of two images, or of all in two folders.

    Raises:
      UserError: something that is not there, an image and a folder, or names that differ.
    """
    for path in (a, b):
        if not path.exists():
            raise UserError(f"no image or folder {path}")
    if a.is_dir() != b.is_dir():
        raise UserError(f"{a} and {b} are a folder and an image; give two of a kind")
    if not a.is_dir():
        return [(printable(f"{a} {b}"), a, b)]
    of_a, of_b = (_by_name(folder) for folder in (a, b))
    alone = sorted(of_a.keys() ^ of_b.keys())
    if alone:
        raise UserError(f"images without a partner in {a} or {b}: {', '.join(alone)}")
    return [(name, of_a[name], of_b[name]) for name in sorted(of_a)]


def _by_name(folder: Path) -> dict[str, Path]:
    files = find_images([str(folder)]).paths
    named = {printable(str(file.relative_to(folder).with_suffix(""))): file for file in files}
    if len(named) < len(files):
        raise UserError(f"{folder} has images of the same name with two suffixes")
    return named


def check_heads(pretrained: Pretrained) -> None:
    """Raises UserError for a model that LPIPS cannot be computed with."""
    name = pretrained.source.get("file", "this model")
    if pretrained.config.variant != "torchvision" or pretrained.config.width != 1:
        raise UserError(
            f"{name} is of the variant {pretrained.config.variant}, width "
            f"{pretrained.config.width:g}; LPIPS takes torchvision's, width 1"
        )
    if set(pretrained.lpips_heads) != set(LPIPS_HEADS):
        raise UserError(
            f"{name} has no LPIPS heads; add them with: python -m flax_alexnet convert WEIGHTS "
            "OUTPUT --heads alex.pth"
        )


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
