"""A table of the implementation that each operator uses on each platform, with measurements.

An operator has one signature and several implementations. With `implementation=None` the first row
of `CHOICES` that fits decides. All code that depends on the platform calls this module.

Times are in milliseconds, of the row's implementation against XLA's own unless the row says
otherwise; on a CPU (two cores of an AMD EPYC with AVX-512, for dense layers and pooling of an Intel
Xeon; jax 0.10.2) in float32 for 64 images. docs/performance.md describes the other experiments.
"""

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops import onednn
from flax_alexnet.ops.linear import Direction

PLATFORMS = ("cpu", "cuda")  # platforms that have their own rows in the table

FORWARD, GRADIENT = Direction.FORWARD, Direction.GRADIENT
INPUT_GRADIENT, KERNEL_GRADIENT = Direction.INPUT_GRADIENT, Direction.KERNEL_GRADIENT


class Operation(enum.StrEnum):
    """What a layer computes."""

    CONVOLUTION = "convolution"
    DENSE = "dense"
    NORMALIZATION = "normalization"
    MAX_POOLING = "max-pooling"
    AVERAGE_POOLING = "average-pooling"


class Convolution(NamedTuple):
    """The facts that decide about a convolution; with groups, the facts of one group."""

    channels: int
    features: int
    kernel_size: int
    stride: int
    dtype: Any = jnp.float32


class Product(NamedTuple):
    """The facts that decide about the product of a dense layer."""

    rows: int
    dtype: Any = jnp.float32


class Pooling(NamedTuple):
    """The facts that decide about pooling."""

    kernel_size: int
    stride: int
    dtype: Any = jnp.float32


Facts = Convolution | Product | Pooling


class Choice(NamedTuple):
    """A row of the table."""

    operation: Operation
    directions: tuple[Direction, ...]  # empty: all
    platform: str  # JAX's name of it, "cpu with oneDNN", or "any"
    implementation: str
    measured: str = ""
    shapes: str = "all"  # the shapes that `fits` accepts, in words
    fits: Callable[[Any], bool] = lambda _: True


