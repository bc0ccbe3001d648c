"""Images that a run cannot read: each is named once, in a file, and too many end the run."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from flax_alexnet.data.sources import NO_LABEL, Dataset
from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.inputs import LARGEST_TEXT, read_bytes

MOST_OF_CLASS = 0.1  # of each class of a folder; collected images usually include a few bad ones
MOST_OF_PREPARED = 0.001  # of a prepared split, which had no bad images when it was prepared
# Called for each image that cannot be read, with its name, the reason, and its label or `NO_LABEL`;
# it raises UserError to end the run.
OnBad = Callable[[str, str, int], None]


def refuse(name: str, problem: str, label: int = NO_LABEL) -> None:
    """Ends the run at the first image that cannot be read."""
    del label
    raise UserError(f"cannot read image {name}: {problem}; remove or repair it")


class Limit:
    """How many images may be bad before a run ends: a share of each class.

    Args:
      classes: for each label, what its images are called and how many there are, such as
        `{0: ("images of cat", 40)}`; `NO_LABEL` stands for all other labels.
      share: the largest share of bad images in a class, 0 to 1.
    """

    def __init__(self, classes: Mapping[int, tuple[str, int]], share: float):
        self._classes, self._share = classes, share
        self._counts: Counter[int] = Counter()
        self._lock = threading.Lock()

    def add(self, label: int) -> None:
        """Counts a bad image."""
        with self._lock:
            self._counts[label if label in self._classes else NO_LABEL] += 1

    def exceeded(self, label: int) -> str:
        """The problem, if too many images of the class with this label are bad, else ""."""
        label = label if label in self._classes else NO_LABEL
        what, total = self._classes[label]
        count = self._counts[label]
        if count / total <= self._share:
            return ""
        return f"{count:,} of {total:,} {what} are bad, more than --data.max-bad {self._share:g}"


def limits(dataset: Dataset, max_bad: float | None) -> tuple[Limit, Limit]:
    """How many images of `dataset.train` and of `dataset.eval` may be bad.

    For a folder, the limit is a share of each class, over both splits together. For a prepared
    dataset, it is a share of each split, since labels are not known before images are read.

    Args:
      dataset: as it was opened.
      max_bad: the share; None for `MOST_OF_CLASS` and `MOST_OF_PREPARED`.
    """
    parts = {"train": dataset.train, "eval": dataset.eval}
    if any(source.prepared for source in parts.values()):
        share = MOST_OF_PREPARED if max_bad is None else max_bad
        train, held_out = (
            Limit({NO_LABEL: (f"{split} images", len(source))}, share)
            for split, source in parts.items()
        )
        return train, held_out
    labels = Counter(s.label(index) for s in parts.values() for index in range(len(s)))
    names = dataset.label_names
    classes = {label: (f"images of {names[label]}", total) for label, total in labels.items()}
    limit = Limit(classes, MOST_OF_CLASS if max_bad is None else max_bad)
    return limit, limit


class BadRecords:
    """Records the bad images of one split as they are found, by any thread.

    Only images that this process has found since its start are counted, so that a repaired image no
    longer counts. The file lists the images that any start of the run has found, one line
    `{"split": …, "name": …, "problem": …}` for each, without repetitions. It does not exist while
    no image is bad.

    Args:
      workdir: the folder of the run; process 0 writes `bad_records.jsonl` there, process p
        `bad_records.p.jsonl`.
      split: the name of the split in the lines.
      total: the number of images in the split.
      limit: how many images may be bad before the run ends. Several splits may share it.
      process: the index of this process.
    """

    def __init__(self, workdir: Path, split: str, total: int, limit: Limit, process: int = 0):
        self.path = workdir / (f"bad_records.{process}.jsonl" if process else "bad_records.jsonl")
        self._split, self._total, self._limit = split, total, limit
        self._names: set[str] = set()
        self._last_count = 0  # the number of images in the last report
        self._waiting: list[bytes] = []  # lines to be written
        self._written: set[bytes] | None = None  # lines of the file; None: not known
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, problem: str, label: int = NO_LABEL) -> None:
        """Records a bad image; an image that is added again counts once.

        Raises:
          UserError: there are too many.
        """
        with self._lock:
            if name not in self._names:
                self._names.add(name)
                self._limit.add(label)
                line = json.dumps({"split": self._split, "name": name, "problem": problem})
                self._waiting.append(line.encode())
                try:
                    self._write()
                except OSError as error:  # a full disk, say, is no reason to stop
                    self._written = None  # a part of a line may be there now
                    reason = cause(error)
                    print(f"cannot write {self.path} ({reason}): {line}", file=sys.stderr)
        if too_many := self._limit.exceeded(label):
            raise UserError(
                f"cannot read image {name}: {problem}; now {too_many} allows (see {self.path}): "
                "remove or repair these images, or raise --data.max-bad"
            )

    def report(self) -> str:
        """A line for the terminal, or "" if no bad image was found since the last call."""
        known, self._last_count = self._last_count, len(self)
        if self._last_count == known:
            return ""
        return (
            f"{self._last_count:,} of {self._total:,} {self._split} images cannot be read and are "
            f"skipped; see {self.path}"
        )

    def _write(self) -> None:
        """Writes the waiting lines, except those that an earlier start has written."""
        cut = False  # whether a kill or a full disk cut the last line off
        if self._written is None:
            there = read_bytes(self.path, LARGEST_TEXT) if self.path.exists() else b""
            self._written = set(there.splitlines())
            cut = bool(there) and not there.endswith(b"\n")
        lines = [line + b"\n" for line in self._waiting if line not in self._written]
        if cut or lines:
            with self.path.open("ab") as file:
                file.writelines([b"\n" * cut, *lines])
        self._waiting.clear()
