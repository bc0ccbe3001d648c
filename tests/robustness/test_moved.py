"""What a run does when somebody moves or removes its folders and files while it goes on."""

import json
import shutil
import subprocess
import sys

import pytest

FLAGS = [
    *("--model.variant", "cuda_convnet_19pct", "--model.width", "0.1", "--batch-size", "8"),
    *("--data.image-size", "16", "--augment.crop-size", "12", "--steps", "60", "--epochs", "100"),
    *("--log-every", "2", "--eval-epochs", "2", "--save-patience", "0.05", "--workdir", "run"),
]


def remove(path):
    while path.exists():  # the run may write into it meanwhile
        shutil.rmtree(path, ignore_errors=True)


def make_anew(run):
    run.rename(run.with_name("moved"))
    run.mkdir()


def put_a_file(path):
    remove(path)
    path.touch()


@pytest.fixture
def train(data_dir, tmp_path):
    """Gives a function that trains in a folder and does something in the middle of it."""

    def trained(attack=None, script='exec "$@"', flags=FLAGS):
        command = [sys.executable, "-u", "-m", "flax_alexnet.train"]
        command += ["--data.data-dir", str(data_dir), *flags]
        said = []
        with subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            for line in process.stdout:
                said.append(line)
                if attack and line.startswith("step     20"):
                    attack(tmp_path / "run")
            errors = process.stderr.read()
        assert "Traceback" not in errors, errors
        return process.returncode, "".join(said), errors

    return trained


ENDS = {
    "moved": lambda run: run.rename(run.with_name("moved")),
    "made again": make_anew,
    "removed": remove,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ENDS)
def test_a_run_whose_working_directory_is_gone_says_so(train, tmp_path, what):
    code, _, errors = train(ENDS[what])
    assert (code, errors.count("\n")) == (2, 1)
    assert "run was moved or removed while the run went on: move it back" in errors
    if what == "moved":
        remove(tmp_path / "run")  # Orbax makes it again where it is saving
        (tmp_path / "moved").rename(tmp_path / "run")
        assert train()[0] == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [row["step"] for row in map(json.loads, lines) if "train_loss" in row]
        assert steps == [1, *range(2, 62, 2)]


GOES_ON = {
    "checkpoints": lambda run: remove(run / "checkpoints"),
    "metrics": lambda run: (run / "metrics.jsonl").unlink(),
    "lock": lambda run: (run / "lock").unlink(),
    "events": lambda run: remove(run / "tensorboard"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GOES_ON)
def test_a_run_that_lost_a_part_of_its_files_ends_saved(train, tmp_path, what):
    code, _, errors = train(GOES_ON[what])
    assert (code, errors) == (0, "")
    assert (tmp_path / "run" / "checkpoints" / "60").is_dir()
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_file_in_the_place_of_checkpoints_is_said(train):
    code, _, errors = train(lambda run: put_a_file(run / "checkpoints"))
    assert (code, errors.count("\n")) == (2, 1)
    assert "could not be saved" in errors


@pytest.mark.slow
def test_a_working_directory_that_the_system_has_removed_is_one_line(train, tmp_path):
    gone = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    code, _, errors = train(script=gone)
    expected = "error: cannot write run: No such file or directory; take another path\n"
    assert (code, errors) == (2, expected)
    assert train(script=gone, flags=[*FLAGS, "--workdir", str(tmp_path / "run")])[0] == 0
