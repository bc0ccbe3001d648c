"""Training from a trained model: what is taken, what is frozen, how fast each layer learns."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_alexnet.checkpoint.manager import Checkpoints, newest_intact, restore_model
from flax_alexnet.commands.convert import main as convert
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.config.schema import Config, frozen_layers, layer_values
from flax_alexnet.train import main
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.finetuning import adapt, start_from
from flax_alexnet.weights.labels import imagenet_labels, imagenet_synsets
from flax_alexnet.weights.load import load
from tests.small_models import make_pretrained

SMALL = ["--batch-size", "8", "--log-every", "1", "--no-compilation-cache"]


def flags(workdir, weights, data, *more):
    return [
        "--workdir",
        str(workdir),
        "--init-from",
        str(weights),
        "--data.name",
        data,
        *SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def finetuned(weights, photographs, tmp_path_factory):
    """Four steps on a folder of two of the model's classes, conv1 and conv2 frozen."""
    folder = tmp_path_factory.mktemp("images")
    for letter in "ab":
        target = folder / "own" / f"thing {letter}"
        target.mkdir(parents=True)
        for number in range(6):
            source = photographs / f"class {letter}" / f"{number % 3}.png"
            (target / f"{number}.png").write_bytes(source.read_bytes())
    workdir = folder / "run"
    more = [
        "--steps",
        "4",
        "--freeze",
        "conv1,conv2",
        "--optimizer.layer-rates",
        "conv.*=0",
        "fc8=2",
    ]
    arguments = flags(workdir, weights, f"folder:{folder / 'own'}", *more)
    assert main(arguments) == 0
    return workdir, arguments


def saved(workdir):
    step, _ = newest_intact(workdir / "checkpoints")
    steps = Checkpoints(workdir / "checkpoints")
    tree = steps._manager.item_metadata(step).tree
    steps.close()
    return tree, *restore_model(workdir / "checkpoints" / str(step))


def test_the_model_and_its_preprocessing_are_taken_from_the_file(pretrained, finetuned):
    config = json.loads((finetuned[0] / "config.json").read_text())["config"]
    assert config["recipe"] == "finetune"
    assert config["model.variant"] == "torchvision"
    assert config["model.width"] == pretrained.config.width
    assert config["data.image_size"] == 72
    assert config["data.resize"] == "torchvision"
    assert config["augment.crop_size"] == 64
    assert config["augment.scale"] == [0.02, 0.03, 0.04]
    _, _, mean = saved(finetuned[0])
    np.testing.assert_array_equal(mean, np.broadcast_to(pretrained.preprocessing.mean, (72, 72, 3)))
    again = load(finetuned[0])
    assert again.label_names == ("thing a", "thing b")
    image = np.random.default_rng(0).integers(0, 256, (1, 72, 72, 3), np.uint8)
    np.testing.assert_allclose(again.preprocess(image), pretrained.preprocess(image), rtol=1e-6)


@pytest.mark.parametrize("spelling", ["run", "./run", "own/../run", "link"])
def test_a_run_is_read_by_any_path(finetuned, spelling, tmp_path, monkeypatch):
    workdir, _ = finetuned
    monkeypatch.chdir(workdir.parent)
    Path("link").unlink(missing_ok=True)
    Path("link").symlink_to("run")
    expected = load(workdir)
    jax.tree.map(np.testing.assert_array_equal, load(spelling).params, expected.params)
    output = tmp_path / "model.safetensors"
    monkeypatch.chdir(workdir)
    assert convert([".", os.path.relpath(output)]) == 0
    jax.tree.map(np.testing.assert_array_equal, load(output).params, expected.params)
    assert load(output).source["file"] == "run, step 4"


