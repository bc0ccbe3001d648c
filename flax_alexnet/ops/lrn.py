"""Local response normalization (section 3.3 of the 2012 paper) with a closed-form gradient.

With s_i = bias + alpha · Σ_{j in W(i)} x_j², where W(i) are the channels within `depth_radius` of
channel i (cut at the ends of its group),

    y_i     = x_i · s_i^-beta
    dL/dx_i = g_i · s_i^-beta − 2·alpha·beta · x_i · Σ_{j in W(i)} g_j · x_j · s_j^(-beta-1)

since i lies in W(j) exactly where j lies in W(i). The gradient needs x alone: s is computed again
rather than stored.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Implementation = Literal["shifted_sums", "reference"]


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
      implementation: "shifted_sums" (closed-form gradient, stores only x) or "reference" (plain
        `reduce_window`, differentiated by JAX); None takes the fastest for the backend.

    Returns:
      float[..., channels] in the type of `x`.

    Raises:
      ValueError: an argument out of its range, or an implementation that does not exist.
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
    if implementation is None:
        implementation = "shifted_sums"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; expected one of {sorted(_IMPLEMENTATIONS)}"
        )
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    # A window that reaches past the whole group is the same as one that just covers it.
    per_group = x.shape[-1] // groups
    radius = min(depth_radius, max(per_group - 1, 0))
    grouped = x.reshape(*x.shape[:-1], groups, per_group)
    normalize = _IMPLEMENTATIONS[implementation]
    y = normalize(grouped.astype(wide), radius, bias, alpha, beta)
    return y.reshape(x.shape).astype(x.dtype)


def _reference(x: jax.Array, radius: int, bias: float, alpha: float, beta: float) -> jax.Array:
    window = (1,) * (x.ndim - 1) + (2 * radius + 1,)
    padding = ((0, 0),) * (x.ndim - 1) + ((radius, radius),)
    total = lax.reduce_window(x * x, 0.0, lax.add, window, (1,) * x.ndim, padding)
    return x * (bias + alpha * total) ** -beta


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _shifted_sums(x: jax.Array, radius: int, bias: float, alpha: float, beta: float) -> jax.Array:
    return x * _inverse_power(bias + alpha * _window_sum(x * x, radius), beta)


def _shifted_sums_forward(
    x: jax.Array, radius: int, bias: float, alpha: float, beta: float
) -> tuple[jax.Array, jax.Array]:
    return _shifted_sums(x, radius, bias, alpha, beta), x


def _shifted_sums_backward(
    radius: int, bias: float, alpha: float, beta: float, x: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    scale = bias + alpha * _window_sum(x * x, radius)
    weighted = gradient * _inverse_power(scale, beta)
    return (weighted - 2 * alpha * beta * x * _window_sum(weighted * x / scale, radius),)


_shifted_sums.defvjp(_shifted_sums_forward, _shifted_sums_backward)


def _window_sum(x: jax.Array, radius: int) -> jax.Array:
    """Σ_{|j - i| ≤ radius} x_j over the last axis, in about 2·log2(window) additions."""
    size, remaining = x.shape[-1], 2 * radius + 1
    power = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((radius, radius),))  # sums over `reach` elements
    reach, offset, total = 1, 0, None
    while remaining:
        if remaining & 1:
            part = power[..., offset : offset + size]
            total = part if total is None else total + part
            offset += reach
        remaining >>= 1
        if remaining:
            power = power[..., : power.shape[-1] - reach] + power[..., reach:]
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


_IMPLEMENTATIONS: dict[str, Callable[[jax.Array, int, float, float, float], jax.Array]] = {
    "shifted_sums": _shifted_sums,
    "reference": _reference,
}
