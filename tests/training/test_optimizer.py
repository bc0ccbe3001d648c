"""The optimizer against float64 NumPy simulations of the rules it is named after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_alexnet.training.optimizer import (
    applied_rate,
    backoff,
    create_decay,
    create_optimizer,
    create_schedule,
    drop_on_plateau,
    with_backoff,
)

STEPS = 50
SHAPES = {"conv1": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "fc6": {"kernel": (8, 5), "bias": (5,)}}


def start():
    rng = np.random.default_rng(1)
    return {
        layer: {name: rng.standard_normal(shape) for name, shape in arrays.items()}
        for layer, arrays in SHAPES.items()
    }


def gradient(weights, step):
    """Of a made-up loss: depends on the weights, so that a wrong update feeds back."""
    return 0.3 * weights + np.cos(step + np.arange(weights.size).reshape(weights.shape))


def simulate(
    rule,
    rate,
    *,
    momentum=0.9,
    decay=0.0005,
    bias_rate=1.0,
    decay_biases=True,
    rate_of_biases=None,
    layer_decays=None,
    layer_ends=None,
):
    """Fifty steps in float64; `rate` and `rate_of_biases` are functions of the step."""
    weights = start()
    velocity = jax.tree.map(np.zeros_like, weights)
    for step in range(STEPS):
        for layer, arrays in weights.items():
            for name, w in arrays.items():
                g = gradient(w, step)
                own_decay = (layer_decays or {}).get(layer, decay)
                own_decay *= decay_biases or name == "kernel"
                base = rate_of_biases if rate_of_biases and name == "bias" else rate
                own_rate = base(step) * (bias_rate if name == "bias" else 1.0)
                v = velocity[layer][name]
                if rule == "paper":
                    v = momentum * v - own_decay * own_rate * w - own_rate * g
                    new = w + v
                else:
                    v = momentum * v + g + own_decay * rate(step) * w
                    new = w - own_rate * v
                velocity[layer][name] = v
                if step < (layer_ends or {}).get(layer, STEPS):
                    weights[layer][name] = new
    return weights


def float_schedule(step):
    return 0.05 * 0.1 ** ((step >= 20) + (step >= 35))


def run(optimizer):
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), start())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        gradients = {
            layer: {
                name: jnp.asarray(gradient(np.asarray(w, np.float64), step), jnp.float32)
                for name, w in arrays.items()
            }
            for layer, arrays in params.items()
        }
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def assert_close(params, expected):
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
        assert error <= 1e-5


@pytest.mark.parametrize("rule", ["paper", "notebook"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias_rate": 2.0, "decay_biases": False}, {"momentum": 0.5, "weight_decay": 0.1}],
    ids=["defaults", "original code's biases", "strong decay"],
)
def test_fifty_steps_follow_the_rule_through_a_drop_of_the_rate(rule, options):
    schedule = create_schedule(0.05, boundaries=[20, 35], drop_factor=0.1)
    params = run(create_optimizer(schedule, rule=rule, **options))
    options = {"decay" if name == "weight_decay" else name: v for name, v in options.items()}
    assert_close(params, simulate(rule, float_schedule, **options))


@pytest.mark.parametrize("rule", ["paper", "notebook"])
def test_layers_have_their_own_decays_and_ends_and_biases_their_own_schedule(rule):
    def of_biases(step):
        return 0.02 * 0.1 ** (step >= 30)

    biases = create_schedule(0.02, boundaries=(30,))
    options = {"layer_decays": {"fc6": 0.3}, "layer_ends": {"conv1": 12}, "decay_biases": False}
    optimizer = create_optimizer(
        create_schedule(0.05, boundaries=(20, 35)),
        rule=rule,
        bias_rate=2.0,
        bias_schedule=biases,
        **options,
    )
    expected = simulate(rule, float_schedule, bias_rate=2.0, rate_of_biases=of_biases, **options)
    assert_close(run(optimizer), expected)
    plain = simulate(rule, float_schedule, bias_rate=2.0, decay_biases=False)
    for layer in plain:
        assert not np.allclose(plain[layer]["kernel"], expected[layer]["kernel"], rtol=1e-3)


def test_a_decay_of_a_layer_may_be_that_of_all():
    """Layers of equal decays are decayed once."""
    same = create_optimizer(0.05, layer_decays={"fc6": 0.0005})
    assert_close(run(same), simulate("paper", lambda _: 0.05))


def test_a_layer_that_has_ended_keeps_its_bits():
    optimizer = create_optimizer(0.05, layer_ends={"conv1": 1})
    params = {"conv1": {"kernel": jnp.float32([0.1, -0.7])}, "fc6": {"kernel": jnp.ones(2)}}
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        new = jax.tree.map(jnp.add, params, updates)
        moved = {
            name: not np.array_equal(new[name]["kernel"], params[name]["kernel"]) for name in new
        }
        assert moved == {"conv1": step == 0, "fc6": True}
        params = new


def test_plateaus_leave_biases_with_a_schedule_of_their_own_alone():
    optimizer = create_optimizer(
        1.0, momentum=0.0, weight_decay=0.0, bias_schedule=create_schedule(0.5)
    )
    params = {"fc6": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}
    state = optimizer.init(params)
    for error in (0.5, 0.5):
        state = drop_on_plateau(state, error)
    state = with_backoff(state, 0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert float(updates["fc6"]["kernel"][0]) == pytest.approx(-0.1 * 0.5)
    assert float(updates["fc6"]["bias"][0]) == pytest.approx(-0.5 * 0.5)


def test_an_exponential_schedule_is_that_of_the_original_code():
    """`DiscreteExpParameterSchedule` with the two schedules of #170, over 90 epochs of 10 steps."""
    kernels = create_decay("exponential", 0.01, 900, final_rate=1 / 250, levels=4)
    biases = create_decay("exponential", 0.02, 900, final_rate=1 / 10, levels=2)
    steps = np.arange(900)
    level = 0.01 * 250.0 ** -(np.arange(4) / 3)  # 0.01, 0.0016, 0.00025, 0.00004
    np.testing.assert_allclose(
        jax.vmap(kernels)(steps), level[np.minimum(steps // 225, 3)], rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.vmap(biases)(steps), np.where(steps < 450, 0.02, 0.002), rtol=1e-5
    )
    smooth = create_decay("exponential", 0.01, 900, final_rate=1 / 250)
    np.testing.assert_allclose(jax.vmap(smooth)(steps), 0.01 * 250.0 ** (-steps / 900), rtol=1e-4)
    assert float(smooth(jnp.int32(2000))) == pytest.approx(0.01 / 250)


def test_a_cosine_schedule_warms_up_and_falls():
    schedule = create_decay("cosine", 0.1, 100, final_rate=0.1, warmup_steps=10, first_step=20)
    steps = np.arange(20, 120)
    over = (steps - 20) / 100
    expected = 0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * over)) / 2)
    expected *= np.minimum(1, (steps - 19) / 10)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-5)
    assert float(schedule(jnp.int32(500))) == pytest.approx(0.01)


