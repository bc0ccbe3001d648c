"""Pictures that a run cannot read: each is named once, in a file, and too many end the run."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from flax_alexnet.errors import UserError, first_line

# Told of each picture that cannot be read, its name and why; raises UserError to end the run.
OnBad = Callable[[str, str], None]


def refuse(name: str, problem: str) -> None:
    """Ends the run at the first picture that cannot be read."""
    raise UserError(f"cannot read picture {name}: {problem}; remove or repair it")


class BadRecords:
    """The bad pictures of one split, as they are found, by any thread.

    Counted is what this process has found since it started, so that a picture that was repaired
    no longer counts. The file names what any start of the run has found: a line
    `{"split": …, "name": …, "problem": …}` a picture, which no later start repeats. It does not
    exist while nothing is bad.

    Args:
      workdir: of the run; process 0 writes `bad_records.jsonl` there, process p
        `bad_records.p.jsonl`.
      split: what the lines call it.
      total: its pictures.
      max_share: of them, 0 to 1; with more bad ones the run ends.
      process: this one.
    """

    def __init__(self, workdir: Path, split: str, total: int, max_share: float, process: int = 0):
        self.path = workdir / (f"bad_records.{process}.jsonl" if process else "bad_records.jsonl")
        self._split, self._total, self._max_share = split, total, max_share
        self._names: set[str] = set()
        self._said = 0  # how many `news` has told of
        self._waiting: list[bytes] = []  # lines to be written
        self._written: set[bytes] | None = None  # lines of the file; None: look
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, problem: str) -> None:
        """Takes down a picture; it may come again, and counts once.

        Raises:
          UserError: there are too many.
        """
        with self._lock:
            if name not in self._names:
                self._names.add(name)
                line = json.dumps({"split": self._split, "name": name, "problem": problem})
                self._waiting.append(line.encode())
                try:
                    self._write()
                except OSError as error:  # a full disk, say, is no reason to stop
                    self._written = None  # a part of a line may be there now
                    reason = error.strerror or first_line(error)
                    print(f"cannot write {self.path} ({reason}): {line}", file=sys.stderr)
            found = len(self)
        if found / self._total > self._max_share:
            raise UserError(
                f"cannot read picture {name}: {problem}; with it {found:,} of {self._total:,} "
                f"{self._split} pictures are bad, more than --data.max-bad {self._max_share:g} "
                f"allows (see {self.path}): remove or repair them, or raise --data.max-bad"
            )

    def news(self) -> str:
        """One line for the terminal, or "" where nothing was found since it was last asked for."""
        known, self._said = self._said, len(self)
        if self._said == known:
            return ""
        return (
            f"{self._said:,} of {self._total:,} {self._split} pictures cannot be read and are "
            f"skipped; see {self.path}"
        )

    def _write(self) -> None:
        """Writes the lines that wait, but for those that an earlier start wrote."""
        cut = False  # whether a kill or a full disk cut the last line off
        if self._written is None:
            there = self.path.read_bytes() if self.path.exists() else b""
            self._written = set(there.splitlines())
            cut = bool(there) and not there.endswith(b"\n")
        lines = [line + b"\n" for line in self._waiting if line not in self._written]
        if cut or lines:
            with self.path.open("ab") as file:
                file.writelines([b"\n" * cut, *lines])
        self._waiting.clear()
