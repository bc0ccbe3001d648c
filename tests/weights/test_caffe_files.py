"""Caffe's models and mean images, written field by field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.models.activations import features
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import name_maps
from flax_alexnet.weights.load import CAFFE, load, read
from tests.foreign_files import CAFFE_SHAPES, KINDS, blob, caffemodel, message, refused


@pytest.mark.parametrize("generation", KINDS)
def test_caffe_variants(generation, tmp_path, capsys):
    path = tmp_path / "model.caffemodel"
    first = load(caffemodel(path, generation))
    assert first.config.variant == "caffe"
    rule = first.preprocessing
    assert (rule.image_size, rule.resize, rule.crop_size, rule.scale) == (256, "caffe", 227, 1.0)
    np.testing.assert_allclose(rule.mean, [122.67891434, 116.66876762, 104.00698793])
    assert "BGR 104.007 116.669 122.679" in capsys.readouterr().err
    second = load(caffemodel(path, generation, ("pool1", "norm1")))
    assert second.config.variant == "caffenet"
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert load(caffemodel(path, generation, (), name=b"CaffeNet")).config.variant == "caffenet"
    caffemodel(path, generation, ())
    with pytest.raises(UserError, match="--variant caffe or caffenet"):
        load(path)
    assert read(path, "caffenet")[0].config.variant == "caffenet"
    with pytest.raises(UserError, match="did you mean 'caffenet'"):
        read(path, "cafenet")


def test_mean_image(tmp_path):
    """BGR, (c, h, w) becomes RGB, (h, w, c)."""
    path = caffemodel(tmp_path / "model.caffemodel")
    bgr = np.random.default_rng(0).random((3, 256, 256), np.float32)
    mean = tmp_path / "mean.binaryproto"
    mean.write_bytes(blob(bgr))
    pretrained, notes = read(path, mean=mean)
    assert notes == []
    for channel in range(3):
        np.testing.assert_array_equal(pretrained.preprocessing.mean[..., channel], bgr[2 - channel])
    mean.write_bytes(blob(bgr[:, :1, :1]))
    np.testing.assert_array_equal(read(path, mean=mean)[0].preprocessing.mean, bgr[::-1, 0, 0])
    for wrong in (bgr[:, :, :255], bgr[:, :200, :200], bgr[:2]):
        mean.write_bytes(blob(wrong))
        with pytest.raises(UserError, match="expected"):
            read(path, mean=mean)


def test_caffe_kernels(tmp_path):
    """Kernels of groups keep their order; only those of conv1 are turned from BGR to RGB."""
    rng = np.random.default_rng(1)
    values = {k: rng.standard_normal(shape, np.float32) for k, shape in CAFFE_SHAPES.items()}
    pretrained = load(caffemodel(tmp_path / "model.caffemodel", values=values))
    for out, channel in ((0, 0), (95, 1), (17, 2)):
        ours = pretrained.params["conv1"]["kernel"][:, :, channel, out]
        np.testing.assert_array_equal(ours, values["conv1"][out, 2 - channel])
    np.testing.assert_array_equal(
        pretrained.params["conv2"]["kernel"][4, 3, 7, 200], values["conv2"][200, 7, 4, 3]
    )


def test_bad_caffemodel(tmp_path, capsys):
    path, out = tmp_path / "model.caffemodel", tmp_path / "out.safetensors"
    whole = caffemodel(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in refused(capsys, path, out)
    lying = message((1, 2**40), (2, 2**40), (3, 1), (4, 1), (5, b"1234"))
    path.write_bytes(message((100, message((1, b"conv1"), (7, lying)))))
    assert "has 1 numbers" in refused(capsys, path, out)
    path.write_bytes(message((1, b"CaffeNet")))
    assert "no weights" in refused(capsys, path, out)
    path.write_bytes(message(*[(100, b"")] * 20_000))
    assert "more than 10,000 layers" in refused(capsys, path, out)
    values = {"conv1": np.zeros((96, 3, 7, 7), np.float32)}
    line = refused(capsys, caffemodel(path, values=values), out)
    assert "conv1.blobs[0] is 96×3×7×7, expected 96×3×11×11" in line


def dense_tensors(layout, **shapes):
    """Layers of zeros by their names and shapes, (out, in), which take no memory."""
    kernel, bias = (layout.names[f"fc8/{part}"].removeprefix("fc8") for part in ("kernel", "bias"))
    result = {}
    for name, shape in shapes.items():
        sides = shape if layout.channels_first else shape[::-1]
        result[name + kernel] = np.broadcast_to(np.float32(0), sides)
        result[name + bias] = np.broadcast_to(np.float32(0), shape[:1])
    return result


FC6, FC7 = (4096, 9216), (4096, 4096)


@pytest.mark.parametrize("layout", [name_maps.CAFFE, name_maps.CAFFE_TENSORFLOW])
@pytest.mark.parametrize(
    ("shapes", "head", "classes", "said"),
    [
        ({"fc6": FC6, "fc7": FC7, "fc8": (5, 4096)}, None, 5, []),
        ({"fc6": FC6, "fc7": FC7}, None, None, []),
        ({"fc6": FC6, "fc7": FC7, "fc9": (5, 4096)}, None, 5, ["fc9 is taken for the last layer"]),
        ({"score": (4096, 4096), "fc7": FC7}, None, 4096, ["score is taken for the last layer"]),
        (
            {"a": FC6, "b": FC7, "c": (5, 4096)},
            None,
            5,
            ["a is taken for fc6", "b is taken for fc7", "c is taken for the last layer"],
        ),
        (
            {"fc7": FC7, "fc8": (5, 4096), "aux": (7, 4096)},
            "aux",
            7,
            ["aux is taken for the last layer", "fc8 is left out"],
        ),
        ({"fc7": FC7, "fc8": (5, 4096), "aux": (7, 4096)}, "fc8", 5, ["aux is left out"]),
        ({"b": FC7, "c": (4096, 4096)}, "c", 4096, ["b is taken for fc7"]),
    ],
)
def test_fine_tuned_caffe(layout, shapes, head, classes, said):
    """Their last layer bears another name, and others may, lest Caffe fill it from the file."""
    tensors, notes = name_maps.name_dense(layout, dense_tensors(layout, **shapes), "model", head)
    expected = {"fc8": (classes, 4096)} if classes else {}
    expected |= {"fc6": FC6} if FC6 in shapes.values() else {}
    expected |= {"fc7": FC7}
    found = dense_tensors(layout, **expected)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in found.items()}
    assert all(part in notes[0] for part in said)
    assert bool(notes) == bool(said)


@pytest.mark.parametrize(
    ("shapes", "head", "said"),
    [
        ({"fc8": (5, 4096), "aux": (7, 4096)}, None, "several last layers, fc8, aux: choose one"),
        ({"score": (5, 4096), "aux": (7, 4096)}, None, "several last layers, score, aux: choose"),
        ({"b": FC7, "c": (4096, 4096)}, None, "several last layers, b, c: choose"),
        ({"fc8": (5, 4096), "aux": (7, 4096)}, "au", "unknown last layer 'au': did you mean 'aux'"),
    ],
)
def test_several_last_layers_of_caffe(shapes, head, said):
    with pytest.raises(UserError, match=said):
        name_maps.name_dense(
            name_maps.CAFFE, dense_tensors(name_maps.CAFFE, **shapes), "model", head
        )


def test_layers_of_caffe_that_fit_nowhere_are_named(tmp_path, capsys):
    path, out = tmp_path / "model.caffemodel", tmp_path / "out.safetensors"
    whole = caffemodel(path).read_bytes()
    extra = message((1, b"extra"), (7, blob(np.zeros((5, 9), np.float32))))
    path.write_bytes(whole + message((100, extra)))
    assert "extra.blobs[0] 5×9 is not expected" in refused(capsys, path, out)
    path.write_bytes(whole + message((100, extra), (100, extra)))
    assert "it has extra.blobs[0] twice" in refused(capsys, path, out)
    caffemodel(path)
    assert "unknown last layer 'extra'" in refused(capsys, path, out, "--head", "extra")
    with pytest.raises(UserError, match="unknown last layer 'score'"):
        load(path, head="score")


def test_grey_caffe(tmp_path):
    """Grey is made of colours as OpenCV does, so a model of grey images sees what it was fed."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((96, 1, 11, 11), np.float32)
    path, mean = caffemodel(tmp_path / "model", values={"conv1": kernel}), tmp_path / "mean"
    image = rng.uniform(100, 150, (1, 256, 256)).astype(np.float32)
    mean.write_bytes(blob(image))
    pretrained, (note,) = read(path, mean=mean)
    assert "the model reads grey images" in note
    images = rng.integers(0, 256, (1, 256, 256, 3), np.uint8)
    ours = features(pretrained.model, pretrained.params, pretrained.preprocess(images), ["conv1"])[
        "conv1"
    ]
    grey = images @ np.array([0.299, 0.587, 0.114]) - image
    expected = jax.lax.conv_general_dilated(
        jnp.asarray(grey[:, None, 14:241, 14:241], jnp.float32), kernel, (4, 4), "VALID"
    )
    expected = np.asarray(expected).transpose(0, 2, 3, 1) + pretrained.params["conv1"]["bias"]
    np.testing.assert_allclose(ours, np.maximum(expected, 0), atol=1e-5 * abs(expected).max())
    with pytest.raises(UserError, match="has 1 channels, but the model reads 3"):
        read(caffemodel(tmp_path / "model"), mean=mean)


