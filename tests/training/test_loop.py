"""Whole runs, small: what they leave behind, and how they go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import jax
import pytest

from flax_alexnet.train import main
from flax_alexnet.training.divergence import on_plateau
from tests.runs import arguments, lines, read, refused


def test_a_run_leaves_what_the_design_promises(finished):
    workdir, printed = finished
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "report",
        "saved",
        "seconds",
        "summary.json",
        "tensorboard",
    }
    summary = read(workdir, "summary.json")
    assert set(summary) == {
        "step",
        "eval_loss",
        "eval_top1",
        "eval_top5",
        "seconds",
        "images_per_second",
        "peak_memory_bytes",
        "params_sha256",
        "platform",
        "device_kind",
        "devices",
        "processes",
        "layout",
        "mesh",
        "versions",
    }
    assert summary["step"] == 12
    where = ("platform", "device_kind", "devices", "processes", "layout", "mesh")
    assert [summary[name] for name in where] == ["cpu", "cpu", 8, 1, "data", {"data": 8}]
    assert {"python", "jax", "jaxlib"} < set(summary["versions"])
    assert summary["versions"] == read(workdir, "config.json")["versions"]
    assert summary["images_per_second"] > 0
    assert 0 <= summary["eval_top1"] <= summary["eval_top5"] <= 1
    assert len(summary["params_sha256"]) == 64
    assert {path.name for path in (workdir / "report").iterdir()} == {
        "conv1.png",
        "curves.png",
        "predictions.png",
    }
    config = read(workdir, "config.json")
    assert config["config"]["model.width"] == 0.05
    assert "jax" in config["versions"]
    assert "conv1" in printed, "the table of layers"
    last = printed.splitlines()[-2]
    assert last.startswith("test accuracy ")
    assert str(workdir) in last


def test_metrics_are_lines_of_named_fractions(finished):
    training = [line for line in lines(finished[0]) if "train_loss" in line]
    evaluation = [line for line in lines(finished[0]) if "eval_loss" in line]
    assert [line["step"] for line in training] == [1, 4, 8, 12]
    # 64 images in batches of 8: an evaluation each 6 steps, and at the end.
    assert [line["step"] for line in evaluation] == [6, 12]
    for line in training:
        assert {"epoch", "train_top1", "learning_rate"} <= set(line)
        assert ("images_per_second" in line) == (line["step"] > 1)  # the first step compiles
        assert line["epoch"] == line["step"] / 8
    for line in evaluation:
        assert {"epoch", "eval_top1", "eval_top5"} <= set(line)
        assert line["eval_top1"] * 20 == pytest.approx(round(line["eval_top1"] * 20), abs=1e-5)


def signal_at(step, argv, number, again=False):
    """Runs the command, and sends it a signal once it has logged `step`; and perhaps again."""
    said = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "flax_alexnet.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            said.append(line)
            if line.startswith("step") and int(line.split()[1]) == step:
                process.send_signal(number)
            if line.startswith("the run stops") and again:
                process.send_signal(number)
    return process.returncode, "".join(said)


@pytest.mark.slow
def test_a_run_that_signals_stop_goes_on_to_the_same_bits(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = ["--steps", "120", "--eval-epochs", "6"]
    assert main(arguments(whole, data_dir, *long)) == 0
    for step, number in ((4, signal.SIGINT), (40, signal.SIGTERM)):
        code, said = signal_at(step, arguments(parts, data_dir, *long), number)
        assert code == 75, said
        assert "the run stops after the current steps" in said
        stopped = int(re.search(r"stopped at step (\d+); the same command goes on", said)[1])
        assert (parts / "checkpoints" / str(stopped)).exists()
        assert stopped >= step
    code, said = signal_at(80, arguments(parts, data_dir, *long), signal.SIGTERM, again=True)
    assert code == 128 + signal.SIGTERM, "the second signal ends it at once"
    assert "stopped at" not in said
    assert main(arguments(parts, data_dir, *long)) == 0
    for name in ("step", "params_sha256", "eval_loss", "eval_top1", "eval_top5"):
        assert read(parts, "summary.json")[name] == read(whole, "summary.json")[name], name
    # Every step is logged once, with the same numbers, though the run was cut between two lines.
    logged = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines(path)]
        for path in (whole, parts)
    ]
    assert logged[0] == logged[1]


LONG_CALL = """
import sys
import jax
from flax_alexnet.training.signals import stop_requests

endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: x * 1.0, x))
with stop_requests():
    print("ready", flush=True)
    endless(1.0).block_until_ready()
"""


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_run_within_a_long_call(number, expected):
    with subprocess.Popen(
        [sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        late = threading.Timer(60, process.kill)
        late.start()
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        for line in process.stderr:
            if line.startswith("the run stops after the current steps"):
                break
        process.send_signal(number)
        assert process.wait() == expected
        late.cancel()


@pytest.fixture
def no_save(monkeypatch):
    """No checkpoint can be saved; gives what is called at each attempt."""
    attempts = []

    def fail(*_):
        for act in attempts:
            act()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flax_alexnet.checkpoint.manager.Checkpoints._check_room", fail)
    return attempts


@pytest.mark.slow
def test_a_signal_ends_the_attempts_to_save_at_the_end(data_dir, tmp_path, capsys, no_save):
    def stop_when_done():
        if [line["step"] for line in lines(tmp_path)][-1:] == [12]:
            os.kill(os.getpid(), signal.SIGTERM)

    no_save.append(stop_when_done)
    argv = arguments(tmp_path, data_dir, "--save-patience", "0.3")  # else it ends after 18 seconds
    assert main(argv) == 75
    assert "stopped at step 12; the same command goes on from step 0" in capsys.readouterr().out
    no_save.clear()
    assert main([*argv, "--save-patience", "0"]) == 2, "with nothing saved, it starts again at 0"
    assert "steps 0 to 12" in capsys.readouterr().out


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda folder: shutil.rmtree(folder / "12")])
def test_a_run_whose_checkpoints_are_gone_is_not_made_again(
    finished, data_dir, tmp_path, capsys, gone
):
    workdir = shutil.copytree(finished[0], tmp_path / "runs")
    shutil.rmtree(workdir / "checkpoints" / "6")
    gone(workdir / "checkpoints")
    before = {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    said = refused(capsys, arguments(workdir, data_dir))
    assert f"{workdir}/checkpoints has no checkpoint, though this run has saved some" in said
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_checkpoint_is_set_aside_and_its_steps_made_again(
    finished, data_dir, tmp_path, capsys
):
    workdir = shutil.copytree(finished[0], tmp_path / "runs")
    (workdir / "summary.json").unlink()
    damaged = workdir / "checkpoints" / "12"
    largest = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    bits = bytearray(largest.read_bytes())
    bits[len(bits) // 2] ^= 1
    largest.write_bytes(bits)
    assert main(arguments(workdir, data_dir)) == 0
    said = capsys.readouterr().out
    assert re.search(r"checkpoint 12 is damaged \(default/\S+ has changed\) and was moved", said)
    assert "steps 6 to 12" in said
    assert (workdir / "damaged" / "12").is_dir()
    for name in ("params_sha256", "eval_loss", "eval_top1"):
        assert read(workdir, "summary.json")[name] == read(finished[0], "summary.json")[name]
    assert [line["step"] for line in lines(workdir)] == [
        line["step"] for line in lines(finished[0])
    ]


def test_a_second_run_in_a_directory_is_refused(finished, data_dir, tmp_path, capsys):
    alias = tmp_path / "another name"
    alias.symlink_to(finished[0])
    holder = (
        "import sys, time; from pathlib import Path\n"
        "from flax_alexnet.training.run_directory import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", holder, str(finished[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for name in (finished[0], alias):
            said = refused(capsys, arguments(name, data_dir))
            assert f"{name} is in use by process {process.pid} on " in said
        process.kill()  # as a crash does; the file stays, and the lock does not
    assert (finished[0] / "lock").exists()
    assert main(arguments(alias, data_dir)) == 0
    assert main(arguments(alias, data_dir)) == 0, "a run lets go of the lock when it ends"


def test_a_finished_run_is_not_made_again(finished, data_dir, capsys):
    before = read(finished[0], "summary.json")
    assert main(arguments(finished[0], data_dir)) == 0
    assert read(finished[0], "summary.json")["params_sha256"] == before["params_sha256"]
    assert "steps 12 to 12" in capsys.readouterr().out


@pytest.mark.slow
def test_plateau_state_is_in_the_checkpoint(data_dir, tmp_path):
    """Evaluations at 6 and 12: a run that stops between them knows what the first one gave."""
    plateau = ["--optimizer.schedule", "plateau", "--optimizer.patience", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(whole, data_dir, *plateau, "--steps", "24")) == 0
    assert main(arguments(parts, data_dir, *plateau, "--steps", "12")) == 0
    assert main(arguments(parts, data_dir, *plateau, "--steps", "24")) == 0
    rates = [
        [line["learning_rate"] for line in lines(path) if "learning_rate" in line]
        for path in (whole, parts)
    ]
    assert rates[0] == rates[1]
    assert (
        read(whole, "summary.json")["params_sha256"] == read(parts, "summary.json")["params_sha256"]
    )


@pytest.mark.slow
def test_a_complete_run_is_lengthened_and_not_shortened(finished, data_dir, tmp_path, capsys):
    """In a thread, as a window or a notebook's page starts it."""
    workdir = shutil.copytree(finished[0], tmp_path / "runs")
    codes = []

    def train(steps):
        thread = threading.Thread(
            target=lambda: codes.append(main(arguments(workdir, data_dir, "--steps", str(steps))))
        )
        thread.start()
        thread.join()
        return capsys.readouterr().out

    said = train(13)
    assert "steps 12 to 13" in said
    assert "No signal stops it outside the main thread" in said
    summary = read(workdir, "summary.json")
    assert summary["step"] == 13
    assert summary["seconds"] > read(finished[0], "summary.json")["seconds"] + 0.1
    assert float((workdir / "seconds").read_text()) == pytest.approx(summary["seconds"], abs=30)
    assert summary["images_per_second"] > 0
    said = train(5)
    assert "the run has made 13 steps already; it keeps them and makes no more" in said
    assert "this run is complete" in said
    assert codes == [0, 0]
    assert read(workdir, "summary.json") == summary

    (workdir / "summary.json").write_text(json.dumps(summary | {"step": 12}))
    (workdir / "seconds").write_text("1000\n")
    assert "test accuracy" in train(13), "a summary of fewer steps is made again"
    summary = read(workdir, "summary.json")
    assert (summary["step"], summary["images_per_second"] > 0) == (13, True)
    assert 1000 < summary["seconds"] < 1600


