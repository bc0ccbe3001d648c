"""The embedded dataset: rendered shapes and textures in clutter. Generated, never downloaded.

Ten classes, six of them shapes and four textures, each in random colours, sizes, places and
rotations, on a shaded background strewn with lines and specks. Every image derives from
(split, index) alone.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

NAME = "shapes_and_textures"
CLASSES = (
    "disc",
    "ring",
    "square",
    "triangle",
    "star",
    "cross",
    "stripes",
    "checkerboard",
    "dots",
    "waves",
)
SIZE = 72  # pixels a side: leaves room for random crops of 64
EXAMPLES = {"train": 6000, "test": 1000}

_SCALE = 2  # drawn larger, then averaged down: smooth edges
_CANVAS = SIZE * _SCALE


class ShapesAndTextures(tfds.core.GeneratorBasedBuilder):
    """The embedded dataset as a TFDS builder; it prepares without network or TensorFlow."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(EXAMPLES[split]):
            label = index % len(CLASSES)
            encoded = io.BytesIO()
            Image.fromarray(render(split, index)).save(encoded, "jpeg", quality=92)
            encoded.seek(0)
            yield index, {"image": encoded, "label": label}


def builder(data_dir: Path) -> ShapesAndTextures:
    """The builder that reads and writes the dataset under `data_dir`, as ArrayRecord files."""
    return ShapesAndTextures(data_dir=str(data_dir), file_format="array_record")


def render(split: str, index: int) -> np.ndarray:
    """The image at `index` of `split`, of class `index % 10`: uint8[72, 72, 3]."""
    rng = np.random.default_rng([sorted(EXAMPLES).index(split), index])
    canvas = Image.fromarray(_background(rng))
    _clutter(ImageDraw.Draw(canvas), rng)
    foreground, mask = _object(CLASSES[index % len(CLASSES)], rng)
    canvas.paste(foreground, mask=mask)
    image = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(2, 12))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth random shading: a colour, and others near it on a coarse grid, interpolated."""
    coarse = rng.integers(30, 226, 3) + rng.integers(-30, 31, (3, 3, 3))
    coarse = coarse.astype(np.uint8)
    small = Image.fromarray(coarse).resize((_CANVAS, _CANVAS), Image.Resampling.BICUBIC)
    return np.asarray(small)


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(2, 7)):
        ends = tuple(rng.uniform(0, _CANVAS, 4))
        draw.line(ends, fill=_color(rng), width=int(rng.integers(1, 5)))
    for _ in range(rng.integers(3, 10)):
        x, y = rng.uniform(0, _CANVAS, 2)
        side = rng.uniform(2, 8)
        draw.rectangle((x, y, x + side, y + side), fill=_color(rng))


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _object(name: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """What the image shows, as (colours, mask), both of the canvas's size.

    Coordinates (u, v) are turned and centred on the object, with 1 at its radius.
    """
    radius = rng.uniform(0.25, 0.42) * _CANVAS
    centre = rng.uniform(radius, _CANVAS - radius, 2)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = ((np.arange(_CANVAS, dtype=np.float32) - middle) / radius for middle in centre)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = x * cos + y[:, None] * sin, y[:, None] * cos - x * sin

    first, second = (np.array(_color(rng)) for _ in range(2))
    # Two colours too alike to tell apart would make a texture invisible.
    while np.abs(first - second).sum() < 200:
        second = np.array(_color(rng))
    if name in _SHAPES:
        inside, pattern = _SHAPES[name](u, v), np.zeros_like(u, bool)
    else:
        inside, pattern = np.hypot(u, v) < 1.1, _TEXTURES[name](u, v, rng)
    colors = np.stack([first, second]).astype(np.uint8)[pattern.astype(np.intp)]
    return Image.fromarray(colors), Image.fromarray(inside)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: folded onto the edge from a tip at radius 1 to a notch at radius 0.4."""
    tenth = np.float32(np.pi / 5)
    radius, angle = np.hypot(u, v), np.abs((np.arctan2(v, u) + 11 * tenth) % (2 * tenth) - tenth)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = 0.4 * np.cos(tenth), 0.4 * np.sin(tenth)
    return (1 - x) * notch_y > y * (1 - notch_x)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    sides = [u * np.cos(a) + v * np.sin(a) < 0.5 for a in 2 * np.pi / 3 * np.arange(3)]
    return np.logical_and.reduce(sides)


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) < 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) < 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.75,
    "triangle": _triangle,
    "star": _star,
    "cross": lambda u, v: (
        (np.minimum(np.abs(u), np.abs(v)) < 0.25) & (np.maximum(np.abs(u), np.abs(v)) < 0.95)
    ),
}


def _stripes(u: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(u * rng.uniform(9, 14)) > 0


def _checkerboard(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    frequency = rng.uniform(6, 10)
    return np.sin(u * frequency) * np.sin(v * frequency) > 0


def _dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    frequency = rng.uniform(9, 13)
    return np.cos(u * frequency) + np.cos(v * frequency) > 0.7


def _waves(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(u * rng.uniform(9, 13) + 2.2 * np.sin(v * rng.uniform(5, 7))) > 0


_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "stripes": _stripes,
    "checkerboard": _checkerboard,
    "dots": _dots,
    "waves": _waves,
}
