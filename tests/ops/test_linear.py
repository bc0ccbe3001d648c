"""Derivatives in forward mode, and of gradients, against differences in 64 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet import AlexNet, cross_entropy, local_response_normalization
from flax_alexnet.models.architectures import ARCHITECTURES
from flax_alexnet.ops import onednn
from flax_alexnet.ops.convolution import convolve
from flax_alexnet.ops.dense import multiply
from flax_alexnet.ops.pooling import average_pool, max_pool

STEP = 1e-7  # of a difference in 64 bits; so small that hardly a ReLU or a maximum changes over
PADS = ((1, 1), (2, 0))
CONVOLUTIONS = ["xla", "patches", "space_to_depth"]
if onednn.usable(jnp.float32):
    CONVOLUTIONS += ["onednn", "onednn_patches"]
OPERATORS = {
    **{
        f"convolution, {name}": (
            functools.partial(convolve, stride=2, padding=PADS, implementation=name),
            [(4, 9, 9, 4), (3, 3, 4, 6)],
        )
        for name in [None, *CONVOLUTIONS]
    },
    "convolution of two groups": (
        functools.partial(convolve, stride=1, padding=PADS, groups=2),
        [(4, 7, 7, 4), (3, 3, 2, 6)],
    ),
    "dense": (multiply, [(16, 9), (9, 5)]),
    **{
        f"normalization, {name}": (
            functools.partial(
                local_response_normalization, depth_radius=2, groups=2, implementation=name
            ),
            [(3, 4, 4, 12)],
        )
        for name in ("shifted_sums", "reference", "pallas")
    },
    **{
        f"max-pooling, {name}": (
            functools.partial(max_pool, window=3, stride=2, padding=PADS, implementation=name),
            [(2, 9, 9, 3)],
        )
        for name in ("slices", "xla")
    },
    "average-pooling": (
        functools.partial(average_pool, window=3, stride=2, padding=PADS),
        [(2, 9, 9, 3)],
    ),
}


def draw(seed, shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def derivatives(function, arrays, directions, *, all_orders=True):
    """Along `directions`: of the function and of its loss's gradient, forward and backward."""

    def loss(*arrays):
        return jnp.sum(jnp.tanh(function(*arrays)))

    gradient = jax.grad(loss, tuple(range(len(arrays))))

    def along_gradient(*arrays):
        return sum(jnp.vdot(g, d) for g, d in zip(gradient(*arrays), directions, strict=True))

    found = {
        "forward": jax.jvp(function, arrays, directions)[1],
        "backward": along_gradient(*arrays),
        "forward over backward": jax.jvp(gradient, arrays, directions)[1],
    }
    if all_orders:
        found |= {
            "linearized": jax.linearize(function, *arrays)[1](*directions),
            "backward over backward": jax.grad(along_gradient, tuple(range(len(arrays))))(*arrays),
        }
    return found


def differences(function, arrays, directions):
    """The same from values and gradients in 64 bits."""

    def loss(*arrays):
        return jnp.sum(jnp.tanh(function(*arrays)))

    @jax.jit
    def values(*arrays):
        gradient = jax.grad(loss, tuple(range(len(arrays))))(*arrays)
        return function(*arrays), loss(*arrays), gradient

    with jax.enable_x64(True):
        pairs = list(zip(arrays, directions, strict=True))
        after, before = (
            values(*(np.asarray(a, np.float64) + step * np.asarray(d) for a, d in pairs))
            for step in (STEP, -STEP)
        )
        of_value, of_loss, of_gradient = jax.tree.map(
            lambda a, b: np.asarray(a - b) / (2 * STEP), after, before
        )
    return {
        "forward": of_value,
        "linearized": of_value,
        "backward": of_loss,
        "forward over backward": of_gradient,
        "backward over backward": of_gradient,
    }


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(a, np.float64) - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_derivatives_in_both_modes(name):
    operator, shapes = OPERATORS[name]
    arrays, directions = draw(0, shapes), draw(1, shapes)
    found = jax.jit(functools.partial(derivatives, operator))(arrays, directions)
    expected = differences(operator, arrays, directions)
    for kind in found:
        assert_close(found[kind], expected[kind], 1e-4 if "back" in kind else 1e-5)


