"""The experiments run, in their quick form."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flax_alexnet.models.architectures import architecture, infer_shapes

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SCRIPTS = {path.stem: path for path in EXPERIMENTS.glob("*/*.py")}
WITH_FLAGS = sorted(n for n, p in SCRIPTS.items() if "\nclass Arguments:" in p.read_text())


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Gives what a script defines; the working directory is empty, as a user's may be."""
    for folder in ("benchmarks", "paper"):
        monkeypatch.syspath_prepend(EXPERIMENTS / folder)  # where scripts find one another
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(SCRIPTS[name]))


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_results_go_to_the_working_directory(load, name):
    """What is tracked is written over by `--output experiments/results` alone."""
    assert load(name)["Arguments"]().output == Path("results")


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("bench", ["--photographs", "nowhere"], "git clone"),
        ("bench_growth", ["--photographs", "nowhere"], "git clone"),
        ("bench_prepare", [], "git clone"),
        ("figure1_relu_vs_tanh", ["--data-dir", "nowhere"], "flax_alexnet prepare"),
        ("real_trunk", [], "git clone"),
        ("real_trunk", ["--photographs", "there"], "git clone"),
        ("real_trunk", ["--photographs", "there", "--examples", "there"], "no weights"),
    ],
)
def test_missing_data_is_one_line(load, tmp_path, capsys, name, flags, says):
    for image in ("one.JPEG", "ex_ref.png", "ex_p0.png", "ex_p1.png"):
        (tmp_path / "there").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "there" / image)
    assert load(name)["main"](flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "results").exists()


def test_every_fifth_photograph_is_taken(load, tmp_path):
    script = load("photographs")
    for number in range(1000):
        (tmp_path / f"{number:03}.JPEG").touch()
    found = script["find_photographs"](tmp_path)
    assert [path.stem for path in found] == [f"{number:03}" for number in range(0, 1000, 5)]


def test_the_quick_form_draws_nothing_from_a_part(load, tmp_path, monkeypatch):
    script = load("communication")
    monkeypatch.setitem(script["main"].__globals__, "compiled", lambda *_: "")  # takes a minute
    assert script["main"](["--quick"]) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["communication_quick.csv"]


