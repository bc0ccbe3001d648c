"""Every form of the convolution agrees with XLA's own, values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_alexnet.ops import onednn
from flax_alexnet.ops.convolution import convolve

LAYOUT = ("NHWC", "HWIO", "NHWC")
FORMS = [None, "xla", "patches", "space_to_depth"]
if onednn.usable(jnp.float32):  # elsewhere a call might end the process
    FORMS += ["onednn", "onednn_patches"]
forms = pytest.mark.parametrize("implementation", FORMS)


def theirs(x, kernel, stride, padding, groups=1):
    return lax.conv_general_dilated(
        *(x, kernel, (stride, stride), padding),
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
    )


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_same(actual, expected, tolerance=1e-6):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual, expected = (a.astype(jnp.float32) for a in (actual, expected))
    difference = jnp.abs(actual - expected).max(initial=0)
    assert difference <= tolerance * jnp.abs(expected).max(initial=0)


@forms
@pytest.mark.parametrize(
    ("channels", "groups"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 1), (6, 2)]
)
@pytest.mark.parametrize("padding", [((2, 2), (2, 2)), ((0, 0), (1, 3))])
@pytest.mark.parametrize("stride", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_it_is_a_convolution(channels, groups, padding, stride, implementation):
    x, kernel = arrays((3, 9, 14, channels), (5, 3, channels // groups, 6))
    ours = functools.partial(
        convolve, stride=stride, padding=padding, groups=groups, implementation=implementation
    )
    y, transpose = jax.vjp(ours, x, kernel)
    expected, expected_transpose = jax.vjp(
        lambda x, kernel: theirs(x, kernel, stride, padding, groups), x, kernel
    )
    assert_same(y, expected)
    (g,) = arrays(y.shape)
    for a, b in zip(transpose(g), expected_transpose(g), strict=True):
        assert_same(a, b)


@forms
@pytest.mark.parametrize("batch", [0, 2, 6, 8])
def test_batches_are_added_up_whatever_parts_they_are_taken_in(batch, implementation):
    """8 in four parts, 6 in two; and no image leaves no gradient.

    XLA's sums are taken in 64 bits here: in 32 it rounds as well, and two roundings may add up.
    """
    padding = ((1, 1), (1, 1))
    x, kernel = arrays((batch, 7, 9, 40), (3, 3, 40, 8))
    ours = functools.partial(convolve, stride=1, padding=padding, implementation=implementation)
    y, transpose = jax.vjp(ours, x, kernel)
    (g,) = arrays(y.shape)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in (x, kernel, g)]
        exact, exact_transpose = jax.vjp(lambda x, k: theirs(x, k, 1, padding), *wide[:2])
        expected = [a.astype(jnp.float32) for a in (exact, *exact_transpose(wide[2]))]
    for a, b in zip((y, *transpose(g)), expected, strict=True):
        assert_same(a, b)


@forms
def test_outside_of_programs_it_is_compiled_once(implementation):
    x, kernel = arrays((8, 7, 9, 40), (3, 3, 40, 8))
    compiled = []

    def gradients():
        def loss(x, kernel):
            return convolve(x, kernel, 1, ((1, 1), (1, 1)), implementation=implementation).sum()

        jax.grad(loss, (0, 1))(x, kernel)

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    gradients()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        gradients()
        assert not compiled
        jax.jit(lambda x: x + len(compiled))(x)  # what is listened to is there
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@forms
def test_half_precision_and_vmap(implementation):
    padding = ((2, 2), (2, 2))
    x, kernel = arrays((4, 2, 11, 11, 3), (5, 5, 3, 8), dtype=jnp.bfloat16)
    ours = functools.partial(convolve, stride=2, padding=padding, implementation=implementation)
    expected = jnp.stack([theirs(part, kernel, 2, padding) for part in x])
    # One rounding to bfloat16 of sums that are taken in another order.
    assert_same(jax.vmap(ours, (0, None))(x, kernel), expected, 2.0**-7)
    gradient = jax.grad(lambda kernel: jax.vmap(ours, (0, None))(x, kernel).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16


def test_nobody_computes_the_gradient_of_the_images():
    """Of the six products of two layers, a training step needs five."""
    x, first, second = arrays((2, 16, 16, 3), (3, 3, 3, 4), (3, 3, 4, 4))
    pads = ((1, 1), (1, 1))

    def loss(kernels):
        y = convolve(x, kernels[0], 1, pads, implementation="xla")
        return convolve(y, kernels[1], 1, pads, implementation="xla").sum()

    program = jax.jit(jax.grad(loss)).lower((first, second)).compile().as_text()
    # The loss is not asked for either, so that the last layer's result is left out too.
    assert len(re.findall(r" convolution\(", program)) == 4
