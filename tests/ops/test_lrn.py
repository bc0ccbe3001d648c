"""Local response normalization against its definition, written as loops in float64."""

import functools
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_alexnet import local_response_normalization
from flax_alexnet.ops.lrn import map_normalization

closed_forms = pytest.mark.parametrize("implementation", ["shifted_sums", "pallas"])
# Kernels for a GPU are interpreted here, which is slow; values and gradients are not left out.
transformed = pytest.mark.parametrize(
    "implementation",
    ["shifted_sums", pytest.param("pallas", marks=pytest.mark.slow), "reference"],
)
implementations = pytest.mark.parametrize("implementation", ["shifted_sums", "pallas", "reference"])
# (shape, radius, bias, alpha, beta, groups): every rank, windows from one channel to more than all,
# the three ways to take a power, and the published constants at the scale where they matter.
CASES = [
    ((7,), 2, 1.0, 1.0, 0.5, 1),
    ((3, 8), 0, 1.0, 0.3, 0.75, 1),
    ((3, 8), 1, 2.0, 0.3, 0.75, 2),
    ((2, 3, 9), 4, 0.5, 1.5, 1.3, 3),
    ((2, 2, 2, 16), 5, 2.0, 1e-4, 0.75, 1),
    ((2, 1, 3, 16), 2, 1.0, 2e-5, 0.75, 2),
    ((1, 2, 2, 2, 6), 30, 1.0, 0.5, 1.0, 1),
    ((1, 2, 2, 2, 6), 30, 1.0, 0.5, 0.75, 2),
    ((2, 5), 3, 1.0, 0.0, 0.75, 1),
    ((2, 5), 3, 1.0, 0.7, 0.0, 5),
]
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective", "reduce-scatter")
cases = pytest.mark.parametrize(("shape", "radius", "bias", "alpha", "beta", "groups"), CASES)


def expected(x, radius, bias, alpha, beta, groups):
    x = np.asarray(x, np.float64)
    channels = x.shape[-1]
    per_group = channels // groups
    y = np.empty_like(x)
    for i in range(channels):
        first = i // per_group * per_group
        low, high = max(first, i - radius), min(first + per_group, i + radius + 1)
        y[..., i] = x[..., i] / (bias + alpha * (x[..., low:high] ** 2).sum(-1)) ** beta
    return y


def random_input(shape, bias, alpha, seed=0):
    """float32 values whose square times alpha is about the bias, so that the sum matters."""
    scale = (bias / alpha) ** 0.5 if alpha else 1.0
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert abs(np.asarray(actual) - expected).max() <= tolerance * abs(expected).max()


def values_and_gradient(x, weight, *args, **options):
    """The values, and the gradient of their sum weighted by `weight`."""

    @jax.jit
    def compute(x, weight):
        y, pullback = jax.vjp(lambda x: local_response_normalization(x, *args, **options), x)
        return y, *pullback(weight)

    return compute(x, weight)


@implementations
@cases
def test_values_and_gradient(shape, radius, bias, alpha, beta, groups, implementation):
    """The float64 differences are right to about 1e-9; what is left is float32 rounding."""
    x = random_input(shape, bias, alpha)
    weight = random_input(shape, 1, 1, seed=1)
    y, gradient = values_and_gradient(
        x, weight, radius, bias, alpha, beta, groups=groups, implementation=implementation
    )
    assert y.dtype == gradient.dtype == x.dtype
    assert_close(y, expected(x, radius, bias, alpha, beta, groups), 1e-6)

    differences = np.empty(shape)
    for index in np.ndindex(shape):
        step = np.zeros(shape)
        step[index] = 1e-5 * abs(x).max()
        above = expected(x + step, radius, bias, alpha, beta, groups)
        below = expected(x - step, radius, bias, alpha, beta, groups)
        differences[index] = ((above - below) * weight).sum() / (2 * step[index])
    assert_close(gradient, differences, 2e-6)


@closed_forms
@pytest.mark.parametrize(("radius", "groups"), [(5, 1), (2, 2), (8, 3), (200, 1)])
def test_implementations_agree(radius, groups, implementation):
    """On more than a block of the kernel, whose last one is not full."""
    x = random_input((2, 5, 5, 96), 2.0, 1e-4)
    weight = random_input(x.shape, 1, 1, seed=1)
    ours, reference = (
        values_and_gradient(
            x, weight, radius, 2.0, 1e-4, 0.75, groups=groups, implementation=implementation
        )
        for implementation in (implementation, "reference")
    )
    for actual, desired in zip(ours, reference, strict=True):
        assert_close(actual, np.asarray(desired), 2e-6)


def test_defaults_are_tensorflows():
    x = random_input((3, 16), 1.0, 1.0)
    assert_close(local_response_normalization(x), expected(x, 5, 1.0, 1.0, 0.5, 1), 1e-6)


