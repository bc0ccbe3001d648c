"""Exported programs in other systems: ONNX Runtime and TensorFlow."""

import functools
import sys

import jax
import pytest

from flax_alexnet.commands import export
from flax_alexnet.models.architectures import ARCHITECTURES, activation_names, architecture
from flax_alexnet.utils.errors import UserError
from tests.parity.comparison import TOLERANCE, relative_error
from tests.small_models import random_pictures, small_net

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
tf = pytest.importorskip("tensorflow")

from flax_alexnet.inference import onnx as onnx_graph  # noqa: E402 (it imports onnx)


def run(model, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(net, images):
    return net.model.apply({"params": net.params}, net.preprocess(images))


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_onnx_has_every_activation(variant):
    net = small_net(variant)
    images = random_pictures(net, 2)
    activations = jax.jit(
        lambda x: net.model.apply(
            {"params": net.params}, net.preprocess(x), mutable=["intermediates"]
        )[1]["intermediates"]
    )(images)
    for layer in activation_names(architecture(variant).layers):
        model = onnx_graph.onnx_model(net.model, net.params, net.preprocessing, layer)
        onnx.checker.check_model(model, full_check=True)
        assert relative_error(run(model, images), activations[layer]) <= TOLERANCE, layer


@pytest.mark.parametrize("option", [{"activation": "tanh"}, {"relu_logits": True}])
def test_onnx_has_the_options_of_a_net(option):
    net = small_net("cuda_convnet_cifar10", **option)
    model = onnx_graph.onnx_model(net.model, net.params, net.preprocessing, "logits")
    images = random_pictures(net, 9)
    assert relative_error(run(model, images), logits_of(net, images)) <= TOLERANCE


def test_onnx_files(tmp_path, monkeypatch):
    net = small_net("cuda_convnet_cifar10")
    path = tmp_path / "net.onnx"
    assert "loaded back: largest difference" in export.export(net, path)
    images = random_pictures(net, 1)
    assert relative_error(run(onnx.load(path), images), logits_of(net, images)) <= TOLERANCE
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "not checked, since onnxruntime is not installed" in export.export(net, path)
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="do not fit into ONNX"):
        export.export(net, path)


def test_saved_models(tmp_path):
    net = small_net("paper")
    assert "loaded back: largest difference" in export.export(net, tmp_path / "net")
    program = tf.saved_model.load(tmp_path / "net").signatures["serving_default"]
    for count in (1, 4):
        images = random_pictures(net, count)
        theirs = program(images=tf.constant(images))["logits"].numpy()
        assert relative_error(logits_of(net, images), theirs) <= TOLERANCE
