"""The experiments run, in their quick form."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def test_figure1(shared_data, tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "figure1_relu_vs_tanh.py"))
    data_dir = str(shared_data / "tfds")
    assert script["main"](["--quick", "--data-dir", data_dir, "--output", str(tmp_path)]) == 0
    with (tmp_path / "figure1_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["activation"] for row in rows} == {"relu", "tanh"}
    assert all(0 < float(row["training_error"]) <= 1 for row in rows)
    assert (tmp_path / "figure1_quick.png").stat().st_size > 10_000


def test_figure1_reads_a_curve():
    script = runpy.run_path(str(EXPERIMENTS / "figure1_relu_vs_tanh.py"))
    curve = [(1.0, 0.5), (2.0, 0.3), (3.0, 0.2)]
    assert script["epochs_to"](0.25, curve) == pytest.approx(2.5)
    assert script["epochs_to"](0.1, curve) == float("inf")
    curves = {("relu", 0.1): curve, ("relu", 0.2): [(1.0, 0.6)], ("tanh", 0.1): curve[:2]}
    assert script["best_rates"](curves) == {"relu": 0.1, "tanh": 0.1}
    said = script["describe"](curves)
    assert said.startswith("30% training error: relu after 2.0 epochs, tanh after 2.0 epochs, 1.0")
    assert said.endswith("tanh was stopped after 2.0 epochs")
    curves["tanh", 0.1] = [(6.0, 0.3), (14.0, 0.2)]
    said = script["describe"](curves)
    assert said.startswith("25% training error: relu after 2.5 epochs, tanh after 10.0 epochs, 4.0")
    assert "stopped" not in said


def test_jit_and_pmap_agree(tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "jit_vs_pmap.py"))
    flags = ["--output", str(tmp_path), "--batch-size", "16", "--rounds", "1"]
    assert script["main"](flags) == 0
    assert (tmp_path / "jit_vs_pmap.csv").read_text().count("\n") == 2


def test_the_loop_is_timed(tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "bench_loop.py"))
    assert script["main"](["--quick", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "bench_loop_quick.csv").read_text().count("\n") == 3


def test_the_real_trunk(shared_data, tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "real_trunk.py"))
    flags = ["--data", str(shared_data), "--output", str(tmp_path), "--photographs", "4"]
    assert script["main"](flags) == 0
    with (tmp_path / "trunk_lpips.csv").open() as file:
        rows = {row["pictures"]: float(row["lpips"]) for row in csv.DictReader(file)}
    examples = [round(value, 5) for name, value in rows.items() if name.startswith("example")]
    assert examples == [0.77962, 0.09134]
    assert rows["JPEG, quality 10"] > rows["JPEG, quality 50"]
    for name in ("trunk_conv1.png", "trunk_neighbours.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_prepare_is_timed(shared_data, tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "bench_prepare.py"))
    assert script["main"](["--quick", "--data", str(shared_data), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "bench_prepare_quick.csv").read_text().count("\n") == 3


def test_stops_and_checks_are_timed(tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "stop_and_check.py"))
    assert script["main"](["--quick", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "stop_and_check_quick.csv").read_text().count("\n") == 7


def test_ours_is_timed_beside_others(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "bench.py"), "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    (row,) = json.loads((tmp_path / "bench_quick.json").read_text())["rows"]
    assert row["rates"]["ours"] > 0
    assert row["peak_bytes"]["ours"] > 2**20
    assert all(found["from"] <= found["to"] for found in row["against"].values())


def test_growth_is_drawn(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "bench_growth.py"), "--quick"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    with (tmp_path / "bench_growth_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["axis"] for row in rows] == ["batch", "image size", "image size", "CPU devices"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)


def test_layers_are_set_against_the_roof(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "roofline.py"), "--quick"]
    subprocess.run(
        [*command, "--variant", "cuda_convnet_cifar10", "--output", str(tmp_path)], check=True
    )
    with (tmp_path / "roofline_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = [row["layer"] for row in rows if row["direction"] == "forward"]
    assert layers == ["conv1", "pool1", "conv2", "conv3", "fc10"]


def test_a_profile_has_every_layer(tmp_path):
    script = runpy.run_path(str(EXPERIMENTS / "profile_step.py"))
    assert script["main"](["--quick", "--output", str(tmp_path)]) == 0
    lines = (tmp_path / "profile_quick.md").read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:3] for line in lines[2:]}
    assert "fc10" in rows  # of some microseconds, which the table does not show
    for layer in ("conv1", "conv2", "conv3", "norms, pools, ReLU, dropout, bias"):
        assert all(float(time) > 0 for time in rows[layer]), layer
