"""The experiments on the paper's claims: arms, rules of the verdicts, and how runs are kept."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.config.recipes import parse_config
from flax_alexnet.config.schema import flatten
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.models.architectures import architecture, infer_shapes

PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tfds"
sys.path.insert(0, str(PAPER))  # where the scripts find one another
import arithmetic  # noqa: E402
import arms  # noqa: E402
import claims  # noqa: E402
import measures  # noqa: E402
import reproduction  # noqa: E402
import verdicts  # noqa: E402
from runner import Runner  # noqa: E402

sys.path.remove(str(PAPER))


def run_of(**values):
    """A complete run whose measures have one value each, or one for each epoch."""
    curves = {
        name: value if isinstance(value, dict) else {1.0: value}
        for name, value in (values | {verdicts.LAST: 1.0}).items()
    }
    return verdicts.Run(curves)


def claim_of(unit="points"):
    effect = verdicts.Effect(("a", "b"), lambda r: r["b"].last("e") - r["a"].last("e"), unit)
    return verdicts.Claim("name", "1", "text", effect)


def runs_of(*effects):
    return {
        (arm, seed): run_of(e=effect if arm == "b" else 0.0)
        for seed, effect in enumerate(effects)
        for arm in ("a", "b")
    }


def test_every_claim_has_its_arms_and_a_name_of_its_own():
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names) >= 20
    for claim in claims.CLAIMS:
        assert set(claims.arms_of([claim.name])) <= arms.ARMS.keys()
        for arm in claim.effect.arms:
            assert arm in arms.ARMS or arm in claims.DERIVED
    assert set(claims.PUBLISHED) <= arms.ARMS.keys()


@pytest.mark.parametrize("name", arms.ARMS)
def test_an_arm_is_a_valid_configuration_of_a_model_that_fits(name, tmp_path):
    flags = arms.flags_of(arms.ArmArguments(name, 3, tmp_path / "run"))
    config = parse_config(flags)
    assert (config.seed, config.workdir) == (3, tmp_path / "run")
    if start := arms.ARMS[name].start:
        assert config.init_from == tmp_path / f"{start}-3"
    layers = architecture(config.model.variant).scaled(10, config.model.width)
    infer_shapes(layers, config.augment.crop_size, config.augment.crop_size)
    quick = parse_config(arms.flags_of(arms.ArmArguments(name, 3, tmp_path, quick=True)))
    assert quick.epochs == 1


def test_the_best_rate_is_tried_with_more_seeds():
    """By the speed to 25 %, and not by the error at any time before."""
    relu = [f"relu_{rate}" for rate in arms.RATES["relu"]]
    assert claims.arms_of(["relu"])[:3] == relu
    first = claims.missing(relu, {}, quick=False)
    assert first == [(arm, 0) for arm in relu]
    speeds = (
        {1.0: 0.3, 9.0: 0.2},
        {1.0: 0.6, 4.0: 0.4, 5.0: 0.2},
        {1.0: 0.5, 20.0: 0.4},
    )
    runs = {(arm, 0): run_of(train_error=e) for arm, e in zip(relu, speeds, strict=True)}
    assert claims.best_arms(runs) == {"relu": relu[1]}
    assert claims.missing(relu, runs, quick=False) == [(relu[1], 1), (relu[1], 2)]
    best = claims.with_best(runs)
    assert best["relu_best", 0] is runs[relu[1], 0]
    assert ("tanh_best", 0) not in best
    tanh = {(f"tanh_{rate}", 0): run_of(train_error={30.0: 0.25}) for rate in arms.RATES["tanh"]}
    claim = next(claim for claim in claims.CLAIMS if claim.name == "relu")
    outcome = verdicts.judge(claim, claims.with_best(runs | tanh))
    assert math.exp(outcome.mean) == pytest.approx(30 / 4.75)


def test_a_run_begins_after_the_one_that_it_starts_from(tmp_path):
    runner = Runner(tmp_path / "claims.csv", tmp_path, None, quick=True)
    jobs = [("second_half_pretrained", 0), ("first_half", 0)]
    assert claims.arms_of(["second_half_pretrained"]) == ["first_half", "second_half_pretrained"]
    assert runner._next(jobs) == ("first_half", 0)
    assert runner._next(jobs[:1]) is None
    runner.append(("first_half", 0), [("test_error", 1.0, 0.5)], 9)
    assert runner._next(jobs[:1]) == jobs[0]


def test_an_average_of_models_is_measured_in_parts_of_the_images(tmp_path):
    labels = np.arange(100) % 2
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        right = np.eye(2)[labels] * 0.6 + 0.2
        right[seed::4] = right[seed::4, ::-1] * [[1, 1]]  # wrong for a quarter, but not surely
        right[seed + 1 :: 4] = np.eye(2)[labels[seed + 1 :: 4]]  # sure where the other is wrong
        np.save(folder / measures.PROBABILITIES, right)
    parts = measures.average([tmp_path / "0", tmp_path / "1"], labels)
    assert len(parts) == measures.FOLDS
    single, together = np.mean(parts, axis=0)
    assert single == pytest.approx(0.25)
    assert together < single


def test_halves_of_the_classes_are_folders(tmp_path):
    if not (DATA / "cifar10").exists():
        pytest.skip(f"CIFAR-10 is not in {DATA}")
    measures.make_halves(open_dataset("cifar10", DATA), tmp_path, 3)
    for half, names in (("first_half", "airplane"), ("second_half", "truck")):
        for split in ("train", "test"):
            folders = sorted((tmp_path / half / split).iterdir())
            assert len(folders) == 5
            assert names in [folder.name for folder in folders]
            assert all(len(list(folder.iterdir())) == 3 for folder in folders)


def test_a_training_ends_at_its_target(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def line(step, kind, top1):
        return json.dumps({"step": step, "epoch": 1.0, f"{kind}_loss": 1.0, f"{kind}_top1": top1})

    path.write_text(line(1, "train", 0.7) + "\n" + line(1, "eval", 0.9) + "\n")
    assert not measures.reached(tmp_path, 0.25)
    path.write_text(line(2, "train", 0.76) + "\n")
    assert measures.reached(tmp_path, 0.25)


# What an arm changes of `base`; the layers that a variant changes are in the test below.
CHANGES = {
    "color_noise": {"augment.color_noise"},
    "not_augmented": {"augment.random_crop", "augment.flip"},
    "narrow": {"model.width"},
    "wide": {"model.width"},
    "he": {"model.initialization"},
    "label_smoothing": {"augment.label_smoothing"},
    "mixup": {"augment.mixup"},
    "resized_crops": {"augment.resized_area"},
    "average": {"optimizer.average"},
    "cosine": {"optimizer.schedule", "optimizer.warmup_epochs", "optimizer.drop_biases"},
    **{
        name: {"model.variant"}
        for name in ("no_norm", "pool2", "towers", "apart", "half", "without_conv2")
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_arm_differs_from_the_base_in_one_thing(name, tmp_path):
    base, other = (
        flatten(parse_config(arms.flags_of(arms.ArmArguments(arm, 0, tmp_path))))
        for arm in ("base", name)
    )
    assert {key for key in base if base[key] != other[key]} == CHANGES[name]


@pytest.mark.parametrize(
    ("name", "of", "changed"),
    [
        ("claims_pool2", "cuda_convnet_18pct", {"pool1", "pool2", "pool3"}),
        ("claims_no_norm", "cuda_convnet_18pct", {"map_norm1", "map_norm2"}),
        ("claims_towers", "cuda_convnet_18pct", {"conv2"}),
        ("claims_apart", "cuda_convnet_18pct", {"conv2", "conv3"}),
        ("claims_half", "cuda_convnet_18pct", {"conv1", "conv2"}),
        ("claims_without_conv2", "cuda_convnet_18pct", {"conv2"}),
        ("claims_without_conv3", "cuda_convnet_18pct", {"conv3"}),
        ("claims_biases_of_one", "cuda_convnet_18pct", {"conv2", "conv3"}),
        ("claims_dense", "cuda_convnet_80sec", {"fc64", "fc1024", "dropout1024"}),
        ("claims_11pct_no_norm", "cuda_convnet_11pct", {"norm1", "norm2"}),
    ],
)
def test_a_variant_of_the_claims_differs_in_the_layers_of_its_name(name, of, changed):
    ours, theirs = set(architecture(name).layers), set(architecture(of).layers)
    assert {layer.name for layer in ours ^ theirs} == changed


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ((1.0, 1.1, 0.9), "holds"),
        ((-1.0, -1.1, -0.9), "does not hold"),
        ((1.0, -1.1, 0.9), "cannot be told apart from none"),
        ((5.0,), "cannot be told apart from none"),  # one seed has no interval
        ((math.inf, 1.0, 1.0), "cannot be told apart from none"),
        ((), "not measured"),
    ],
)
def test_the_interval_of_the_mean_decides(effects, verdict):
    assert verdicts.judge(claim_of(), runs_of(*effects)).verdict == verdict


def test_the_interval_is_students():
    """For 1, 2, 3, 4: 2.5 ± 3.18245 · 1.29099 / 2."""
    low, high = verdicts.interval((1, 2, 3, 4))
    assert (low, high) == (pytest.approx(0.44574, abs=1e-4), pytest.approx(4.55426, abs=1e-4))


def test_chance_must_be_small_for_every_seed():
    chance = claim_of("chance")
    assert verdicts.judge(chance, runs_of(0.001, 0.04)).verdict == "holds"
    assert verdicts.judge(chance, runs_of(0.001, 0.06)).verdict == "does not hold"
    assert verdicts.judge(chance, runs_of(0.001)).verdict == "cannot be told apart from none"


def test_only_seeds_with_a_run_of_each_arm_count():
    runs = runs_of(1.0, 1.1, 0.9)
    del runs["a", 1]
    assert verdicts.judge(claim_of(), runs).effects == (1.0, 0.9)


def test_an_effect_of_times_is_shown_as_a_ratio():
    claim = claim_of("times")
    outcome = verdicts.judge(claim, runs_of(*np.log([2.0, 2.0, 2.0])))
    assert verdicts.effect_text(claim, outcome) == "2.00 (2.00 to 2.00) times"
    assert verdicts.describe(claim, outcome) == "name: 2.00 (2.00 to 2.00) times, 3 seeds: holds"


def test_epochs_to_a_target_lie_between_points():
    run = run_of(error={1.0: 0.8, 2.0: 0.4, 3.0: 0.6})
    assert run.epochs_to("error", 0.6) == pytest.approx(1.5)
    assert run.epochs_to("error", 0.9) == 1.0
    assert run.epochs_to("error", 0.1) == math.inf
    assert run.last("error") == 0.6
    assert run.mean("error") == pytest.approx(0.6)


def test_a_run_without_its_last_line_is_not_complete(tmp_path):
    path = tmp_path / "claims.csv"
    assert verdicts.read_runs(path) == {}
    rows = [["base", 0, "test_error", 10, 0.25, ""], ["base", 0, "seconds", 0, 9, "a machine"]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [verdicts.COLUMNS, *rows, ["base", 1, "test_error", 10, 0.3, ""]]
        )
    ((key, run),) = verdicts.read_runs(path).items()
    assert key == ("base", 0)
    assert (run.last("test_error"), run.machine) == (0.25, "a machine")


def test_neighbours_of_the_same_class_are_counted():
    known = np.concatenate([np.zeros((8, 2)), np.ones((8, 2))])
    labels = np.repeat([0, 1], 8)
    queries = np.array([[0.1, 0.0], [0.9, 1.0], [0.0, 0.1]])
    assert measures.same_class(known, queries, labels, np.array([0, 1, 1])) == pytest.approx(2 / 3)


def test_towers_that_differ_are_told_from_towers_that_do_not():
    grey = np.ones((5, 5, 3, 8))
    color = grey.copy()
    color[:, :, 0] = -2
    noise = np.random.default_rng(0).standard_normal((5, 5, 3, 16)) * 0.1
    first, second, chance = measures.towers(np.concatenate([grey, color], -1) + noise)
    assert first < 0.1 < 0.9 < second
    assert chance < 1e-3
    mixed = np.stack([grey, color], -1).reshape(5, 5, 3, 16) + noise
    assert measures.towers(mixed)[2] > 0.5


def test_an_unknown_name_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert claims.main(["--only", "magic"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown claim or arm magic" in error


@pytest.mark.slow
def test_runs_are_appended_shared_and_go_on(tmp_path):
    """The quick form, stopped at once and started again, as a user would."""
    if not (DATA / "cifar10").exists():
        pytest.skip(f"CIFAR-10 is not in {DATA}")
    command = [sys.executable, str(PAPER / "claims.py"), "--quick", "--data-dir", str(DATA)]

    def start(*flags):
        return subprocess.run(
            [*command, *flags], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    stopped = start("--only", "half", "--hours", "0.001")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "stopped; the same command goes on" in stopped.stdout
    finished = start("--only", "half")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    path = tmp_path / "results" / "claims_quick.csv"
    runs = verdicts.read_runs(path)
    assert sorted(runs) == [(arm, seed) for arm in ("half", "towers") for seed in (0, 1)]
    assert {"test_error", "train_loss", "sample_error"} <= runs["half", 0].curves.keys()
    before = path.read_bytes()
    again = start("--only", "half", "towers_color")
    assert (again.returncode, path.read_bytes()) == (0, before)
    assert "begins" not in again.stdout
    assert "towers_color: chance at most" in again.stdout


def test_arithmetic_is_exact(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert arithmetic.main([]) == 0
    with (tmp_path / "results" / "arithmetic.csv").open(newline="") as file:
        ours = {row["what"]: row["ours"] for row in csv.DictReader(file)}
    assert ours["neurons of conv1"] == "290,400"
    assert ours["neurons"] == "659,272"
    assert ours["parameters"] == "60,965,224"
    assert ours["different crops and flips of an image"] == "2,178"
    assert "minutes, one H200" in ours["time of 90 epochs"]
    assert json.loads(arithmetic.Arguments().bench.read_text())["rows"]
    capsys.readouterr()


@pytest.fixture
def measured(tmp_path):
    """A file of measures with two seeds of a claim's arms, and a page with marks for tables."""
    runner = Runner(tmp_path / "claims.csv", tmp_path, None, quick=False)
    for seed, (half, both) in enumerate(((0.3, 0.25), (0.31, 0.25))):
        for arm, error in (("half", half), ("towers", both)):
            curve = [("test_error", epoch, error + 0.1 / epoch) for epoch in (1.0, 10.0)]
            runner.append((arm, seed), [*curve, ("color_chance", 10.0, 0.01)], 3600)
    for seed in range(3):
        runner.append(("80sec", seed), [("test_error", 11.0, 0.25 + 0.01 * seed)], 1800)
    names = ("claims", "published", "arithmetic", "machines")
    marks = (f"<!-- {name} -->\nold\n<!-- end of {name} -->" for name in names)
    (tmp_path / "page.md").write_text("# A page\n\n" + "\n\ntext\n\n".join(marks) + "\n\nend\n")
    return tmp_path


def test_the_page_has_what_was_measured_between_its_marks(measured):
    flags = ["--results", str(measured), "--page", str(measured / "page.md")]
    assert reproduction.main([*flags, "--images", str(measured)]) == 0
    text = (measured / "page.md").read_text()
    assert "\nold\n" not in text
    assert text.count("\n\ntext\n\n") == 3
    assert text.endswith("\n\nend\n")
    rows = [line for line in text.splitlines() if "one of half the kernels" in line]
    assert rows == [
        "| 3.2 | Two towers have a lower error than one of half the kernels | 1.7 and 1.2 points "
        "(top-1, top-5) | 5.50 (-0.85 to 11.85) points | 2 | cannot be told apart from none |"
    ]
    assert "| 26 % | 26.00 % (23.52 to 28.48) | 1 | 3 | 0.5 |" in text
    assert "| 5.5 |" in text  # hours of all runs
    for name in ("claims_effects.png", "claims_curves.png"):
        with Image.open(measured / name) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    before = text
    assert reproduction.main([*flags, "--images", str(measured)]) == 0
    assert (measured / "page.md").read_text() == before


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="has no marks"):
        reproduction.replaced("# A page", "claims", "")
