"""The loss and the accuracies of a classifier, as pure functions of logits and labels."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy in nats: float[b, classes] and int[b] → float32[b], one an image.

    With `smoothing` s in [0, 1), the right class has the target 1 − s + s / classes, and each other
    one s / classes (Szegedy, Vanhoucke, Ioffe, Shlens and Wojna 2016, section 7).
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    if smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return -(targets * log_probabilities).sum(-1)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]


def predict(logits: jax.Array) -> jax.Array:
    """The class of the largest logit: float[b, classes] → int32[b] (the notebook took axis 0)."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether fewer than `k` classes have a larger logit than the right one: bool[b].

    Ties are decided by the class number, as `argmax` and a stable sort do; a logit that is not a
    number is never right.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    better = (logits > own) | ((logits == own) & earlier)
    return (better.sum(axis=-1) < k) & ~jnp.isnan(logits).any(axis=-1)