CHOICES = (
    Choice(
        Operation.CONVOLUTION,
        (FORWARD,),
        "cpu with oneDNN",
        "onednn",
        "notebook's conv1 63 against 131, conv2 221 against 331, conv3 62 against 186, conv4 115 "
        "against 136, conv5 54 against 82",
    ),
    Choice(
        Operation.CONVOLUTION,
        (KERNEL_GRADIENT,),
        "cpu with oneDNN",
        "onednn",
        "notebook's conv1 105 to 140 against 331, torchvision's 80 against 241",
        shapes="up to 32 channels, 3 × 3 up to 96",
        fits=lambda c: c.channels <= (96 if c.kernel_size == 3 else 32),
    ),
    Choice(
        Operation.CONVOLUTION,
        (KERNEL_GRADIENT,),
        "cpu with oneDNN",
        "onednn_patches",
        "notebook's conv2 306, as patches by XLA's product 519; conv3 86 and 115, conv4 120 and "
        "164, conv5 88 and 135",
        shapes="more",
    ),
    Choice(
        Operation.CONVOLUTION,
        (INPUT_GRADIENT,),
        "cpu with oneDNN",
        "onednn",
        "notebook's conv2 215 against 313, conv3 131 against 155, conv4 82 against 127, conv5 62 "
        "against 109",
    ),
    Choice(
        Operation.CONVOLUTION,
        (FORWARD,),
        "cpu",
        "patches",
        "notebook's conv3 126 against 159; its conv4 181 against 164, conv2 412 against 362",
        shapes="3 × 3, stride 2",
        fits=lambda c: (c.kernel_size, c.stride) == (3, 2),
    ),
    Choice(
        Operation.CONVOLUTION,
        (KERNEL_GRADIENT,),
        "cpu",
        "patches",
        "notebook's conv1 199 against 535, conv2 458 against 737, conv3 136 against 210, conv4 183 "
        "against 229; torchvision's conv1 218 against 187",
        shapes="all but fewer than 96 features of 3 channels at stride 4",
        fits=lambda c: c.stride < 4 or c.features >= 96,
    ),
    Choice(
        Operation.CONVOLUTION,
        (INPUT_GRADIENT,),
        "cpu",
        "patches",
        "torchvision's conv2 219 against 317, a tower of the paper's conv2 137 against 143; "
        "notebook's conv2 493 against 349, conv4 152 against 162",
        shapes="5 × 5, stride 1",
        fits=lambda c: (c.kernel_size, c.stride) == (5, 1),
    ),
    Choice(
        Operation.CONVOLUTION,
        (FORWARD, KERNEL_GRADIENT),
        "cuda",
        "space_to_depth",
        "on one H200, bfloat16, 1024 images: notebook's conv1 forward 0.96 against 7.67, "
        "kernel gradient 1.12 against 3.58",
        shapes="up to 4 channels at stride 4",
        fits=lambda c: c.channels <= 4 and c.stride == 4,
    ),
    Choice(
        Operation.DENSE,
        (FORWARD,),
        "cpu with oneDNN",
        "onednn",
        "notebook's fc6 for 16 images 60 against 109, 64: 105 against 125; but two: 41 against 33",
        shapes="16 rows and more",
        fits=lambda c: c.rows >= 16,
    ),
    Choice(
        Operation.DENSE,
        (INPUT_GRADIENT,),
        "cpu with oneDNN",
        "onednn",
        "notebook's fc6 102 against 136, fc7 11 against 17",
        shapes="16 rows and more",
        fits=lambda c: c.rows >= 16,
    ),
    Choice(Operation.DENSE, (KERNEL_GRADIENT,), "any", "xla", "notebook's fc6 122, by oneDNN 117"),
    Choice(Operation.DENSE, (), "any", "xla"),
    Choice(Operation.CONVOLUTION, (), "any", "xla"),
    Choice(
        Operation.NORMALIZATION,
        (),
        "cuda",
        "pallas",
        "on one H200 forward and backward 2.0 to 3.4 times as fast as shifted_sums",
    ),
    Choice(
        Operation.NORMALIZATION,
        (),
        "any",
        "shifted_sums",
        "notebook's norm1 11 forward and 43 backward; as `reduce_window` 64 and 90",
    ),
    Choice(
        Operation.MAX_POOLING,
        (FORWARD,),
        "cpu",
        "slices",
        "torchvision's pool1 1.4 against 10.8; notebook's, of stride 1, 18 against 9",
        shapes="stride 2 and more",
        fits=lambda c: c.stride > 1,
    ),
    Choice(Operation.MAX_POOLING, (FORWARD,), "any", "xla"),
    Choice(
        Operation.MAX_POOLING,
        (GRADIENT,),
        "any",
        "slices",
        "2 × 2 at stride 1 on 32 × 56 × 56 × 96: 21 against 326",
    ),
    Choice(
        Operation.AVERAGE_POOLING,
        (),
        "cpu",
        "slices",
        "cuda_convnet_19pct's pool2 0.41 against 0.72, its gradient 1.5 against 2.8; pool3 0.29 "
        "and 0.51, 0.8 and 2.0",
    ),
    Choice(Operation.AVERAGE_POOLING, (), "any", "xla"),
)


def choose(
    operation: Operation, direction: Direction, platform: str, facts: Facts | None = None
) -> str:
    """The implementation of `operation` on a platform ("cpu", "cuda", "tpu", …) for `facts`."""
    platforms = {platform, "any"}
    if platform == "cpu" and facts and onednn.usable(facts.dtype):
        platforms.add("cpu with oneDNN")
    return next(
        row.implementation
        for row in CHOICES
        if row.operation == operation
        and (not row.directions or direction in row.directions)
        and row.platform in platforms
        and row.fits(facts)
    )


def dispatch(
    operation: Operation,
    direction: Direction,
    facts: Facts | None,
    forms: Mapping[str, Callable[..., jax.Array]],
    *arrays: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """Applies one of `forms` to `arrays`: `implementation`, or the platform's form in the table.

    The platform is the one for which the program is compiled; an exported program has several.

    Args:
      operation: selects the row of the table.
      direction: selects the row of the table.
      facts: select the row of the table.
      forms: functions of `arrays` by the names of their implementations.
      arrays: the inputs of the operator.
      implementation: the name of the form to use instead of the table's; None: the table's.
    """
    if implementation is not None:
        return forms[implementation](*arrays)
    default = choose(operation, direction, "any", facts)
    chosen = {platform: choose(operation, direction, platform, facts) for platform in PLATFORMS}
    others = {platform: forms[name] for platform, name in chosen.items() if name != default}
    return by_platform(*arrays, default=forms[default], **others)


def by_platform(
    *arrays: jax.Array, default: Callable[..., Any], **functions: Callable[..., Any]
) -> Any:
    """Applies to `arrays` the function of the platform that is compiled for: `cpu=`, …"""
    if not functions:
        return default(*arrays)
    return lax.platform_dependent(*arrays, default=default, **functions)


def current_platform() -> str:
    """The platform of this process's devices, as JAX calls it when it compiles: "cpu", "cuda" …"""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
