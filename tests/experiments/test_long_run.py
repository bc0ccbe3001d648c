"""A long run in full, and that its measures can fail: see `experiments/benchmarks/long_run.py`."""

import json
import os
import runpy
import threading
from multiprocessing import shared_memory
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "long_run.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.usefixtures("examples")
@pytest.mark.slow
def test_ten_thousand_steps_leave_nothing_behind(script, tmp_path):
    code = script["main"](["--output", str(tmp_path)])
    result = json.loads((tmp_path / "long_run.json").read_text())
    assert result["steps"] == 10_000
    assert result["growth_after_a_tenth"] < 0.02, result
    left = result["left_behind"]
    assert left.pop("native_threads") < result["steps"] // script["EVERY"], result
    assert max(left.values()) <= 0, result
    assert result["exit_seconds"] < 10, result
    assert code == 0
    assert (tmp_path / "long_run.png").stat().st_size > 10_000


def test_growth_is_seen(script):
    """A kilobyte a step, and a save at each tenth line that takes much memory for a moment."""
    memory = [(n, 2**20 + 2**10 * n + 2**23 * (n % 10 == 0)) for n in range(1, 101)]
    first, last = script["first_and_last"](10, memory)
    assert (first, last) == (2**20 + 2**10 * 15, 2**20 + 2**10 * 96)


def test_what_is_held_is_counted(script):
    before = script["held_now"]()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        now = script["held_now"]()
    finally:
        os.close(descriptor)
        end.set()
        thread.join()
    one_more = {kind: before[kind] + 1 for kind in ("descriptors", "threads")}
    assert now == before | one_more


def test_shared_memory_counts_when_nobody_uses_it(script):
    segment = shared_memory.SharedMemory(create=True, size=1)
    try:
        assert segment.name not in script["ownerless"]()
        segment.close()
        assert segment.name in script["ownerless"]()
    finally:
        segment.unlink()
    assert segment.name not in script["ownerless"]()
