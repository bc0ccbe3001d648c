"""Folders of class folders: their image files, classes and splits. No image is decoded here."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from flax_alexnet.data.decode import is_image_file
from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.text import printable

# What the folders of a split are called, whatever their case; "_set" may follow.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# Folders that systems leave beside images, some with small copies of them.
OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
CHUNK = 64  # files that a thread is given at once
READERS = 16  # threads, which mostly wait for a disk or a network

File = tuple[str, int]  # a path as text, which takes a third of a Path's memory, and a label


def standard_split(name: str) -> str | None:
    """The split that a folder of this name holds by custom: train, validation or test."""
    plain = re.sub(r"[ _-]?set$", "", name.lower())
    return next((split for split, names in SPLITS.items() if plain in names), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over."""
    return name.startswith(".") or name in OF_SYSTEMS


def natural(names: Iterable[str]) -> list[str]:
    """Sorted, with the numbers in them by their value: class_2 comes before class_10."""

    def key(name: str) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", name)
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], name

    return sorted(names, key=key)


def subfolders(path: str | Path) -> list[str]:
    """Names of the folders in `path`, or links to some, hidden ones left out, in natural order."""
    with os.scandir(path) as entries:
        return natural(e.name for e in entries if _is_folder(e) and not is_hidden(e.name))


def split_folders(path: Path) -> dict[str, str]:
    """The folders in `path` that hold splits, {"train": "Training"}; empty where there are none.

    Such a folder has class folders, so that a class of images may be called "train" as well.

    Raises:
      UserError: two folders for the same split.
      OSError: a folder that cannot be read.
    """
    by_split: dict[str, str] = {}
    for name in subfolders(path):
        split = standard_split(name)
        if split is None or not _count(path / name)[0]:
            continue
        if split in by_split:
            raise UserError(
                f"{path} has {by_split[split]} and {name}, both for the split {split}; leave one"
            )
        by_split[split] = name
    return {split: by_split[split] for split in SPLITS if split in by_split}


def class_folders(path: Path) -> list[str]:
    """Names of the classes in `path`: of its folders, in natural order.

    One folder beside files that are no images may be all that a class has, as in Tiny ImageNet
    (`n01443537/images` beside `n01443537_boxes.txt`).

    Raises:
      UserError: fewer than two, or one that holds no images but folders.
      OSError: a folder that cannot be read.
    """
    names = subfolders(path)
    for name in names:
        folders, files = _count(path / name)
        if folders > (1 if files else 0):
            raise UserError(
                f"{path / name} holds folders and no images, so it is no class: expected a "
                "folder for each class with its images, or train, validation and test with such "
                f"folders; rename or move it, or take folder:{path / name} if the classes are there"
            )
    if len(names) < 2:
        raise UserError(
            f"{path} has {len(names)} class folders; expected two or more, each with the "
            "images of one class"
        )
    return names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # of a link that leads back to itself
        return False


def _count(path: Path) -> tuple[int, int]:
    """How many folders and other files a folder holds; none, where an image is among the files."""
    folders, files = 0, []
    with os.scandir(path) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                if _is_folder(entry):
                    folders += 1
                else:
                    files.append(entry.path)
    images = folders and any(map(is_image_file, files))
    return (0, 0) if images else (folders, len(files))


def list_image_files(path: Path, label_names: Sequence[str]) -> tuple[list[File], list[str]]:
    """The images below the class folders of `path`, with labels, sorted by class and name.

    By the text of the names, so that which image is held out does not depend on `label_names`.
    The first bytes of a file say whether it is an image, and not its name. A file that is empty or
    that cannot be read is listed too: it may have been an image, and has an outcome. Hidden files
    and links to folders are passed over.

    Returns:
      Images, and paths of files that are none.

    Raises:
      UserError: a class folder without an image.
      OSError: a folder that cannot be read.
    """
    images: list[File] = []
    others: list[str] = []
    for label, name in sorted(enumerate(label_names), key=lambda pair: pair[1]):
        _, files = list_below(os.path.join(path, name))
        chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
        tried = map_threads(lambda chunk: [is_image_file(file) for file in chunk], chunks, READERS)
        before = len(images)
        for file, is_image in zip(files, itertools.chain.from_iterable(tried), strict=True):
            others.append(file) if is_image is False else images.append((file, label))
        if len(images) == before:
            raise UserError(f"class folder {path / name} has no images: add some or remove it")
    return images, others


def list_below(folder: str) -> tuple[list[str], list[str]]:
    """The folders below a folder, itself too, and the files in them, each sorted by its parts.

    Hidden ones and links to folders are passed over: a link may lead back.

    Raises:
      OSError: a folder that cannot be read.
    """
    folders, files = [folder], []
    for inside in folders:  # which grows meanwhile
        with os.scandir(inside or os.curdir) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                path = os.path.join(inside, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif not os.path.isdir(path):
                    files.append(path)

    def parts(path: str) -> list[str]:
        return path.split(os.sep)

    return sorted(folders, key=parts), sorted(files, key=parts)


def describe_others(others: Sequence[str]) -> str:
    """A line that counts files which are no images, by their endings; "" where there are none."""
    if not others:
        return ""
    kinds = Counter(os.path.splitext(path)[1].lower() or "without an ending" for path in others)
    counts = ", ".join(f"{count:,} {printable(kind)}" for kind, count in kinds.most_common(5))
    return (
        f"{len(others):,} files in the class folders are no images and are set aside ({counts}), "
        f"such as {printable(others[0])}"
    )


def list_left_out(
    path: Path, images: Collection[str], others: Collection[str]
) -> list[tuple[str, str]]:
    """(name, why) of all files below `path` but the `images`, sorted by name.

    Args:
      path: the whole folder.
      images: paths of those that are taken.
      others: paths of files in class folders that are none.
    """
    taken, set_aside = set(images), set(others)
    parents = (Path(folder, "_").parents for folder in set(map(os.path.dirname, taken)))
    inside = {str(parent) for several in parents for parent in several}
    result, folders = [], [str(path)]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:  # of somebody else's, say
            result.append((printable(folder), cause(error)))
            continue
        for entry in entries:
            # A class folder may be a link; no other link is followed, as it may lead back.
            if entry.is_dir(follow_symlinks=entry.path in inside):
                folders.append(entry.path)
            elif entry.path not in taken:
                parts = entry.path.removeprefix(str(path)).split(os.sep)
                if entry.path in set_aside:
                    why = "it is no image in a known format"
                elif os.path.isdir(entry.path):
                    why = "it is a link to a folder"
                elif any(map(is_hidden, parts)):
                    why = "it is hidden"
                else:
                    why = "it is in no class folder that is read"
                result.append((printable(entry.path), why))
    return sorted(result)
