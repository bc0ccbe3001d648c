"""Builds the parts of a run from its configuration: optimizer, compiled steps and state."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_alexnet.config.schema import Config, OptimizerConfig
from flax_alexnet.data.augment import augment, preprocess
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.parallel.layouts import Layout
from flax_alexnet.training.metrics import cross_entropy
from flax_alexnet.training.optimizer import (
    Schedule,
    create_decay,
    create_optimizer,
    create_schedule,
)
from flax_alexnet.training.step import Totals, TrainState, eval_step, train_step, zero_totals
from flax_alexnet.utils.user_folders import cache_folder


class LayerSettings(NamedTuple):
    """What the optimizer does differently for some layers, by their names."""

    rates: Mapping[str, float] = {}  # factors of the learning rate
    decays: Mapping[str, float] = {}  # weight decays
    ends: Mapping[str, float] = {}  # epochs after which layers keep their values


ALL_ALIKE = LayerSettings()


def make_optimizer(
    config: OptimizerConfig,
    steps_per_epoch: float,
    epochs: float = 1.0,
    layers: LayerSettings = ALL_ALIKE,
    first_step: float = 0.0,
) -> optax.GradientTransformation:
    """The optimizer that a configuration describes, with its epochs turned into steps.

    Args:
      config: the configuration.
      steps_per_epoch: steps of an epoch.
      epochs: the length of the run, which schedules that fall to its end need.
      layers: what applies to some layers only.
      first_step: the step at which epoch 0 begins; see `create_schedule`.
    """
    timing = steps_per_epoch, epochs, first_step
    of_biases = _config_of_biases(config)
    return create_optimizer(
        _make_schedule(config, *timing),
        config.momentum,
        config.weight_decay,
        rule=config.rule,
        bias_rate=config.bias_rate,
        bias_schedule=None if of_biases == config else _make_schedule(of_biases, *timing),
        layer_rates=layers.rates,
        layer_decays=layers.decays,
        layer_ends={
            name: round(first_step + epoch * steps_per_epoch) for name, epoch in layers.ends.items()
        },
        decay_biases=config.decay_biases,
        clip_norm=config.clip_norm,
    )


def _config_of_biases(config: OptimizerConfig) -> OptimizerConfig:
    """The configuration of which the schedule is that of biases."""
    if not config.drop_biases:
        return dataclasses.replace(config, schedule="constant")
    final_rate, levels = config.bias_final_rate, config.bias_rate_levels
    return dataclasses.replace(
        config,
        final_rate=config.final_rate if final_rate is None else final_rate,
        rate_levels=config.rate_levels if levels is None else levels,
    )


def _make_schedule(
    config: OptimizerConfig, steps_per_epoch: float, epochs: float, first_step: float
) -> Schedule:
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "exponential" or config.schedule == "cosine":
        return create_decay(
            config.schedule,
            config.learning_rate,
            epochs * steps_per_epoch,
            final_rate=config.final_rate,
            levels=config.rate_levels,
            warmup_steps=warmup_steps,
            first_step=first_step,
        )
    drop_epochs = config.drop_epochs if config.schedule == "steps" else ()
    return create_schedule(
        config.learning_rate,
        boundaries=[round(first_step + epoch * steps_per_epoch) for epoch in drop_epochs],
        drop_factor=config.drop_factor,
        warmup_steps=warmup_steps,
        first_step=first_step,
    )


def compile_steps(
    config: Config,
    model: AlexNet,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    template: TrainState,
    frozen: Collection[str] = (),
) -> tuple[Callable[..., tuple[TrainState, jax.Array]], Callable[..., Totals]]:
    """The training and the evaluation step as jitted functions over a layout's mesh.

    The state is sharded as the layout says, and is donated to the step, which reuses its buffers.
    Batches are split over the devices, and XLA inserts the sum of the gradients over the devices.
    """
    replicated, batch, state = layout.replicated, layout.batch, shardings(template)
    model = model.clone(partition=layout.partition)
    settings = config.augment

    def augment_fn(key: jax.Array, images: jax.Array, mean: jax.Array) -> jax.Array:
        return augment(
            key,
            images,
            config.preprocessing(mean),
            crop=settings.random_crop,
            flip=settings.flip,
            noise=settings.color_noise,
            area=settings.resized_area,
            chunk=settings.chunk,
        )

    def preprocess_fn(images: jax.Array, mean: jax.Array) -> jax.Array:
        return preprocess(images, config.preprocessing(mean))

    step_fn = jax.jit(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            augment=augment_fn,
            frozen=frozen,
            loss=functools.partial(cross_entropy, smoothing=settings.label_smoothing),
            mixup_alpha=settings.mixup,
            average_decay=config.optimizer.average or 0.0,
        ),
        in_shardings=(state, batch, replicated),
        out_shardings=(state, replicated),
        donate_argnums=0,
    )
    eval_fn = jax.jit(
        functools.partial(eval_step, model=model, preprocess=preprocess_fn),
        in_shardings=(replicated, state.evaluated, replicated, batch),
        out_shardings=replicated,
    )
    return step_fn, eval_fn


def state_template(
    init_fn: Callable[..., TrainState], image_size: int, layout: Layout
) -> TrainState:
    """Shapes, types and shardings of the state that `init_fn` makes of a key and a mean image."""
    mean = jax.ShapeDtypeStruct((image_size, image_size, 3), jnp.float32)
    shapes = jax.eval_shape(init_fn, jax.random.key(0), mean)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        layout.shardings(shapes),
    )


def shardings(template: TrainState) -> Any:
    """Where each array of the state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, template)


def initialize(
    init_fn: Callable[..., TrainState],
    key: jax.Array,
    mean: np.ndarray,
    template: TrainState,
    initial: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step, with its final sharding; see `create_state`."""
    # The program runs once, so it is compiled with the fewest optimizations that give the same
    # bits. For the notebook's model the compilation then takes 2.5 s instead of 6.9 s; drawing the
    # parameters takes 6 s either way.
    options = {"xla_backend_optimization_level": 1}
    init = jax.jit(init_fn, out_shardings=shardings(template), compiler_options=options)
    return init(key, mean, initial)


def empty_totals(layout: Layout) -> Totals:
    """Totals over no images, on all devices."""
    return jax.jit(zero_totals, out_shardings=layout.replicated)()


def gather_params(params: Any, layout: Layout) -> Any:
    """All parameters on this host, from all devices; all processes must call it."""
    collect = jax.jit(lambda tree: tree, out_shardings=layout.replicated)
    return jax.tree.map(np.asarray, collect(params))


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start is quicker."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # the user has chosen a place
    folder = cache_folder()
    if folder is None:
        print(
            "this user has no home folder for a cache of compiled programs, so each start compiles "
            "them again; set XDG_CACHE_HOME to a folder for the cache"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX caches only programs that took a second to compile, but the many small ones
    # take as long together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
