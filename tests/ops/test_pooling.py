"""Pooling against plain loops in NumPy, in float64, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.models.architectures import explicit_padding
from flax_alexnet.ops.pooling import adaptive_average_pool, average_pool, max_pool


def expected_windows(reduce, x, window, stride, padding):
    """`reduce` over the part of each window that lies inside the image."""
    (top, bottom), (left, right) = padding
    height, width = x.shape[1:3]
    rows = [
        np.stack(
            [
                reduce(
                    x[:, max(i, 0) : min(i + window, height), max(j, 0) : min(j + window, width)],
                    axis=(1, 2),
                )
                for j in range(-left, width + right - window + 1, stride)
            ],
            axis=1,
        )
        for i in range(-top, height + bottom - window + 1, stride)
    ]
    return np.stack(rows, axis=1)


def expected_adaptive(x, size):
    height, width = x.shape[1:3]

    def cell(i, n):
        return slice(int(np.floor(i * n / size)), int(np.ceil((i + 1) * n / size)))

    return np.stack(
        [
            np.stack(
                [x[:, cell(i, height), cell(j, width)].mean(axis=(1, 2)) for j in range(size)], 1
            )
            for i in range(size)
        ],
        1,
    )


def distinct_values(*shape):
    """All negative and 0.1 apart: padding that counted as zero would win, and no two tie."""
    size = np.prod(shape)
    return -0.1 * (1 + np.random.default_rng(0).permutation(size).reshape(shape))


def assert_same_values_and_gradients(actual, expected, x):
    weight = np.random.default_rng(1).standard_normal(expected(x).shape)

    @jax.jit
    def values_and_gradient(x, weight):
        y, pullback = jax.vjp(actual, x)
        return y, *pullback(weight)

    y, actual_gradient = values_and_gradient(np.float32(x), np.float32(weight))
    np.testing.assert_allclose(y, expected(x), rtol=1e-6)

    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):  # exact, since both kinds of pooling are piecewise linear
        step = np.zeros_like(x)
        step[index] = 0.01
        gradient[index] = ((expected(x + step) - expected(x - step)) * weight).sum() / 0.02
    np.testing.assert_allclose(actual_gradient, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "reduce"), [(max_pool, np.max), (average_pool, np.mean)], ids=["max", "average"]
)
@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [
        (2, 1, "VALID"),
        (3, 2, "VALID"),
        (3, 2, "SAME"),
        (3, 2, "CEIL"),
        (3, 2, (1, 1)),
        (2, 3, "VALID"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 7, 7, 2), (1, 6, 8, 3)])
def test_windows(pool, reduce, window, stride, padding, shape):
    padding = tuple(explicit_padding(size, window, stride, padding) for size in shape[1:3])
    assert_same_values_and_gradients(
        functools.partial(pool, window=window, stride=stride, padding=padding),
        lambda x: expected_windows(reduce, x, window, stride, padding),
        distinct_values(*shape),
    )


@pytest.mark.parametrize(
    ("pool", "reduce"), [(max_pool, np.max), (average_pool, np.mean)], ids=["max", "average"]
)
@pytest.mark.parametrize("implementation", ["slices", "xla"])
def test_implementations(pool, reduce, implementation):
    padding = ((1, 0), (0, 2))
    assert_same_values_and_gradients(
        functools.partial(pool, window=3, stride=2, padding=padding, implementation=implementation),
        lambda x: expected_windows(reduce, x, 3, 2, padding),
        distinct_values(2, 8, 7, 3),
    )


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("shape", [(2, 6, 6, 2), (1, 7, 13, 2), (1, 2, 1, 3)])
def test_adaptive(size, shape):
    assert_same_values_and_gradients(
        functools.partial(adaptive_average_pool, size=size),
        lambda x: expected_adaptive(x, size),
        distinct_values(*shape),
    )


def test_ceil_pads_only_the_far_edge():
    assert [explicit_padding(n, 3, 2, "CEIL") for n in (31, 32)] == [(0, 0), (0, 1)]


def test_a_tie_sends_its_gradient_to_one_pixel():
    """Shared among or copied to the tied pixels, the gradient would depend on how many tie."""
    gradient = jax.grad(lambda x: max_pool(x, 2, 2, ((0, 0), (0, 0))).sum())(jnp.ones((1, 4, 4, 1)))
    windows = gradient.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    np.testing.assert_array_equal(np.sort(windows), [[0, 0, 0, 1]] * 4)


@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [(2, 1, (0, 0)), (3, 1, (1, 1)), (3, 2, (0, 1)), (2, 3, (0, 0))],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_xlas_to_the_bit(window, stride, padding, dtype):
    """With many ties, and sums of up to nine numbers, which depend on their order."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 4, (2, 9, 10, 5)), dtype)
    pool = functools.partial(max_pool, window=window, stride=stride, padding=(padding, padding))
    y = pool(x)
    g = jnp.asarray(rng.standard_normal(y.shape), dtype)
    (y, pullback), (their_y, their_pullback) = (
        jax.vjp(functools.partial(pool, implementation=implementation), x)
        for implementation in ("slices", "xla")
    )
    np.testing.assert_array_equal(y, their_y)
    np.testing.assert_array_equal(pullback(g)[0], their_pullback(g)[0])


POOLS = {
    **{
        f"{kind} {implementation}": functools.partial(
            pool, window=3, stride=2, padding=((0, 1), (0, 1)), implementation=implementation
        )
        for kind, pool in (("max", max_pool), ("average", average_pool))
        for implementation in ("slices", "xla")
    },
    "adaptive": functools.partial(adaptive_average_pool, size=3),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_vmap(pool):
    x = jnp.asarray(distinct_values(3, 2, 8, 8, 2), jnp.float32)
    np.testing.assert_array_equal(jax.vmap(pool)(x), jnp.stack([pool(part) for part in x]))


@pytest.mark.parametrize("pool", [max_pool, average_pool])
@pytest.mark.parametrize("implementation", ["slices", "xla"])
def test_images_that_no_window_fits_in_have_none(pool, implementation):
    pool = functools.partial(
        pool, window=3, stride=2, padding=((0, 0), (0, 0)), implementation=implementation
    )
    x = jnp.ones((2, 2, 5, 1))
    assert pool(x).shape == (2, 0, 2, 1)
    np.testing.assert_array_equal(jax.grad(lambda x: pool(x).sum())(x), jnp.zeros_like(x))


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_bfloat16(pool):
    x = jnp.asarray(distinct_values(1, 8, 8, 2), jnp.bfloat16)
    y = pool(x)
    assert y.dtype == jnp.bfloat16
    # Within the rounding of the sum (8 additions) and of the quotient.
    np.testing.assert_allclose(y.astype(jnp.float32), pool(x.astype(jnp.float32)), rtol=9 * 2.0**-9)