def test_forward_mode_outside_of_programs():
    arrays, directions = draw(0, [(4, 6), (6, 3)]), draw(1, [(4, 6), (6, 3)])
    found = derivatives(multiply, arrays, directions)
    expected = differences(multiply, arrays, directions)
    for kind in found:
        assert_close(found[kind], expected[kind], 1e-4)


@pytest.mark.parametrize(
    "name", ["convolution, None", "dense", "normalization, shifted_sums", "max-pooling, slices"]
)
@pytest.mark.slow
def test_an_operator_maps_over_any_of_its_arrays(name):
    """As do an ensemble, whose kernels differ, and a gradient for each image."""
    operator, shapes = OPERATORS[name]
    arrays, directions = draw(0, shapes), draw(1, shapes)
    for place, shape in enumerate(shapes):
        several = jnp.stack([*draw(2, [shape]), *draw(3, [shape])])

        def of_one(array, place=place):
            with_it = [*arrays[:place], array, *arrays[place + 1 :]]
            return derivatives(operator, with_it, directions)

        mapped = jax.jit(jax.vmap(of_one))(several)
        one_by_one = jax.jit(lambda several, f=of_one: [f(array) for array in several])(several)
        expected = jax.tree.map(lambda *rows: np.stack(rows), *one_by_one)
        assert_close(mapped, expected, 1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=() if variant == "cuda_convnet_19pct" else pytest.mark.slow)
        for variant in ARCHITECTURES
    ],
)
def test_a_model_has_derivatives_in_both_modes(variant):
    size = 18 if variant == "cuda_convnet_19pct" else 67
    pretrained = AlexNet(variant=variant, num_classes=3, width=0.05, initialization="he")
    (images,) = draw(0, [(2, size, size, 3)])
    leaves, tree = jax.tree.flatten(jax.jit(pretrained.init)(jax.random.key(0), images)["params"])
    directions = draw(1, [leaf.shape for leaf in leaves])

    def logits(*leaves):
        # Computed in the type of the parameters, which is 64 bits where differences are taken.
        wide = pretrained.clone(dtype=leaves[0].dtype)
        return wide.apply({"params": jax.tree.unflatten(tree, leaves)}, images)

    found = jax.jit(functools.partial(derivatives, logits, all_orders=False))(leaves, directions)
    expected = differences(logits, leaves, directions)
    for kind in found:
        assert_close(found[kind], expected[kind], 1e-3 if "back" in kind else 1e-4)


@pytest.mark.parametrize(
    ("variant", "with_gradient"),
    [
        ("cuda_convnet_19pct", False),
        pytest.param("cuda_convnet_19pct", True, marks=pytest.mark.slow),
        pytest.param("notebook", True, marks=pytest.mark.slow),
    ],
)
def test_a_model_can_be_stepped_through(variant, with_gradient):
    """`jax.disable_jit`, as a debugger wants it, through every operator and its gradient."""
    size = 18 if variant == "cuda_convnet_19pct" else 51
    pretrained = AlexNet(variant=variant, num_classes=3, width=0.05)
    (images,) = draw(0, [(2, size, size, 3)])
    params = jax.jit(pretrained.init)(jax.random.key(0), images)["params"]

    def loss(params):
        return cross_entropy(pretrained.apply({"params": params}, images), jnp.array([0, 2])).mean()

    function = jax.value_and_grad(loss) if with_gradient else loss
    expected = jax.jit(function)(params)
    with jax.disable_jit():
        found = function(params)
    assert_close(found, jax.tree.map(np.asarray, expected), 1e-5)