@implementations
@pytest.mark.parametrize("radius", [5, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_in_float32(dtype, radius, implementation):
    """Only the result is rounded; 257 squares added in bfloat16 would be some percent off."""
    x = jnp.asarray(random_input((4, 300), 1, 1), dtype)
    normalize = functools.partial(
        local_response_normalization, depth_radius=radius, beta=0.75, implementation=implementation
    )
    y, pullback = jax.jit(lambda x: jax.vjp(normalize, x))(x)
    (gradient,) = pullback(y)
    wide = np.asarray(x.astype(jnp.float32))
    _, exact_gradient = values_and_gradient(
        wide, y.astype(jnp.float32), radius, beta=0.75, implementation="reference"
    )
    exact = expected(wide, radius, 1.0, 1.0, 0.75, 1)
    for actual, desired in ((y, exact), (gradient, np.asarray(exact_gradient))):
        assert actual.dtype == dtype
        error = abs(np.asarray(actual.astype(jnp.float32)) - desired)
        assert (error <= float(jnp.finfo(dtype).eps) * abs(desired) + 1e-6).all()


@implementations
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        x = jnp.asarray(random_input((3, 16), 1, 1), jnp.float64)
        y = local_response_normalization(x, beta=0.75, implementation=implementation)
    assert y.dtype == jnp.float64
    assert_close(y, expected(x, 5, 1.0, 1.0, 0.75, 1), 1e-14)


@transformed
def test_under_transformations(implementation):
    x = random_input((4, 3, 3, 16), 1, 1)
    normalize = functools.partial(local_response_normalization, implementation=implementation)
    gradient = jax.grad(lambda x: (normalize(x) ** 2).sum())
    for function in (normalize, gradient):
        plain = np.asarray(function(x))
        assert_close(jax.jit(function)(x), plain, 1e-6)
        assert_close(jax.jit(jax.vmap(jax.vmap(function)))(x), plain, 1e-6)

    _, pullback = jax.vjp(normalize, x[0])
    expected = np.stack([pullback(weight)[0] for weight in x])
    assert_close(jax.vmap(pullback)(x)[0], expected, 1e-6)


@closed_forms
def test_the_gradient_can_be_differentiated(implementation):
    """Along x, against the reference, which JAX differentiates twice."""

    def along_itself(implementation):
        normalize = functools.partial(local_response_normalization, implementation=implementation)
        gradient = jax.grad(lambda x: (normalize(x) ** 2).sum())
        return jax.grad(lambda x: (gradient(x) * x).sum())

    x = random_input((3, 16), 1, 1)
    assert_close(along_itself(implementation)(x), np.asarray(along_itself("reference")(x)), 1e-5)


@transformed
def test_sharded_batch_needs_no_communication(implementation):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    x = random_input((16, 3, 3, 32), 1, 1)
    normalize = functools.partial(
        local_response_normalization, groups=2, implementation=implementation
    )
    for function in (normalize, jax.grad(lambda x: normalize(x).sum())):
        sharded = jax.device_put(x, sharding)
        compiled = jax.jit(function).lower(sharded).compile()
        for collective in COLLECTIVES:
            assert collective not in compiled.as_text()
        y = compiled(sharded)
        assert y.sharding.is_equivalent_to(sharding, y.ndim)
        assert_close(y, np.asarray(function(x)), 1e-6)


@closed_forms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_stores_only_its_input(dtype, implementation):
    """The squares, sums and powers of the largest maps would cost more memory than the rest."""
    x = jnp.asarray(random_input((2, 4, 4, 16), 1, 1), dtype)
    normalize = functools.partial(local_response_normalization, implementation=implementation)
    _, pullback = jax.vjp(normalize, x)
    (stored,) = jax.tree.leaves(pullback)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored.reshape(x.shape), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"implementation": "cumsum"},
            "unknown implementation 'cumsum'.*pallas.*reference.*shifted_sums",
        ),
        ({"groups": 5}, "16 channels cannot be split into 5"),
        ({"groups": 0}, "16 channels cannot be split into 0"),
        ({"depth_radius": -1}, "depth_radius=-1"),
        ({"bias": 0.0}, "bias=0.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"beta": -0.5}, "beta=-0.5"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        local_response_normalization(jnp.ones((2, 16)), **options)


def test_refuses_integers_and_scalars():
    with pytest.raises(TypeError, match="floating point, not int32"):
        local_response_normalization(jnp.ones((2, 16), jnp.int32))
    with pytest.raises(ValueError, match="channel axis"):
        local_response_normalization(jnp.float32(1))


def test_the_kernel_is_for_programs_on_a_gpu(monkeypatch):
    """Where there is one, others are computed as ever, to the bit."""
    x = jnp.asarray(random_input((4, 3, 3, 16), 1, 1))

    def normalize(x):  # traced again each time
        return jax.value_and_grad(lambda x: (local_response_normalization(x) ** 2).sum())(x)

    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: normalize(x))(x))
    without = jax.jit(lambda x: normalize(x))(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "pallas_call" in str(jax.make_jaxpr(lambda x: normalize(x))(x))
    for ours, theirs in zip(jax.jit(lambda x: normalize(x))(x), without, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(lambda x: normalize(x)), platforms=("cpu", "cuda", "tpu"))
    assert exported(shape).serialize()

    monkeypatch.setitem(sys.modules, "flax_alexnet.ops.lrn_pallas", None)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: normalize(x))(x))
    with pytest.raises(ImportError, match="lrn_pallas"):
        local_response_normalization(x, implementation="pallas")


