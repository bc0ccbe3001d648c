"""The `notebook` variant against the notebook's own TensorFlow graph, and LRN against TensorFlow's.

The graph is the notebook's, op for op, less two of its faults: dropout that is never switched off,
and an accuracy taken over the batch. Its ReLU on the logits is here, behind `relu_logits`.
"""

import jax
import numpy as np
import pytest

from flax_alexnet import AlexNet, local_response_normalization
from tests.parity.comparison import TOLERANCE, assert_parity, relative_error

tf = pytest.importorskip("tensorflow")


def notebook(params, images, relu_logits):
    """Every activation of the notebook's graph; its names for them are lrn1, maxpool1, dense1 …"""
    activations = {}

    def conv2d(x, name, stride, padding):
        x = tf.nn.conv2d(x, params[name]["kernel"], stride, padding)
        activations[name] = tf.nn.relu(tf.nn.bias_add(x, params[name]["bias"]))
        return activations[name]

    def lrn(x, name):
        activations[name] = tf.nn.lrn(x, depth_radius=5, bias=2, alpha=1e-4, beta=0.75)
        return activations[name]

    def max_pooling2d(x, name):
        activations[name] = tf.nn.max_pool2d(x, [2, 2], [1, 1], "VALID")
        return activations[name]

    def dense(x, name):
        return tf.nn.bias_add(tf.matmul(x, params[name]["kernel"]), params[name]["bias"])

    conv1 = conv2d(images, "conv1", 4, "SAME")
    maxpool1 = max_pooling2d(lrn(conv1, "norm1"), "pool1")
    conv2 = conv2d(maxpool1, "conv2", 2, "SAME")
    maxpool2 = max_pooling2d(lrn(conv2, "norm2"), "pool2")
    conv3 = conv2d(maxpool2, "conv3", 2, "VALID")
    conv4 = conv2d(conv3, "conv4", 1, "SAME")
    conv5 = conv2d(conv4, "conv5", 1, "SAME")
    activations["fc6"] = tf.nn.relu(dense(tf.reshape(conv5, [-1, 13 * 13 * 256]), "fc6"))
    activations["fc7"] = tf.nn.relu(dense(activations["fc6"], "fc7"))
    logits = dense(activations["fc7"], "fc8")
    activations["logits"] = tf.nn.relu(logits) if relu_logits else logits
    return activations


@pytest.mark.parametrize("relu_logits", [False, True])
def test_notebook(relu_logits):
    def reference(params, images, labels):
        params = jax.tree.map(tf.constant, params)
        with tf.GradientTape() as tape:
            tape.watch(params)
            activations = notebook(params, images, relu_logits)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, activations["logits"])
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, params)
        return (
            {name: value.numpy() for name, value in activations.items()},
            {
                f"{layer}/{name}": value.numpy()
                for layer, values in gradients.items()
                for name, value in values.items()
            },
        )

    assert_parity(AlexNet("notebook", relu_logits=relu_logits), 224, reference)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"depth_radius": 5, "bias": 2.0, "alpha": 1e-4, "beta": 0.75}, id="notebook"),
        pytest.param({"depth_radius": 2, "bias": 1.0, "alpha": 2e-5, "beta": 0.75}, id="caffe"),
        pytest.param({"depth_radius": 40, "bias": 0.5, "alpha": 0.1, "beta": 1.3}, id="wide"),
    ],
)
@pytest.mark.parametrize("scale", [1, 100])
def test_local_response_normalization(arguments, scale):
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((2, 5, 7, 32))).astype(np.float32)
    weight = rng.standard_normal(x.shape, np.float32)
    ours, pullback = jax.vjp(lambda x: local_response_normalization(x, **arguments), x)
    variable = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        theirs = tf.nn.local_response_normalization(variable, **arguments)
    assert relative_error(ours, theirs) <= TOLERANCE
    their_gradient = tape.gradient(theirs, variable, tf.constant(weight))
    assert relative_error(pullback(weight)[0], their_gradient) <= TOLERANCE
