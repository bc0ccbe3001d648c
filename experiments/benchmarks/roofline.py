"""Each layer on the machine's roofline: operations a second over operations a byte.

Each operator of a variant is timed alone, forward, and forward with both gradients, on random
arrays of the shapes that it has in the model. Its operations are two a multiply-accumulate (for a
norm or a pool, one for each value of a window); its bytes are those of its input, parameters and
output, each read or written once. The roof is what a large matrix product and a large copy reach in
the same process. A layer far under the roof leaves room; one at it does not (Williams et al. 2009).

    python experiments/benchmarks/roofline.py

With nothing else running it takes a minute on two cores; no data is needed.
"""

import csv
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from flax_alexnet.models.architectures import (
    Conv,
    Dense,
    Layer,
    Norm,
    Pool,
    architecture,
    explicit_padding,
    infer_shapes,
)
from flax_alexnet.ops.convolution import convolve
from flax_alexnet.ops.dense import multiply
from flax_alexnet.ops.lrn import local_response_normalization
from flax_alexnet.ops.pooling import max_pool
from flax_alexnet.utils.host_memory import keep_for_reuse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times each layer alone."""

    output: Path = Path("results")
    """Where roofline_DEVICE.csv and .png go."""
    variant: str = "notebook"
    """The model."""
    batch: int = 64
    """Images at once."""
    dtype: str = "float32"
    """Of all arrays."""
    rounds: int = 5
    """How often each is timed."""
    quick: bool = False
    """Two images: shows that it works."""


class Point(NamedTuple):
    """A layer in one direction."""

    layer: str
    direction: str
    operations: float
    moved_bytes: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Times all layers, writes and draws them; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    if arguments.quick:
        arguments = dataclasses.replace(arguments, batch=2, rounds=1)
    keep_for_reuse()
    dtype, batch = jnp.dtype(arguments.dtype), arguments.batch
    timed = functools.partial(seconds, rounds=arguments.rounds)
    side = 512 if arguments.quick else 4096 if jax.default_backend() == "cpu" else 8192
    a = random((side, side), dtype)
    peak = 2 * side**3 / timed(lambda a: a @ a, a)
    large = random((2**24 if arguments.quick else 2**27,), dtype)
    bandwidth = 2 * large.nbytes / timed(lambda x: x + 1, large)
    del a, large

    table = architecture(arguments.variant)
    points = []
    shape: tuple[int, ...] = (table.image_size, table.image_size, 3)
    for info in infer_shapes(table.scaled(table.num_classes), *shape[:2]):
        layer, before, shape = info.layer, shape, info.shape
        found = operator(layer, before)
        if not found:
            continue
        function, parameters = found
        arrays = [random((batch, *before), dtype), *(random(p, dtype) for p in parameters)]
        per_image = 2 * info.macs or window(layer) * int(np.prod(shape))
        size = arrays[0].nbytes + batch * int(np.prod(shape)) * dtype.itemsize
        size += sum(array.nbytes for array in arrays[1:])
        directions: dict[str, tuple[float, Callable[..., Any]]] = {
            "forward": (1, function),
            "both": (3 if parameters else 2, both_ways(function)),
        }
        for direction, (times, run) in directions.items():
            took = timed(run, *arrays)
            points.append(
                Point(layer.name, direction, times * batch * per_image, times * size, took)
            )
            rate = points[-1].operations / took
            print(f"{layer.name:8}{direction:8} {1e3 * took:8.1f} ms {rate / 1e9:9.1f} GFLOP/s")
    save(points, peak, bandwidth, arguments)
    return 0


def random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def seconds(function: Callable[..., Any], *arrays: jax.Array, rounds: int) -> float:
    """The median of some calls after the first."""
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def both_ways(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The result, and the gradients of all arguments."""

    def run(*arrays: jax.Array) -> Any:
        y, pullback = jax.vjp(function, *arrays)
        return y, pullback(y)

    return run


def window(layer: Layer) -> int:
    """Values that one of a norm's or a pool's results is made of."""
    if isinstance(layer, Norm):
        return 2 * layer.depth_radius + 1
    return layer.kernel_size**2 if isinstance(layer, Pool) else 1


def operator(
    layer: Layer, before: tuple[int, ...]
) -> tuple[Callable[..., jax.Array], list[tuple[int, ...]]] | None:
    """What a layer computes of images, and the shapes of what it computes it with."""
    match layer:
        case Conv():
            convolution = functools.partial(
                convolve, stride=layer.stride, padding=pads(layer, before), groups=layer.groups
            )
            kernel = (
                layer.kernel_size,
                layer.kernel_size,
                before[-1] // layer.groups,
                layer.features,
            )
            return convolution, [kernel]
        case Norm():
            settings = layer.depth_radius, layer.bias, layer.alpha, layer.beta
            return lambda x: local_response_normalization(x, *settings, groups=layer.groups), []
        case Pool(kind="MAX"):
            return lambda x: max_pool(x, layer.kernel_size, layer.stride, pads(layer, before)), []
        case Dense():
            size = int(np.prod(before))
            shape = (size, layer.features or 0)
            return lambda x, kernel: multiply(x.reshape(len(x), size), kernel), [shape]
    return None


def pads(layer: Conv | Pool, shape: tuple[int, ...]) -> Any:
    """Pixels ((top, bottom), (left, right)) that a layer adds."""
    return tuple(
        explicit_padding(size, layer.kernel_size, layer.stride, layer.padding) for size in shape[:2]
    )


def save(points: Sequence[Point], peak: float, bandwidth: float, arguments: Arguments) -> None:
    """Writes the table, with the roof in its last two rows, and the plot."""
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    name = f"roofline_{'quick' if arguments.quick else device}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows([*points, Point("matrix product", "roof", peak, 0, 1)])
        writer.writerow(Point("copy", "roof", 0, bandwidth, 1))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    intensity = np.geomspace(0.1, 1e4, 100)
    axis.plot(intensity, np.minimum(peak, intensity * bandwidth) / 1e9, "k-", label="roof")
    for direction, marker in (("forward", "o"), ("both", "^")):
        of_direction = [point for point in points if point.direction == direction]
        x = [point.operations / point.moved_bytes for point in of_direction]
        y = [point.operations / point.seconds / 1e9 for point in of_direction]
        label = "forward" if direction == "forward" else "forward and gradients"
        axis.plot(x, y, marker, alpha=0.8, label=label)
        if direction == "forward":
            for point, across, up in zip(of_direction, x, y, strict=True):
                axis.annotate(
                    point.layer, (across, up), (3, -9), textcoords="offset points", size=7
                )
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axis.set_title(f"{arguments.variant}, {arguments.batch} images, {arguments.dtype}, {device}")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(arguments.output / f"{name}.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
