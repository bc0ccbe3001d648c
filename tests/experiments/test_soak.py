"""Attacks on the commands, in their short form: see `experiments/benchmarks/soak_commands.py`."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_commands_withstand_what_is_tried_on_them(tmp_path):
    command = [sys.executable, str(SCRIPT), "--phases", "commands", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["results"]
    result = json.loads((tmp_path / "results" / "soak_commands_quick.json").read_text())
    assert result["problems"] == []
    assert result["attacks"] == result["withstood"] >= 2 * 10
    with (tmp_path / "results" / "soak_commands_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["command"] for row in rows} == {"predict", "features .h5"}
    # Attacks that do nothing would be withstood by anything.
    outcomes = {(row["attack"], row["outcome"]) for row in rows}
    assert ("SIGKILL", "exit code -9") in outcomes
    assert ("little memory", "one line") in outcomes


@pytest.fixture
def attacked(monkeypatch):
    """The script's functions that tell what is wrong."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import soak_commands

    return soak_commands


class Left:
    """A command that has ended, and what a second run says."""

    def __init__(self, out, code, said):
        self.out, self.run = out, lambda: (code, said)


@pytest.mark.parametrize(
    ("code", "said", "files", "second", "problem"),
    [
        (0, "", {"a": b"1"}, (0, ""), ""),
        (0, "", {"a": b"2"}, (0, ""), "done, but a has other bytes"),
        (0, "", {"a": b"1", ".a.partial": b""}, (0, ""), "done, but other files: ['.a.partial']"),
        (2, "error: no room", {"a": b"1"}, (0, ""), ""),
        (2, "error: no\nroom", {}, (0, ""), "not one line: error: no\nroom"),
        (2, "error: no room", {}, (0, ""), "other files: ['a']"),
        (-9, "", {"a": b"1"}, (2, "a exists already"), ""),
        (-9, "", {"a": b"2"}, (2, "a exists already"), "it does not go on"),
        (-11, "", {"a": b"1"}, (0, ""), "exit code -11"),
        (1, "Traceback", {"a": b"1"}, (0, ""), "a traceback"),
        (124, "", {"a": b"1"}, (0, ""), "it does not end"),
    ],
)
def test_what_is_wrong_is_seen(attacked, tmp_path, code, said, files, second, problem):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    left = Left(tmp_path, *second)
    found = attacked.looked_at(left, code, said, {"a": b"1"}, again=True)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_the_page_on_reliability_has_the_counts():
    root = SCRIPT.parents[2]
    result = json.loads((root / "experiments" / "results" / "soak_commands.json").read_text())
    training = json.loads((root / "experiments" / "results" / "soak_training.json").read_text())
    page = (root / "docs" / "reliability.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d+ of \d+) \|", page, re.MULTILINE))
    names = {"features .h5": "`features`, HDF5", "features .npy": "`features`, NumPy"}
    names |= {"hub": "`hub push`", "report": "its report"}
    expected = {names.get(name, f"`{name}`"): held for name, held in result["by_command"].items()}
    expected["`train`"] = (
        f"{training['kills'] - len(training['mismatches'])} of {training['kills']}"
    )
    assert rows == expected
    assert f"Of the {result['attacks']} others\n{result['withstood']} held" in page
