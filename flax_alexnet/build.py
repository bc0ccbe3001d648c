"""From a configuration to what a run is made of: model, optimizer, compiled steps, state."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flax_alexnet.augment import augment, preprocess
from flax_alexnet.checkpoint import Checkpoints
from flax_alexnet.config import Config, ModelConfig, OptimizerConfig
from flax_alexnet.data.examples import Examples, mean_image
from flax_alexnet.data.loader import evaluation_batches
from flax_alexnet.model import AlexNet
from flax_alexnet.optimizer import create_optimizer, create_schedule
from flax_alexnet.sharding import put_batch, replicated, split_batch
from flax_alexnet.step import Totals, TrainState, eval_step, train_step, zero_totals


def make_model(config: ModelConfig, num_classes: int) -> AlexNet:
    """The net that a configuration describes."""
    return AlexNet(
        variant=config.variant,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        dropout_rate=config.dropout_rate,
        width=config.width,
        relu_logits=config.relu_logits,
        initialization=config.initialization,
        activation={"relu": nn.relu, "tanh": nn.tanh}[config.activation],
    )


def make_optimizer(config: OptimizerConfig, steps_per_epoch: float) -> optax.GradientTransformation:
    """The optimizer that a configuration describes, with its epochs turned into steps."""
    drop_epochs = config.drop_epochs if config.schedule == "steps" else ()
    schedule = create_schedule(
        config.learning_rate,
        boundaries=[round(epoch * steps_per_epoch) for epoch in drop_epochs],
        drop_factor=config.drop_factor,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
    )
    return create_optimizer(
        schedule,
        config.momentum,
        config.weight_decay,
        rule=config.rule,
        bias_rate=config.bias_rate,
        decay_biases=config.decay_biases,
        clip_norm=config.clip_norm,
    )


def compile_steps(
    config: Config, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[..., tuple[TrainState, jax.Array]], Callable[..., Totals]]:
    """The training and the evaluation step as jitted functions over the mesh.

    The state is replicated and given up to the step (its buffers are used again); batches come
    split over the devices, and XLA adds the sum of gradients over them.
    """
    whole, split = replicated(mesh), split_batch(mesh)
    settings = config.augment
    augment_fn = functools.partial(
        augment,
        crop_size=settings.crop_size,
        crop=settings.random_crop,
        flip=settings.flip,
        noise=settings.color_noise,
        scale=settings.scale,
    )
    step_fn = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, augment=augment_fn),
        in_shardings=(whole, split, whole),
        out_shardings=whole,
        donate_argnums=0,
    )
    preprocess_fn = functools.partial(
        preprocess, crop_size=settings.crop_size, scale=settings.scale
    )
    eval_fn = jax.jit(
        functools.partial(eval_step, model=model, preprocess=preprocess_fn),
        in_shardings=(whole, whole, whole, split),
        out_shardings=whole,
    )
    return step_fn, eval_fn


def restore_or_create(
    checkpoints: Checkpoints,
    init_fn: Callable[..., TrainState],
    key: jax.Array,
    examples: Examples,
    image_size: int,
    mesh: Mesh,
) -> TrainState:
    """The newest saved state, or that before the first step; on the devices either way."""
    whole = replicated(mesh)
    latest = checkpoints.latest_step()
    if latest is None:
        mean = mean_image(examples)
        return jax.jit(init_fn, out_shardings=whole)(jax.random.fold_in(key, 2**32 - 1), mean)
    mean_shape = jax.ShapeDtypeStruct((image_size, image_size, 3), jnp.float32)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(init_fn, key, mean_shape),
    )
    return checkpoints.restore(latest, template)


def evaluate(
    eval_fn: Callable[..., Totals],
    state: TrainState,
    examples: Examples,
    batch_size: int,
    threads: int,
    mesh: Mesh,
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy over all examples, each counted once."""
    totals = jax.device_put(zero_totals(), replicated(mesh))
    for batch in evaluation_batches(
        examples,
        batch_size,
        threads=threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        totals = eval_fn(totals, state.params, state.mean, put_batch(batch, mesh))
    images = float(totals["images"])
    return {f"eval_{name}": float(totals[name]) / images for name in ("loss", "top1", "top5")}
