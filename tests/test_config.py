"""The command line: recipes, flags over them, and mistakes in one line."""

import dataclasses
import io

import pytest

from flax_alexnet import __main__ as cli
from flax_alexnet.config.cli import known_flags
from flax_alexnet.config.recipes import RECIPES, parse_config
from flax_alexnet.config.schema import Config, flatten, validate
from flax_alexnet.models.architectures import architecture, trace
from flax_alexnet.utils.errors import UserError


def test_a_recipe_is_a_value_and_flags_override_it():
    argv = ["--recipe", "paper", "--data.name", "cifar10", "--seed=3"]
    argv += ["--optimizer.learning-rate", "0.02"]
    expected = dataclasses.replace(
        RECIPES["paper"],
        seed=3,
        data=dataclasses.replace(RECIPES["paper"].data, name="cifar10"),
        optimizer=dataclasses.replace(RECIPES["paper"].optimizer, learning_rate=0.02),
    )
    assert parse_config(argv) == expected
    assert parse_config([]) == RECIPES["quickstart"]


def test_the_home_is_found_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_config(["--workdir=~/runs", "--data.data-dir=~/data"])
    assert [str(config.workdir), str(config.data.data_dir)] == ["/home/me/runs", "/home/me/data"]
    with pytest.raises(UserError, match="~nobody-there/x"):
        parse_config(["--workdir=~nobody-there/x"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_its_images_fit(name):
    config = RECIPES[name]
    validate(config)
    layers = architecture(config.model.variant).scaled(1000, config.model.width)
    trace(layers, config.augment.crop_size, config.augment.crop_size)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "quikstart"], "unknown recipe 'quikstart': did you mean 'quickstart'?"),
        (["--data.nme", "x"], "unknown flag --data.nme: did you mean --data.name?"),
        (["--lr=3"], "unknown flag --lr"),
        (["--model.variant", "papers"], "unknown variant 'papers': did you mean 'paper'?"),
        (["--batch-size", "0"], "--batch-size is 0; expected 1 to 1048576"),
        (["--batch-size", "many"], "batch-size"),
        (["--batch-size"], "batch-size"),
        (["stray"], "stray"),
        (["--model.dtype", "float16"], "model.dtype"),
        (["--model.dropout-rate", "1"], "expected 0 to below 1"),
        (["--epochs", "inf"], "--epochs is inf; expected numbers up to 1e+10"),
        (
            ["--optimizer.rule", "notebook", "--optimizer.schedule", "plateau"],
            "--optimizer.schedule is plateau; expected constant or steps",
        ),
        (["--augment.crop-size", "99"], "--augment.crop-size is 99; expected 1 to"),
        (["--optimizer.schedule", "steps", "--optimizer.drop-epochs"], "drop-epochs"),
    ],
)
def test_mistakes_say_what_was_expected(argv, message):
    with pytest.raises(UserError) as error:
        parse_config(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_are_those_of_the_dataclasses():
    flags = known_flags(Config())
    assert {"--recipe", "--data.name", "--augment.no-flip", "--optimizer.learning-rate"} <= set(
        flags
    )
    flat = flatten(Config())
    assert flat["data.name"] == "shapes_and_textures"
    assert flat["optimizer.drop_epochs"] == []


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in known_flags(Config()) if not flag.startswith("--no-"))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("command", [*sorted({*cli.COMMANDS} - {"hub"}), "hub push"])
def test_help_is_printed_in_any_encoding(command, encoding, monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, encoding=encoding))
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    print("→ 猫 \udcff", flush=True)
    assert "usage" in output.getvalue().decode(encoding)
    assert output.getvalue().endswith(b"\\u2192 \\u732b \\udcff\n")


def test_the_console_script_lists_commands_and_suggests_the_nearest(capsys):
    assert cli.main([]) == 0
    assert "prepare" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean 'train'?\n"
    assert cli.main(["train", "--recipe", "none"]) == 2
