"""The images, by what matplotlib is told to draw, and the command."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from flax_alexnet.utils import plotting
from flax_alexnet.utils.plotting import (
    color_selectivity,
    plot_activations,
    plot_confusion,
    plot_distance,
    plot_grad_cam,
    plot_kernels,
    plot_neighbours,
    plot_predictions,
)

RNG = np.random.default_rng(0)
ODD_NAME = "$a$_\\b{\U0010fffd"  # no formula, and in no font
DRAWN_NAME = "$a$_\\b{\\U0010fffd"


@pytest.fixture
def cat_font(tmp_path):
    """A font of the system that has one character more than matplotlib's own: 猫, as a square."""
    pen = TTGlyphPen(None)
    for place, point in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if place else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 100)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "A Cat", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "cat.ttf")
    before = fontManager.ttflist.copy()
    fontManager.addfont(tmp_path / "cat.ttf")
    yield "A Cat"
    fontManager.ttflist[:] = before


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def images_of(shape):
    return RNG.integers(0, 256, (*shape, 8, 8, 3), np.uint8)


def test_names_are_drawn_in_a_font_that_has_them(cat_font, figures, tmp_path):
    names = ["$猫$ é", "cat", "Katze \U0010fffd"]
    plot_confusion(np.eye(3, dtype=int), names, tmp_path / "c.png")  # warnings are errors
    drawn = figures[0].axes[0].get_xticklabels()
    assert [label.get_text() for label in drawn] == [*names[:2], "Katze \\U0010fffd"]
    assert cat_font in drawn[0].get_fontfamily()
    assert cat_font not in drawn[1].get_fontfamily() + drawn[2].get_fontfamily()
    image = np.asarray(Image.open(tmp_path / "c.png"))
    fontManager.ttflist[:] = [font for font in fontManager.ttflist if font.name != cat_font]
    if plotting._font("猫") == "":
        plot_confusion(np.eye(3, dtype=int), names, tmp_path / "c.png")
        label = figures[1].axes[0].get_xticklabels()[0]
        assert label.get_text() == "$\\u732b$ é"
        assert not np.array_equal(Image.open(tmp_path / "c.png"), image)


def test_color_selectivity():
    kernels = np.zeros((2, 3, 3, 6))
    kernels[..., 1] = RNG.standard_normal((2, 3, 1))  # grey
    kernels[:, :, 0, 2] = RNG.standard_normal((2, 3))  # red
    kernels[..., 3] = RNG.standard_normal((2, 3, 1)) * [1, -3, 2]  # opponents
    kernels[..., 4:] = RNG.standard_normal((2, 3, 3, 1)) * [1, -0.01]
    found = color_selectivity(kernels)
    np.testing.assert_allclose(found[:4], [0, 0, 2 / 3, 1], atol=1e-12)
    # The same by a matrix: what is left of each pixel without its mean over the colours.
    left = np.einsum("cd,hwd->hwc", np.eye(3) - 1 / 3, kernels[..., 4])
    np.testing.assert_allclose(found[4:], (left**2).sum() / (kernels[..., 4] ** 2).sum())