def test_frozen_layers_keep_their_bits_and_have_no_optimizer_state(pretrained, finetuned):
    tree, params, _ = saved(finetuned[0])
    for layer in ("conv1", "conv2"):
        for name in ("kernel", "bias"):
            assert params[layer][name].tobytes() == pretrained.params[layer][name].tobytes()
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree["opt_state"])
    ]
    assert any("conv3" in path for path in paths)
    assert not any("conv1" in path or "conv2" in path for path in paths)


def test_a_layer_at_rate_zero_stays_and_others_learn(pretrained, finetuned):
    _, params, _ = saved(finetuned[0])
    for layer in ("conv3", "conv4", "conv5"):
        np.testing.assert_array_equal(params[layer]["kernel"], pretrained.params[layer]["kernel"])
    for layer in ("fc6", "fc7"):
        assert not np.array_equal(params[layer]["kernel"], pretrained.params[layer]["kernel"])


@pytest.mark.slow
def test_with_the_same_classes_the_first_loss_is_the_models_own(
    pretrained, weights, photographs, tmp_path, capsys
):
    """Nothing is trained at rate 0, so evaluation after a step is that of the model itself."""
    more = ["--steps", "1", "--optimizer.layer-rates", ".*=0"]
    assert main(flags(tmp_path / "run", weights, f"folder:{photographs}", *more)) == 0
    assert "starting from made.pth\n" in capsys.readouterr().out
    held_out = sorted(photographs.rglob("*.png"))[9]
    logits = pretrained.model.apply(
        {"params": pretrained.params}, pretrained.preprocess(pretrained.open(held_out)[None])
    )
    expected = -jax.nn.log_softmax(logits)[0, 3]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    np.testing.assert_allclose(summary["eval_loss"], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_trunk_will_do(pretrained, photographs, tmp_path, capsys):
    trunk = {name: values for name, values in pretrained.params.items() if name.startswith("conv")}
    safetensors_files.save(
        dataclasses.replace(pretrained, params=trunk), tmp_path / "trunk.safetensors"
    )
    more = ["--steps", "1", "--freeze", "conv.*"]
    path = tmp_path / "trunk.safetensors"
    assert main(flags(tmp_path / "run", path, f"folder:{photographs}", *more)) == 0
    assert "fc6, fc7, fc8 not there, and drawn at random" in capsys.readouterr().out
    _, params, _ = saved(tmp_path / "run")
    for layer in trunk:
        assert params[layer]["kernel"].tobytes() == pretrained.params[layer]["kernel"].tobytes()


@pytest.mark.slow
def test_the_head_is_replaced_and_a_stopped_run_ends_in_the_same_bits(finetuned, tmp_path, capsys):
    workdir, arguments = finetuned
    _, params, _ = saved(workdir)
    assert params["fc8"]["kernel"].shape[-1] == 2
    mine = ["--workdir", str(tmp_path / "run"), *arguments[2:], "--allow-changes"]
    assert main([*mine, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "starting from made.pth; fc8 is replaced, since its 4 classes are not these 2" in said
    assert "frozen: conv1, conv2" in said
    assert main([*mine, "--steps", "4"]) == 0
    one, other = (
        json.loads((folder / "summary.json").read_text())["params_sha256"]
        for folder in (workdir, tmp_path / "run")
    )
    assert one == other


def test_imagenets_synsets_keep_the_head(tmp_path):
    """TFDS calls ImageNet's classes by their numbers in WordNet."""
    pretrained = make_pretrained(num_classes=1000)
    named = dataclasses.replace(pretrained, label_names=imagenet_labels())
    safetensors_files.save(named, tmp_path / "named.safetensors")
    config = adapt(parse_config([]), tmp_path / "named.safetensors")
    start = start_from(named, config, 1000, imagenet_synsets())
    assert not start.random_layers
    assert start_from(named, config, 1000, imagenet_synsets()[::-1]).random_layers == {"fc8"}
    numbers = [str(number) for number in range(1000)]
    nameless = dataclasses.replace(pretrained, label_names=())
    for start in (named, nameless):  # 0 … 999 are class numbers, in whatever order they come
        assert not start_from(start, config, 1000, numbers).random_layers
        assert start_from(start, config, 1000, sorted(numbers)).random_layers == {"fc8"}
    assert not start_from(
        nameless, config, 1000, [f"x{number}" for number in numbers]
    ).random_layers


def test_flags_override_what_the_file_says(weights):
    argv = ["--init-from", str(weights), "--augment.crop-size", "70", "--optimizer.momentum", "0.5"]
    config = parse_config(argv, adapt=adapt)
    assert config == parse_config(["--init_from", *argv[1:]], adapt=adapt)
    assert (config.augment.crop_size, config.data.image_size) == (70, 72)
    assert config.optimizer.momentum == 0.5
    assert parse_config([*argv, "--recipe", "paper"], adapt=adapt).recipe == "paper"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv*", [1, 2, 3, 4, 5]),  # as of file names
        ("conv?", [1, 2, 3, 4, 5]),
        ("*[12]", [1, 2]),
        ("conv[!1]", [2, 3, 4, 5]),
        ("*[!1-6]", [7, 8]),
        ("conv.*", [1, 2, 3, 4, 5]),  # regular expressions
        ("conv[^1]", [2, 3, 4, 5]),
        ("conv[1-3]", [1, 2, 3]),
        ("conv1|fc[67]", [1, 6, 7]),
        ("fc.", [6, 7, 8]),
        ("conv1,conv2", [1, 2]),
    ],
)
def test_layers_are_named_by_patterns_of_either_kind(pattern, expected):
    names = [f"conv{n}" for n in range(1, 6)] + [f"fc{n}" for n in range(6, 9)]
    frozen = frozen_layers(Config(freeze=(pattern,)), names)
    assert sorted(int(name[-1]) for name in frozen) == expected
    if "," not in pattern:
        rates = layer_values("optimizer.layer-rates", (f"{pattern}=0.1",), names)
        assert rates == dict.fromkeys(frozen, 0.1)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--freeze", "conv9"], "did you mean 'conv"),
        (["--freeze", "*"], "leaves no layer to train"),
        (["--freeze", "fc8", "--model.num-classes", "9"], "and would stay random"),
        (["--freeze", "conv.*,fc.*"], "leaves no layer to train"),
        (["--freeze", "(("], "is no pattern"),
        (["--freeze", "a{99999999999999999999}"], "is no pattern"),
        (["--freeze", "(" * 5000], "is no pattern"),
        (["--optimizer.layer-rates", "a{99999999999999999999}=0.1"], "is no pattern"),
        (["--optimizer.layer-rates", "fc8"], "expected PATTERN=NUMBER"),
        (["--optimizer.layer-rates", "fc8=-1"], "expected PATTERN=NUMBER"),
        (["--optimizer.layer-rates", "head=3"], "unknown layer 'head'"),
        (["--model.variant", "paper"], "leave that flag out"),
        (["--model.width", "0.5"], "--model.width is 0.5, but --init-from"),
        (["--init-from", "nothing.safetensors"], "no weights nothing.safetensors"),
        (["--recipe", "finetune", "--init-from", ""], "needs a trained model"),
    ],
)
def test_mistakes_are_one_line(weights, photographs, tmp_path, capsys, more, says):
    assert main(flags(tmp_path / "run", weights, f"folder:{photographs}", *more)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_mean_image_fixes_the_size_of_the_images(photographs, tmp_path, capsys):
    pretrained = make_pretrained()
    rule = dataclasses.replace(pretrained.preprocessing, mean=np.zeros((72, 72, 3), np.float32))
    safetensors_files.save(
        dataclasses.replace(pretrained, preprocessing=rule), tmp_path / "model.safetensors"
    )
    arguments = flags(tmp_path / "run", tmp_path / "model.safetensors", f"folder:{photographs}")
    assert main([*arguments, "--data.image-size", "80"]) == 2
    assert "the mean image in" in capsys.readouterr().err
