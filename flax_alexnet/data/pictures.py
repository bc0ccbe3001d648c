"""Pictures that a trained net is used on: each has an outcome, and a bad one stops no other."""

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flax_alexnet.data.ahead import map_threads
from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.sources import FOLDER, FolderSource, Joined, Source, open_dataset
from flax_alexnet.errors import UserError
from flax_alexnet.preprocessing import ResizeRule

CHUNK = 16  # records that a thread reads at once
NO_LABEL = -1  # of a picture whose right class nobody said


class Picture(NamedTuple):
    """A picture, or why there is none."""

    name: str
    label: int
    image: np.ndarray | None  # uint8[size, size, 3]
    problem: str = ""


def find_pictures(arguments: Sequence[str]) -> FolderSource:
    """The files that paths, folders (with all below them) and globs name, in that order.

    Hidden files are passed over; any other is taken, whatever its name says, so that each has an
    outcome. A file that is named twice is taken once.

    Raises:
      UserError: an argument that names nothing.
    """
    if not arguments:
        raise UserError("no pictures: name files, folders or globs")
    files: dict[Path, int] = {}
    for argument in arguments:
        expanded = os.path.expanduser(argument)
        # A name may hold the signs of a glob, so what is there goes first.
        named = [expanded] if os.path.lexists(expanded) else glob.glob(expanded, recursive=True)
        found = [file for path in sorted(named) for file in _files(Path(path))]
        if not found:
            raise UserError(f"no pictures {argument}: expected a file, a folder or a glob")
        files |= dict.fromkeys(found, NO_LABEL)
    return FolderSource(list(files.items()), ())


def open_for_use(
    name: str, data_dir: Path | None = None, split: str | None = None
) -> tuple[Source, Sequence[str]]:
    """Labelled pictures of one split of a dataset, and the names of its classes.

    Args:
      name: as for `open_dataset`.
      data_dir: likewise.
      split: of TFDS; None is "validation" where there is one, else "test". Of a folder "train",
        "test" or "all"; None is "test".

    Raises:
      UserError: no such dataset or split.
    """
    if not name.startswith(FOLDER):
        dataset = open_dataset(name, data_dir, eval_split=split)
        return dataset.eval, dataset.label_names
    dataset = open_dataset(name)
    if split == "all":
        return Joined(dataset.train, dataset.eval), dataset.label_names
    parts = {"train": dataset.train, "test": dataset.eval, None: dataset.eval}
    if split not in parts:
        raise UserError(f"--data.split of a folder is train, test or all, not {split!r}")
    return parts[split], dataset.label_names


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = (p.relative_to(path) for p in sorted(path.rglob("*")) if not p.is_dir())
    return [path / p for p in below if not any(part.startswith(".") for part in p.parts)]


def read_pictures(
    source: Source,
    size: int,
    resize: ResizeRule = "paper",
    indices: Sequence[int] | None = None,
    threads: int | None = None,
) -> Iterator[Picture]:
    """The pictures of a source brought to `size` × `size`, in order; see `decode` for the rules.

    Raises:
      UserError: a prepared dataset is damaged.
    """

    def read(rows: Sequence[int]) -> list[Picture]:
        return read_rows(source, rows, size, resize, strict=source.prepared)

    indices = range(len(source)) if indices is None else indices
    parts = chunks(source, indices, CHUNK)
    return itertools.chain.from_iterable(map_threads(read, parts, threads))


def chunks(source: Source, indices: Sequence[int], most: int) -> list[Sequence[int]]:
    """The indices in parts to be read at once.

    Prepared records are read many at once, several times faster than one by one; files, which may
    be large, are not.
    """
    size = most if source.prepared else 1
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def read_rows(
    source: Source, rows: Sequence[int], size: int, resize: ResizeRule, *, strict: bool = False
) -> list[Picture]:
    """Some pictures of a source, read at once, each with its own outcome.

    Raises:
      UserError: a record cannot be read, if `strict`.
    """
    try:
        records = source.records(rows)
    except UserError as error:
        if len(rows) > 1:  # one of them; the others are not to suffer
            parts = (read_rows(source, [row], size, resize, strict=strict) for row in rows)
            return list(itertools.chain.from_iterable(parts))
        if strict:
            raise
        why = error.__context__  # what is wrong with a file, without its name
        problem = str(why if isinstance(why, DecodeError) else error)
        return [Picture(source.name(rows[0]), NO_LABEL, None, problem)]
    pictures = []
    for record in records:
        try:
            image, problem = decode(record.image, size, resize), ""
        except DecodeError as error:
            image, problem = None, str(error)
        pictures.append(Picture(record.name, record.label, image, problem))
    return pictures


def summarize(problems: Sequence[tuple[str, str]], total: int, what: str = "pictures") -> str:
    """What became of `total` pictures, of which those of `problems`, (name, why), were not read."""
    lines = [f"{total - len(problems):,} of {total:,} {what} read"]
    if problems:
        lines[0] += f"; {len(problems):,} not:"
        lines += [f"  {name}: {problem}" for name, problem in problems[:20]]
    if len(problems) > 20:
        kinds = Counter(problem for _, problem in problems).most_common(5)
        lines.append("  … " + "; ".join(f"{count} times: {problem}" for problem, count in kinds))
    return "\n".join(lines)