def test_the_two_rules_differ_where_the_text_says_they_do():
    """At a drop of the rate (inside or outside of the velocity) and in the decay."""
    drop = create_schedule(0.05, boundaries=[20])
    paper, notebook = (
        np.asarray(run(create_optimizer(drop, rule=rule, weight_decay=0.0))["fc6"]["kernel"])
        for rule in ("paper", "notebook")
    )
    assert np.abs(paper - notebook).max() > 1e-3
    # At a constant rate ε, the paper's rule with ε times the decay is the notebook's.
    assert_close(
        run(create_optimizer(0.05, rule="notebook", weight_decay=0.1)),
        simulate("paper", lambda _: 0.05, decay=0.1 * 0.05),
    )


def test_clipping_bounds_the_gradient_before_the_decay():
    optimizer = create_optimizer(1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    params = {"fc6": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones((4,))}}
    gradients = jax.tree.map(lambda w: 100 * jnp.ones_like(w), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    norm = np.sqrt(sum(float((u**2).sum()) for u in jax.tree.leaves(updates)))
    assert norm == pytest.approx(0.5, rel=1e-5)


def test_schedule_warms_up_and_drops():
    schedule = create_schedule(0.08, boundaries=[10, 20], drop_factor=0.5, warmup_steps=4)
    rates = [float(schedule(jnp.int32(step))) for step in (0, 1, 3, 4, 9, 10, 19, 20)]
    assert rates == pytest.approx([0.02, 0.04, 0.08, 0.08, 0.08, 0.04, 0.04, 0.02])


def test_a_schedule_goes_on_with_another_batch_size():
    """Two steps with half the batches: as one of the schedule of whole ones, which drops at 10."""
    settings = {"drop_factor": 0.5, "warmup_steps": 4}
    whole = create_schedule(0.08, boundaries=[10], **settings)
    later = create_schedule(0.08, boundaries=[11], **settings, first_step=1.0)
    for step in range(2, 20):
        assert float(later(jnp.int32(step))) == float(whole(jnp.int32(step - 1)))


def test_plateau_divides_the_rate_three_times_and_keeps_count_in_the_state():
    optimizer = create_optimizer(0.01)
    params = {"fc6": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}}
    state = optimizer.init(params)

    def rate_after(state, error):
        state = drop_on_plateau(state, error, patience=2)
        _, state = optimizer.update(params, state, params)
        return float(applied_rate(state)), state

    rates = []
    #        best  best stale drop  best  stale drop  stale drop  stale stale stale
    errors = [0.9, 0.8, 0.80, 0.85, 0.7, 0.75, 0.71, 0.70, 0.72, 0.9, 0.90, 0.90]
    for error in errors:
        rate, state = rate_after(state, error)
        rates.append(rate)
    assert rates == pytest.approx([1e-2] * 3 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 4, rel=1e-5)


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.9])
def test_a_plateau_drops_exactly_so_often(factor):
    optimizer = create_optimizer(1.0)
    params = {"fc6": {"kernel": jnp.ones((2, 2))}}
    state = optimizer.init(params)
    for _ in range(10):
        state = drop_on_plateau(state, 1.0, patience=1, drop_factor=factor, max_drops=3)
    _, state = optimizer.update(params, state, params)
    assert float(applied_rate(state)) == pytest.approx(factor**3, rel=1e-5)


