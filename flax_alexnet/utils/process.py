"""The start and the end of the process of a command: output, signals, exit code."""

import contextlib
import io
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from flax_alexnet.utils.errors import END_SIGNALS, INTERRUPTED, Terminated, UserError, exit_code

# With fewer bytes of address space JAX does not load, or hangs; a training run needs more.
LEAST_MEMORY, LEAST_FOR_TRAINING = 1_500_000_000, 2_600_000_000
PATIENCE = 10.0  # seconds for tidying up after a signal


class _Output(io.FileIO):
    """Standard output or error that does not end a command when it can no longer be written.

    The reader may have closed the pipe, as `head` does when it has enough, or the disk may be full.
    The command finishes all the same; `failure` is the first error other than a closed pipe.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # it does not block, and is not ready
                select.select([], [self], [])
            return written
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = self.failure or error
            return len(data)


def escape_output() -> None:
    r"""Makes standard output and error escape characters that their encoding lacks, as \u2192.

    Otherwise such a character would end a command if the locale, or PYTHONIOENCODING, is Latin-1 or
    ASCII. Streams that replace them, as in notebooks, stay unchanged.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def leave(main: Callable[[], int], *, training: bool = False) -> NoReturn:
    """Runs a command and ends the process with what it returns.

    Args:
      main: the command; it returns the exit code.
      training: whether the command is a training run. Then a signal ends the process at once, since
        a run handles signals itself from its first step on; and lost output is no failure, since it
        is only a log.
    """
    begin(LEAST_FOR_TRAINING if training else LEAST_MEMORY)
    outputs = _take_output()
    heard = [number for number in END_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    for number in heard:  # `nohup` has one ignored
        signal.signal(number, _end if training else _end_tidily)
    sys.unraisablehook = _unraisable
    _watch(heard, 0.0 if training else PATIENCE)
    if jax := sys.modules.get("jax"):
        # JAX_TRANSFER_GUARD helps to debug a user's own program; our transfers are intended.
        jax.config.update("jax_transfer_guard", "allow")
    try:
        code = main()
    except KeyboardInterrupt as error:  # raised outside of the part of `main` that handles it
        code = exit_code(error)
    except MemoryError:
        code = exit_code(
            UserError("there is too little memory: see `ulimit -v`, or end other programs")
        )
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if (failure := outputs[0].failure) and not training and code == 0:
        print(f"error: cannot write the standard output: {failure.strerror}", file=sys.stderr)
        code = 2
    # An orderly exit waits for threads: those of a failed save take minutes, and if XLA is still
    # running after Ctrl-C, the exit crashes. But several processes need it to leave each other.
    jax = sys.modules.get("jax")  # which training imports late
    if code >= INTERRUPTED or not (jax and jax.distributed.is_initialized()):
        os._exit(code)
    sys.exit(code)


def begin(least: int = LEAST_MEMORY) -> None:
    """Prepares the process of a command for its imports, which come before the call of `leave`.

    Closed standard streams are connected to the null device; otherwise the next file that is opened
    would get the number of one, and its output. A signal ends the process at once. If the limit on
    the address space is less than `least` bytes, a line says so, and the process ends.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the least number that is free, which is this
    end_on_signals()
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY and allowed < least:
        print(
            f"error: `ulimit -v` allows {allowed / 1e9:.1f} GB of addresses, and JAX takes more "
            f"than {least / 1e9:.1f} GB: raise it",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(2)


def end_on_signals() -> None:
    """Lets a signal end the process at once; for imports, some of which lose exceptions."""
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
    raise Terminated(number)


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Sends a signal again if its `Terminated` was lost, as exceptions in a finalizer are.

    Python's garbage collector calls code of JAX, so this may happen at any moment. Exceptions that
    threads of TensorStore lose after a failed save are not printed: the failure was reported.
    """
    error = lost.exc_value
    if isinstance(error, Terminated):
        number = error.args[0]
        signal.signal(number, _end_tidily)
        signal.set_wakeup_fd(-1)  # `_watch` would end the process at a second signal
        # A thread sends it a little later, since it would be lost again during this call.
        threading.Timer(0.05, os.kill, [os.getpid(), number]).start()
    elif not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(lost)


def _watch(heard: Collection[int], patience: float) -> None:
    """Ends the process `patience` seconds after one of the signals `heard`, if nothing else has.

    Python handles a signal only between two of its instructions. An instruction may take minutes,
    such as waiting for other processes, and some libraries lose exceptions that are raised within
    them. A thread receives each signal at once; a second signal ends the process at once.
    """

    def next_signal() -> int:
        while (number := os.read(reader, 1)[0]) not in heard:
            pass
        return number

    def watch() -> None:
        number = next_signal()
        timer = threading.Timer(patience, os._exit, [128 + number])
        timer.daemon = True
        timer.start()
        os._exit(128 + next_signal())

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="ending", daemon=True).start()


def _take_output() -> list[_Output]:
    """Puts an `_Output` in the place of standard output and error, closed ones too."""
    outputs = []
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        raw = _Output(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=number == 2 or raw.isatty(),
            write_through=bool(before and before.write_through),  # as `python -u` has it
        )
        setattr(sys, name, stream)
        outputs.append(raw)
    return outputs
