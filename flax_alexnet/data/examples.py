"""Decoded images, each with its outcome: an image that cannot be read does not stop the others."""

import functools
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.folders import list_below
from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.data.preprocessing import ResizeRule
from flax_alexnet.data.sources import (
    NO_LABEL,
    FolderSource,
    Record,
    Source,
    held_out_split,
    open_splits,
    reading,
)
from flax_alexnet.utils.errors import UserError


class Example(NamedTuple):
    """A decoded image with its label, or why there is none."""

    name: str  # for messages, as that of its `Record`
    label: int
    image: np.ndarray | None  # uint8[size, size, 3]; None where there is a problem
    problem: str = ""


def find_images(arguments: Sequence[str]) -> FolderSource:
    """The files that paths, folders (with all below them) and globs name, in that order.

    Hidden files are skipped. All other files are taken, whatever their names, so that each has an
    outcome. A file that is named twice is taken once. A link to a folder is followed only if it is
    named, or if a part of a glob other than "**" matches it, since links may form a cycle.

    Raises:
      UserError: an argument names no file, or a folder cannot be read.
    """
    if not arguments:
        raise UserError("no images: name files, folders or globs")
    files: dict[tuple[str, str], Path] = {}  # by where they really are
    place = functools.cache(os.path.realpath)
    for argument in arguments:
        expanded = os.path.expanduser(argument)
        # A file name may contain the wildcards of a glob, so an existing path takes precedence.
        with reading():
            named = [expanded] if os.path.lexists(expanded) else _expand(expanded)
            # Links come last, so that a folder that is also found directly keeps its own name.
            named.sort(key=lambda path: (os.path.islink(path) and os.path.isdir(path), path))
            paths = [Path(file) for path in named for file in _files(path)]
        if not paths:
            raise UserError(f"no images {argument}: expected a file, a folder or a glob")
        for file in paths:
            files.setdefault((place(file.parent), file.name), file)
    return FolderSource([(file, NO_LABEL) for file in files.values()], ())


def open_split(
    name: str,
    data_dir: Path | None = None,
    split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> tuple[Source, str]:
    """Labelled images of one split of a dataset, and what the user should know of them, or "".

    Args:
      name: as for `open_splits`.
      data_dir: likewise.
      split: a split of TFDS, or one of `FolderSplits`; None is "validation" if there is one, else
        "test".
      image_key: as for `open_splits`.
      label_key: likewise.

    Raises:
      UserError: no such dataset or split.
    """
    splits = open_splits(name, data_dir, image_key, label_key)
    chosen = split or held_out_split(splits)
    if chosen is None:
        raise UserError(
            f"dataset {name!r} has no validation or test split, only {', '.join(splits.names)}: "
            "choose with --data.split"
        )
    return splits.open(chosen), splits.note()


def _files(path: str) -> list[str]:
    return list_below(path)[1] if os.path.isdir(path) else [path]


def _expand(pattern: str) -> list[str]:
    """The paths that a glob names, each once; "**" matches any number of folders, but no links."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    first = parts.index("**")
    head, rest = os.sep.join(parts[:first]), os.sep.join(parts[first + 1 :])
    if not head:
        tops = [os.sep * pattern.startswith(os.sep)]
    else:
        tops = [path for path in glob.glob(head) if os.path.isdir(path)]
    if not rest:  # all below them
        return [top or os.curdir for top in tops]
    folders = (folder for top in tops for folder in list_below(top)[0])
    return [path for folder in folders for path in _expand(os.path.join(glob.escape(folder), rest))]


def read_examples(
    source: Source,
    size: int,
    resize: ResizeRule = "paper",
    indices: Sequence[int] | None = None,
    threads: int | None = None,
) -> Iterator[Example]:
    """The images of a source brought to `size` × `size`, in order; see `decode` for the rules.

    Raises:
      UserError: a prepared dataset is damaged.
    """

    def read(index: int) -> Example:
        return decode_record(read_record(source, index, strict=source.prepared), size, resize)

    return map_threads(read, range(len(source)) if indices is None else indices, threads)


def read_record(source: Source, index: int, *, strict: bool = False) -> Record:
    """One encoded image of a source; if it cannot be read, its record says why.

    Raises:
      UserError: the dataset is damaged and `strict` is set; else the record says so.
    """
    try:
        return source.read(index)
    except DecodeError as error:
        problem = str(error)
    except UserError as error:
        if strict:
            raise
        problem = str(error)
    return Record(b"", source.label(index), source.name(index), problem)


def decode_record(
    record: Record, size: int, resize: ResizeRule, out: np.ndarray | None = None
) -> Example:
    """Decodes a record to `size` × `size`, into `out` if it is given; see `decode`."""
    image, problem = None, record.problem
    if not problem:
        try:
            image = decode(record.image, size, resize, out)
        except DecodeError as error:
            problem = str(error)
    return Example(record.name, record.label, image, problem)


def summarize(problems: Sequence[tuple[str, str]], total: int, what: str = "images") -> str:
    """A summary of `total` images, of which those in `problems`, (name, reason), were not read."""
    lines = [f"{total - len(problems):,} of {total:,} {what} read"]
    if problems:
        lines[0] += f"; {len(problems):,} not:"
        lines += [f"  {name}: {problem}" for name, problem in problems[:20]]
    if len(problems) > 20:
        kinds = Counter(problem for _, problem in problems).most_common(5)
        lines.append("  … " + "; ".join(f"{count} times: {problem}" for problem, count in kinds))
    return "\n".join(lines)
