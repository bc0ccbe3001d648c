"""The graph of a model in ONNX; tests/parity/test_exported_programs.py runs it."""

import dataclasses

import numpy as np
import pytest

from flax_alexnet.utils.errors import UserError
from tests.small_models import small_pretrained

onnx = pytest.importorskip("onnx")
from flax_alexnet.inference import onnx as ours  # noqa: E402


def test_each_layer_becomes_its_nodes():
    pretrained = small_pretrained("paper")
    graph = ours.onnx_model(
        pretrained.model, pretrained.params, pretrained.preprocessing, "pool1"
    ).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds == [
        *("Cast", "Sub", "Slice", "Mul", "Transpose"),  # the preprocessing
        *("Conv", "Relu"),
        *("Reshape", "LRN", "Reshape"),  # two towers
        *("MaxPool", "Transpose"),
    ]
    (lrn,) = (node for node in graph.node if node.op_type == "LRN")
    assert {a.name: a.i or round(a.f, 6) for a in lrn.attribute}["size"] == 5


def test_the_whole_is_valid_and_names_its_ends():
    pretrained = small_pretrained("torchvision")
    model = ours.onnx_model(pretrained.model, pretrained.params, pretrained.preprocessing, "logits")
    onnx.checker.check_model(model, full_check=True)
    size = pretrained.preprocessing.image_size
    (images,), (logits,) = model.graph.input, model.graph.output
    sides = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, sides) == ("images", ["batch", size, size, 3])
    assert logits.name == "logits"


def test_weights_beyond_what_a_file_holds_are_refused(monkeypatch):
    pretrained = small_pretrained("notebook")
    monkeypatch.setattr(ours, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="do not fit into ONNX"):
        ours.onnx_model(pretrained.model, pretrained.params, pretrained.preprocessing, "logits")


def test_a_mean_colour_and_a_mean_image_are_both_subtracted():
    pretrained = small_pretrained("notebook")
    colour = dataclasses.replace(pretrained.preprocessing, mean=np.float32([1, 2, 3]))
    for rule, sides in ((pretrained.preprocessing, 3), (colour, 1)):
        graph = ours.onnx_model(pretrained.model, pretrained.params, rule, "conv1").graph
        (subtract,) = (node for node in graph.node if node.op_type == "Sub")
        shapes = {value.name: len(value.dims) for value in graph.initializer}
        assert shapes[subtract.input[1]] == sides
