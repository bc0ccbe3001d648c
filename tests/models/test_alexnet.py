"""The module that walks a table of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet import AlexNet
from flax_alexnet.models.architectures import (
    ARCHITECTURES,
    Conv,
    Dropout,
    architecture,
    infer_shapes,
    register,
)
from flax_alexnet.utils.errors import UserError
from tests.models.expected import (
    COSTS,
    KEY,
    SHAPES,
    abstract_activations,
    abstract_params,
    activations,
    full_size,
    images,
    variants,
)


def small(variant, **options):
    """(model, images, parameters) of a small model, at which about half of the units live."""
    model = AlexNet(variant, num_classes=6, width=0.05, **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 64, 64, 3), np.float32)

    def he(leaf):
        scale = np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
        return scale * rng.standard_normal(leaf.shape, np.float32)

    return model, x, jax.tree.map(he, abstract_params(model, x))


@variants
def test_shapes(variant):
    size = COSTS[variant][0]
    table = architecture(variant)
    infos = infer_shapes(table.scaled(table.num_classes), size, size)
    names = [*(info.layer.name for info in infos[:-1]), "logits"]
    traced = {
        name: info.shape
        for name, info in zip(names, infos, strict=True)
        if not isinstance(info.layer, Dropout)
    }
    assert list(traced.items()) == list(SHAPES[variant].items())  # in this order

    actual = abstract_activations(full_size(variant), images(variant))
    assert {name: x.shape[1:] for name, x in actual.items()} == SHAPES[variant]


@pytest.mark.parametrize(
    ("variant", "kernels"),
    [
        ("notebook", {"conv2": (5, 5, 96, 256), "conv4": (3, 3, 384, 384), "fc6": (43264, 4096)}),
        ("torchvision", {"conv2": (5, 5, 64, 192), "conv4": (3, 3, 384, 256), "fc6": (9216, 4096)}),
        *(
            (
                variant,
                {
                    "conv1": (11, 11, 3, 96),
                    "conv2": (5, 5, 48, 256),
                    "conv3": (3, 3, 256, 384),
                    "conv4": (3, 3, 192, 384),
                    "conv5": (3, 3, 192, 256),
                    "fc6": (9216, 4096),
                },
            )
            for variant in ("paper", "caffe", "caffenet")
        ),
    ],
)
def test_kernel_shapes(variant, kernels):
    params = abstract_params(full_size(variant), images(variant))
    assert {name: params[name]["kernel"].shape for name in kernels} == kernels


@variants
@pytest.mark.parametrize("width", [0.5, 0.01])
def test_width_scales_all_but_the_last_layer(variant, width):
    table = architecture(variant)
    for full, scaled in zip(table.layers, table.scaled(7, width), strict=True):
        if features := getattr(full, "features", None):
            # The nearest whole number for each tower, and never a tower without features.
            nearest = max(table.groups, features * width)
            assert abs(scaled.features - nearest) <= table.groups / 2
            assert scaled.features % table.groups == 0
    assert table.scaled(7, width)[-1].features == 7

    size = COSTS[variant][0]
    infos = infer_shapes(table.scaled(7, width), size, size)
    params = abstract_params(AlexNet(variant, num_classes=7, width=width), images(variant))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(info.parameters for info in infos)


# variant: (standard deviation of each kernel where it is not 0.01, biases that are not 0)
INITIAL = {
    "notebook": ({}, {"conv2": 1, "conv4": 1, "conv5": 1}),
    "paper": ({}, {"conv2": 1, "conv4": 1, "conv5": 1, "fc6": 1, "fc7": 1}),
    "caffe": (
        {"fc6": 0.005, "fc7": 0.005},
        {"conv2": 0.1, "conv4": 0.1, "conv5": 0.1, "fc6": 0.1, "fc7": 0.1},
    ),
    "caffenet": (
        {"fc6": 0.005, "fc7": 0.005},
        {"conv2": 1, "conv4": 1, "conv5": 1, "fc6": 1, "fc7": 1},
    ),
    "original": (
        {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03},
        {"conv2": 1, "conv4": 1, "conv5": 1, "fc6": 1, "fc7": 1},
    ),
    "cuda_convnet_80sec": ({"conv1": 1e-4, "fc64": 0.1, "fc10": 0.1}, {}),
    "cuda_convnet_19pct": ({"conv1": 1e-4}, {}),
    "cuda_convnet_13pct": ({"conv1": 1e-4, "local3": 0.04, "local4": 0.04}, {}),
}


def initial_values(variant, **options):
    model = AlexNet(variant, num_classes=100, width=0.25, **options)
    return jax.jit(model.init)(KEY, jnp.zeros((1, 96, 96, 3)))["params"]


def assert_distributed(kernel, std):
    """Mean and standard deviation lie within five of their own standard errors."""
    kernel = np.asarray(kernel, np.float64)
    assert abs(kernel.mean()) <= 5 * std / kernel.size**0.5
    assert abs(kernel.std() / std - 1) <= 5 / (2 * kernel.size) ** 0.5


@pytest.mark.parametrize(
    "variant",  # Caffe's two differ from the paper's in a few numbers
    [
        pytest.param(v, marks=pytest.mark.slow) if v.startswith(("caffe", "original")) else v
        for v in INITIAL
    ],
)
def test_published_initial_values(variant):
    stds, biases = INITIAL[variant]
    for name, layer in initial_values(variant).items():
        assert_distributed(layer["kernel"], stds.get(name, 0.01))
        assert abs(layer["kernel"]).max() > 3 * stds.get(name, 0.01)  # normal, not truncated
        np.testing.assert_array_equal(layer["bias"], np.float32(biases.get(name, 0)))


def test_pytorch_initial_values():
    """PyTorch's default for convolutions and dense layers: uniform in ±1/sqrt(fan in)."""
    for layer in initial_values("torchvision").values():
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        assert_distributed(layer["kernel"], bound / 3**0.5)
        for values in layer.values():
            assert abs(values).max() <= bound
            assert values.min() < -0.75 * bound
            assert values.max() > 0.75 * bound


