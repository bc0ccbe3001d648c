"""Mistakes of the user, one line that says what was wrong, and how a process ends."""

import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
STOPPED = 75  # exit code of a run that a signal ended and that is saved; "try again" in sysexits.h
LOST = 3  # exit code where another process of the run has ended


class UserError(ValueError):
    """A mistake of the user: its message names the value, what was expected, and the remedy."""


def exit_code(error: BaseException) -> int:
    """Says in one line why a command ends, and gives the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
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
    """The text in one line as any terminal and file takes it: file names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1].replace("udc", "x") for c in text)


def escape_output() -> None:
    r"""Lets standard output and error write what their encoding lacks as escapes, such as \u2192.

    Else it would end a command where the locale, or PYTHONIOENCODING, is Latin-1 or ASCII. What
    somebody has put in their place, as notebooks do, stays as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def leave(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with what it returns."""
    escape_output()
    try:
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os._exit(0)
    # An orderly exit waits for threads: those of a save that failed take minutes, and where XLA is
    # still at work after Ctrl-C, it crashes. Several processes of a run must leave each other.
    jax = sys.modules.get("jax")
    if code == INTERRUPTED or not (jax and jax.distributed.is_initialized()):
        os._exit(code)
    sys.exit(code)
