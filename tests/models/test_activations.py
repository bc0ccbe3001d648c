import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.models.activations import features, grad_cam, map_names
from flax_alexnet.models.architectures import activation_names, architecture
from flax_alexnet.utils.errors import UserError
from tests.small_models import make_pretrained

SIZES = {"cuda_convnet_19pct": 16, "notebook": 48, "torchvision": 64}


def _pretrained(variant):
    """A small model, its parameters and two images as it sees them."""
    size = SIZES[variant]
    pretrained = make_pretrained(variant, 7, size, size)
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    return pretrained.model, pretrained.params, images


@pytest.fixture(scope="module")
def small():
    return _pretrained("cuda_convnet_19pct")


def test_features_are_the_activations_of_the_whole_model(small):
    model, params, images = small
    names = activation_names(architecture(model.variant).layers)
    _, state = model.apply({"params": params}, images, mutable=["intermediates"])
    found = features(model, params, images, names[::-1])
    assert list(found) == list(names[::-1])
    for name in names:
        np.testing.assert_array_equal(found[name], state["intermediates"][name])


def test_flax_captures_what_it_captures_of_any_module(small):
    model, params, images = small
    expected = features(model, params, images, ("conv1", "pool1", "logits"))

    def captured(which):
        options = {"capture_intermediates": which, "mutable": ["intermediates"]}
        return model.apply({"params": params}, images, **options)[1]["intermediates"]

    found = captured(True)
    before = found["conv1"]["__call__"][0]  # a layer's own output, as of any linen module
    np.testing.assert_array_equal(jax.nn.relu(before), expected["conv1"])
    np.testing.assert_array_equal(found["__call__"][0], expected["logits"])
    np.testing.assert_array_equal(found["pool1"], expected["pool1"])
    only = captured(lambda module, _: module.name == "conv1")
    np.testing.assert_array_equal(only["conv1"]["__call__"][0], before)
    assert only["conv2"].shape == found["conv2"]["__call__"][0].shape


def test_features_need_no_later_parameters(small):
    model, params, images = small
    trunk = {name: value for name, value in params.items() if name.startswith("conv")}
    found = features(model, trunk, images, ["pool3"])
    assert found.keys() == {"pool3"}
    np.testing.assert_array_equal(
        found["pool3"], features(model, params, images, ["logits", "pool3"])["pool3"]
    )


def test_features_can_be_jitted_vmapped_and_differentiated(small):
    model, params, images = small
    kernel, bias = params["conv1"]["kernel"], params["conv1"]["bias"]

    def conv1(image):
        return features(model, params, image[None], ("conv1",))["conv1"][0]

    def by_hand(image):
        found = jax.lax.conv_general_dilated(
            image[None], kernel, (1, 1), [(2, 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.maximum(found[0] + bias.reshape(1, 1, -1), 0)

    compiled = jax.jit(features, static_argnames=("model", "layers"))
    expected = jax.vmap(by_hand)(images)
    np.testing.assert_allclose(jax.vmap(conv1)(images), expected, rtol=1e-5, atol=1e-5)
    found = compiled(model, params, images, ("conv1",))["conv1"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    gradient, expected = (
        jax.grad(lambda x, f=f: (f(x) ** 2).sum())(images[0]) for f in (conv1, by_hand)
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["conv3", "convv2"], "unknown layer 'convv2': did you mean 'conv2'"),
        (["fc10"], "choose one of: conv1"),
        ([], "no layers; choose some of conv1, pool1"),
    ],
)
def test_features_say_which_layers_there_are(small, layers, message):
    with pytest.raises(UserError, match=message):
        features(*small, layers)


@pytest.mark.parametrize(
    ("variant", "maps"),
    [
        ("cuda_convnet_19pct", ("conv1", "pool1", "conv2", "pool2", "conv3", "pool3")),
        ("torchvision", ("pool2", "avgpool")),  # dropout stands before its dense layers
    ],
)
def test_a_model_goes_on_from_its_maps(variant, maps):
    model, params, images = _pretrained(variant)
    found = features(model, params, images, [*maps, "logits"])
    for name in maps:
        later = {k: v for k, v in params.items() if k.startswith("fc") or k[-1] > name[-1]}
        logits = model.apply({"params": later}, found[name], first=name)
        np.testing.assert_allclose(logits, found["logits"], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_model_computes_from_one_map_to_another(small):
    model, params, images = small
    maps = features(model, params, images, ["pool1", "pool2"])
    found = model.apply({"params": params}, maps["pool1"], first="pool1", last="pool2")
    np.testing.assert_allclose(found, maps["pool2"], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="'conv1'"):
        model.apply({"params": params}, maps["pool1"], first="pool1", last="conv1")


def test_map_names():
    assert map_names("notebook")[-3:] == ("conv3", "conv4", "conv5")
    assert map_names("torchvision")[-2:] == ("pool5", "avgpool")


def test_grad_cam_is_the_formula():
    # In the notebook's model three dense layers follow conv5, whose gradient is written out here.
    model, params, images = _pretrained("notebook")
    labels = np.array([5, 2])
    weights = {name: np.asarray(params[name]["kernel"]) for name in ("fc6", "fc7", "fc8")}
    found = features(model, params, images, ["conv5", "fc6", "fc7"])
    maps, fc6, fc7 = (np.asarray(values) for values in found.values())
    expected = []
    for row, label in enumerate(labels):
        gradient = weights["fc8"][:, label]
        gradient = weights["fc7"] @ (gradient * (fc7[row] > 0))
        gradient = weights["fc6"] @ (gradient * (fc6[row] > 0))
        alpha = gradient.reshape(maps.shape[1:]).mean((0, 1))
        expected.append(np.maximum((maps[row] * alpha).sum(-1), 0))
    compiled = jax.jit(grad_cam, static_argnames=("model", "layer"))
    result = compiled(model, params, images, labels)
    assert result.dtype == np.float32
    assert np.count_nonzero(expected), "the test would say nothing"
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


def test_grad_cam_of_an_earlier_layer(small):
    # All that follows conv3 here is linear, so a step of any size gives the derivative.
    model, params, images = small
    labels = np.array([3, 6])
    maps = features(model, params, images, ["conv3"])["conv3"]

    def scores(shift):
        logits = model.apply({"params": params}, maps + shift.reshape(1, 1, 1, -1), first="conv3")
        return np.asarray(logits)[[0, 1], labels]

    unit = np.eye(maps.shape[-1], dtype=np.float32)
    alpha = np.stack([scores(row) - scores(0 * row) for row in unit], 1) / maps[0, ..., 0].size
    expected = np.maximum(np.einsum("bhwc,bc->bhw", maps, alpha), 0)
    found = grad_cam(model, params, images, labels, "conv3")
    assert np.count_nonzero(expected), "the test would say nothing"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv9", "logits", "fc10"])
def test_grad_cam_needs_a_map(small, layer):
    with pytest.raises(UserError, match="conv3"):
        grad_cam(*small, np.array([0, 1]), layer)
