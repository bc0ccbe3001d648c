"""LPIPS: the values of example pictures, what a distance must do, and the command."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image
from small_nets import make_net

from flax_alexnet import lpips
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.pretrained import LPIPS_HEADS

main = importlib.import_module("flax_alexnet.commands.lpips").main
distance = jax.jit(lpips, static_argnames="spatial")


@pytest.fixture(scope="module")
def trunk(shared_data):
    """Torchvision's layers, the heads, and the three example pictures of the reference code."""
    with np.load(shared_data / "alexnet_owt" / "features_and_lpips.npz") as file:
        arrays = dict(file)
    params = unflatten_dict(
        {name: v for name, v in arrays.items() if name.startswith("conv")}, sep="/"
    )
    heads = {name: arrays[name] for name in LPIPS_HEADS}
    pictures = {
        name: shared_data / "alexnet_owt" / f"ex_{name}.png" for name in ("ref", "p0", "p1")
    }
    return params, heads, pictures


@pytest.fixture(scope="module")
def full(trunk, tmp_path_factory):
    params, heads, _ = trunk
    net = make_net(width=1.0, num_classes=1000, image_size=256, crop_size=224)
    path = tmp_path_factory.mktemp("lpips") / "trunk.safetensors"
    safetensors_files.save(
        dataclasses.replace(net, params=params, lpips_heads=heads, label_names=()), path
    )
    return path


def opened(path):
    with Image.open(path) as image:
        return jnp.asarray(np.asarray(image.convert("RGB"))[None] / np.float32(127.5) - 1)


def test_a_net_of_huge_weights_gives_no_distance(trunk, full, tmp_path, capsys):
    _, _, pictures = trunk
    net = safetensors_files.read(full)
    net.params["conv1"]["kernel"] *= np.float32(1e38)
    safetensors_files.save(net, tmp_path / "huge.safetensors")
    files = [str(pictures[name]) for name in ("ref", "p0")]
    table = tmp_path / "distances.csv"
    assert main([str(tmp_path / "huge.safetensors"), *files, "--output", str(table)]) == 2
    said = capsys.readouterr()
    assert said.err == "error: no pair of pictures could be compared\n"
    assert "the net gives what is not a number for these pictures" in said.out
    assert "the net gives what is not a number" in table.read_text()


@pytest.mark.parametrize(("other", "expected"), [("p0", 0.72188), ("p1", 0.13757)])
def test_the_example_pictures(trunk, other, expected):
    """The values are those that PyTorch gives: see tests/parity/test_torch_lpips.py."""
    params, heads, pictures = trunk
    value = distance(params, heads, opened(pictures["ref"]), opened(pictures[other]))
    assert value.shape == (1,)
    assert round(float(value[0]), 5) == expected


def test_equal_images_have_no_distance_and_the_order_does_not_matter(trunk):
    params, heads, _ = trunk
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(distance(params, heads, a, a), 0, atol=1e-12)
    np.testing.assert_allclose(
        distance(params, heads, a, b), distance(params, heads, b, a), rtol=1e-6
    )
    assert (distance(params, heads, a, b) > 0.01).all()
    gradient = jax.grad(lambda x: distance(params, heads, x, a).sum())(jnp.asarray(a))
    assert jnp.isfinite(gradient).all()
    with pytest.raises(ValueError, match="same shape"):
        lpips(params, heads, a, b[:, :63])


def test_images_that_are_not_in_their_range_are_refused(trunk):
    params, heads, _ = trunk
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (1, 32, 32, 3), np.uint8)
    good = jnp.asarray(levels / np.float32(127.5) - 1)
    for bad in (levels, levels.astype(np.int32), levels > 127):
        for function in (lpips, distance):  # a type is seen while tracing, too
            with pytest.raises(ValueError, match=f"not {bad.dtype}: take images / 127.5 - 1"):
                function(params, heads, bad, good)
    for bad in (levels.astype(np.float32), good * 1.01):
        with pytest.raises(ValueError, match=r"lpips takes \[-1, 1\], not .*: take images / 127.5"):
            lpips(params, heads, good, bad)
    with pytest.warns(UserWarning, match=r"no value is below 0: .* 2 \* images - 1 of \[0, 1\]"):
        lpips(params, heads, (good + 1) / 2, (good + 1) / 2)
    expected = distance(params, heads, good, -good)
    rounded = lpips(params, heads, good * np.float32(1 + 1e-6), -good)
    np.testing.assert_allclose(rounded, expected, rtol=1e-4)


