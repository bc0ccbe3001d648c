"""The optimizers of the paper, the original code and the notebook, as one optax chain."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


class OnlyFinite(optax.GradientTransformationExtraArgs):
    """An optimizer that leaves its whole state unchanged, to the bit, if `finite` is False.

    `finite` is an argument of its `update`, a bool[], True by default.
    """


def create_optimizer(
    learning_rate: float | Schedule = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0005,
    *,
    rule: Literal["paper", "notebook"] = "paper",
    bias_rate: float = 1.0,
    bias_schedule: Schedule | None = None,
    layer_rates: Mapping[str, float] | None = None,
    layer_decays: Mapping[str, float] | None = None,
    layer_ends: Mapping[str, int] | None = None,
    decay_biases: bool = True,
    clip_norm: float | None = None,
) -> OnlyFinite:
    """SGD with momentum and additive weight decay.

    With g the gradient, w the weights, ε the learning rate, m the momentum and λ the decay:

        paper:     v ← m·v − ε·(g + λ·w);    w ← w + v
        notebook:  v ← m·v + (g + λ·ε·w);    w ← w − ε·v

    In the paper's rule (section 5) the rate is inside the velocity, so that gradients accumulated
    at a high rate keep that rate after a drop; `optax.sgd` differs in this. The notebook
    multiplies the decay by the rate twice, which makes it 1 / ε times weaker than the paper's.

    The optimizer's state contains the rate of the last update, and the factors by which plateaus
    and divergence have lowered it: see `applied_rate`, `drop_on_plateau` and `with_backoff`.

    Args:
      learning_rate: ε, a constant or a function of the step (int32[]); see `create_schedule`.
      momentum: m, in [0, 1).
      weight_decay: λ, ≥ 0.
      rule: which of the two rules is used.
      bias_rate: multiplies ε for biases; the original code and Caffe take 2.
      bias_schedule: a function of the step that takes the place of ε for biases, which plateaus
        then do not lower; None: biases follow ε.
      layer_rates: multiplies ε for the parameters of some layers, by their names.
      layer_decays: takes the place of λ for some layers, by their names.
      layer_ends: the number of steps after which some layers keep their values, by their names.
      decay_biases: whether λ applies to biases; the original code and Caffe leave them out.
      clip_norm: gradients are scaled down to this global norm first; None: they are not clipped.

    Returns:
      An optax chain; its `update` needs the parameters, and takes `finite` (see `OnlyFinite`).

    Raises:
      ValueError: the rule is unknown.
    """
    schedule = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    scale = scale_by_rate(schedule, bias_rate, layer_rates, bias_schedule)
    ends = [end_layers(layer_ends)] if layer_ends else []
    if rule == "paper":
        decays = add_decays(weight_decay, layer_decays, decay_biases)
        return _chain(*clip, *decays, scale, accumulate_velocity(momentum), *ends)
    if rule == "notebook":
        decays = add_decays(weight_decay, layer_decays, decay_biases, schedule)
        return _chain(*clip, *decays, accumulate_velocity(momentum), scale, *ends)
    raise ValueError(f"unknown rule {rule!r}; expected 'paper' or 'notebook'")


def add_decays(
    weight_decay: float,
    layer_decays: Mapping[str, float] | None = None,
    decay_biases: bool = True,
    schedule: Schedule | None = None,
) -> list[optax.GradientTransformation]:
    """Transformations of the update u to u + λ·w, one for each λ; see `create_optimizer`.

    With a `schedule`, λ is multiplied by its value at each step.
    """
    own = layer_decays or {}

    def add(decay: float) -> optax.GradientTransformation:
        def mask(params: optax.Params) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: (
                    own.get(_layer(path), weight_decay) == decay
                    and (decay_biases or not _is_bias(path))
                ),
                params,
            )

        scheduled = (lambda step: decay * schedule(step)) if schedule else decay
        return optax.add_decayed_weights(scheduled, None if decay_biases and not own else mask)

    return [add(decay) for decay in dict.fromkeys((weight_decay, *own.values()))]


def create_schedule(
    learning_rate: float,
    *,
    boundaries: Sequence[int] = (),
    drop_factor: float = 0.1,
    warmup_steps: int = 0,
    first_step: float = 0.0,
) -> Schedule:
    """A rate that rises linearly during warm-up and is multiplied by a factor at each boundary.

    Args:
      learning_rate: the rate after warm-up, > 0.
      boundaries: steps at which the rate is multiplied by `drop_factor` once more.
      drop_factor: in (0, 1); the paper divides by 10.
      warmup_steps: steps over which the rate rises; step 0 has 1 / `warmup_steps` of it.
      first_step: the step at which warm-up begins; not 0 if a run resumes with another batch size.

    Returns:
      A function of the step, int32[] to float32[].
    """

    def schedule(step: jax.Array) -> jax.Array:
        drops = sum(
            ((step >= boundary).astype(jnp.float32) for boundary in boundaries), jnp.float32(0)
        )
        return learning_rate * jnp.float32(drop_factor) ** drops

    return _warm_up(schedule, warmup_steps, first_step)


def create_decay(
    kind: Literal["exponential", "cosine"],
    learning_rate: float,
    total_steps: float,
    *,
    final_rate: float = 0.0,
    levels: int | None = None,
    warmup_steps: int = 0,
    first_step: float = 0.0,
) -> Schedule:
    """A rate that falls from the first step of a run to the last.

    With t the share of the run that is over, ε₀ the first rate and f `final_rate`:

        exponential:  ε = ε₀ · f^t
        cosine:       ε = ε₀ · (f + (1 − f) · (1 + cos(π·t)) / 2)

    Args:
      kind: which of the two.
      learning_rate: ε₀, > 0.
      total_steps: the steps of the run; the rate stays as it is after them.
      final_rate: f, in [0, 1]; more than 0 for "exponential".
      levels: n equal parts of the run with a constant rate each, of t = 0, 1/(n−1), …, 1; ≥ 2.
        None: the rate falls with each step.
      warmup_steps: see `create_schedule`.
      first_step: the step at which the run begins; see `create_schedule`.

    Returns:
      A function of the step, int32[] to float32[].

    References:
      `DiscreteExpParameterSchedule` of cuda-convnet2 (`lr.cu`), which is "exponential" with levels;
      Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017).
    """
    if kind == "cosine":
        falling = optax.cosine_decay_schedule(learning_rate, 1.0, final_rate)
    else:
        falling = optax.exponential_decay(learning_rate, 1, final_rate)

    def schedule(step: jax.Array) -> jax.Array:
        over = jnp.clip((step.astype(jnp.float32) - first_step) / total_steps, 0.0, 1.0)
        if levels:
            over = jnp.minimum(jnp.floor(over * levels), levels - 1) / (levels - 1)
        return jnp.asarray(falling(over), jnp.float32)

    return _warm_up(schedule, warmup_steps, first_step)


def _warm_up(schedule: Schedule, warmup_steps: int, first_step: float) -> Schedule:
    def warmed_up(step: jax.Array) -> jax.Array:
        steps = (step + 1).astype(jnp.float32) - first_step
        return schedule(step) * jnp.minimum(1.0, steps / warmup_steps)

    return warmed_up if warmup_steps else schedule


class RateState(NamedTuple):
    """State of `scale_by_rate`; `factor`, `best` and `stale` belong to `drop_on_plateau`."""

    step: jax.Array  # int32[]
    applied: jax.Array  # float32[]: the rate of the last update
    factor: jax.Array  # float32[]: the factor by which plateaus have lowered the rate, 1 at first
    backoff: jax.Array  # float32[]: the factor by which divergence has lowered it, 1 at first
    best: jax.Array  # float32[]: the lowest validation error so far
    stale: jax.Array  # int32[]: evaluations since `best`


def scale_by_rate(
    schedule: Schedule,
    bias_rate: float = 1.0,
    layer_rates: Mapping[str, float] | None = None,
    bias_schedule: Schedule | None = None,
) -> optax.GradientTransformation:
    """Maps the update u to −ε·u with ε = schedule(step) · factor · backoff.

    ε is multiplied by `bias_rate` for biases, and by the layer's factor in `layer_rates`. With a
    `bias_schedule`, ε is bias_schedule(step) · backoff for biases, times the same two factors.
    """

    def init(params: optax.Params) -> RateState:
        del params
        return RateState(  # no two fields share an array, so that all can be donated to a step
            step=jnp.zeros((), jnp.int32),
            applied=jnp.zeros((), jnp.float32),
            factor=jnp.ones((), jnp.float32),
            backoff=jnp.ones((), jnp.float32),
            # Larger than any error, but finite, since `jax.debug_infs` would stop at infinity.
            best=jnp.full((), jnp.finfo(jnp.float32).max, jnp.float32),
            stale=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: RateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RateState]:
        del params
        rate = jnp.asarray(schedule(state.step), jnp.float32) * state.factor * state.backoff
        of_biases = rate
        if bias_schedule:
            of_biases = jnp.asarray(bias_schedule(state.step), jnp.float32) * state.backoff

        def scale(path: Any, u: jax.Array) -> jax.Array:
            own = bias_rate if _is_bias(path) else 1.0
            own *= (layer_rates or {}).get(_layer(path), 1.0)
            return u * (-(of_biases if _is_bias(path) else rate) * own).astype(u.dtype)

        updates = jax.tree_util.tree_map_with_path(scale, updates)
        return updates, state._replace(step=state.step + 1, applied=rate)

    return optax.GradientTransformation(init, update)


def end_layers(layer_ends: Mapping[str, int]) -> optax.GradientTransformation:
    """Makes the updates of each of these layers zero after so many steps."""

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        del params

        def end(path: Any, u: jax.Array) -> jax.Array:
            last = layer_ends.get(_layer(path))
            return u if last is None else jnp.where(state.count < last, u, jnp.zeros_like(u))

        updates = jax.tree_util.tree_map_with_path(end, updates)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def accumulate_velocity(momentum: float) -> optax.GradientTransformationExtraArgs:
    """Maps the update u to the velocity v ← momentum · v + u, like `optax.trace`.

    Its `update` takes an argument `finite`, a bool[], True by default. If it is False, the velocity
    stays unchanged, to the bit. A velocity that overflows becomes the largest finite number.
    """

    def update(
        updates: optax.Updates,
        state: optax.TraceState,
        params: optax.Params | None = None,
        *,
        finite: bool | jax.Array = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.TraceState]:
        del params, extra_args
        # The choice is made here, before the parameters are updated, so that XLA can update
        # velocities and parameters in place, without a copy of either.
        velocity = jax.tree.map(
            lambda u, v: jnp.where(finite, jnp.nan_to_num(momentum * v + u), v),
            updates,
            state.trace,
        )
        return velocity, optax.TraceState(velocity)

    return optax.GradientTransformationExtraArgs(optax.trace(momentum).init, update)


def applied_rate(opt_state: optax.OptState) -> jax.Array:
    """The learning rate of the last update, float32[]."""
    return _rate_state(opt_state).applied


def drop_on_plateau(
    opt_state: optax.OptState,
    error: float | jax.Array,
    *,
    patience: int = 1,
    drop_factor: float = 0.1,
    max_drops: int = 3,
) -> optax.OptState:
    """The state after an evaluation: the rate drops when the error has stopped improving.

    The paper's rule (section 5): "divide the learning rate by 10 when the validation error rate
    stopped improving with the current learning rate", three times in all.

    Args:
      opt_state: the state of an optimizer from `create_optimizer` with the rule "paper" (the decay
        of the notebook's rule follows the schedule alone).
      error: validation error, such as 1 − top-1 accuracy; smaller is better.
      patience: evaluations without a new best, at the current rate, before a drop; ≥ 1.
      drop_factor: the factor by which a drop multiplies the rate.
      max_drops: the rate never falls below `drop_factor ** max_drops` of the schedule's.
    """
    old = _rate_state(opt_state)
    error = jnp.asarray(error, jnp.float32)
    stale = jnp.where(error < old.best, 0, old.stale + 1)
    # The threshold is half a drop above the lowest factor, so that rounding has no influence.
    drop = (stale >= patience) & (old.factor > drop_factor ** (max_drops - 0.5))
    new = old._replace(
        factor=jnp.where(drop, old.factor * drop_factor, old.factor),
        best=jnp.minimum(error, old.best),
        stale=jnp.where(drop, 0, stale),
    )
    return _with_rate_state(opt_state, new)


def backoff(opt_state: optax.OptState) -> jax.Array:
    """The factor by which divergence has lowered the learning rate, float32[], 1 at first."""
    return _rate_state(opt_state).backoff


def with_backoff(opt_state: optax.OptState, value: float | jax.Array) -> optax.OptState:
    """The state with another `backoff`, in (0, 1], by which all later rates are multiplied.

    The paper has no such rule. After divergence, an older checkpoint continues with half the
    backoff of the diverged state: `with_backoff(restored, backoff(diverged) / 2)`. With the
    notebook's rule the decay follows the schedule alone, as in `drop_on_plateau`.
    """
    old = _rate_state(opt_state)
    return _with_rate_state(opt_state, old._replace(backoff=jnp.asarray(value, jnp.float32)))


def only_finite(
    optimizer: optax.GradientTransformation,
    keeps_itself: Callable[[Any], bool] | None = None,
) -> OnlyFinite:
    """Makes any optax transformation an `OnlyFinite`; an `OnlyFinite` is returned unchanged.

    Args:
      optimizer: an optax transformation.
      keeps_itself: tells whether a part of the state handles `finite` itself, and so is left alone;
        None: no part does.
    """
    if isinstance(optimizer, OnlyFinite):
        return optimizer
    whole = optax.with_extra_args_support(optimizer)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        finite: bool | jax.Array = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new = whole.update(updates, state, params, finite=finite, **extra_args)

        def keep(new: Any, old: Any) -> Any:
            return new if keeps_itself and keeps_itself(new) else jnp.where(finite, new, old)

        return updates, jax.tree.map(keep, new, state, is_leaf=keeps_itself)

    return OnlyFinite(whole.init, update)


def _chain(*parts: optax.GradientTransformation) -> OnlyFinite:
    return only_finite(optax.chain(*parts), keeps_itself=_is_velocity)


def _is_velocity(state: Any) -> bool:
    return isinstance(state, optax.TraceState)


def _with_rate_state(opt_state: optax.OptState, new: RateState) -> optax.OptState:
    return jax.tree.map(
        lambda s: new if isinstance(s, RateState) else s,
        opt_state,
        is_leaf=lambda s: isinstance(s, RateState),
    )


def _rate_state(opt_state: optax.OptState) -> RateState:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, RateState))
    (state,) = (leaf for leaf in leaves if isinstance(leaf, RateState))
    return state


def _is_bias(path: Any) -> bool:
    return path[-1].key == "bias"


def _layer(path: Any) -> str:
    return path[-2].key if len(path) > 1 else ""
