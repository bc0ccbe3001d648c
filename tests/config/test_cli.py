"""The command line: recipes, flags over them, and mistakes in one line."""

import io

import pytest

from flax_alexnet import __main__ as cli
from flax_alexnet.config.cli import known_flags
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.config.schema import Config
from flax_alexnet.utils.errors import UserError


def test_the_home_is_found_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_config(["--workdir=~/runs", "--data.data-dir=~/data"])
    assert [str(config.workdir), str(config.data.data_dir)] == ["/home/me/runs", "/home/me/data"]
    with pytest.raises(UserError, match="~nobody-there/x"):
        parse_config(["--workdir=~nobody-there/x"])


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
