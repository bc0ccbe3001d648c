"""Loss, accuracies, and the notebook's faults in both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.training.metrics import cross_entropy, predict, top_k_correct


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((16, 10)) * 5, rng.integers(0, 10, 16)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), labels]
    ours = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_label_smoothing_spreads_a_share_of_the_target():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((16, 10)) * 5, rng.integers(0, 10, 16)
    targets = np.full((16, 10), 0.3 / 10)
    targets[np.arange(16), labels] += 0.7
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ours = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing=0.3)
    np.testing.assert_allclose(ours, -(targets * log_p).sum(1), rtol=1e-5)


def test_cross_entropy_is_finite_for_huge_logits_and_taken_in_float32():
    logits = jnp.array([[3e4, 0.0], [0.0, 3e4]], jnp.bfloat16)
    ours = cross_entropy(logits, jnp.array([0, 0]))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, [0, float(logits[1, 1])])


def test_top_k_is_that_of_a_stable_sort():
    rng = np.random.default_rng(0)
    logits, labels = rng.integers(0, 4, (200, 9)).astype(np.float32), rng.integers(0, 9, 200)
    order = np.argsort(-logits, axis=1, kind="stable")
    for k in (1, 3, 5, 9):
        expected = (order[:, :k] == labels[:, None]).any(1)
        ours = top_k_correct(jnp.asarray(logits), jnp.asarray(labels), k)
        np.testing.assert_array_equal(ours, expected)


def test_logits_that_are_not_numbers_are_never_right():
    logits = jnp.full((1, 3), jnp.nan)
    assert not top_k_correct(logits, jnp.array([0]), 3).any()


# The notebook's faults: each test shows the fault, then the repair.


@pytest.mark.slow
def test_fault_relu_on_the_logits():
    """Negative logits get no gradient; a model whose logits all die is dead for good."""
    params_of = lambda model: model.init(jax.random.key(0), images)["params"]  # noqa: E731
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    faulty = AlexNet("cuda_convnet_19pct", 10, relu_logits=True)
    repaired = AlexNet("cuda_convnet_19pct", 10)
    params = params_of(repaired)
    params["fc10"]["bias"] -= 1000.0

    def loss(params, model):
        logits = model.apply({"params": params}, images)
        return cross_entropy(logits, jnp.array([3, 4])).mean()

    gradients = jax.grad(loss)(params, faulty)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))
    gradients = jax.grad(loss)(params, repaired)
    assert gradients["fc10"]["bias"].any()
    assert (repaired.apply({"params": params}, images) < 0).all()


def test_fault_argmax_over_the_batch():
    logits = jnp.array([[0.0, 9.0, 1.0], [5.0, 0.0, 1.0]])
    faulty = jnp.argmax(logits, axis=0)
    assert faulty.shape == (3,)  # one answer a class, and the number of an image at that
    np.testing.assert_array_equal(predict(logits), [1, 0])


@pytest.mark.slow
def test_fault_dropout_outside_training():
    model = AlexNet("torchvision", 10, width=0.1)
    images = jax.random.normal(jax.random.key(1), (2, 63, 63, 3))
    params = model.init(jax.random.key(0), images)["params"]
    always = [
        model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(i)})
        for i in range(2)
    ]
    assert (always[0] != always[1]).any()  # the fault: the same image, another answer
    evaluated = [model.apply({"params": params}, images) for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)


def test_fault_decay_scaled_by_the_rate_twice():
    """Without gradients, a step shrinks weights by ελ in the paper, by ε²λ in the notebook."""
    from flax_alexnet.training.optimizer import create_optimizer

    params = {"fc6": {"kernel": jnp.ones((1, 1))}}
    shrink = {}
    for rule in ("paper", "notebook"):
        optimizer = create_optimizer(0.01, momentum=0.0, weight_decay=0.5, rule=rule)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        shrink[rule] = -float(updates["fc6"]["kernel"][0, 0])
    assert shrink["paper"] == pytest.approx(0.01 * 0.5)
    assert shrink["notebook"] == pytest.approx(0.01 * 0.01 * 0.5)
