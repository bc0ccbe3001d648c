"""User errors, which are reported in one line, and the exit codes of a process."""

import contextlib
import difflib
import signal
import sys
from collections.abc import Iterable, Iterator

from flax_alexnet.utils.text import printable

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
STOPPED = 75  # exit code of a run that a signal ended and that is saved; "try again" in sysexits.h
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which ask a process to end
LOST = 3  # exit code where another process of the run has ended


class Terminated(KeyboardInterrupt):
    """A signal asks the process to end; `args[0]` is its number."""


class UserError(ValueError):
    """A mistake of the user: its message names the value, what was expected, and the remedy."""


def exit_code(error: BaseException) -> int:
    """Says in one line why a command ends, and gives the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if isinstance(error, Terminated) else signal.SIGINT
        print("interrupted" if number == signal.SIGINT else "terminated", file=sys.stderr)
        return 128 + number
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Raises UserError for what libraries say of variables of the environment when imported."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"cannot start: {first_line(error)}") from None


def unknown(what: str, name: str, known: Iterable[str], shown: Iterable[str] = ()) -> str:
    """One line for a name that is not `known`: with the nearest one, else with those to choose.

    Where too many are known to show, these are `shown`.
    """
    known = sorted(known)
    choice = ", ".join([*shown] or known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {choice}"
    return f"unknown {what} {name!r}: {hint}"


def cause(error: BaseException) -> str:
    """What the system says went wrong, without number and path, or else `first_line`."""
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