def test_kernels_of_two_towers_are_drawn_apart_by_their_color(figures, tmp_path):
    kernels = RNG.standard_normal((5, 5, 3, 96)).astype(np.float32)
    kernels[..., :48] = kernels[:, :, :1, :48]
    plot_kernels(kernels, tmp_path / "new" / "kernels.png", groups=2)
    first, second = figures[0].axes
    assert "Tower 1: 48 kernels of 5×5×3; colour selectivity 0.00" in first.get_title()
    mean = color_selectivity(kernels[..., 48:]).mean()
    assert f"Tower 2: 48 kernels of 5×5×3; colour selectivity {mean:.2f}" in second.get_title()
    order = 48 + np.argsort(color_selectivity(kernels[..., 48:]), kind="stable")
    assert texts(second) == [str(channel) for channel in order]
    tile = np.asarray(second.images[1].get_array())
    kernel = kernels[..., order[1]]
    np.testing.assert_allclose((tile - 0.5) * 2 * np.abs(kernel).max(), kernel, atol=1e-5)
    with Image.open(tmp_path / "new" / "kernels.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("count", [1, 20, 64])
def test_kernels_of_one_tower(figures, tmp_path, count):
    plot_kernels(np.zeros((3, 3, 3, count)), tmp_path / "kernels.png")
    (axis,) = figures[0].axes
    assert axis.get_title().startswith(f"conv1: {count} kernels")
    assert len(axis.images) == count


def test_activations_show_the_strongest_channels(figures, tmp_path):
    maps = RNG.random((4, 4, 30)) + np.roll(np.arange(30), 7)
    activations = {"conv1": maps, "pool1": maps[..., :3], "fc6": np.array([0.0, 2.5, 0.0, 1.0])}
    plot_activations(images_of(()), activations, tmp_path / "a.png", channels=5)
    _, conv1, pool1, fc6 = figures[0].axes
    assert titles(figures[0]) == ["image, 8×8×3", "conv1, 4×4×30", "pool1, 4×4×3", "fc6, 4"]
    assert texts(conv1) == ["6", "5", "4", "3", "2"]
    np.testing.assert_allclose(conv1.images[0].get_array(), maps[..., 6], rtol=1e-6)
    assert len(pool1.images) == 3
    assert fc6.get_xlabel() == "50% not zero, largest 2.5"


def test_grad_cam_lies_over_the_whole_image(figures, tmp_path):
    maps = np.zeros((2, 2, 2))
    maps[0, 0, 1] = 3.0
    plot_grad_cam(images_of(()), maps, ["cat", ODD_NAME], tmp_path / "g.png")
    assert titles(figures[0]) == ["", "cat", DRAWN_NAME]
    heat = np.asarray(figures[0].axes[1].images[1].get_array())
    assert heat.shape == (8, 8)
    assert heat[0, 7] == heat.max() == 3
    # Pixels 1 and 6 of 8 are as far from the centres of the two columns, which lie at 1.5 and 5.5.
    np.testing.assert_allclose(heat[0], 3 * np.clip((np.arange(8) - 1.5) / 4, 0, 1), atol=1e-6)


@pytest.mark.parametrize("count", [2, 20, 60, 61, 1000])
def test_confusion(figures, tmp_path, count):
    matrix = np.eye(count, dtype=np.int64) * 3
    matrix[0, 1] = 1
    matrix[count - 1] = 0
    names = [f"name {index}" for index in range(count - 1)]  # the last has none
    plot_confusion(matrix, names, tmp_path / "c.png")
    figure = figures[0]
    axis = figure.axes[0]
    shares = np.ma.filled(axis.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shares[0, :2], [0.75, 0.25])
    assert np.isnan(shares[count - 1]).all()
    right = 3 * (count - 1)
    assert axis.get_title() == f"{right / (right + 1):.1%} of {right + 1:,} images right"
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert (labels == [*names, f"class {count - 1}"]) == (count <= 60)
    assert texts(axis) == (["3", "1", *["3"] * (count - 2)] if count <= 20 else [])
    listed = figure._supxlabel.get_text() if figure._supxlabel else ""
    assert listed == ("1 of 4 images of name 0 taken for name 1" if count > 60 else "")
    extent = axis.get_window_extent()
    assert min(extent.width, extent.height) * plotting.DPI / figure.dpi >= count


def test_neighbours(figures, tmp_path):
    queries, neighbours = images_of((2,)), images_of((2, 3))
    distances = np.array([[0.5, 1, 12345], [2, 3, 4]])
    names = [["a", "b", "c"], ["d", ODD_NAME, "x" * 30]]
    plot_neighbours(queries, neighbours, distances, ["p", "q"], names, tmp_path / "n.png")
    shown = ["d", DRAWN_NAME, "x" * 12 + "…" + "x" * 11]
    assert titles(figures[0]) == ["p", *names[0], "q", *shown]
    below = [axis.get_xlabel() for axis in figures[0].axes]
    assert below == ["query", "0.5", "1", "1.234e+04", "query", "2", "3", "4"]
    np.testing.assert_array_equal(figures[0].axes[4].images[0].get_array(), queries[1])
    np.testing.assert_array_equal(figures[0].axes[6].images[0].get_array(), neighbours[1, 1])


def test_predictions(figures, tmp_path):
    images = images_of((10,))
    probabilities = RNG.dirichlet(np.ones(7), 10)
    best = np.argsort(-probabilities)
    names = ["a", "b", "c", "d", "e", ODD_NAME]
    labels = [int(best[0, 1]), -1, *[0] * 8]
    plot_predictions(images, labels, probabilities, names, tmp_path / "p.png")
    plot_predictions(
        images[:1], None, probabilities, names, tmp_path / "p.png", titles=["x\udcff.jpg"]
    )
    known, unknown = figures
    names[-1:] = [DRAWN_NAME, "class 6"]
    assert titles(known)[:4] == [names[best[0, 1]], "", "a", "a"]
    assert texts(known.axes[4]) == [names[label] for label in best[0, :5]]
    colors = [[bar.get_facecolor() for bar in axis.patches] for axis in known.axes[4:6]]
    assert [color == colors[0][0] for color in colors[0]] == [True, False, True, True, True]
    assert len(set(colors[1])) == 1
    assert titles(unknown) == ["x?.jpg", ""]
    assert texts(unknown.axes[1]) == texts(known.axes[4])


def test_distance(figures, tmp_path):
    a, b = images_of((2,))
    plot_distance(a, b, np.linspace(0, 0.5, 64).reshape(8, 8), tmp_path / "d.png")
    assert titles(figures[0])[:3] == ["a", "b", "distance, 0.2500 on average"]
    shown = [axis.images[0].get_array() for axis in figures[0].axes[:2]]
    np.testing.assert_array_equal(shown, [a, b])
