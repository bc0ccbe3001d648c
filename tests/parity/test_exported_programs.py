"""Exported programs in other systems: ONNX Runtime and TensorFlow."""

import functools
import sys

import jax
import pytest

from flax_alexnet.commands import export
from flax_alexnet.models.architectures import ARCHITECTURES, activation_names, architecture
from flax_alexnet.utils.errors import UserError
from tests.parity.comparison import TOLERANCE, relative_error
from tests.small_models import random_images, small_pretrained

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
def logits_of(pretrained, images):
    return pretrained.model.apply({"params": pretrained.params}, pretrained.preprocess(images))


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_onnx_has_every_activation(variant):
    pretrained = small_pretrained(variant)
    images = random_images(pretrained, 2)
    activations = jax.jit(
        lambda x: pretrained.model.apply(
            {"params": pretrained.params}, pretrained.preprocess(x), mutable=["intermediates"]
        )[1]["intermediates"]
    )(images)
    for layer in activation_names(architecture(variant).layers):
        model = onnx_graph.onnx_model(
            pretrained.model, pretrained.params, pretrained.preprocessing, layer
        )
        onnx.checker.check_model(model, full_check=True)
        assert relative_error(run(model, images), activations[layer]) <= TOLERANCE, layer


@pytest.mark.parametrize("option", [{"activation": "tanh"}, {"relu_logits": True}])
def test_onnx_has_the_options_of_a_model(option):
    pretrained = small_pretrained("cuda_convnet_19pct", **option)
    model = onnx_graph.onnx_model(
        pretrained.model, pretrained.params, pretrained.preprocessing, "logits"
    )
    images = random_images(pretrained, 9)
    assert relative_error(run(model, images), logits_of(pretrained, images)) <= TOLERANCE


def test_onnx_files(tmp_path, monkeypatch):
    pretrained = small_pretrained("cuda_convnet_19pct")
    path = tmp_path / "model.onnx"
    assert "loaded back: largest difference" in export.export(pretrained, path)
    images = random_images(pretrained, 1)
    assert relative_error(run(onnx.load(path), images), logits_of(pretrained, images)) <= TOLERANCE
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "not checked, since onnxruntime is not installed" in export.export(pretrained, path)
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="do not fit into ONNX"):
        export.export(pretrained, path)


def test_saved_models(tmp_path):
    pretrained = small_pretrained("paper")
    assert "loaded back: largest difference" in export.export(pretrained, tmp_path / "model")
    program = tf.saved_model.load(tmp_path / "model").signatures["serving_default"]
    for count in (1, 4):
        images = random_images(pretrained, count)
        theirs = program(images=tf.constant(images))["logits"].numpy()
        assert relative_error(logits_of(pretrained, images), theirs) <= TOLERANCE
