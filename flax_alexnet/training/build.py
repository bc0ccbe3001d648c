"""Builds the parts of a run from its configuration: optimizer, compiled steps and state."""

import functools
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_alexnet.config.schema import Config, OptimizerConfig
from flax_alexnet.data.augment import augment, preprocess
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.parallel.layouts import Layout
from flax_alexnet.training.optimizer import create_optimizer, create_schedule
from flax_alexnet.training.step import Totals, TrainState, eval_step, train_step, zero_totals
from flax_alexnet.utils.user_folders import cache_folder


def make_optimizer(
    config: OptimizerConfig,
    steps_per_epoch: float,
    layer_rates: Mapping[str, float] | None = None,
    first_step: float = 0.0,
) -> optax.GradientTransformation:
    """The optimizer that a configuration describes, with its epochs turned into steps.

    Epoch 0 begins at `first_step`; see `create_schedule`.
    """
    drop_epochs = config.drop_epochs if config.schedule == "steps" else ()
    schedule = create_schedule(
        config.learning_rate,
        boundaries=[round(first_step + epoch * steps_per_epoch) for epoch in drop_epochs],
        drop_factor=config.drop_factor,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        first_step=first_step,
    )
    return create_optimizer(
        schedule,
        config.momentum,
        config.weight_decay,
        rule=config.rule,
        bias_rate=config.bias_rate,
        layer_rates=layer_rates,
        decay_biases=config.decay_biases,
        clip_norm=config.clip_norm,
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
        )

    def preprocess_fn(images: jax.Array, mean: jax.Array) -> jax.Array:
        return preprocess(images, config.preprocessing(mean))

    step_fn = jax.jit(
        functools.partial(
            train_step, model=model, optimizer=optimizer, augment=augment_fn, frozen=frozen
        ),
        in_shardings=(state, batch, replicated),
        out_shardings=(state, replicated),
        donate_argnums=0,
    )
    eval_fn = jax.jit(
        functools.partial(eval_step, model=model, preprocess=preprocess_fn),
        in_shardings=(replicated, state.params, replicated, batch),
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