@pytest.mark.slow
def test_figure1(shared_data, load, tmp_path):
    script = load("figure1_relu_vs_tanh")
    data_dir = str(shared_data / "tfds")
    assert script["main"](["--quick", "--data-dir", data_dir, "--output", str(tmp_path)]) == 0
    with (tmp_path / "figure1_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["activation"] for row in rows} == {"relu", "tanh"}
    assert all(0 < float(row["training_error"]) <= 1 for row in rows)
    assert (tmp_path / "figure1_quick.png").stat().st_size > 10_000


def test_figure1_reads_a_curve(load):
    script = load("figure1_relu_vs_tanh")
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


@pytest.mark.slow
def test_jit_and_pmap_agree(load, tmp_path):
    flags = ["--output", str(tmp_path), "--batch-size", "16", "--rounds", "1"]
    assert load("jit_vs_pmap")["main"](flags) == 0
    assert (tmp_path / "jit_vs_pmap.csv").read_text().count("\n") == 2


@pytest.mark.slow
def test_the_loop_is_timed(load, tmp_path):
    assert load("bench_loop")["main"](["--quick"]) == 0
    assert (tmp_path / "results" / "bench_loop_quick.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_the_real_trunk(shared_data, load, tmp_path):
    trunk = shared_data / "alexnet_owt"
    flags = ["--weights", str(trunk / "features_and_lpips.npz"), "--examples", str(trunk)]
    flags += ["--photographs", str(shared_data / "imagenet_samples")]
    assert load("real_trunk")["main"](["--quick", *flags, "--output", str(tmp_path)]) == 0
    with (tmp_path / "trunk_quick_lpips.csv").open() as file:
        rows = {row["images"]: float(row["lpips"]) for row in csv.DictReader(file)}
    examples = [round(value, 5) for name, value in rows.items() if name.startswith("example")]
    assert examples == [0.72188, 0.13757]
    assert rows["JPEG, quality 10"] > rows["JPEG, quality 50"]
    for name in ("trunk_quick_conv1.png", "trunk_quick_neighbours.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_prepare_is_timed(shared_data, load, tmp_path):
    flags = ["--photographs", str(shared_data / "imagenet_samples"), "--output", str(tmp_path)]
    assert load("bench_prepare")["main"](["--quick", *flags]) == 0
    assert (tmp_path / "bench_prepare_quick.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_stops_and_checks_are_timed(load, tmp_path):
    script = load("stop_and_check")
    assert script["main"](["--quick", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "stop_and_check_quick.csv").read_text().count("\n") == 7


@pytest.mark.slow
def test_ours_is_timed_beside_others(tmp_path):
    command = [sys.executable, str(SCRIPTS["bench"]), "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    (row,) = json.loads((tmp_path / "bench_quick.json").read_text())["rows"]
    assert row["rates"]["ours"] > 0
    assert row["peak_bytes"]["ours"] > 2**20
    assert all(found["from"] <= found["to"] for found in row["against"].values())


@pytest.mark.slow
def test_growth_is_drawn(tmp_path):
    command = [sys.executable, str(SCRIPTS["bench_growth"]), "--quick"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    with (tmp_path / "bench_growth_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["axis"] for row in rows] == ["batch", "image size", "image size", "CPU devices"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)


@pytest.mark.slow
def test_layers_are_set_against_the_roof(tmp_path):
    command = [sys.executable, str(SCRIPTS["roofline"]), "--quick"]
    subprocess.run(
        [*command, "--variant", "cuda_convnet_19pct", "--output", str(tmp_path)], check=True
    )
    with (tmp_path / "roofline_quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = [row["layer"] for row in rows if row["direction"] == "forward"]
    assert layers == ["conv1", "pool1", "conv2", "conv3", "fc10"]


@pytest.mark.slow
def test_a_profile_has_every_layer(load, tmp_path):
    assert load("profile_step")["main"](["--quick", "--output", str(tmp_path)]) == 0
    lines = (tmp_path / "profile_quick.md").read_text().splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:3] for line in lines[2:]}
    assert "fc10" in rows  # of some microseconds, which the table does not show
    for layer in ("conv1", "conv2", "conv3", "norms, pools, ReLU, dropout, bias"):
        assert all(float(time) > 0 for time in rows[layer]), layer


@pytest.mark.slow
def test_the_tables_of_imagenet_on_a_stand_in(load, capsys):
    """A row of one model, and one of several that shares a model with it; then all are there."""
    script = load("imagenet")
    assert script["main"](["--quick", "--only", "145"]) == 0
    assert script["main"](["--quick", "--table", "1", "--only", "half"]) == 0
    with Path("results/imagenet_quick.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["table"], row["model"], row["crops"]) for row in rows] == [
        ("2", "145", "1"),
        ("2", "145", "10"),
        ("1", "half", "1"),
        ("1", "half", "10"),
    ]
    assert [row["paper_top1"] for row in rows] == ["", "40.664", "", "39.168"]
    assert all(95 <= float(row["top5"]) <= float(row["top1"]) <= 100 for row in rows)
    capsys.readouterr()
    assert script["main"](["--quick", "--only", "145"]) == 0  # nothing is left to do
    assert "step" not in capsys.readouterr().out
    assert script["main"](["--quick", "--only", "146"]) == 2
    assert "no row 146 in this table" in capsys.readouterr().err


def test_the_models_of_the_tables_are_those_of_the_original_files(load):
    """Sizes after a layer, and parameters, computed by hand from `layers-147.cfg` and the others.

    half:   48·364 + 128·1,201 + 192·1,153 + 192·1,729 + 256·1,729
            + 4,096·9,217 + 4,096·4,097 + 1,000·4,097
    pool2:  as #145, with fc6 on 5 × 5 pixels: 4,096·6,401 instead of 4,096·9,217
    apart:  96·364 + 320·1,201 + 384·1,441 + 384·1,729 + 256·1,729
            + 8,192·4,609 + 8,192·4,097 + 1,000·8,193
    """
    load("imagenet")
    expected = {
        "original_half": ("pool5", (6, 6, 256), 59_798_312),
        "original_pool2": ("pool5", (5, 5, 256), 49_430_888),
        "original_apart": ("fc6", (1, 1, 8192), 81_591_720),
        "original_no_norm": ("pool5", (6, 6, 256), 60_965_224),
    }
    for name, (layer, shape, parameters) in expected.items():
        infos = infer_shapes(architecture(name).scaled(1000), 224, 224)
        assert {info.layer.name: info.shape for info in infos}[layer] == shape
        assert sum(info.parameters for info in infos) == parameters