def test_backoff_halves_the_rate_beside_the_drops_of_a_plateau():
    """What divergence does goes on with an older state, which has had fewer drops."""
    optimizer = create_optimizer(0.08)
    params = {"fc6": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}}
    saved = optimizer.init(params)
    assert float(backoff(saved)) == 1
    rates = []
    for _ in range(3):
        diverged = drop_on_plateau(drop_on_plateau(saved, 0.9), 0.9)
        _, diverged = optimizer.update(params, diverged, params)
        rates.append(float(applied_rate(diverged)))
        saved = with_backoff(saved, backoff(diverged) / 2)
    _, state = optimizer.update(params, saved, params)
    rates.append(float(applied_rate(state)))
    assert rates == pytest.approx([0.008, 0.004, 0.002, 0.01])
    assert float(backoff(state)) == 1 / 8
    assert jax.tree.structure(saved) == jax.tree.structure(optimizer.init(params))


@pytest.mark.parametrize("rule", ["paper", "notebook"])
def test_the_state_stays_to_the_bit_where_gradients_are_not_finite(rule):
    """With every part of a chain, of which some count steps."""
    schedule = create_schedule(0.05, boundaries=[2], warmup_steps=2)
    optimizer = create_optimizer(schedule, rule=rule, clip_norm=1.0)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), start())
    update = jax.jit(optimizer.update)
    _, before = update(params, optimizer.init(params), params, finite=True)
    bad = jax.tree.map(lambda w: w * jnp.nan, params)
    _, after = update(bad, before, params, finite=False)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    _, moved = update(params, before, params)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(moved), strict=True)
    changed = [not np.array_equal(a, b) for a, b in pairs]
    assert sum(changed) >= len(jax.tree.leaves(params)) + 2, "velocities, steps, the rate"


def test_a_velocity_that_overflows_is_the_largest_number():
    optimizer = create_optimizer(1e10)
    params = {"fc6": {"kernel": jnp.ones((2, 2))}}
    gradients = {"fc6": {"kernel": jnp.array([[1e38, -1e38], [1.0, 0.0]])}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    largest = np.finfo(np.float32).max
    assert updates["fc6"]["kernel"][0].tolist() == [-largest, largest]


@pytest.mark.parametrize("rule", ["paper", "notebook"])
def test_an_update_that_may_not_be_made_copies_neither_parameters_nor_velocities(rule):
    optimizer = create_optimizer(0.01, rule=rule)
    params = {"fc6": {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}}

    def step(params, state, gradients, finite):
        updates, state = optimizer.update(gradients, state, params, finite=finite)
        added = jax.tree.map(lambda w, u: jnp.where(finite, w + u, w), params, updates)
        return added, state

    state, finite = jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), bool)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, finite).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * 512**2
    assert memory.temp_size_in_bytes < 4 * 512**2


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="unknown rule 'adam'"):
        create_optimizer(rule="adam")
