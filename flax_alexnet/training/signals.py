"""Signals that ask a run to stop, such as Ctrl-C and SIGTERM: it saves and ends after a step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flax_alexnet.parallel.distributed import total
from flax_alexnet.utils.errors import END_SIGNALS

WATCHER = "signals"  # the name of the thread that is told of them


@contextlib.contextmanager
def stop_requests(alone: bool = False) -> Iterator[Callable[[bool], bool]]:
    """Turns the first SIGTERM, SIGHUP or Ctrl-C into a question to ask after each step.

    The next one ends the process. Of several processes any may get the signal, and each is at
    another step, so these ask each other, but only where they wait for the devices anyway. Outside
    the main thread, where Python lets nobody handle signals, these stay as they are: see
    `handles_signals`.

    Args:
      alone: whether this process asks for itself, whatever the others do.

    Yields:
      (whether this is such a place) to whether the run is to be saved and ended here; the same on
      all processes.
    """
    pressed = False

    def handle(signum: int, frame: Any) -> None:
        del signum, frame
        nonlocal pressed
        pressed = True

    def requested(waiting: bool) -> bool:
        if alone or jax.process_count() == 1:
            return pressed
        return waiting and bool(total(np.array([pressed], np.int32), "log a step")[0])

    def watch() -> None:
        seen = 0
        while number := os.read(reader, 1):
            if number[0] not in before:
                continue
            seen += 1
            if seen > 1:
                os._exit(128 + number[0])
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, b"\nstopping after the steps under way; once more to stop at once\n")

    if not handles_signals():
        yield requested
        return
    heard = [number for number in END_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    # Python calls `handle` between two of its instructions, and one may wait for the device for
    # long. A thread is told of each signal at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name=WATCHER, daemon=True)
    watcher.start()
    try:
        yield requested
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, action in before.items():
            signal.signal(number, action)
        os.close(writer)  # which ends the thread
        watcher.join()
        os.close(reader)


def handles_signals() -> bool:
    """Whether this thread may handle signals, which is the main one alone."""
    return threading.current_thread() is threading.main_thread()