# Normalization within a map: (shape, size, bias, alpha, beta). The window is smaller than the map,
# as large as it, and larger; beta takes the three ways of a power.
MAP_CASES = [
    ((2, 5, 6, 3), 3, 1.0, 0.3, 0.75),
    ((1, 4, 3, 2), 5, 2.0, 1e-3 / 25, 0.75),
    ((2, 3, 3, 1), 9, 1.0, 0.2, 0.5),
    ((1, 3, 4, 2), 1, 0.5, 1.5, 1.3),
    ((1, 3, 4, 2), 3, 1.0, 0.0, 0.75),
]
map_cases = pytest.mark.parametrize(("shape", "size", "bias", "alpha", "beta"), MAP_CASES)


def expected_in_maps(x, size, bias, alpha, beta):
    x = np.asarray(x, np.float64)
    radius, y = size // 2, np.empty_like(x)
    for i, j in np.ndindex(x.shape[1:3]):
        rows = slice(max(0, i - radius), i + radius + 1)
        columns = slice(max(0, j - radius), j + radius + 1)
        total = (x[:, rows, columns] ** 2).sum((1, 2))
        y[:, i, j] = x[:, i, j] / (bias + alpha * total) ** beta
    return y


@map_cases
def test_values_and_gradient_in_maps(shape, size, bias, alpha, beta):
    x, weight = random_input(shape, bias, alpha), random_input(shape, 1, 1, seed=1)
    y, pullback = jax.vjp(lambda x: map_normalization(x, size, bias, alpha, beta), x)
    assert_close(y, expected_in_maps(x, size, bias, alpha, beta), 1e-6)
    differences = np.empty(shape)
    for index in np.ndindex(shape):
        step = np.zeros(shape)
        step[index] = 1e-5 * abs(x).max()
        above = expected_in_maps(x + step, size, bias, alpha, beta)
        below = expected_in_maps(x - step, size, bias, alpha, beta)
        differences[index] = ((above - below) * weight).sum() / (2 * step[index])
    assert_close(pullback(weight)[0], differences, 2e-6)


@map_cases
def test_forward_mode_in_maps(shape, size, bias, alpha, beta):
    x, dx = random_input(shape, bias, alpha), random_input(shape, 1, 1, seed=1)
    weight = random_input(shape, 1, 1, seed=2)

    def normalize(x):
        return map_normalization(x, size, bias, alpha, beta)

    derivative = jax.jvp(normalize, (x,), (dx,))[1]
    (gradient,) = jax.vjp(normalize, x)[1](weight)
    assert_close((derivative * weight).sum(), np.float64((gradient * dx).sum()), 1e-4)


def test_maps_under_vmap_and_on_eight_devices():
    x = random_input((8, 4, 5, 3), 1.0, 0.3)
    y = map_normalization(x, 3, 1.0, 0.3)
    several = jax.vmap(lambda x: map_normalization(x, 3, 1.0, 0.3))(np.stack([x, x]))
    np.testing.assert_allclose(several[1], y, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def gradient(x):
        return jax.grad(lambda x: map_normalization(x, 3, 1.0, 0.3).sum())(x)

    text = jax.jit(gradient).lower(split).compile().as_text()
    assert not any(name in text for name in COLLECTIVES)
    np.testing.assert_allclose(jax.jit(gradient)(split), gradient(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_in_maps_sums_in_float32(dtype):
    x = jnp.full((1, 9, 9, 1), 100.0, dtype)  # the sum of 81 squares is not finite in float16
    y = map_normalization(x, 9, 1.0, 1.0, 0.5)
    assert y.dtype == dtype
    assert_close(y.astype(jnp.float32)[0, 4, 4, 0], np.float32(1 / 9), 1e-2)


@pytest.mark.parametrize("options", [{"size": 4}, {"size": 0}, {"bias": 0.0}, {"alpha": -1.0}])
def test_options_of_maps_out_of_range(options):
    with pytest.raises(ValueError, match="expected an odd size, bias > 0"):
        map_normalization(jnp.ones((1, 3, 3, 1)), **{"size": 3, **options})


def test_other_arrays_than_maps_of_floats():
    with pytest.raises(TypeError, match="floating point, not int32"):
        map_normalization(jnp.ones((1, 3, 3, 1), jnp.int32), 3)
    with pytest.raises(ValueError, match="batch, height, width, channels"):
        map_normalization(jnp.ones((3, 3, 1)), 3)
