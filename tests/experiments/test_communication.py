"""What crosses devices in a step: what theory says, and nothing for the towers' own layers."""

import functools
import re
import runpy
from pathlib import Path

import pytest

from flax_alexnet.models.architectures import ARCHITECTURES

SCRIPT = runpy.run_path(
    str(Path(__file__).parents[2] / "experiments" / "benchmarks" / "communication.py")
)
BATCH, WIDTH = 16, 1 / 8
TOWERS = [name for name, table in ARCHITECTURES.items() if table.groups == 2]
CASES = [
    *((name, variant) for name in ("data", "zero", "hybrid") for variant in ("notebook", "paper")),
    ("hybrid", "torchvision"),
    ("hybrid", "cuda_convnet_19pct"),
    *(("towers", variant) for variant in TOWERS),
]


@functools.cache
def collectives(name, variant):
    layout = SCRIPT["layout_for"](name, variant, 8, WIDTH)
    text = SCRIPT["compiled"](layout, variant, BATCH, WIDTH)
    return layout, SCRIPT["collectives"](text)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(*case, marks=() if case == ("hybrid", "torchvision") else pytest.mark.slow)
        for case in CASES
    ],
)
def test_bytes_are_those_of_theory(name, variant):
    layout, found = collectives(name, variant)
    expected = SCRIPT["theory"](layout, variant, BATCH)
    # Theory leaves out a few hundred bytes of metrics.
    assert sum(c.sent for c in found) == pytest.approx(expected, abs=500)
    kinds = {c.kind for c in found if c.sent > 500}
    if name == "data":
        assert kinds == {"all-reduce"}, "gradients only"
    if name == "hybrid" and variant != "cuda_convnet_19pct":
        # Only convolutions' gradients are added up; dense layers exchange what they read.
        summed = [c.source for c in found if c.kind == "all-reduce" and c.sent > 500]
        assert summed
        assert not any(re.search(r"fc[678]/shard_map", source) for source in summed)


def of(found, layer):
    return [c for c in found if re.search(rf"AlexNet\)+/{layer}/", c.source)]


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v == "paper" else pytest.mark.slow) for v in TOWERS]
)
def test_layers_with_groups_need_nothing_of_the_other_tower(variant):
    _, found = collectives("towers", variant)
    forward = [c for c in found if "transpose" not in c.source]
    for layer in ("conv1", "conv2", "conv4", "conv5"):
        assert not of(forward, layer)
    assert [c.kind for c in of(forward, "conv3")] == ["all-gather"]
    assert [c.kind for c in of(forward, "fc6")] == ["all-gather"]
    # Towards their inputs neither: what is left is the sum of gradients over images.
    for layer in ("conv2", "conv4", "conv5"):
        assert {c.kind for c in of(found, layer)} <= {"all-reduce"}


def test_the_table_and_the_plot_are_made(tmp_path):
    table = SCRIPT["scaling_table"](("paper",)).splitlines()
    assert len([line for line in table if line.startswith("| paper |")]) == 9
    SCRIPT["draw"](tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").stat().st_size > 10_000


def test_every_notation_of_groups_is_read():
    line = '  %r = f32[8,16]{1,0} all-reduce(%x), replica_groups=%s, metadata={op_name="a/b"}'
    for groups, count in (
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}", 8),
    ):
        (found,) = SCRIPT["collectives"](line.replace("%s", groups))
        assert (found.kind, found.size, found.group, found.source) == (
            "all-reduce",
            512,
            count,
            "a/b",
        )
        assert found.sent == pytest.approx(2 * (count - 1) / count * 512)
