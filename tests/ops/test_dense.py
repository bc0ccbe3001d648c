"""The product of a dense layer in each form."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from flax_alexnet.ops import dense
from flax_alexnet.ops.linear import Direction
from tests.ops.onednn_arrays import arrays, assert_close, here


@here
@pytest.mark.parametrize("form", ["xla", "onednn"])
def test_a_dense_layer_in_each_form_is_a_product_with_its_gradients(form):
    x, kernel, g = arrays((20, 50), (50, 70), (20, 70))
    y, pullback = jax.vjp(jnp.matmul, x, kernel)
    dx, dkernel = pullback(g)
    forms = {direction: by_name[form] for direction, by_name in dense._FORMS.items()}
    assert_close(forms[Direction.FORWARD](x, kernel), y)
    assert_close(forms[Direction.INPUT_GRADIENT](g, kernel), dx)
    assert_close(forms[Direction.KERNEL_GRADIENT](x, g), dkernel)
    chosen, chosen_pullback = jax.vjp(dense.multiply, x, kernel)
    for actual, expected in zip((chosen, *chosen_pullback(g)), (y, dx, dkernel), strict=True):
        assert_close(actual, expected)
