"""How the process of a command begins and ends: its output, signals, and its exit code."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from flax_alexnet.errors import END_SIGNALS, INTERRUPTED, Terminated

PATIENCE = 10.0  # seconds for tidying up after a signal


class _Output(io.FileIO):
    """Standard output or error that ends no command when it cannot be written any more.

    The reader may have gone, as `head` does when it has enough, or the disk may be full. What was
    asked for is finished all the same; `failure` is the first error that is not such a reader's.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = self.failure or error
            return len(data)


def escape_output() -> None:
    r"""Lets standard output and error write what their encoding lacks as escapes, such as \u2192.

    Else it would end a command where the locale, or PYTHONIOENCODING, is Latin-1 or ASCII. What
    somebody has put in their place, as notebooks do, stays as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def leave(main: Callable[[], int], *, training: bool = False) -> NoReturn:
    """Runs a command and ends the process with what it returns.

    Args:
      main: the command; it returns the exit code.
      training: whether a signal ends the process at once, since a run has its own way of ending
        tidily from the first step on, and lost output is no failure, since it is only a log.
    """
    outputs = _take_output()
    for number in END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, _end if training else _end_tidily)
    code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if (failure := outputs[0].failure) and not training and code == 0:
        print(f"error: cannot write the standard output: {failure.strerror}", file=sys.stderr)
        code = 2
    # An orderly exit waits for threads: those of a save that failed take minutes, and where XLA is
    # still at work after Ctrl-C, it crashes. Several processes of a run must leave each other.
    jax = sys.modules.get("jax")
    if code >= INTERRUPTED or not (jax and jax.distributed.is_initialized()):
        os._exit(code)
    sys.exit(code)


def end_on_signals() -> None:
    """Lets a signal end the process at once; for imports, some of which lose what is raised."""
    for number in END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: Any) -> NoReturn:
    del frame
    os._exit(128 + number)


def _end_tidily(number: int, frame: Any) -> NoReturn:
    """Ends the command so that what it was writing is removed."""
    del frame
    end_on_signals()  # the next one ends it at once
    # Some libraries lose what is raised within them.
    timer = threading.Timer(PATIENCE, os._exit, [128 + number])
    timer.daemon = True
    timer.start()
    raise Terminated(number)


def _take_output() -> list[_Output]:
    """Puts an `_Output` in the place of standard output and error, closed ones too."""
    found = []
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is None:
            # Else the next file that is opened would get the number, and what others print there.
            descriptor = os.open(os.devnull, os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        raw = _Output(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=number == 2 or raw.isatty(),
        )
        setattr(sys, name, stream)
        found.append(raw)
    return found
