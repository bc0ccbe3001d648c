"""`python -m flax_alexnet.prepare --data.name NAME`: data in the form that training reads."""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import absl.logging
import tensorflow_datasets as tfds

from flax_alexnet.config import LARGEST_IMAGE, parse
from flax_alexnet.data import shapes
from flax_alexnet.data.prepared import PreparedFolder
from flax_alexnet.data.sources import (
    FOLDER,
    UNREADABLE,
    damaged,
    default_data_dir,
    need_known,
    open_dataset,
)
from flax_alexnet.errors import UserError, exit_code, first_line, leave


@dataclasses.dataclass(frozen=True)
class PrepareDataConfig:
    """What to prepare, and where to."""

    name: str = shapes.NAME
    """The embedded "shapes_and_textures", a TFDS name, or folder:PATH."""
    data_dir: Path | None = None
    """Where prepared datasets lie; none: TFDS_DATA_DIR or tensorflow_datasets in the home."""
    image_size: int = 256
    """Side in pixels to which the pictures of a folder are brought."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Downloads or reads a dataset and writes it as ArrayRecord files."""

    data: PrepareDataConfig = PrepareDataConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a mistake of the user."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        config = parse(PrepareConfig, arguments, PrepareConfig(), "flax_alexnet.prepare")
        print(prepare(config.data.name, config.data.data_dir, config.data.image_size))
        return 0
    except (UserError, KeyboardInterrupt) as error:
        return exit_code(error)


def prepare(name: str, data_dir: Path | None = None, image_size: int = 256) -> str:
    """Prepares a dataset, with a progress bar, and returns a line that says what is there now.

    The embedded dataset is rendered. A folder's pictures are brought to `image_size` ×
    `image_size` by the paper's rule (shorter side scaled, centre cut out) and stored as JPEG under
    the name "prepared_folder/NAME". TFDS names are downloaded and stored as TFDS does, but as
    ArrayRecord; many of their builders need TensorFlow for that.

    Raises:
      UserError: a size out of range, a folder or name that is not there, a picture that cannot be
        decoded, or TensorFlow is needed and not installed.
    """
    if not 1 <= image_size <= LARGEST_IMAGE:
        raise UserError(f"--data.image-size is {image_size}; expected 1 to {LARGEST_IMAGE}")
    data_dir = data_dir or default_data_dir()
    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS warns of what is meant so here
    try:
        builder = _builder(name, data_dir, image_size)
        builder.download_and_prepare()
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing {name!r} needs the package {error.name}: pip install "
            "'flax-alexnet[prepare]'"
        ) from None
    except UNREADABLE as error:
        raise damaged(data_dir / name.partition(":")[0], error) from None
    # What TFDS and its builders raise when something is missing: a version of that name, files to
    # be fetched by hand, a network, room on the disk, a folder that can be written to.
    except (
        *(AssertionError, OSError, ValueError, RuntimeError),
        tfds.core.DatasetNotFoundError,
    ) as error:
        by_hand = str(error).startswith("Manual directory")  # and how to fetch them follows
        reason = str(error) if by_hand else first_line(error)
        raise UserError(f"cannot prepare {name!r} in {data_dir}: {reason}") from None
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    counts = ", ".join(f"{split.num_examples:,} {s}" for s, split in builder.info.splits.items())
    return f"{builder.name}{config}: {counts} pictures in {builder.data_path}"


def _builder(name: str, data_dir: Path, image_size: int) -> tfds.core.DatasetBuilder:
    if name == shapes.NAME:
        return shapes.builder(data_dir)
    if not name.startswith(FOLDER):
        need_known(name, data_dir)
        return tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    dataset = open_dataset(name)
    folder = Path(os.path.expanduser(name.removeprefix(FOLDER))).resolve().name
    if not re.fullmatch(r"\w+", folder, re.ASCII):
        raise UserError(f"the folder's name, {folder!r}, may have only letters, digits and '_'")
    path = data_dir / PreparedFolder.name / folder
    if path.exists():
        raise UserError(f"{path} is there already; remove it to prepare {name} once more")
    return PreparedFolder(dataset, folder, data_dir, image_size)


if __name__ == "__main__":
    leave(main)
