"""Local response normalization on NVIDIA GPUs: one kernel forward, one backward, in Pallas.

A thread computes a few vectors of 16 bytes of neighbouring channels. It loads these and the ones
beside them whole, which the caches make cheap, takes them apart into a register per channel, and
adds up windows from register to register: no shift along an axis, which Triton does not have, and
no shared memory. Device memory sees each array once; the scale is computed again for the gradient.

GB/s of forward and backward together, counted as the five arrays that they must read or write, on
one H200 (driver 580, JAX 0.11.2, 512 images), where a copy of 308 MB moves 4140 GB/s:

    shape, depth_radius, groups          pallas  shifted_sums  reference
    56 × 56 × 96,  5, 1  bfloat16          3290           960        660
                         float32           3860          1270       1390
    28 × 28 × 256, 5, 1  bfloat16          3130           960        660
                         float32           3820          1270       1390
    55 × 55 × 96,  2, 2  bfloat16          3350          1450
                         float32           4060          2080
    27 × 27 × 256, 2, 2  bfloat16          3170          1400
                         float32           3970          2050

Pallas's Triton backend is deprecated as of JAX 0.11; where it is gone, this cannot be imported.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from flax_alexnet.ops.dispatch import by_platform

MAX_RADIUS = 8  # a thread keeps its window in registers

VECTOR_BYTES = 16  # the widest load of a thread
THREADS = 128  # in a block


@functools.cache
def window_kernel(radius: int, bias: float, alpha: float, beta: float) -> Any:
    """The operator for windows of 2·`radius` + 1 channels; `radius` is at most `MAX_RADIUS`.

    It maps float[..., channels] to the normalized array, or the input and a gradient of the
    result to the gradient of the input. Both have the type of the input, and sums are in float32 at
    least. Leading axes may be mapped and split over devices; the channels may not be split.
    On other systems than CUDA the kernel is interpreted, slowly, for tests.
    """

    def local(*arrays: jax.Array) -> jax.Array:
        return _call(*arrays, radius=radius, bias=bias, alpha=alpha, beta=beta)

    def split(*arrays: jax.Array) -> jax.Array:
        # XLA knows nothing of the kernel, and would gather whole batches for it.
        def partition(mesh: Any, sources: Any, target: Any) -> Any:
            whole = NamedSharding(mesh, PartitionSpec(*target.sharding.spec[:-1]))
            return mesh, local, whole, (whole,) * len(sources)

        operator = custom_partitioning(local)
        rule = ", ".join(["... c"] * len(arrays)) + " -> ... c"
        operator.def_partition(partition, sharding_rule=rule, need_replication_factors=("c",))
        return operator(*arrays)

    operator = custom_vmap(split)

    @operator.def_vmap
    def batched(size: int, is_batched: Any, *arrays: jax.Array) -> tuple[jax.Array, bool]:
        stacked = (
            array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))
            for array, is_mapped in zip(arrays, is_batched, strict=True)
        )
        return operator(*stacked), True

    return operator


@functools.partial(jax.jit, static_argnames=("radius", "bias", "alpha", "beta"))
def _call(*arrays: jax.Array, radius: int, bias: float, alpha: float, beta: float) -> jax.Array:
    x = arrays[0]
    if not x.size:
        return x
    width = VECTOR_BYTES // x.dtype.itemsize
    channels = x.shape[-1]
    # Zeros add nothing to a sum.
    padding = ((0, 0),) * (x.ndim - 1) + ((0, -channels % width),)
    padded = [jnp.pad(array, padding) for array in arrays]
    sources = [array.reshape(-1, width) for array in padded]
    row = padded[0].shape[-1] // width
    vectors = _vectors(row, width, len(arrays))
    kernel = functools.partial(
        _kernel, radius=radius, bias=bias, alpha=alpha, beta=beta, row=row, vectors=vectors
    )
    call = functools.partial(
        pl.pallas_call,
        kernel,
        jax.ShapeDtypeStruct.like(sources[0]),
        grid=(pl.cdiv(sources[0].shape[0], THREADS * vectors),),
        compiler_params=triton.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        name="local_response_normalization",
    )
    y = by_platform(*sources, cuda=call(), default=call(interpret=True))
    return y.reshape(padded[0].shape)[..., :channels]


def _vectors(row: int, width: int, arrays: int) -> int:
    """How many of a row a thread computes: more share the work on their borders, and registers."""
    return math.gcd(row, 4 if arrays == 2 and width == 8 else 2)


def _kernel(
    *refs: Any,
    radius: int,
    bias: float,
    alpha: float,
    beta: float,
    row: int,
    vectors: int,
) -> None:
    """`refs` are of vectors, (count, width), of which `row` hold the channels of a group."""
    *sources, target = refs
    count, width = target.shape
    thread = pl.program_id(0) * THREADS + jnp.arange(THREADS, dtype=jnp.int32)
    # Threads too many repeat the work of the last one.
    index = jnp.minimum(thread * vectors, count - vectors)
    place = index % row

    def load(source: Any, reach: int) -> list[jax.Array]:
        """The channels of the thread's vectors and `reach` on each side, or zeros outside."""
        beside = -(-reach // width)
        channels = []
        for shift in range(-beside, vectors + beside):
            if 0 <= shift < vectors:
                vector = source[index + shift]
            else:
                inside = (place + shift >= 0) & (place + shift < row)
                vector = source[jnp.where(inside, index + shift, index)]
                vector = jnp.where(inside[:, None], vector, jnp.zeros_like(vector))
            channels += _take_apart(vector)
        excess = beside * width - reach
        wide = jnp.float64 if source.dtype == jnp.float64 else jnp.float32
        return [x.astype(wide) for x in channels[excess : len(channels) - excess]]

    gradients = load(sources[1], radius) if len(sources) > 1 else None
    x = load(sources[0], 2 * radius if gradients else radius)
    scale = [bias + alpha * total for total in _window_sums([a * a for a in x], radius)]
    x = x[radius : len(x) - radius]
    powers = [_inverse_powers(s, beta) for s in scale]
    if gradients is None:
        y = [a * power for a, (power, _) in zip(x, powers, strict=True)]
    else:
        weighted = [g * power for g, (power, _) in zip(gradients, powers, strict=True)]
        terms = [w * a * inverse for w, a, (_, inverse) in zip(weighted, x, powers, strict=True)]
        totals = _window_sums(terms, radius)
        inner = slice(radius, len(x) - radius)
        parts = zip(weighted[inner], x[inner], totals, strict=True)
        y = [w - 2 * alpha * beta * a * total for w, a, total in parts]
    for shift in range(vectors):
        vector = y[shift * width : (shift + 1) * width]
        target[index + shift] = _put_together([a.astype(target.dtype) for a in vector])


def _take_apart(x: jax.Array) -> list[jax.Array]:
    """The columns of an array; as halves of halves, since Triton splits in two only."""
    rows, columns = x.shape
    if columns == 1:
        return [x.reshape(rows)]
    even, odd = map(_take_apart, jnp.unstack(x.reshape(rows, columns // 2, 2), axis=-1))
    return [column for pair in zip(even, odd, strict=True) for column in pair]


def _put_together(columns: list[jax.Array]) -> jax.Array:
    if len(columns) == 1:
        return columns[0][:, None]
    halves = [_put_together(columns[::2]), _put_together(columns[1::2])]
    return jnp.stack(halves, axis=-1).reshape(-1, len(columns))


def _window_sums(x: list[jax.Array], radius: int) -> list[jax.Array]:
    """The sums of 2·`radius` + 1 neighbours, as `lrn._window_sum` adds them."""
    size, remaining = len(x) - 2 * radius, 2 * radius + 1
    reach, offset, total = 1, 0, None
    while remaining:
        if remaining & 1:
            part = x[offset : offset + size]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
            offset += reach
        remaining >>= 1
        if remaining:
            x = [a + b for a, b in zip(x[:-reach], x[reach:], strict=True)]
            reach *= 2
    assert total is not None
    return total


def _inverse_powers(x: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """x^-beta and 1 / x for x > 0; for a GPU, whose cheapest root is the reciprocal one."""
    root = lax.rsqrt(x)
    inverse = root * root
    if beta == 0.5:
        return root, inverse
    if beta == 0.75:
        return inverse * lax.rsqrt(root), inverse
    return jnp.exp(-beta * jnp.log(x)), inverse
