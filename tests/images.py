"""Images and folders of them, made for a test."""

import io

import numpy as np
from PIL import Image


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def random_image(seed, height=20, width=20):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def make_folder(path, classes, size=20):
    """A folder of class folders with so many images each."""
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for index in range(count):
            data = encoded(random_image(index, size, size + 3))
            (path / name / f"{index:03}.png").write_bytes(data)
    return path


def image_files(photographs):
    return sorted(photographs.rglob("*.png"))