@pytest.mark.slow
def test_another_batch_size_goes_on_in_images(data_dir, tmp_path, capsys):
    """64 images in batches of 24 to the end of epoch 1 and beyond, then of 8, then of 24."""
    flags = [
        *("--steps", "99", "--log-every", "99", "--eval-epochs", "0.5", "--save-patience", "0"),
        *("--optimizer.schedule", "steps", "--optimizer.drop-epochs", "1.5"),
        *("--model.variant", "cuda_convnet_19pct"),  # compiles sooner
        *("--data.image-size", "16", "--augment.crop-size", "12"),
    ]
    said = []
    for batch_size, epochs in (("24", "1"), ("8", "2"), ("24", "3")):
        more = ["--batch-size", batch_size, "--epochs", epochs]
        if said:
            text = refused(capsys, arguments(tmp_path, data_dir, *flags, *more))
            assert "(batch_size was" in text
            assert "epochs" not in text, "more of them are no change"
            more.append("--allow-changes")
        assert main(arguments(tmp_path, data_dir, *flags, *more)) == 0
        said.append(capsys.readouterr().out)
    assert [re.search(r"steps (\d+ to \d+)", text)[1] for text in said] == [
        "0 to 3",  # 72 images
        "3 to 10",  # 128
        "10 to 13",  # 200
    ]
    assert (
        "from step 3 on, batch_size was 24, is now 8. 72 images have been seen, epoch 1.00"
        in (said[1])
    )
    logged = [line for line in lines(tmp_path) if "train_loss" in line]
    assert [(line["step"], line["epoch"]) for line in logged] == [
        *((1, 24 / 64), (3, 1), (10, 2), (13, 3)),
    ]
    evaluated = [line for line in lines(tmp_path) if "eval_loss" in line]
    assert [(line["step"], line["epoch"]) for line in evaluated] == [
        *((2, 48 / 64), (3, 1), (6, 1.5), (10, 2), (12, 176 / 64), (13, 3)),
    ]
    assert [line["learning_rate"] for line in logged] == pytest.approx([0.01] * 2 + [0.001] * 2)
    config = read(tmp_path, "config.json")["config"]
    assert config["batch_sizes"] == [[0, 24], [3, 8], [10, 24]]


