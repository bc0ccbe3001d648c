"""Primitives outside of compiled programs."""

import jax
import jax.numpy as jnp

from flax_alexnet.ops.primitives import compiled


def test_a_function_is_compiled_once_for_each_value_of_a_parameter():
    traced = []

    def scaled(x, *, factor):
        traced.append(factor)
        return x * factor

    run = compiled(scaled, "factor")
    for factor in (2.0, 2.0, 3.0, 3.0):
        assert run(jnp.ones(3), factor=factor).tolist() == [factor] * 3
    assert traced == [2.0, 3.0]


def test_it_stays_one_operation_where_jit_is_off():
    traced = []

    def negative(x):
        traced.append(x)
        return -x

    with jax.disable_jit():
        assert compiled(negative)(jnp.ones(())) == -1
    (x,) = traced
    assert isinstance(x, jax.core.Tracer)
