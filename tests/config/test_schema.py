"""Fields and their ranges: mistakes in one line."""

import pytest

from flax_alexnet.config.cli import known_flags
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.config.schema import Config, Range, flatten, layer_values, upgrade
from flax_alexnet.utils.errors import UserError

EXPONENTIAL = ("--optimizer.schedule", "exponential", "--optimizer.final-rate", "0.1")


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
            "--optimizer.schedule is plateau; expected another one with --optimizer.rule notebook",
        ),
        (
            ["--augment.resized-area", "0.5", "--augment.no-random-crop"],
            "--augment.resized-area is 0.5; expected nothing with --augment.no-random-crop",
        ),
        (
            ["--optimizer.schedule", "exponential"],
            "--optimizer.final-rate is 0.0; expected more than 0 with --optimizer.schedule exp",
        ),
        (
            [*EXPONENTIAL, "--optimizer.bias-final-rate", "0"],
            "--optimizer.bias-final-rate is 0.0; expected more than 0",
        ),
        ([*EXPONENTIAL, "--optimizer.rate-levels", "1"], "rate-levels is 1; expected 2 or more"),
        (["--augment.label-smoothing", "1"], "expected 0 to below 1"),
        (["--augment.mixup", "-0.1"], "--augment.mixup is -0.1; expected 0 or more"),
        (["--augment.chunk", "0"], "--augment.chunk is 0; expected 1 or more"),
        (["--optimizer.average", "1"], "--optimizer.average is 1.0; expected 0 to below 1"),
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


@pytest.mark.parametrize(
    "value", ["conv1", "conv1=fast", "conv1=-1", "conv1=inf", "=3", "nothing=1"]
)
def test_a_value_of_some_layers_is_a_pattern_and_a_number(value):
    with pytest.raises(UserError, match=r"--optimizer\.layer-decays"):
        layer_values("optimizer.layer-decays", [value], ["conv1", "fc10"])


def test_a_later_value_of_a_layer_goes_before_an_earlier_one():
    values = layer_values("optimizer.layer-decays", ["*=0", "fc10=3"], ["conv1", "fc10"])
    assert values == {"conv1": 0.0, "fc10": 3.0}


def test_a_configuration_of_an_older_version_has_what_came_later():
    new = flatten(Config())
    old = {name: value for name, value in new.items() if name != "augment.chunk"}
    assert upgrade(old) == new
    assert upgrade(old | {"model.variant": "cuda_convnet_cifar10"})["model.variant"] == (
        "cuda_convnet_19pct"
    )
    assert upgrade(old | {"seed": 7})["seed"] == 7
