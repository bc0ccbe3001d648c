"""Mistakes of the user: one line that says what was wrong, and exit code 2."""

import contextlib
import difflib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
LOST = 3  # exit code where another process of the run has ended


class UserError(ValueError):
    """A mistake of the user: its message names the value, what was expected, and the remedy."""


def exit_code(error: BaseException) -> int:
    """Says in one line why a command ends, and gives the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def unknown(what: str, name: str, known: Iterable[str], shown: Iterable[str] = ()) -> str:
    """One line for a name that is not `known`: with the nearest one, else with those to choose.

    Where too many are known to show, these are `shown`.
    """
    known = sorted(known)
    choice = ", ".join([*shown] or known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {choice}"
    return f"unknown {what} {name!r}: {hint}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def printable(text: str) -> str:
    """The text as any terminal and file takes it: file names need not be Unicode."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which gets the name `path` once all is written.

    Raises:
      UserError: it cannot be written there; then what was there before is as it was.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}; take another path") from None


def need_writable(path: Path | None, inputs: Iterable[Path]) -> None:
    """Raises UserError, before all the work, for a path that cannot be written or is an input's."""
    if path is None:
        return
    with contextlib.suppress(OSError):  # an input that is not there is said elsewhere
        if any(path.exists() and other.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"{path} would be written over, but is read; take another path")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; take another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}; take another path") from None


def leave(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with what it returns."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os._exit(0)
    if code == INTERRUPTED:  # XLA may still be at work in its threads, and would crash in its end
        os._exit(code)
    sys.exit(code)