@pytest.mark.parametrize(
    "variant",
    ["paper", "cuda_convnet_13pct", pytest.param("torchvision", marks=pytest.mark.slow)],
)
def test_he_initial_values(variant):
    for layer in initial_values(variant, initialization="he").values():
        # The last axes; a locally connected layer has a kernel for each of its places before them.
        fan_in = np.prod(layer["kernel"].shape[-4:-1])
        assert_distributed(layer["kernel"], (2 / fan_in) ** 0.5)
        np.testing.assert_array_equal(layer["bias"], 0)


# The largest square that does not fit, by hand: for `paper` 63 gives conv1 (63 + 3 - 11) // 4 + 1
# = 14 pixels, and pools of 3/2 leave 6, 2 and none.
@pytest.mark.parametrize(
    ("variant", "size", "layer"),
    [
        ("notebook", 28, "conv3"),
        ("paper", 63, "pool5"),
        ("paper", 7, "conv1"),
        ("caffe", 10, "conv1"),
        ("torchvision", 62, "pool5"),
    ],
)
def test_image_too_small_names_the_layer(variant, size, layer):
    x = jax.ShapeDtypeStruct((1, size, 224, 3), jnp.float32)
    with pytest.raises(UserError, match=rf"{size}×224.*{layer} is left") as error:
        abstract_params(AlexNet(variant), x)
    assert "\n" not in str(error.value)
    abstract_params(AlexNet(variant), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


@pytest.mark.parametrize(
    "variant", [pytest.param("caffe", marks=pytest.mark.slow), "cuda_convnet_19pct"]
)
def test_no_images_have_no_logits_and_no_gradient(variant):
    model, size = AlexNet(variant, num_classes=7, width=1 / 16), architecture(variant).image_size
    params = model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]

    def logits(params):
        y = model.apply({"params": params}, jnp.zeros((0, size, size, 3)))
        return y.sum(), y

    gradient, y = jax.jit(jax.grad(logits, has_aux=True))(params)
    assert y.shape == (0, 7)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_images_need_four_axes():
    with pytest.raises(ValueError, match="batch, height, width, channels"):
        abstract_params(AlexNet(), jax.ShapeDtypeStruct((224, 224, 3), jnp.float32))


@variants
def test_bfloat16_computes_with_float32_parameters(variant):
    model = full_size(variant, dtype=jnp.bfloat16)
    params = abstract_params(model, images(variant))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    actual = abstract_activations(model, images(variant))
    assert {x.dtype for x in actual.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("variant", "dropped"),
    [
        *((variant, {"fc7", "logits"}) for variant in ("notebook", "paper", "caffe", "caffenet")),
        ("torchvision", {"fc6", "fc7", "logits"}),  # its dropout stands before fc6 and fc7
        ("cuda_convnet_19pct", set()),
    ],
)
def test_dropout_only_in_training(variant, dropped):
    model, x, params = small(variant)
    evaluation = activations(model, params, x)  # needs no key
    first, again, other = (
        activations(model, params, x, train=True, dropout_key=key)
        for key in (KEY, KEY, jax.random.fold_in(KEY, 1))
    )
    changed = {name for name in first if not np.array_equal(first[name], evaluation[name])}
    assert changed == dropped
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert np.array_equal(first["logits"], other["logits"]) == (not dropped)