@pytest.mark.slow
def test_switches_of_jax_do_not_end_a_run(data_dir, tmp_path):
    with jax.debug_infs(True), jax.debug_nans(True), jax.transfer_guard("disallow"):
        assert main(arguments(tmp_path / "run", data_dir, "--steps", "2")) == 0


@pytest.mark.slow
def test_a_run_can_be_stepped_through(data_dir, tmp_path):
    with jax.disable_jit():
        assert main(arguments(tmp_path / "run", data_dir, "--steps", "2")) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_is_explained(data_dir, tmp_path, capsys):
    argv = arguments(tmp_path, data_dir, "--optimizer.learning-rate", "1e9")
    assert main(argv) == 2
    said = capsys.readouterr().err
    # In which of the last two layers sums overflow depends on the order in which they are added up.
    where = r"rate of 1e\+09; the largest activation is inf, in (fc7|logits);"
    assert re.search(rf"not finite at step \d, .* {where}", said)
    assert "the last good checkpoint is none" in said
    assert "with a lower --optimizer.learning-rate" in said
    assert "or go on with --on-divergence rollback" in said
    assert not list((tmp_path / "checkpoints").iterdir()), "nothing that is not finite is saved"


@pytest.mark.slow
def test_a_run_that_diverges_goes_back_with_half_the_rate_three_times(data_dir, tmp_path, capsys):
    """A rate that rises until no halving helps; the first steps are fine, and saved."""
    rising = ["--optimizer.learning-rate", "60", "--optimizer.warmup-epochs", "100"]
    more = ["--steps", "60", "--log-every", "1", "--on-divergence", "rollback"]
    assert main(arguments(tmp_path, data_dir, *rising, *more)) == 2
    said = capsys.readouterr()
    back = re.findall(
        r"the last good checkpoint is that of step (\d+); the run goes back to step (\d+)", said.out
    )
    assert len(back) == 3
    assert all(saved == start for saved, start in back)
    assert [f"with {share} times the rate" in said.out for share in (0.5, 0.25, 0.125)] == [
        True
    ] * 3
    assert "not finite at step" in said.err
    assert (
        "the run went back three times, down to 1/8 of the rate: start again in a new" in said.err
    )
    assert "--on-divergence rollback" not in said.err
    steps = [line["step"] for line in lines(tmp_path) if "train_loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "steps that were made again are logged once"


@pytest.mark.slow
def test_a_plateau_is_warned_of_once(data_dir, tmp_path, capsys):
    """The notebook's own initial values on small images: the README says that they stall."""
    plateau = ["--model.initialization", "published"]
    said = []
    for steps in ("18", "24"):  # not even after a restart
        assert main(arguments(tmp_path, data_dir, *plateau, "--steps", steps)) == 0
        said.append(capsys.readouterr().out)
    warning = "warning: the loss has not moved from ln(10) = 2.303"
    assert [text.count(warning) for text in said] == [1, 0]
    assert re.search(r"conv1 \d+%.* fc7 \d+%", said[0])
    assert "take --model.initialization he, or another" in said[0], "it has the small scale"


def test_a_healthy_run_is_not_warned(finished):
    losses = [line["eval_loss"] for line in lines(finished[0]) if line.get("eval_loss")]
    assert not any(on_plateau(loss, 10) for loss in losses)
    assert "warning" not in finished[1]
