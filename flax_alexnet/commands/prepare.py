"""`python -m flax_alexnet prepare --data.name NAME`: data in the form that training reads."""

import dataclasses
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import absl.logging
import tensorflow_datasets as tfds

from flax_alexnet.config.cli import check_flag, command, parse
from flax_alexnet.config.schema import LARGEST_IMAGE
from flax_alexnet.data import imagenet, synthetic
from flax_alexnet.data.descriptions import damaged
from flax_alexnet.data.examples import summarize
from flax_alexnet.data.folders import list_left_out
from flax_alexnet.data.sources import (
    FOLDER,
    PREPARED_FOLDER,
    UNREADABLE,
    FolderSplits,
    check_descriptions,
    check_known,
    default_data_dir,
    place_of,
    prepare_with_tfds,
)
from flax_alexnet.data.writer import OUTCOMES, Prepared, check_new, write_dataset
from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.text import printable


@dataclasses.dataclass(frozen=True)
class PrepareDataConfig:
    """The dataset to prepare, and where to write it."""

    name: str = synthetic.NAME
    """The embedded "shapes_and_textures", a TFDS name such as "imagenet2012", or folder:PATH."""
    data_dir: Path | None = None
    """Folder of prepared datasets; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    image_size: int = 256
    """Side in pixels to which the images of a folder or of ImageNet are resized."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Downloads or reads a dataset and writes it as ArrayRecord files."""

    data: PrepareDataConfig = PrepareDataConfig()
    name: str | None = None
    """Name of the dataset of a folder, as in prepared_folder/NAME; none: the folder's name."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    config = parse(PrepareConfig, argv, PrepareConfig(), "flax_alexnet prepare")
    print(prepare(**vars(config.data), as_name=config.name))


def prepare(
    name: str, data_dir: Path | None = None, image_size: int = 256, as_name: str | None = None
) -> str:
    """Prepares a dataset, with a progress bar, and returns lines that say what is there now.

    The images of a folder and of "imagenet2012" are brought to `image_size` × `image_size` by
    the paper's rule (shorter side scaled, centre cut out) and stored as JPEG; those that cannot be
    read are left out, and `outcomes.csv` in the dataset says why; of a folder it also lists what is
    no image, hidden, or in no class folder. A folder's dataset has all its splits, and is called
    "prepared_folder/NAME" by `as_name`, or as `name_of_folder` says. What was interrupted goes on
    when it is called again. The embedded dataset is rendered. Other TFDS names are downloaded and
    stored as TFDS does, but as ArrayRecord; many of their builders need TensorFlow for that.

    Raises:
      UserError: a size out of range, a folder or name that is not there, no image that can be
        read, a place that cannot be written to, or TensorFlow is needed and not installed.
    """
    if as_name is not None:
        check_flag("name", as_name, name.startswith(FOLDER), "no value: it is for folders")
        plain = re.fullmatch(r"\w+", as_name, re.ASCII)
        check_flag("name", as_name, plain is not None, "letters of ASCII, digits and '_'")
    if not 1 <= image_size <= LARGEST_IMAGE:
        raise UserError(f"--data.image-size is {image_size}; expected 1 to {LARGEST_IMAGE}")
    data_dir = data_dir or default_data_dir()
    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS warns of what is meant so here
    try:
        if name.startswith(FOLDER):
            return _prepare_folder(name, data_dir, image_size, as_name)
        if name == imagenet.NAME:
            return _prepare_imagenet(data_dir, image_size)
        return _prepare_with_tfds(name, data_dir)
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


def _prepare_folder(name: str, data_dir: Path, image_size: int, as_name: str | None) -> str:
    path = place_of(name)  # so that names are the same from everywhere
    if data_dir.resolve().is_relative_to(path):
        raise UserError(
            f"--data.data-dir is {data_dir}, in the folder of the images, which would then have "
            "another class; take a folder beside it"
        )
    parts = FolderSplits(path)
    as_name = as_name or name_of_folder(path.name)
    folder = data_dir / PREPARED_FOLDER / as_name / "1.0.0"
    check_new(folder, "--name or --data.data-dir")
    if as_name != path.name:
        print(f"{printable(str(path))} is prepared as {PREPARED_FOLDER}/{as_name}", flush=True)
    splits = {split: parts.open(split) for split in parts.names}
    left_out = list_left_out(path, parts.images, parts.others)
    written = write_dataset(splits, folder, PREPARED_FOLDER, image_size, left_out=left_out)
    return _describe(f"{PREPARED_FOLDER}/{as_name}", written, left_out)


def name_of_folder(name: str) -> str:
    """The name of a folder as that of a dataset, of letters of ASCII, digits and "_".

    A name of another script becomes "folder_" and a number that follows from it.
    """
    if re.fullmatch(r"\w+", name, re.ASCII):
        return name
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()
    return re.sub(r"\W+", "_", letters).strip("_") or f"folder_{digest[:8]}"


def _prepare_imagenet(data_dir: Path, image_size: int) -> str:
    folder = data_dir / imagenet.NAME / imagenet.VERSION
    check_new(folder)
    with imagenet.open_archives(data_dir) as splits:
        written = write_dataset(
            splits, folder, imagenet.NAME, image_size, name_feature=imagenet.NAME_FEATURE
        )
    return _describe(imagenet.NAME, written)


def _describe(name: str, written: Prepared, left_out: Sequence[tuple[str, str]] = ()) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in written.counts.items())
    total = sum(written.counts.values()) + len(written.problems)
    lines = [
        f"{name}: {counts} images in {written.folder}, {written.size / 1e6:,.1f} MB, "
        f"{written.throughput:,.0f} images/s",
        summarize(written.problems, total),
    ]
    for why, count in Counter(why for _, why in left_out).items():
        example = next(name for name, other in left_out if other == why)
        lines.append(f"{count:,} other files: {why}, such as {example}")
    lines.append(f"what became of each: {written.folder / OUTCOMES}")
    return "\n".join(lines)


def _prepare_with_tfds(name: str, data_dir: Path) -> str:
    check_descriptions(name, data_dir)
    if name == synthetic.NAME:
        builder = prepare_with_tfds(lambda: synthetic.builder(data_dir))
    else:
        check_known(name, data_dir)
        builder = prepare_with_tfds(
            lambda: tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
        )
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    counts = ", ".join(f"{split.num_examples:,} {s}" for s, split in builder.info.splits.items())
    return f"{builder.name}{config}: {counts} images in {builder.data_path}"
