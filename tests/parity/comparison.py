"""What the parity tests share: one random problem for both systems, and one measure of error.

The gradient of a model with ReLU and max-pooling jumps where a unit is zero or two pixels of a
window tie. Among a million units a few come so close to it that two systems, which add the same
numbers in another order, round to different sides; a single one moves a kernel's gradient by some
percent, though both are right. Gradients are therefore compared on images for which both systems
decide alike everywhere, and the activations, which do not jump, on every image.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet import AlexNet
from flax_alexnet.models.architectures import Pool, architecture

TOLERANCE = 1e-5  # in float32, relative to the largest value
ATTEMPTS = 20

Arrays = dict[str, np.ndarray]


def relative_error(ours, theirs) -> float:
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_same(ours: Arrays, theirs: Arrays) -> None:
    """Every entry of two flat dictionaries agrees; the message lists all errors by name."""
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert all(error <= TOLERANCE for error in errors.values()), errors


def assert_parity(model: AlexNet, image_size: int, reference: Callable) -> None:
    """`reference(params, images, labels)` gives the activations and gradients that `model` gives.

    Both are flat dictionaries in Flax's layouts: {"conv1": array, …}, {"conv1/kernel": array, …}.
    """
    params = random_parameters(model, image_size)
    for seed in range(ATTEMPTS):
        rng = np.random.default_rng(seed)
        # Grey levels, at which LRN with the published alpha divides by far more than its bias.
        images = rng.uniform(-128, 128, (2, image_size, image_size, 3)).astype(np.float32)
        labels = rng.integers(0, model.num_classes, 2)
        activations, gradients = _activations_and_gradients(model, params, images, labels)
        their_activations, their_gradients = reference(params, images, labels)
        assert_same(activations, their_activations)
        if _decisions(model, activations) == _decisions(model, their_activations):
            assert_same(gradients, their_gradients)
            return
    raise AssertionError(f"{ATTEMPTS} times, a unit or window was decided differently")


def random_parameters(model: AlexNet, image_size: int) -> dict[str, Arrays]:
    """Values at which half of the units live, the biases matter, and the logits are small.

    A softmax of large logits would amplify rounding, and one that is saturated has no gradient.
    """
    rng = np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = {}
    for name, layer in shapes.items():
        kernel = rng.standard_normal(layer["kernel"].shape, np.float32)
        # He et al. (2015); a locally connected layer has a kernel for each of its places.
        kernel *= np.float32((2 / np.prod(kernel.shape[-4:-1])) ** 0.5)
        bias = rng.standard_normal(layer["bias"].shape, np.float32)
        params[name] = {"kernel": kernel, "bias": bias}
    params[architecture(model.variant).layers[-1].name]["kernel"] *= np.float32(0.01)
    return params


@functools.partial(jax.jit, static_argnums=0)
def _activations_and_gradients(model: AlexNet, params, images, labels) -> tuple[Arrays, Arrays]:
    def loss(params):
        logits, state = model.apply({"params": params}, images, mutable=["intermediates"])
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(log_p[jnp.arange(len(labels)), labels]), state["intermediates"]

    gradients, activations = jax.grad(loss, has_aux=True)(params)
    return activations, {
        f"{layer}/{name}": value
        for layer, values in gradients.items()
        for name, value in values.items()
    }


def _decisions(model: AlexNet, activations: Arrays) -> list[bytes]:
    """The units that ReLU passes, and the winning pixel of every window of max-pooling."""
    result = [np.asarray(value) > 0 for _, value in sorted(activations.items())]
    for before, layer in itertools.pairwise(architecture(model.variant).layers):
        if isinstance(layer, Pool) and layer.kind == "MAX":
            x = np.asarray(activations[before.name])
            windows = np.lib.stride_tricks.sliding_window_view(x, (layer.kernel_size,) * 2, (1, 2))
            windows = windows[:, :: layer.stride, :: layer.stride]
            result.append(windows.reshape(*windows.shape[:-2], -1).argmax(-1))
    return [decision.tobytes() for decision in result]
