"""LPIPS: the values of example images, what a distance must do, and the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_alexnet import lpips

distance = jax.jit(lpips, static_argnames="spatial")


def opened(path):
    with Image.open(path) as image:
        return jnp.asarray(np.asarray(image.convert("RGB"))[None] / np.float32(127.5) - 1)


@pytest.mark.parametrize(("other", "expected"), [("p0", 0.72188), ("p1", 0.13757)])
def test_the_example_images(lpips_trunk, other, expected):
    """The values are those that PyTorch gives: see tests/parity/test_torch_lpips.py."""
    params, heads, images = lpips_trunk
    value = distance(params, heads, opened(images["ref"]), opened(images[other]))
    assert value.shape == (1,)
    assert round(float(value[0]), 5) == expected


def test_equal_images_have_no_distance_and_the_order_does_not_matter(lpips_trunk):
    params, heads, _ = lpips_trunk
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


def test_images_that_are_not_in_their_range_are_refused(lpips_trunk):
    params, heads, _ = lpips_trunk
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


def test_a_map_says_where(lpips_trunk):
    params, heads, _ = lpips_trunk
    a = np.zeros((1, 64, 64, 3), np.float32)
    b = a.copy()
    b[:, :24, :24] = np.random.default_rng(0).uniform(-1, 1, (24, 24, 3))
    there = np.asarray(distance(params, heads, a, b, spatial=True))
    assert there.shape == (1, 64, 64)
    # Far away only the deepest layers, which see most of the image, notice.
    assert there[0, :24, :24].mean() > 2 * there[0, 40:, 40:].mean()


def test_the_gradient_is_finite_where_all_features_are_zero_and_is_the_slope(lpips_trunk):
    params, heads, _ = lpips_trunk
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
