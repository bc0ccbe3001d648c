"""`python -m flax_alexnet.prepare --data.name NAME`: data in the form that training reads."""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from flax_alexnet.config import LARGEST_IMAGE, parse
from flax_alexnet.data import shapes
from flax_alexnet.data.prepared import PreparedFolder
from flax_alexnet.data.sources import FOLDER, default_data_dir, open_dataset
from flax_alexnet.errors import UserError, exit_code, first_line, unknown


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
    if name.startswith(FOLDER):
        dataset = open_dataset(name)
        folder = Path(os.path.expanduser(name.removeprefix(FOLDER))).resolve().name
        if not re.fullmatch(r"\w+", folder, re.ASCII):
            raise UserError(f"the folder's name, {folder!r}, may have only letters, digits and '_'")
        builder: tfds.core.DatasetBuilder = PreparedFolder(dataset, folder, data_dir, image_size)
        prepared_name = f"{PreparedFolder.name}/{folder}"
        if Path(builder.data_path).exists():
            raise UserError(
                f"{builder.data_path} is there already; remove it to prepare {name} once more"
            )
    elif name == shapes.NAME:
        builder, prepared_name = shapes.builder(data_dir), name
    else:
        builder, prepared_name = _tfds_builder(name, data_dir), name
    try:
        builder.download_and_prepare()
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing {name!r} needs the package {error.name}: pip install "
            "'flax-alexnet[prepare]'"
        ) from None
    # What TFDS and its builders raise when something is missing: files to be fetched by hand, a
    # network, room on the disk, a folder that can be written to.
    except (AssertionError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot prepare {name!r} in {data_dir}: {first_line(error)}") from None
    counts = ", ".join(f"{n:,} {s}" for s, n in _counts(builder).items())
    return f"{prepared_name}: {counts} pictures in {builder.data_path}"


def _counts(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def _tfds_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    known = set(tfds.list_builders(with_community_datasets=False)) - {PreparedFolder.name}
    base = name.partition(":")[0].partition("/")[0]
    if base not in known:
        raise UserError(unknown("dataset", base, [shapes.NAME, *known]) + " (or folder:PATH)")
    try:
        return tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    except (AssertionError, ValueError, OSError, tfds.core.DatasetNotFoundError) as error:
        raise UserError(f"cannot prepare {name!r}: {first_line(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
