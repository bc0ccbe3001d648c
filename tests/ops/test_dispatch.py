"""The table of implementations: it decides for every layer, and a run says what it decides."""

import jax.numpy as jnp
import pytest

from flax_alexnet.models.alexnet import implementations
from flax_alexnet.models.architectures import ARCHITECTURES
from flax_alexnet.ops import convolution, dense, lrn, onednn, pooling
from flax_alexnet.ops.dispatch import CHOICES, Convolution, Operation, choose
from flax_alexnet.ops.linear import Direction


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "another"])
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_there_is_a_choice_for_every_layer(variant, platform):
    table = ARCHITECTURES[variant]
    said = implementations(table.scaled(table.num_classes), platform)
    assert all(layer.name in said for layer in table.layers if layer.name.startswith("conv"))


def test_each_row_names_what_exists():
    known = {operation: {"slices", "xla"} for operation in Operation}
    known[Operation.NORMALIZATION] = set(lrn._IMPLEMENTATIONS)
    known[Operation.CONVOLUTION] = set(convolution._FORMS)
    known[Operation.DENSE] = set(dense._FORMS[Direction.FORWARD])
    for row in CHOICES:
        assert row.implementation in known[row.operation], row
        assert row.measured or row.implementation == "xla", row
    assert pooling.choose is choose


def test_a_line_tells_what_runs(monkeypatch):
    layers = ARCHITECTURES["notebook"].scaled(1000)
    monkeypatch.setattr(onednn, "usable", lambda dtype: dtype == jnp.float32)
    said = implementations(layers, "cpu")
    assert "convolution forward: onednn (conv1 conv2 conv3 conv4 conv5)" in said
    gradients = "onednn (conv1), onednn_patches (conv2 conv3 conv4 conv5)"
    assert f"convolution kernel gradient: {gradients}" in said
    said = implementations(layers, "cpu", jnp.bfloat16)
    assert "convolution kernel gradient: patches (conv1 conv2 conv3 conv4 conv5)" in said
    assert "convolution forward: patches (conv3), xla (conv1 conv2 conv4 conv5)" in said
    assert "convolution input gradient: xla (conv2 conv3 conv4 conv5)" in said
    assert "normalization: shifted_sums (norm1 norm2)" in said
    assert "max-pooling forward: xla (pool1 pool2)" in said
    assert "max-pooling gradient: slices (pool1 pool2)" in said
    forward = Operation.CONVOLUTION, Direction.FORWARD
    assert choose(*forward, "cuda", Convolution(3, 96, 11, 4)) == "space_to_depth"
