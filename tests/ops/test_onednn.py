"""oneDNN's operations inside of JAX: derivatives, `vmap`, the compilation cache, and where not."""

import functools
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import pytest

from flax_alexnet.ops import onednn
from flax_alexnet.ops.convolution import convolve
from flax_alexnet.ops.dispatch import Convolution, Operation, choose
from flax_alexnet.ops.linear import Direction
from tests.ops.onednn_arrays import arrays, assert_close, here


@here
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolution_and_product_are_xlas(dilation):
    x, kernel, a, b = arrays((4, 17, 20, 24), (3, 5, 24, 40), (300, 50), (50, 70))
    convolution = onednn._Convolution(2, ((1, 3), (0, 2)), dilation)
    for operation, values in (
        (convolution, (x, kernel)),
        (onednn._Product(False, False), (a, b)),
        (onednn._Product(True, False), (a.T, b)),
        (onednn._Product(False, True), (a, b.T)),
    ):
        ours = functools.partial(onednn._run, operation)
        assert operation.target in jax.jit(ours).lower(*values).as_text()
        expected = operation.by_xla(*values)
        assert_close(ours(*values), expected)  # on its own
        assert_close(jax.jit(ours)(*values), expected)


@here
@pytest.mark.parametrize("form", ["onednn", "onednn_patches"])
@pytest.mark.parametrize("argument", [0, 1], ids=["images", "kernel"])
def test_it_can_be_differentiated_twice(form, argument):
    values = arrays((4, 9, 9, 3), (3, 3, 3, 4))

    def curvature(implementation):
        def loss(*values):
            y = convolve(*values, 2, ((1, 1), (1, 1)), implementation=implementation)
            return jnp.sum(jnp.tanh(y))

        gradient = jax.grad(loss, argument)
        return jax.jit(jax.grad(lambda *v: jnp.sum(gradient(*v) ** 2), argument))(*values)

    assert_close(curvature(form), curvature("xla"))


@here
def test_other_axes_are_xlas():
    """One kernel for each image, as a gradient for each image has it."""
    x, kernels = arrays((3, 2, 9, 9, 3), (3, 3, 3, 3, 4))
    pads = ((1, 1), (1, 1))
    ours = jax.vmap(lambda x, kernel: onednn.convolution(x, kernel, 1, pads))
    expected = [onednn.convolution(*pair, 1, pads) for pair in zip(x, kernels, strict=True)]
    assert_close(jax.jit(ours)(x, kernels), jnp.stack(expected))


@here
def test_no_program_with_it_goes_to_the_compilation_cache(tmp_path):
    """What XLA does where it is to write one is undefined: JAX warns, or the process ends."""
    code = """if True:
        import jax, jax.numpy as jnp
        from flax_alexnet.ops.convolution import convolve

        def with_xla(x): return convolve(x, x, 1, ((1, 1), (1, 1)), implementation="xla")
        def with_onednn(x): return convolve(x, x, 1, ((1, 1), (1, 1)), implementation="onednn")

        for function in (with_xla, with_onednn):
            jax.jit(function)(jnp.ones((3, 3, 3, 3))).block_until_ready()
    """
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
    written = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert "jit_with_xla" in written
    assert "jit_with_onednn" not in written


@here
def test_an_exported_program_is_xlas():
    x, kernel = arrays((2, 9, 9, 3), (5, 5, 3, 4))
    layer = jax.jit(functools.partial(convolve, stride=1, padding=((2, 2), (2, 2))))
    assert "__onednn" in layer.lower(x, kernel).as_text()
    exported = jax.export.export(layer, platforms=("cpu", "cuda", "tpu"))(x, kernel)
    assert "__onednn" not in exported.mlir_module()
    loaded = jax.export.deserialize(exported.serialize())
    assert_close(loaded.call(x, kernel), layer(x, kernel))


@here
def test_where_it_is_not_used(monkeypatch):
    def chosen(dtype):
        return choose(
            Operation.CONVOLUTION, Direction.FORWARD, "cpu", Convolution(64, 192, 5, 1, dtype)
        )

    assert (chosen(jnp.float32), chosen(jnp.bfloat16)) == ("onednn", "xla")
    monkeypatch.setattr(onednn, "_passed", lambda: False)
    assert chosen(jnp.float32) == "xla"


def test_the_probe_is_made_once_for_a_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = iter([None, False, True])
    monkeypatch.setattr(onednn, "probe", lambda: next(answers))
    ask = onednn._passed.__wrapped__
    assert not ask()
    assert "could not be tested" in capsys.readouterr().err
    assert not ask()  # which is asked again, since it was no answer
    assert not ask()  # remembered
    (known,) = (tmp_path / "flax_alexnet").iterdir()
    known.write_text("{")  # damaged, as a full disk may leave it
    assert ask()
    assert ask()
    monkeypatch.setattr(onednn.jaxlib, "__version__", "9.9")
    with pytest.raises(StopIteration):  # of another version nothing is known
        ask()


def test_without_a_place_to_remember_the_probe_is_made(monkeypatch):
    monkeypatch.setattr(onednn, "cache_folder", lambda: None)
    monkeypatch.setattr(onednn, "probe", lambda: True)
    assert onednn._passed.__wrapped__()


@here
def test_a_probe_says_what_a_process_of_its_own_found(monkeypatch):
    assert onednn.probe()
    for code, expected in (
        ("import os; os.abort()", False),
        ("print(False)", False),
        ("raise MemoryError", None),
    ):
        monkeypatch.setattr(onednn, "CHECK", code)
        assert onednn.probe() is expected
    monkeypatch.setattr(onednn.sys, "executable", "/nowhere/python")
    assert onednn.probe() is None
