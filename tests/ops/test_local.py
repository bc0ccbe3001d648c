"""Locally connected layers against their definition, written as loops in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.ops.local import locally_connect

# (images, kernels, padding): with and without padding, uneven sides, and a window as large as
# the image, which makes it a dense layer.
CASES = [
    ((2, 5, 4, 3), (5, 4, 3, 3, 3, 2), ((1, 1), (1, 1))),
    ((1, 6, 6, 2), (4, 5, 3, 2, 2, 4), ((0, 0), (0, 0))),
    ((3, 3, 3, 1), (2, 4, 3, 3, 1, 2), ((1, 0), (1, 2))),
    ((2, 4, 3, 2), (1, 1, 4, 3, 2, 5), ((0, 0), (0, 0))),
]
cases = pytest.mark.parametrize(("shape", "kernels", "padding"), CASES)


def expected(x, kernels, padding):
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    rows, columns, height, width, _, features = kernels.shape
    y = np.zeros((len(x), rows, columns, features))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i : i + height, j : j + width]
            y[:, i, j] = np.einsum("bmnc,mnco->bo", window, np.asarray(kernels[i, j], np.float64))
    return y


def random_arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@cases
def test_values_and_gradients(shape, kernels, padding):
    """The operator is linear in each array, so that its gradient follows from the definition."""
    x, k = random_arrays(shape, kernels)
    y, pullback = jax.vjp(functools.partial(locally_connect, padding=padding), x, k)
    np.testing.assert_allclose(y, expected(x, k, padding), rtol=1e-5, atol=1e-5)
    (weight,) = random_arrays(y.shape)
    of_x, of_k = pullback(weight)
    rng = np.random.default_rng(1)
    for gradient, which in ((of_x, 0), (of_k, 1)):
        direction = rng.standard_normal(gradient.shape)
        varied = [direction if which == 0 else x, direction if which == 1 else k]
        change = (expected(*varied, padding) * weight).sum()
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), change, rtol=1e-4)


@cases
def test_forward_mode_and_vmap(shape, kernels, padding):
    x, k = random_arrays(shape, kernels)
    operator = functools.partial(locally_connect, padding=padding)
    y, derivative = jax.jvp(operator, (x, k), (x, k))
    np.testing.assert_allclose(derivative, 2 * y, rtol=1e-5)
    several = jax.vmap(operator, (0, None))(np.stack([x, 2 * x]), k)
    np.testing.assert_allclose(several, np.stack([y, 2 * y]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    shape, kernels, padding = CASES[0]
    x, k = (jnp.asarray(array, dtype) for array in random_arrays(shape, kernels))
    y = locally_connect(x, k, padding)
    assert y.dtype == dtype
    exact = expected(np.asarray(x, np.float32), np.asarray(k, np.float32), padding)
    assert abs(np.asarray(y, np.float64) - exact).max() <= 0.02 * abs(exact).max()


def test_images_on_eight_devices():
    shape, kernels, padding = CASES[0]
    x, k = random_arrays((8, *shape[1:]), kernels)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    compiled = jax.jit(functools.partial(locally_connect, padding=padding))
    text = compiled.lower(jax.device_put(x, split), k).compile().as_text()
    assert "all-" not in text  # no image leaves its device
    y = compiled(jax.device_put(x, split), k)
    np.testing.assert_allclose(y, expected(x, k, padding), rtol=1e-5, atol=1e-5)


def test_it_is_flaxs_layer():
    """Flax has the values of a window in the order (channel, row, column), in one axis."""
    (x,) = random_arrays((2, 5, 4, 3))
    layer = nn.ConvLocal(2, (3, 3), padding=((1, 1), (1, 1)))
    params = layer.init(jax.random.key(0), x)["params"]
    bias = np.random.default_rng(1).standard_normal(params["bias"].shape, np.float32)
    theirs = layer.apply({"params": {**params, "bias": bias}}, x)
    kernels = params["kernel"].reshape(5, 4, 3, 3, 3, 2).transpose(0, 1, 3, 4, 2, 5)
    ours = locally_connect(x, kernels, ((1, 1), (1, 1))) + bias[None]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 5, 4, 2)])
def test_kernels_for_another_size_are_refused(shape):
    x, k = random_arrays(shape, CASES[0][1])
    with pytest.raises(ValueError, match=r"kernels \(5, 4, 3, 3, 3, 2\) do not fit"):
        locally_connect(x, k, ((1, 1), (1, 1)))
