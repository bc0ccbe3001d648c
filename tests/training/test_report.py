"""What a run leaves behind, and how long it tries to."""

import json

import pytest

from flax_alexnet.training import report
from flax_alexnet.training.report import keep_trying, peak_memory
from flax_alexnet.utils.errors import UserError


def test_a_finished_run_has_its_images_and_summary(finished):
    workdir, printed = finished
    assert {path.name for path in (workdir / "report").iterdir()} == {
        "curves.png",
        "conv1.png",
        "predictions.png",
    }
    summary = json.loads((workdir / "summary.json").read_text())
    assert f"test accuracy {summary['eval_top1']:.2%} after 12 steps" in printed


def test_memory_is_that_of_this_process_at_least():
    assert peak_memory() > 50 * 2**20


def test_what_succeeds_later_is_done(monkeypatch, capsys):
    monkeypatch.setattr(report, "RETRY_SECONDS", 0.01)
    failures = [UserError("the disk is full"), OSError(28, "No space left on device", "x")]

    def action():
        if failures:
            raise failures.pop()

    assert keep_trying(action, minutes=1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "cannot write x: No space left on device; trying again for 1 minutes"
    assert second.startswith("the disk is full; trying again")


def test_what_never_succeeds_is_an_error():
    def action():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full; make room"):
        keep_trying(action, minutes=0)