def test_dropout_rate_of_zero_keeps_everything():
    model, x, params = small("paper", dropout_rate=0.0)
    training = activations(model, params, x, train=True, dropout_key=KEY)["logits"]
    np.testing.assert_array_equal(training, activations(model, params, x)["logits"])


def test_relu_logits():
    model, x, params = small("notebook")
    linear = activations(model, params, x)["logits"]
    assert linear.min() < 0 < linear.max()
    faulty = activations(model.clone(relu_logits=True), params, x)["logits"]
    np.testing.assert_array_equal(faulty, jnp.maximum(linear, 0))


def test_activation_function():
    model, x, params = small("cuda_convnet_19pct", activation=jnp.tanh)
    conv1 = activations(model, params, x)["conv1"]
    assert conv1.min() < 0
    assert abs(conv1).max() <= 1


def test_towers_meet_only_in_conv3():
    """A change in one half of conv1 reaches only that half of `paper` until conv3 reads both."""
    model, x, params = small("paper")
    bias = params["conv1"]["bias"].copy()
    bias[: bias.size // 2] += 1
    before = activations(model, params, x)
    after = activations(model, {**params, "conv1": {**params["conv1"], "bias": bias}}, x)
    reached = {name: jnp.split(before[name] != after[name], 2, axis=-1) for name in before}
    for name in ("norm1", "pool1", "conv2", "norm2", "pool2"):
        assert [half.any() for half in reached[name]] == [True, False]
    assert all(half.any() for half in reached["conv3"])


def test_groups():
    assert {name: table.groups for name, table in ARCHITECTURES.items()} == {
        "notebook": 1,
        "paper": 2,
        "original": 2,
        "caffe": 2,
        "caffenet": 2,
        "torchvision": 1,
        **{f"cuda_convnet_{name}": 1 for name in ("80sec", "19pct", "18pct", "13pct", "11pct")},
    }
    grouped = {
        layer.name
        for layer in architecture("paper").layers
        if isinstance(layer, Conv) and layer.groups == 2
    }
    assert grouped == {"conv2", "conv4", "conv5"}


def test_the_original_model_normalizes_linear_maps_and_pools_before_relu():
    """#145: of both signs up to pool1, which has what ReLU leaves of it; conv5 is pooled so too."""
    model, x, params = small("original")
    values = activations(model, params, x)
    for name in ("conv1", "norm1", "conv5"):
        assert values[name].min() < 0 < values[name].max()
    for name in ("pool1", "conv2", "pool5"):
        assert values[name].min() == 0


def test_locally_connected_layers_share_nothing_between_places():
    """A change of the kernel and bias of one place changes that place alone."""
    model, x, params = small("cuda_convnet_13pct")
    before = activations(model, params, x)["local3"]
    kernel, bias = (np.array(params["local3"][name]) for name in ("kernel", "bias"))
    kernel[2, 3], bias[2, 3] = 0, 1
    changed = {**params, "local3": {"kernel": kernel, "bias": bias}}
    after = activations(model, changed, x)["local3"]
    different = (before != after).any((0, 3))
    assert np.argwhere(different).tolist() == [[2, 3]]
    np.testing.assert_array_equal(after[:, 2, 3], 1)


def test_a_variant_of_ones_own_has_a_name():
    table = dataclasses.replace(architecture("cuda_convnet_19pct"), name="mine")
    with pytest.raises(UserError, match="unknown variant 'mine'"):
        architecture("mine")
    register(table)
    register(table)  # the same once more
    assert architecture("mine") == table
    assert abstract_activations(full_size("mine"), images("cuda_convnet_19pct"))["logits"].shape
    with pytest.raises(UserError, match="there is a variant mine already"):
        register(dataclasses.replace(table, image_size=40))
    with pytest.raises(UserError, match="there is a variant paper already"):
        register(dataclasses.replace(table, name="paper"))
    assert "mine" not in ARCHITECTURES
