"""Mistakes in one line, and the codes with which a process ends."""

import signal

import pytest

from flax_alexnet.utils.errors import (
    Terminated,
    UserError,
    cause,
    exit_code,
    first_line,
    starting,
    unknown,
)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("one\n  line"), 2, "error: one line\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(signal.SIGTERM), 143, "terminated\n"),
        (Terminated(signal.SIGINT), 130, "interrupted\n"),
    ],
)
def test_each_end_has_a_line_and_a_code(error, code, said, capsys):
    assert exit_code(error) == code
    assert capsys.readouterr().err == said


def test_the_nearest_name_is_suggested_and_else_all():
    assert unknown("layer", "conv11", ["conv1", "fc6"]).endswith("did you mean 'conv1'?")
    assert unknown("layer", "x", ["conv1", "fc6"]).endswith("choose one of: conv1, fc6")
    assert unknown("layer", "x", ["conv1"], shown=["some"]).endswith("choose one of: some")


def test_causes_are_the_systems_words_or_the_first_line():
    assert cause(OSError(28, "No space left on device", "file")) == "No space left on device"
    assert cause(ValueError(" one \ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"


def test_what_a_library_says_while_it_is_imported_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match=r"^cannot start: bad value$"), starting():
        raise ValueError("bad value\nof a variable")
