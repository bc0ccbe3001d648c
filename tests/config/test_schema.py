"""Fields and their ranges: mistakes in one line."""

import pytest

from flax_alexnet.config.cli import known_flags
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.config.schema import Config, Range, flatten
from flax_alexnet.utils.errors import UserError


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


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Range(least=1), (1, None, (1, 2)), (0, (1, 0)), "1 or more"),
        (Range(above=0), (1e-9, (0.1, 0.2)), (0, -1, (0.1, 0)), "more than 0"),
        (Range(least=0, most=1), (0, 1), (-0.1, 1.1), "0 to 1"),
        (Range(least=0, below=1), (0, 0.999), (1, -1), "0 to below 1"),
        (Range(above=0, below=1), (0.5,), (0, 1), "more than 0, below 1"),
        (Range(above=0, most=100), (100, 1e-9), (0, 101), "more than 0, at most 100"),
    ],
)
def test_a_range_has_its_ends_or_not_and_says_so(bounds, inside, outside, text):
    assert all(bounds.holds(value) for value in inside)
    assert not any(bounds.holds(value) for value in outside)
    assert not bounds.holds(float("nan"))
    assert str(bounds) == text
