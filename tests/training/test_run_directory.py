"""A working directory belongs to one run, of one configuration."""

import json

import pytest

from flax_alexnet.config.recipes import QUICKSTART, RECIPES
from flax_alexnet.config.schema import flatten
from flax_alexnet.training.run_directory import (
    claim,
    locked,
    record,
    recorded,
    summarized_step,
    versions,
    write_json,
)
from flax_alexnet.utils.errors import UserError

CONFIG = flatten(QUICKSTART)


def test_a_new_directory_is_made_and_keeps_the_configuration(tmp_path):
    workdir = tmp_path / "runs" / "mine"
    assert claim(workdir, CONFIG) == (CONFIG, [])
    assert recorded(workdir) == {}
    record(workdir, CONFIG)
    assert recorded(workdir) == CONFIG
    assert json.loads((workdir / "config.json").read_text())["versions"] == versions()


def test_another_configuration_is_refused_allowed_or_of_no_weight(tmp_path):
    record(tmp_path, CONFIG)
    other = CONFIG | {"seed": 7}
    with pytest.raises(UserError, match="seed was 0, is now 7"):
        claim(tmp_path, other)
    assert claim(tmp_path, other, allow_changes=True) == (CONFIG, ["seed was 0, is now 7"])
    assert claim(tmp_path, other, free_to_change={"seed"}) == (CONFIG, [])


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """It lacks fields that came later, which were off, and has the old name of a variant."""
    config = flatten(RECIPES["cifar10"])
    old = {name: value for name, value in config.items() if name != "augment.mixup"}
    record(tmp_path, old | {"model.variant": "cuda_convnet_cifar10"})
    assert claim(tmp_path, config) == (config, [])
    assert recorded(tmp_path) == config
    with pytest.raises(UserError, match=r"augment\.mixup was 0\.0, is now 0\.2"):
        claim(tmp_path, config | {"augment.mixup": 0.2})


def test_a_lock_keeps_others_out_and_names_its_owner(tmp_path):
    refused = pytest.raises(UserError, match=r"is in use by process \d+ on ")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{}", '{"step": "1"}', '{"step": true}', "[[]]"])
def test_a_summary_that_is_none_has_no_step(tmp_path, content):
    assert summarized_step(tmp_path) is None
    (tmp_path / "summary.json").write_text(content)
    assert summarized_step(tmp_path) is None
    write_json(tmp_path / "summary.json", {"step": 12})
    assert summarized_step(tmp_path) == 12
