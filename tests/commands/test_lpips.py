"""`lpips`: for two images and for two folders."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from PIL import Image

from flax_alexnet import lpips
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import safetensors_files
from tests.small_models import make_pretrained

distance = jax.jit(lpips, static_argnames="spatial")
main = importlib.import_module("flax_alexnet.commands.lpips").main


@pytest.fixture(scope="module")
def full(lpips_trunk, tmp_path_factory):
    params, heads, _ = lpips_trunk
    pretrained = make_pretrained(width=1.0, num_classes=1000, image_size=256, crop_size=224)
    path = tmp_path_factory.mktemp("lpips") / "lpips_trunk.safetensors"
    safetensors_files.save(
        dataclasses.replace(pretrained, params=params, lpips_heads=heads, label_names=()), path
    )
    return path


def test_a_model_of_huge_weights_gives_no_distance(lpips_trunk, full, tmp_path, capsys):
    _, _, images = lpips_trunk
    pretrained = safetensors_files.read(full)
    pretrained.params["conv1"]["kernel"] *= np.float32(1e38)
    safetensors_files.save(pretrained, tmp_path / "huge.safetensors")
    files = [str(images[name]) for name in ("ref", "p0")]
    table = tmp_path / "distances.csv"
    assert main([str(tmp_path / "huge.safetensors"), *files, "--output", str(table)]) == 2
    said = capsys.readouterr()
    assert said.err == "error: no pair of images could be compared\n"
    assert "the model returns values that are not finite for these images" in said.out
    assert "the model returns values that are not finite" in table.read_text()


def test_the_least_size(lpips_trunk, full, tmp_path, capsys):
    params, heads, _ = lpips_trunk
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


def test_the_command_for_two_images_and_for_two_folders(lpips_trunk, full, tmp_path, capsys):
    *_, images = lpips_trunk
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, names in ((a, ("ref", "ref")), (b, ("p0", "p1"))):
        folder.mkdir()
        for target, name in zip(("first.png", "second.png"), names, strict=True):
            (folder / target).write_bytes(images[name].read_bytes())
    plot = tmp_path / "where.png"
    one = [str(full), str(images["ref"]), str(images["p0"]), "--plot", str(plot)]
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
    assert lines[3] == "third,it is no image in a known format"


def test_mistakes_are_one_line(lpips_trunk, full, tmp_path, capsys, weights):
    *_, images = lpips_trunk
    ref, small = str(images["ref"]), tmp_path / "small.png"
    Image.new("RGB", (80, 64)).save(small)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    (tmp_path / "x" / "alone.png").write_bytes(small.read_bytes())
    for arguments, says in (
        ([str(full), ref, "nothing.png"], "no image or folder nothing.png"),
        ([str(full), ref, str(tmp_path)], "give two of a kind"),
        ([str(full), str(tmp_path / "x"), str(tmp_path / "y")], "no images"),
        ([str(full), ref, str(small)], "no pair of images could be compared"),
        ([str(weights), ref, ref], "LPIPS takes torchvision's"),
        ([str(full), ref], "Missing"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
