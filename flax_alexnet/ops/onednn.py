"""oneDNN's convolution and matrix product, which jaxlib has and XLA does not use by itself.

On an x86-64 CPU a convolution takes half the time of XLA's own, or less. XLA has operations for
them, of which nobody promises that they stay as they are, and which end the process where they are
called wrongly: so they are used only with versions of jaxlib that they were tested with, and
elsewhere `choices` takes other forms. What they are called with stands in XLA's
`xla/service/cpu/onednn_config.proto` and `onednn_contraction_rewriter.cc`.
"""

import dataclasses
import functools
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

TESTED = ("0.10.2",)  # versions of jaxlib
Pads = tuple[tuple[int, int], tuple[int, int]]


def usable(dtype: Any) -> bool:
    """Whether it is there, was tested, and computes in `dtype`."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and jaxlib.__version__ in TESTED and dtype == jnp.float32


def convolution(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Pads, dilation: int = 1
) -> jax.Array:
    """Cross-correlation of NHWC images with HWIO kernels on a CPU.

    Args:
      x: float32[b, h, w, c].
      kernel: float32[kh, kw, c, features].
      stride: along both axes.
      padding: pixels of zeros ((top, bottom), (left, right)), none of them negative.
      dilation: pixels from one number of the kernel to the next.

    Returns:
      float32[b, h', w', features].
    """
    return _run(_Convolution(stride, padding, dilation), x, kernel)


def product(
    a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False
) -> jax.Array:
    """The matrix product on a CPU: float32[n, i] and float32[i, o] to float32[n, o].

    With `transpose_a` the first is float32[i, n], with `transpose_b` the second float32[o, i].
    """
    return _run(_Product(transpose_a, transpose_b), a, b)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    stride: int
    padding: Pads
    dilation: int

    target: ClassVar[str] = "__onednn$convolution"

    def config(self) -> dict[str, Any]:
        images = {"data": {"batch_dim": 0, "spatial_dims": [1, 2], "feature_dim": 3}}
        kernel = {"spatial_dims": [0, 1], "input_feature_dim": 2, "output_feature_dim": 3}
        (top, bottom), (left, right) = self.padding
        window = {
            "pad_left": [top, left],
            "pad_right": [bottom, right],
            "strides": [self.stride] * 2,
            "window_dilations": [self.dilation] * 2,
        }
        config = {
            "dims": 4,
            "input": images,
            "kernel": {"filter": kernel},
            "output": images,
            "window": window,
            "feature_groups": 1,
        }
        return {"onednn_conv_config": config}

    def by_xla(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            *(x, kernel, (self.stride, self.stride), self.padding),
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


@dataclasses.dataclass(frozen=True)
class _Product:
    transpose_a: bool
    transpose_b: bool

    target: ClassVar[str] = "__onednn$matmul"

    def config(self) -> dict[str, Any]:
        return {"onednn_matmul_config": dataclasses.asdict(self)}

    def by_xla(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return (a.T if self.transpose_a else a) @ (b.T if self.transpose_b else b)


# To JAX both are one primitive, of which XLA's own operations tell the rest: its derivatives, of
# any order, and what it is under `vmap`.
_primitive = Primitive("onednn")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(operation: Any, *arrays: jax.Array) -> jax.Array:
    return _primitive.bind(*arrays, operation=operation)


@_run.defjvp
def _derivative(
    operation: Any, arrays: Sequence[jax.Array], tangents: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _run(operation, *arrays), jax.jvp(operation.by_xla, arrays, tangents)[1]


def _abstract(*arrays: Any, operation: Any) -> Any:
    return arrays[0].update(shape=jax.eval_shape(operation.by_xla, *arrays).shape)


def _batched(arrays: Sequence[Any], axes: Sequence[Any], *, operation: Any) -> tuple[Any, int]:
    return jax.vmap(operation.by_xla, axes)(*arrays), 0


@functools.partial(jax.jit, static_argnames="operation")
def _compiled(*arrays: jax.Array, operation: Any) -> jax.Array:
    return _primitive.bind(*arrays, operation=operation)


def _outside_of_programs(*arrays: jax.Array, operation: Any) -> jax.Array:
    with jax.disable_jit(False):  # it is one operation, as JAX's own are under `disable_jit`
        return _compiled(*arrays, operation=operation)


def _lowered_by_xla(context: Any, *arrays: Any, operation: Any) -> Any:
    return mlir.lower_fun(operation.by_xla, multiple_results=False)(context, *arrays)


def _lowered(context: Any, *arrays: Any, operation: Any) -> Any:
    exported = context.module_context.lowering_parameters.for_export  # to who knows which XLA
    # Given nothing, such as a batch of no images, or 64 bits, oneDNN ends the process or writes
    # nothing.
    refused = any(0 in a.shape or a.dtype == jnp.float64 for a in context.avals_in)
    if exported or refused:
        return _lowered_by_xla(context, *arrays, operation=operation)
    # XLA cannot write a program with these operations to a file, as JAX's compilation cache does,
    # and what it tries then is undefined. Programs with Python callbacks are kept out of the cache.
    context.module_context.add_host_callback(_never_called)
    config = json.dumps(operation.config())
    lower = jax.ffi.ffi_lowering(operation.target, api_version=1, backend_config=config)
    return lower(context, *arrays)


def _never_called() -> None: ...


_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(_outside_of_programs)
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _lowered_by_xla)
mlir.register_lowering(_primitive, _lowered, platform="cpu")
