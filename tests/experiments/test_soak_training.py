"""Exact resume, in its short form: see `benchmarks/soak_training.py` for what is claimed."""

import copy
import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "soak_training.py"


@pytest.fixture(scope="module")
def soak():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.usefixtures("examples")
@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(soak, tmp_path):
    # With this seed phases are ended within a tenth of the time that they usually take.
    assert soak["main"](["--quick", "--seed", "25", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "soak_training_quick.json").read_text())
    assert result["mismatches"] == []
    assert result["kills"] == sum(result["kills_by_phase"].values()) == 3
    # A kill costs the steps since the last checkpoint, and those during a save that it broke off.
    assert 0 < result["most_steps_made_again"] <= 3 * soak["EVERY"]
    with (tmp_path / "soak_training_quick.csv").open() as file:
        lives = list(csv.DictReader(file))
    assert [life["exit_code"] for life in lives].count("-9") == 3
    assert lives[-1]["exit_code"] == "0"
    aims, phases = zip(*((life["aim"], life["phase"]) for life in lives[:3]), strict=True)
    assert aims == ("save", "metrics", "evaluation")
    # On a machine that is busy a phase may be over between the look at it and the kill.
    assert not {"start-up", "compilation"} & set(phases), phases
    assert any(aim == phase for aim, phase in zip(aims, phases, strict=True)), phases


@pytest.fixture
def remains(soak):
    """Of a run as it should be."""
    metrics = [{"step": n, "train_loss": 1 / n} for n in range(1, soak["STEPS"] + 1)]
    arrays = {"kernel": np.zeros((2, 3), np.float32), "step": np.array(72)}
    return soak["Remains"](arrays, metrics, {"params_sha256": "ab"})


class TestDifferences:
    """What the long form would say; it is of no use if it says nothing."""

    def of(self, soak, remains, change):
        found = copy.deepcopy(remains)
        change(found)
        return soak["differences"](remains, found)

    def test_none(self, soak, remains):
        assert self.of(soak, remains, id) == []

    def test_a_bit_that_numbers_hide(self, soak, remains):
        def change(found):
            found.arrays["kernel"][1, 2] = -0.0

        assert self.of(soak, remains, change) == ["kernel has other bits"]

    def test_another_type(self, soak, remains):
        def change(found):
            found.arrays["step"] = found.arrays["step"].astype(np.int32)

        assert self.of(soak, remains, change) == ["step is not the same array"]

    def test_a_step_that_is_missing(self, soak, remains):
        said = self.of(soak, remains, lambda found: found.metrics.pop(6))
        assert said == ["step 7 was logged 0 times", "metrics.jsonl differs from line 7 on"]

    def test_a_step_that_is_doubled(self, soak, remains):
        said = self.of(soak, remains, lambda found: found.metrics.append(found.metrics[-1]))
        assert said == ["step 72 was logged 2 times", "metrics.jsonl differs from line 73 on"]

    def test_another_loss(self, soak, remains):
        def change(found):
            found.metrics[2]["train_loss"] = np.nextafter(1 / 3, 1)

        assert self.of(soak, remains, change) == ["metrics.jsonl differs from line 3 on"]

    def test_another_summary(self, soak, remains):
        said = self.of(soak, remains, lambda found: found.summary.update(params_sha256="cd"))
        assert said == ["params_sha256 in summary.json was ab, is now cd"]


def test_phases_are_told_from_what_a_run_leaves(soak, tmp_path):
    """The moments of a run, one after the other."""
    introduction = "quickstart: 96 images, 128 to test on; steps 12 to 72 with 8 images each\n"
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    said = ""
    left_over = set()

    def phase():
        return soak["phase_of"](tmp_path, said, left_over)

    assert phase() == "start-up"
    said += introduction
    (checkpoints / "24.orbax-checkpoint-tmp").mkdir(parents=True)
    left_over = soak["saves_under_way"](tmp_path)
    assert phase() == "compilation", "what an earlier process was saving is none of its doing"
    metrics.write_text('{"step": 22}\n')
    said += "step     22  epoch   1.83  loss 2.3\n"
    assert phase() == "step"
    metrics.write_text('{"step": 22}\n{"step": 23}\n')
    assert phase() == "metrics"
    said += "step     23  epoch"
    assert phase() == "metrics"
    said += "   1.92  loss 2.3\n"
    assert phase() == "evaluation"
    metrics.write_text('{"step": 24}\n{"step": 24, "eval_loss": 2.3}\n{"st')
    said += "step     24  epoch   2.00  test loss 2.3\n"
    assert phase() == "save", "Orbax prepares it"
    (checkpoints / "24.orbax-checkpoint-tmp-2").mkdir()
    assert phase() == "save"
    (checkpoints / "24.orbax-checkpoint-tmp-2").rename(checkpoints / "24")
    assert phase() == "step"
    metrics.write_text('{"step": 72, "eval_loss": 2.3}\n')
    said += "step     72  epoch   6.00  test loss 2.3\n"
    (checkpoints / "72").mkdir()
    assert phase() == "report"