def test_the_least_size(trunk, full, tmp_path, capsys):
    params, heads, _ = trunk
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (1, 31, 31, 3)).astype(np.float32) for _ in range(2))
    assert distance(params, heads, a, b) > 0.01
    with pytest.raises(UserError, match="an image of 31×30 does not fit"):
        lpips(params, heads, a[:, :, :30], b[:, :, :30])
    for name, image in (("a", a), ("b", b)):
        pixels = ((image[0] + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        Image.fromarray(pixels[:30]).save(tmp_path / f"{name}_small.png")
    assert main([str(full), *(str(tmp_path / f"{name}.png") for name in "ab")]) == 0
    assert "b.png: " in capsys.readouterr().out
    assert main([str(full), *(str(tmp_path / f"{name}_small.png") for name in "ab")]) == 2
    assert "an image of 30×31 does not fit" in "".join(capsys.readouterr())


def test_a_map_says_where(trunk):
    params, heads, _ = trunk
    a = np.zeros((1, 64, 64, 3), np.float32)
    b = a.copy()
    b[:, :24, :24] = np.random.default_rng(0).uniform(-1, 1, (24, 24, 3))
    there = np.asarray(distance(params, heads, a, b, spatial=True))
    assert there.shape == (1, 64, 64)
    # Far away only the deepest layers, which see most of the image, notice.
    assert there[0, :24, :24].mean() > 2 * there[0, 40:, 40:].mean()


def test_the_gradient_is_finite_where_all_features_are_zero_and_is_the_slope(trunk):
    params, heads, _ = trunk
    # Such a bias makes every unit of conv1 dead: the square root of a length of zero.
    dead = {name: dict(values) for name, values in params.items()}
    dead["conv1"]["bias"] = np.full_like(params["conv1"]["bias"], -1e4)
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32) for _ in range(2))
    gradient = jax.jit(jax.grad(lambda a, p: lpips(p, heads, a, b).sum()))
    assert jnp.isfinite(gradient(a, dead)).all()
    # Along the steepest direction the slope is the gradient's length.
    steepest = np.asarray(gradient(a, params))
    length = np.linalg.norm(steepest)
    step = 0.05 * steepest / length
    ends = [distance(params, heads, a + sign * step, b)[0] for sign in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 0.1, length, rtol=0.05)


def test_the_command_for_two_pictures_and_for_two_folders(trunk, full, tmp_path, capsys):
    *_, pictures = trunk
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, names in ((a, ("ref", "ref")), (b, ("p0", "p1"))):
        folder.mkdir()
        for target, name in zip(("first.png", "second.png"), names, strict=True):
            (folder / target).write_bytes(pictures[name].read_bytes())
    plot = tmp_path / "where.png"
    one = [str(full), str(pictures["ref"]), str(pictures["p0"]), "--plot", str(plot)]
    assert main(one) == 0
    assert ": 0.72188\n" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    (a / "third.png").write_bytes(b"bad")
    (b / "third.png").write_bytes(b"")
    output = tmp_path / "distances.csv"
    assert main([str(full), str(a), str(b), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "first: 0.72188\nsecond: 0.13757\n2 of 3 pairs read; 1 not:" in said
    assert "mean of 2 pairs: 0.42972" in said
    lines = output.read_text().splitlines()
    assert lines[0] == "pair,lpips"
    assert lines[2].startswith("second,0.1375")
    assert lines[3] == "third,it is no picture in a known format"


def test_mistakes_are_one_line(trunk, full, tmp_path, capsys, weights):
    *_, pictures = trunk
    ref, small = str(pictures["ref"]), tmp_path / "small.png"
    Image.new("RGB", (80, 64)).save(small)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    (tmp_path / "x" / "alone.png").write_bytes(small.read_bytes())
    for arguments, says in (
        ([str(full), ref, "nothing.png"], "no picture or folder nothing.png"),
        ([str(full), ref, str(tmp_path)], "give two of a kind"),
        ([str(full), str(tmp_path / "x"), str(tmp_path / "y")], "no pictures"),
        ([str(full), ref, str(small)], "no pair of pictures could be compared"),
        ([str(weights), ref, ref], "LPIPS takes torchvision's"),
        ([str(full), ref], "Missing"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
