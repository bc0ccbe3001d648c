"""Signals that ask a run to stop, such as Ctrl-C and SIGTERM."""

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

WATCHER = "signals"  # the name of the thread that receives the signals


@contextlib.contextmanager
def stop_requests(alone: bool = False) -> Iterator[Callable[[bool], bool]]:
    """Turns the first SIGTERM, SIGHUP or Ctrl-C into a request that is checked after each step.

    The second signal ends the process. In a run of several processes any of them may get the
    signal, and each is at another step. So the processes ask each other, but only where they wait
    for the devices anyway. Outside the main thread Python does not allow signal handlers, and
    signals keep their usual effect; see `handles_signals`.

    Args:
      alone: whether this process decides for itself, whatever the others do.

    Yields:
      A function. Its argument says whether the process waits for the devices here; its result says
      whether to save and end the run here, and is the same on all processes.
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
            with contextlib.suppress(OSError):  # standard error is closed
                os.write(
                    2,
                    b"\nthe run stops after the current steps; a second signal stops it at once\n",
                )

    if not handles_signals():
        yield requested
        return
    heard = [number for number in END_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    # Python calls `handle` only between two of its instructions, and an instruction may wait long
    # for the device. The watcher thread receives each signal at once.
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
    """Whether this thread may handle signals; only the main thread may."""
    return threading.current_thread() is threading.main_thread()
