"""The tables of layers: shapes, parameters and costs."""

import jax
import jax.numpy as jnp
import pytest

from flax_alexnet import AlexNet
from flax_alexnet.models.architectures import ARCHITECTURES, architecture, infer_shapes
from flax_alexnet.utils.errors import UserError
from tests.models.expected import (
    COSTS,
    SHAPES,
    abstract_activations,
    abstract_params,
    full_size,
    images,
    variants,
)


def test_every_variant_has_expectations():
    assert ARCHITECTURES.keys() == SHAPES.keys() == COSTS.keys()


@variants
def test_costs(variant):
    size, parameters, macs = COSTS[variant]
    table = architecture(variant)
    infos = infer_shapes(table.scaled(table.num_classes), table.image_size, table.image_size)
    assert table.image_size == size
    assert sum(info.parameters for info in infos) == parameters
    assert sum(info.macs for info in infos) == macs

    params = abstract_params(full_size(variant), images(variant))
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(layer)) for name, layer in params.items()
    }
    assert counts == {info.layer.name: info.parameters for info in infos if info.parameters}


def test_caffe_pools_past_the_edge():
    """At 231 pixels conv1 leaves 56 and the windows do not fit, which 227 would not show."""
    infos = infer_shapes(architecture("caffe").scaled(1000), 231, 231)
    sizes = {info.layer.name: info.shape[0] for info in infos}
    assert [sizes[name] for name in ("conv1", "pool1", "pool2", "pool5")] == [56, 28, 14, 7]


def test_trace_of_oblong_images():
    model, x = AlexNet("paper", width=0.05), jax.ShapeDtypeStruct((1, 64, 100, 3), jnp.float32)
    actual = abstract_activations(model, x)
    for info in infer_shapes(architecture("paper").scaled(1000, 0.05), 64, 100):
        if info.layer.name in actual:
            assert actual[info.layer.name].shape[1:] == info.shape


@pytest.mark.parametrize(
    ("variant", "hint"),
    [("papr", "did you mean 'paper'"), ("caffe_net", "did you mean 'caffenet'"), ("vgg", "choose")],
)
def test_unknown_variant_suggests_the_nearest(variant, hint):
    with pytest.raises(UserError, match=hint):
        abstract_params(AlexNet(variant), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
