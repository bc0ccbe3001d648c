"""The archives of the ImageNet challenge of 2012, read without unpacking them."""

import contextlib
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import tensorflow_datasets as tfds
from tqdm import tqdm

from flax_alexnet.data.decode import LARGEST_FILE, DecodeError
from flax_alexnet.data.sources import Record
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.utils.text import printable

NAME, VERSION, NAME_FEATURE = "imagenet2012", "5.1.0", "file_name"  # as TFDS has them
TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
NO_LABEL = -1  # of a member that is none of the archive's images


class TarImages:
    """Members of an archive by index; one that is no image of it says so when it is read."""

    def __init__(self, file: BinaryIO, label_names: Sequence[str]):
        self.label_names = label_names
        self._file = file
        # Arrays, since there are more than a million members.
        self._names: list[str] = []
        self._offsets, self._sizes, self._labels = array("q"), array("q"), array("q")

    def add(self, member: tarfile.TarInfo, label: int) -> None:
        """Appends a member."""
        self._names.append(printable(member.name))
        self._offsets.append(member.offset_data)
        self._sizes.append(member.size if _is_plain(member) else -1)
        self._labels.append(label)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The member's name, printable."""
        return self._names[index]

    def read(self, index: int) -> Record:
        """The record at `index`, for any number of threads; DecodeError says why there is none."""
        size, label = self._sizes[index], self._labels[index]
        if size < 0:
            raise DecodeError("it is no regular file")
        if label == NO_LABEL:
            raise DecodeError("by its name it is no image of this archive")
        if size > LARGEST_FILE:
            raise DecodeError(f"it has {size:,} bytes; at most {LARGEST_FILE:,} are read")
        try:
            encoded = os.pread(self._file.fileno(), size, self._offsets[index])
        except OSError as error:
            raise DecodeError(error.strerror or type(error).__name__) from None
        return Record(encoded, label, self.name(index))


@contextlib.contextmanager
def open_archives(data_dir: Path) -> Iterator[dict[str, TarImages]]:
    """The images of "train" and "validation", labelled by synset as TFDS does.

    Every member of the archives is listed, whatever it is, of which only the headers are read.

    Args:
      data_dir: the archives lie in its `downloads/manual`, where TFDS wants them.

    Raises:
      UserError: an archive is not there, cannot be read, or is damaged.
    """
    folder = data_dir / "downloads" / "manual"
    missing = [name for name in (TRAIN, VALIDATION) if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{NAME} needs {' and '.join(missing)} in {folder}. You need to register on "
            "https://image-net.org/download-images to fetch what is missing"
        )
    with _open(folder / TRAIN) as train, _open(folder / VALIDATION) as validation:
        yield {"train": _list_train(train), "validation": _list_validation(validation)}


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fetch it once more") from None


def _list_train(file: BinaryIO) -> TarImages:
    """An archive of archives: one for each synset, called after it like the images inside."""
    synsets = _lines("labels.txt")
    labels = {f"{synset}.tar": label for label, synset in enumerate(synsets)}
    images = TarImages(file, synsets)
    for outer in tqdm(_members(file), desc=TRAIN, total=len(synsets), unit="class", disable=None):
        label = labels.get(outer.name, NO_LABEL)
        if label == NO_LABEL or not _is_plain(outer):
            images.add(outer, NO_LABEL)
            continue
        for member in _members(file, outer.offset_data, outer.offset_data + outer.size):
            belongs = re.fullmatch(rf"{synsets[label]}_\d+\.JPEG", member.name, re.ASCII)
            images.add(member, label if belongs else NO_LABEL)
    return images


def _list_validation(file: BinaryIO) -> TarImages:
    """An archive of numbered images, whose labels TFDS has by their number."""
    synsets, answers = _lines("labels.txt"), _lines("validation_labels.txt")
    labels = {synset: label for label, synset in enumerate(synsets)}
    by_name = {
        f"ILSVRC2012_val_{number:08}.JPEG": labels[synset]
        for number, synset in enumerate(answers, start=1)
    }
    images = TarImages(file, synsets)
    for member in _members(file):
        images.add(member, by_name.get(member.name, NO_LABEL))
    return images


def _lines(name: str) -> list[str]:
    """A file that TFDS has beside its own builder of this dataset."""
    return tfds.core.tfds_path(f"datasets/{NAME}/{name}").read_text().split()


def _members(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """What a tar archive between two places of a file has, in its order.

    `tarfile` takes any header that it cannot read for the archive's end, so the zeros that mark
    the true one are looked for.

    Raises:
      UserError: it is damaged or cut off.
    """
    end = os.fstat(file.fileno()).st_size if end is None else end
    file.seek(start)
    where = start
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                where = member.offset_data
                if not 0 <= member.size <= end - where:
                    raise tarfile.ReadError("a member that does not end")
                yield member
            where = archive.offset
        file.seek(where)
        if where + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("no end")
    # What else `tarfile` raises depends on where the damage is.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError):
        raise UserError(
            f"{file.name} is damaged or cut off, at byte {where:,}; fetch it once more"
        ) from None


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member's bytes lie in the archive as they are."""
    return member.isreg() and not member.issparse()
