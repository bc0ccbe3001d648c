"""Local response normalization (section 3.3 of the 2012 paper) with a closed-form gradient.

With s_i = bias + alpha · Σ_{j in W(i)} x_j², where W(i) are the channels within `depth_radius` of
channel i (cut at the ends of its group), or the pixels of its map in a window around it (cut at
the edges of the map),

    y_i     = x_i · s_i^-beta
    dy_i    = dx_i · s_i^-beta − 2·alpha·beta · x_i · s_i^(-beta-1) · Σ_{j in W(i)} x_j · dx_j
    dL/dx_i = g_i · s_i^-beta − 2·alpha·beta · x_i · Σ_{j in W(i)} g_j · x_j · s_j^(-beta-1)

since i lies in W(j) exactly where j lies in W(i). The gradient needs x alone: s is computed again
rather than stored.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_alexnet.ops.dispatch import Operation, current_platform, dispatch
from flax_alexnet.ops.fusion import written_on_cpu
from flax_alexnet.ops.linear import Direction, linear

Implementation = Literal["shifted_sums", "pallas", "reference"]
DERIVATIVE, GRADIENT = Direction.DERIVATIVE, Direction.GRADIENT


class Window(NamedTuple):
    """What a value is normalized with."""

    radius: int
    bias: float
    alpha: float
    beta: float
    axes: tuple[int, ...] = (-1,)  # those along which the window extends


def local_response_normalization(
    x: jax.Array,
    depth_radius: int = 5,
    bias: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.5,
    *,
    groups: int = 1,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Divides each channel by a power of the squares of its neighbours, in TensorFlow's convention.

    `alpha` is not divided by the size of the window, and the window is 2·`depth_radius` + 1 wide.
    Caffe's and PyTorch's layers of size n with their (alpha, beta, k) are
    `depth_radius=(n - 1) // 2, bias=k, alpha=alpha / n, beta=beta` here.

    Args:
      x: float[..., channels], any rank from 1 up; the sums are taken in float32 at least.
      depth_radius: half width of the window, 0 or more; it may exceed the channels.
      bias: k of the paper, > 0.
      alpha: scale of the sum of squares, ≥ 0.
      beta: exponent, ≥ 0.
      groups: windows stay within each of this many equal groups of channels (the paper's towers).
      implementation: "shifted_sums" (closed-form gradient, stores only x), "pallas" (the same, in
        one kernel each way for NVIDIA GPUs, and interpreted elsewhere; wider windows than 17,
        symbolic shapes and meshes of explicit axes are left to "shifted_sums"), or "reference"
        (plain `reduce_window`, differentiated by JAX); None takes the fastest for the backend.

    Returns:
      float[..., channels] in the type of `x`.

    Raises:
      ValueError: an argument out of its range, or an implementation that does not exist.
      ImportError: "pallas", and this version of JAX no longer has Pallas's Triton backend.
      TypeError: `x` is not floating point.

    References:
      Krizhevsky, Sutskever and Hinton (2012), section 3.3; `tf.nn.local_response_normalization`.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, not {x.dtype}; cast it first")
    if x.ndim < 1:
        raise ValueError("x must have a channel axis, but it is a scalar")
    if depth_radius < 0 or bias <= 0 or alpha < 0 or beta < 0:
        raise ValueError(
            "expected depth_radius ≥ 0, bias > 0, alpha ≥ 0 and beta ≥ 0, not "
            f"depth_radius={depth_radius}, bias={bias}, alpha={alpha}, beta={beta}"
        )
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"{x.shape[-1]} channels cannot be split into {groups} equal groups")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; expected one of {sorted(_IMPLEMENTATIONS)}"
        )
    # A window that reaches past the whole group is the same as one that just covers it.
    per_group = x.shape[-1] // groups
    window = Window(min(depth_radius, max(per_group - 1, 0)), bias, alpha, beta)
    grouped = x.reshape(*x.shape[:-1], groups, per_group)
    if implementation == "reference":
        y = _reference(window, grouped)
    else:
        compute = _IMPLEMENTATIONS[implementation] if implementation else _fastest
        y = _closed_form(compute, window, grouped)
    return y.reshape(x.shape)


def map_normalization(
    x: jax.Array, size: int, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.75
) -> jax.Array:
    """Divides each pixel by a power of the squares of its neighbours in the same map.

    `alpha` is not divided by the pixels of the window: cuda-convnet's `rnorm` of size n with its
    scale, and Caffe's `WITHIN_CHANNEL` with its alpha, are `alpha=scale / n**2` here.

    Args:
      x: float[b, h, w, channels]; the sums are taken in float32 at least.
      size: pixels of a side of the window, which is centred: odd and positive. At the edges the
        window has fewer pixels, and alpha stays.
      bias: added to the sum, > 0.
      alpha: scale of the sum of squares, ≥ 0.
      beta: exponent, ≥ 0.

    Returns:
      float[b, h, w, channels] in the type of `x`.

    Raises:
      ValueError: an argument out of its range.
      TypeError: `x` is not floating point.

    References:
      `ResponseNormLayer` of cuda-convnet (`layer.py`).
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point, not {x.dtype}; cast it first")
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, height, width, channels), not {x.shape}")
    if size < 1 or size % 2 == 0 or bias <= 0 or alpha < 0 or beta < 0:
        raise ValueError(
            "expected an odd size, bias > 0, alpha ≥ 0 and beta ≥ 0, not "
            f"size={size}, bias={bias}, alpha={alpha}, beta={beta}"
        )
    return _closed_form(_sums, Window(size // 2, bias, alpha, beta, axes=(1, 2)), x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _reference(window: Window, x: jax.Array) -> jax.Array:
    radius, bias, alpha, beta, _ = window
    wide = _wide(x)
    shape = (1,) * (x.ndim - 1) + (2 * radius + 1,)
    padding = ((0, 0),) * (x.ndim - 1) + ((radius, radius),)
    total = lax.reduce_window(wide * wide, 0.0, lax.add, shape, (1,) * x.ndim, padding)
    return (wide * (bias + alpha * total) ** -beta).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _closed_form(compute: Callable[..., jax.Array], window: Window, x: jax.Array) -> jax.Array:
    """What `compute` gives for x; given the gradient of that too, it gives the gradient of x."""
    return compute(window, x)


@_closed_form.defjvp
def _derivative_of_closed_form(
    compute: Callable[..., jax.Array],
    window: Window,
    arrays: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    derivative = linear(_Operator(compute, window), DERIVATIVE, GRADIENT, arrays, *tangents)
    return _closed_form(compute, window, *arrays), derivative


@dataclasses.dataclass(frozen=True)
class _Operator:
    """The derivative of the normalization and its transpose, for `linear`."""

    compute: Callable[..., jax.Array]
    window: Window

    def __call__(self, direction: Direction, x: jax.Array, varied: jax.Array) -> jax.Array:
        if direction is GRADIENT:
            return self.compute(self.window, x, varied)
        return _derivative(self.window, x, varied)


def _derivative(window: Window, x: jax.Array, dx: jax.Array) -> jax.Array:
    _, bias, alpha, beta, _ = window
    wide, of_wide = _wide(x), _wide(dx)
    scale = bias + alpha * _window_sum(wide * wide, window)
    root = lax.rsqrt(scale)
    total = _window_sum(wide * of_wide, window) * (root * root)
    power = _inverse_power(scale, beta)
    return (power * (of_wide - 2 * alpha * beta * wide * total)).astype(x.dtype)


def _shifted_sums(window: Window, x: jax.Array, *gradient: jax.Array) -> jax.Array:
    # Two sums read it. Written down without its groups, or XLA fuses nothing into it.
    whole = (*x.shape[:-2], x.shape[-2] * x.shape[-1])
    arrays = (x, *(written_on_cpu(g.reshape(whole)).reshape(x.shape) for g in gradient))
    # One group after another, or XLA on a CPU takes three times as long for two.
    groups = x.shape[-2]
    parts = zip(*(jnp.split(array, groups, -2) for array in arrays), strict=True)
    return jnp.concatenate([_sums(window, *part) for part in parts], -2)


def _sums(window: Window, x: jax.Array, gradient: jax.Array | None = None) -> jax.Array:
    _, bias, alpha, beta, _ = window
    wide = _wide(x)
    scale = bias + alpha * _window_sum(wide * wide, window)
    if gradient is None:
        return (wide * _inverse_power(scale, beta)).astype(x.dtype)
    weighted = _wide(gradient) * _inverse_power(scale, beta)
    root = lax.rsqrt(scale)  # the power's, as a rule: a division is dearer, and reads `scale` again
    total = _window_sum(weighted * wide * (root * root), window)
    return (weighted - 2 * alpha * beta * wide * total).astype(x.dtype)


def _pallas(window: Window, *arrays: jax.Array) -> jax.Array:
    from flax_alexnet.ops.lrn_pallas import MAX_RADIUS, window_kernel

    shifted_sums = functools.partial(_shifted_sums, window)
    is_symbolic = not all(isinstance(size, int) for size in arrays[0].shape)
    if (
        window.radius > MAX_RADIUS
        or is_symbolic
        or jax.typeof(arrays[0]).sharding.mesh.explicit_axes
    ):
        return shifted_sums(*arrays)
    operator = jax.custom_jvp(window_kernel(*window[:4]))
    # Only where the gradient is differentiated again.
    operator.defjvp(lambda primals, tangents: jax.jvp(shifted_sums, primals, tangents))
    return operator(*arrays)


def _fastest(window: Window, *arrays: jax.Array) -> jax.Array:
    forms = {name: functools.partial(form, window) for name, form in _IMPLEMENTATIONS.items()}
    direction = Direction.FORWARD if len(arrays) == 1 else GRADIENT
    # Where there is no GPU, the kernel for it need not be traced.
    usable = current_platform() == "cuda" and _has_pallas()
    implementation = None if usable else "shifted_sums"
    return dispatch(
        Operation.NORMALIZATION, direction, None, forms, *arrays, implementation=implementation
    )


def _has_pallas() -> bool:
    try:
        import flax_alexnet.ops.lrn_pallas  # noqa: F401
    except ImportError:
        return False
    return True


def _window_sum(x: jax.Array, window: Window) -> jax.Array:
    """Σ_{|j - i| ≤ radius} x_j along each of the window's axes."""
    for axis in window.axes:
        x = _sum_along(x, window.radius, axis % x.ndim)
    return x


def _sum_along(x: jax.Array, radius: int, axis: int) -> jax.Array:
    """Σ_{|j - i| ≤ radius} x_j along an axis, in about 2·log2(window) additions."""

    def part(values: jax.Array, start: int, stop: int) -> jax.Array:
        return lax.slice_in_dim(values, start, stop, axis=axis)

    size, remaining = x.shape[axis], 2 * radius + 1
    edges = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
    power = jnp.pad(x, edges)  # sums over `reach` elements
    reach, offset, total = 1, 0, None
    while remaining:
        if remaining & 1:
            added = part(power, offset, offset + size)
            total = added if total is None else total + added
            offset += reach
        remaining >>= 1
        if remaining:
            length = power.shape[axis]
            power = part(power, 0, length - reach) + part(power, reach, length)
            reach *= 2
    assert total is not None
    return total


def _inverse_power(x: jax.Array, beta: float) -> jax.Array:
    """x^-beta for x > 0; beta of 1/2 and 3/4, the common ones, need no logarithm."""
    if beta == 0.5:
        return lax.rsqrt(x)
    if beta == 0.75:
        root = lax.rsqrt(x)
        return root * jnp.sqrt(root)
    return x**-beta


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "shifted_sums": _shifted_sums,
    "pallas": _pallas,
    "reference": _reference,
}