# The bugs of the demo beside the pretrained weights of guerzh/tf_weights.


def test_demo_padding(tmp_path):
    """It convolves with SAME, where the model was trained with VALID: 57 × 57 and not 55 × 55."""
    pretrained = load(caffemodel(tmp_path / "model.caffemodel"))
    images = np.zeros((1, 256, 256, 3), np.uint8)
    outputs = jax.eval_shape(
        lambda x: features(
            pretrained.model, pretrained.params, pretrained.preprocess(x), ["conv1", "conv5"]
        ),
        images,
    )
    assert outputs["conv1"].shape == (1, 55, 55, 96)
    assert outputs["conv5"].shape == (1, 13, 13, 256)


def test_demo_red(tmp_path):
    """It swaps red and blue by assigning views, so that blue is there twice and red is lost."""
    kernel = np.zeros(CAFFE_SHAPES["conv1"], np.float32)
    kernel[range(3), range(3), 0, 0] = 1  # units 0, 1, 2 see blue, green, red, as Caffe has them
    pretrained = load(caffemodel(tmp_path / "model.caffemodel", values={"conv1": kernel}))
    image = np.broadcast_to(np.array([200, 150, 130], np.uint8), (1, 256, 256, 3))  # RGB
    seen = features(pretrained.model, pretrained.params, pretrained.preprocess(image), ["conv1"])[
        "conv1"
    ]
    blue, green, red = seen[0, 20, 20, :3] - pretrained.params["conv1"]["bias"][:3]
    np.testing.assert_allclose([red, green, blue], [200, 150, 130] - CAFFE.mean, rtol=1e-5)


def test_demo_mean(tmp_path):
    """It subtracts the mean from its first image only."""
    pretrained = load(caffemodel(tmp_path / "model.caffemodel"))
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    first, second = np.asarray(pretrained.preprocess(np.stack([image, image])))
    np.testing.assert_array_equal(first, second)
    inside = image[14:241, 14:241].astype(np.float32)
    np.testing.assert_allclose(second, inside - CAFFE.mean, rtol=1e-6)
