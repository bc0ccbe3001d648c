"""Metrics: whole lines, on the disk and on the terminal, and the clocks beside them."""

import json
import time

import pytest

from flax_alexnet.training import logger
from flax_alexnet.training.logger import (
    Clock,
    Lines,
    RunLog,
    SilentLog,
    Throughput,
    average_throughput,
    read_metrics,
)
from flax_alexnet.utils.errors import UserError

LINE = {"step": 4, "epoch": 0.5, "train_loss": 2.3, "train_top1": 0.1, "images_per_second": 50.0}


def test_lines_are_read_as_they_were_written_and_what_is_made_again_is_removed(tmp_path, capsys):
    clock = Clock(tmp_path / "seconds", time.monotonic())
    log = RunLog(tmp_path, 0, 8, clock)
    for step in (4, 8):
        log.write(LINE | {"step": step})
    log.sync()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8]
    log.rewind(4)
    log.write(LINE | {"step": 6})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4, 6]
    assert "step      6  epoch   0.50  loss 2.3000  top-1  10.00%" in capsys.readouterr().out
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_silent_log_takes_what_a_log_takes():
    names = [name for name in vars(RunLog) if not name.startswith("_")]
    assert set(names) == {name for name in vars(SilentLog) if not name.startswith("_")}


def test_lines_that_do_not_fit_leave_no_part(tmp_path, monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def truncate(self, _):
            pass

    lines = Lines(tmp_path / "x")
    whole = lines._file
    monkeypatch.setattr(lines, "_file", Full())
    lines.add("one")
    with pytest.raises(OSError, match="No space"):
        lines.flush()
    lines._file = whole
    lines.add("two")
    lines.flush()
    lines.close()
    assert (tmp_path / "x").read_text() == "one\ntwo\n"


def test_seconds_go_on_from_those_of_the_sitting_before(tmp_path):
    (tmp_path / "seconds").write_text("100.0\n")
    clock = Clock(tmp_path / "seconds", time.monotonic())
    assert 100 <= clock.seconds() < 160
    clock.keep()
    assert float((tmp_path / "seconds").read_text()) >= 100


def test_throughput_leaves_out_compilation_and_pauses(monkeypatch):
    now = iter([10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr(logger.time, "monotonic", lambda: next(now))
    throughput = Throughput(batch_size=8)
    throughput.step()  # its dispatch ends at 10
    throughput.step()
    throughput.pause()  # at 12
    assert throughput.lap() == {"images_per_second": 2 * 8 / 2}
    throughput.step()  # from 20
    throughput.pause()  # to 21
    assert throughput.lap() == {"images_per_second": 8.0}


def test_a_first_step_alone_has_no_throughput():
    throughput = Throughput(batch_size=8)
    throughput.step()
    time.sleep(0.001)
    throughput.pause()
    assert throughput.lap() == {}


def test_the_average_is_over_time_and_not_over_lines():
    lines = [{"epoch": 1.0, "images_per_second": 10.0}, {"epoch": 2.0, "images_per_second": 30.0}]
    assert average_throughput(lines) == pytest.approx(15.0)
    assert average_throughput([]) == 0


def test_a_line_that_a_kill_cut_off_is_left_out_and_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE)[:20])
    assert read_metrics(path) == [LINE]
    path.write_text("{\n" + json.dumps(LINE) + "\n")
    with pytest.raises(UserError, match=r"is damaged \(line 1\)"):
        read_metrics(path)
