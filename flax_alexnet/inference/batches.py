"""A trained model over many images, in batches, on all devices of this process."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_alexnet.data.examples import Example
from flax_alexnet.data.prefetch import prefetch
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.parallel.layouts import make_layout
from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights.pretrained import Pretrained


def infer(
    function: Callable[[jax.Array], Any], examples: Iterable[Example], batch_size: int
) -> Iterator[tuple[Example, Any]]:
    """Yields each image with its row of the results, or with None if it could not be read.

    Args:
      function: maps uint8[b, size, size, 3] to a tree of arrays [b, …]; it is jitted or calls
        jitted functions. All batches have the same size; the last one is filled up.
      examples: read lazily, some batches ahead.
      batch_size: images at once; rounded up to a multiple of the devices.
    """
    layout = make_layout("data", (), devices=jax.local_devices())
    devices = jax.local_device_count()
    batch_size = -(-batch_size // devices) * devices

    def batches() -> Iterator[tuple[list[Example], Any]]:
        for group in _grouped(examples, batch_size):
            images = [example.image for example in group if example.image is not None]
            if not images:
                yield group, None
                continue
            filled = np.stack(images + images[:1] * (batch_size - len(images)))
            yield group, function(layout.put({"image": filled}, batch_size)["image"])

    for group, results in prefetch(batches(), 1):  # the device works while the host goes on
        rows = collections.deque(_rows(results, batch_size))
        for example in group:
            yield example, rows.popleft() if example.image is not None else None


def _grouped(examples: Iterable[Example], batch_size: int) -> Iterator[list[Example]]:
    """Groups the images, in order, by `batch_size` readable ones; the last may have fewer."""
    group: list[Example] = []
    readable = 0
    for example in examples:
        group.append(example)
        readable += example.image is not None
        if readable == batch_size:
            yield group
            group, readable = [], 0
    if group:
        yield group


def _rows(results: Any, count: int) -> list[Any]:
    if results is None:
        return []
    results = jax.tree.map(np.asarray, results)
    return [jax.tree.map(lambda values, row=row: values[row], results) for row in range(count)]


def check_numbers(values: Any, what: str) -> None:
    """Raises UserError if a model returns NaN or ∞, as one with huge or damaged weights does.

    Args:
      values: an array, such as log-probabilities, where −∞ is valid: it is that of 0.
      what: what the values are of, such as the name of an image.
    """
    if not np.all(values < np.inf):
        raise UserError(
            f"the model returns values that are not finite for {what}: its weights are too large "
            "or damaged; take another model"
        )


def on_devices(
    pretrained: Pretrained, function: Callable[[AlexNet, Any, jax.Array], Any]
) -> Callable[[jax.Array], Any]:
    """Turns `function` of (model, params, images) into a jitted one of images, for `infer`."""
    layout = make_layout("data", (), devices=jax.local_devices())
    # The layout keeps XLA from gathering whole batches for convolutions with groups.
    model = pretrained.model.clone(partition=layout.partition)
    params = jax.device_put(pretrained.params, layout.replicated)
    of_batch = jax.jit(functools.partial(function, model))
    return lambda images: of_batch(params, images)


def log_probabilities(pretrained: Pretrained, crops: int = 1) -> Callable[[jax.Array], jax.Array]:
    """The function from uint8[b, s, s, 3] to log-probabilities, float32[b, classes].

    Args:
      pretrained: a classifier.
      crops: 1 for the central crop, 2 for it and its mirror image, or 10 for the paper's corners,
        centre and their mirror images (section 4.1), over which the probabilities are averaged.
    """

    def of_batch(model: AlexNet, params: Any, images: jax.Array) -> jax.Array:
        if crops == 10:
            seen = pretrained.ten_crops(images)
        else:
            centre = pretrained.preprocess(images)
            seen = jnp.stack([centre, centre[:, :, ::-1]][:crops], axis=1)
        logits: Any = model.apply({"params": params}, seen.reshape(-1, *seen.shape[2:]))
        logits = logits.astype(jnp.float32).reshape(*seen.shape[:2], -1)
        means = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1)
        return means - np.log(seen.shape[1], dtype=np.float32)

    return on_devices(pretrained, of_batch)
