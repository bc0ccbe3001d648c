"""Signals that ask a run to stop; test_loop.py sends them to whole runs."""

import os
import signal
import threading

from flax_alexnet.training.signals import WATCHER, stop_requests


def test_after_signals_all_is_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop_requested:
        assert not stop_requested(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested(False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert WATCHER not in {thread.name for thread in threading.enumerate()}
