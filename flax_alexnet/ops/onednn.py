"""oneDNN's convolution and matrix product, which jaxlib has and XLA does not use by itself.

On an x86-64 CPU such a convolution takes half the time of XLA's own, or less. XLA's operations for
oneDNN are not a stable interface, and a wrong call ends the process. Therefore another process
tries them first (`probe`), and if that fails, `dispatch` chooses other forms. Their arguments are
defined in XLA's `xla/service/cpu/onednn_config.proto` and `onednn_contraction_rewriter.cc`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from flax_alexnet.ops.primitives import Pads, compiled
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.inputs import read_json
from flax_alexnet.utils.outputs import replacing
from flax_alexnet.utils.user_folders import cache_folder

TARGETS = "__onednn$"  # the prefix of the operations' names
CHECK = "from flax_alexnet.ops import onednn; print(onednn.check())"  # what a probe runs
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
PROBE_SECONDS = 300  # after which a probe has failed; it takes three on two cores


def usable(dtype: Any) -> bool:
    """Whether oneDNN is available, has passed the probe, and computes in `dtype`."""
    return dtype == jnp.float32 and _passed()


@functools.cache
def _passed() -> bool:
    """Whether the operations passed the probe, with this JAX on this machine.

    The answer is remembered in the user's cache folder, where there is one.
    """
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    if not (here and _KEPT_OUT and sys.executable):
        return False
    folder = cache_folder()
    known = folder / f"onednn-{_circumstances()}.json" if folder else None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        if known:
            return bool(read_json(known)["passed"])
    passed = probe()
    if passed is None:
        print(
            "oneDNN could not be tested in a separate process; XLA is used instead", file=sys.stderr
        )
    elif known:
        # If the file cannot be written, or another process is writing it, the next start probes.
        with contextlib.suppress(OSError, UserError), replacing(known) as partial:
            partial.write_text(json.dumps({"passed": passed}) + "\n")
    return bool(passed)


def _circumstances() -> str:
    """A digest of all that the answer depends on, since several machines may share a home."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = sorted({line for line in lines if line.startswith(("model name", "flags"))})
        facts = [jax.__version__, jaxlib.__version__, Path(__file__).read_text(), *kind]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return "unknown"


def probe() -> bool | None:
    """Whether oneDNN's operations give XLA's results, tried in a separate process that may crash.

    The process also checks that a program with them stays out of the compilation cache. The result
    is None if it could not start or ended without an answer, for example without enough memory.
    """
    place = str(Path(__file__).parents[2])  # where this package is, however it was found
    code = f"import sys; sys.path.insert(0, {place!r}); {CHECK}"
    command = [sys.executable, "-W", "error:Error writing persistent", "-c", code]
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command,
                env=own
                | {
                    "JAX_PLATFORMS": "cpu",
                    "JAX_COMPILATION_CACHE_DIR": folder,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                },
                timeout=PROBE_SECONDS,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if -done.returncode in CRASHES:
        return False
    return {"True": True, "False": False}.get(done.stdout.strip().rpartition("\n")[2])


def check() -> bool:
    """The test that the process of `probe` runs."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (4, 17, 20, 24), (3, 5, 24, 40), (64, 50), (50, 70)
    x, kernel, a, b = (jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True))
    try:
        for operation, arrays in (
            (_Convolution(2, ((1, 3), (0, 2)), 1), (x, kernel)),
            (_Convolution(1, ((1, 1), (2, 2)), 2), (x, kernel)),
            (_Product(False, False), (a, b)),
            (_Product(True, False), (a.T, b)),
            (_Product(False, True), (a, b.T)),
        ):
            expected = jax.jit(operation.by_xla)(*arrays)
            actual = _primitive.bind(*arrays, operation=operation)
            if not jnp.abs(actual - expected).max() <= 1e-5 * jnp.abs(expected).max():
                return False
    except (jax.errors.JaxRuntimeError, Warning):  # no such operation, or the cache wrote it
        return False
    written = os.listdir(os.environ["JAX_COMPILATION_CACHE_DIR"])
    return bool(written) and not any(name.startswith("jit__onednn") for name in written)


def _keep_out_of_the_cache() -> bool:
    """Keeps only programs with oneDNN out of JAX's compilation cache; returns whether it can.

    XLA cannot serialize such a program, and its behaviour is undefined when JAX's cache tries to.
    JAX has no public way to exclude a program.
    """
    try:
        from jax._src import compilation_cache

        put = compilation_cache.put_executable_and_time
    except (ImportError, AttributeError):  # a JAX that keeps its cache elsewhere
        return False

    @functools.wraps(put)
    def put_others(*args: Any, **kwargs: Any) -> None:
        programs = [value for value in (*args, *kwargs.values()) if hasattr(value, "hlo_modules")]
        modules = [module for program in programs for module in program.hlo_modules()]
        if not any(TARGETS in module.to_string() for module in modules):
            put(*args, **kwargs)

    compilation_cache.put_executable_and_time = put_others
    return True


def convolution(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Pads, dilation: int = 1
) -> jax.Array:
    """Cross-correlation of NHWC images with HWIO kernels on a CPU.

    Args:
      x: float32[b, h, w, c].
      kernel: float32[kh, kw, c, features].
      stride: along both axes.
      padding: pixels of zeros ((top, bottom), (left, right)), none of them negative.
      dilation: distance in pixels between neighbouring numbers of the kernel.

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


# For JAX, both operations are one primitive. XLA's own operations define its derivatives, of any
# order, and its behaviour under `vmap`.
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


def _onednn(*arrays: jax.Array, operation: Any) -> jax.Array:
    return _primitive.bind(*arrays, operation=operation)


def _lowered_by_xla(context: Any, *arrays: Any, operation: Any) -> Any:
    return mlir.lower_fun(operation.by_xla, multiple_results=False)(context, *arrays)


def _lowered(context: Any, *arrays: Any, operation: Any) -> Any:
    exported = context.module_context.lowering_parameters.for_export  # may run with another XLA
    # For empty arrays, such as a batch of no images, or for 64-bit numbers, oneDNN ends the process
    # or writes no result.
    refused = any(0 in a.shape or a.dtype == jnp.float64 for a in context.avals_in)
    if exported or refused:
        return _lowered_by_xla(context, *arrays, operation=operation)
    config = json.dumps(operation.config())
    lower = jax.ffi.ffi_lowering(operation.target, api_version=1, backend_config=config)
    return lower(context, *arrays)


_primitive.def_abstract_eval(_abstract)
_primitive.def_impl(compiled(_onednn, "operation"))
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _lowered_by_xla)
mlir.register_lowering(_primitive, _lowered, platform="cpu")
_KEPT_OUT = _keep_out_of_the_cache()
