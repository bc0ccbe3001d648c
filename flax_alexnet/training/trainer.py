"""The parts of a run that do not change from step to step: model, compiled steps, data."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.config.schema import Config
from flax_alexnet.data.augment import preprocess
from flax_alexnet.data.loader import evaluation_batches, training_batches
from flax_alexnet.data.mean_image import mean_image
from flax_alexnet.data.prefetch import prefetch
from flax_alexnet.models.alexnet import AlexNet, make_model
from flax_alexnet.parallel.distributed import total
from flax_alexnet.training.build import (
    compile_steps,
    empty_totals,
    gather_params,
    initialize,
    make_optimizer,
    state_template,
)
from flax_alexnet.training.due import Schedule
from flax_alexnet.training.setup import Setup
from flax_alexnet.training.step import Totals, TrainState, create_state
from flax_alexnet.weights.pretrained import Params

SAMPLE = 64  # images from which a run that does not train is diagnosed


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The parts of a run that its loop uses.

    Attributes:
      config: the configuration of the run.
      setup: the data, the layout and the history of the run.
      schedule: when the run logs and evaluates, and when it ends.
      checkpoints: the checkpoints of the run.
      model: the module that is trained.
      init_fn: makes the state before the first step.
      template: shapes, types and shardings of a state.
      step_fn: the compiled training step.
      eval_fn: the compiled evaluation step.
    """

    config: Config
    setup: Setup
    schedule: Schedule
    checkpoints: Checkpoints
    model: AlexNet
    init_fn: Callable[..., TrainState]
    template: TrainState
    step_fn: Callable[..., tuple[TrainState, jax.Array]]
    eval_fn: Callable[..., Totals]

    @property
    def key(self) -> jax.Array:
        """The PRNG key from which all random numbers of the run are derived."""
        return jax.random.key(self.config.seed)

    def newest(self) -> tuple[int, TrainState]:
        """The newest saved step with its state, or step 0 with the initial state.

        The state also holds the step. Reading it there would block until the device has drawn all
        parameters, which it does while the host traces and compiles the training step.
        """
        latest = self.checkpoints.latest_step()
        if latest is not None:
            return latest, self.checkpoints.restore(latest, self.template)
        if self.setup.start:
            mean, initial = self.setup.start.mean, self.setup.start.params
        else:
            mean, initial = mean_image(self.setup.data.train, self.setup.data.share, total), {}
        key = jax.random.fold_in(self.key, 2**32 - 1)
        return 0, initialize(self.init_fn, key, mean, self.template, initial)

    def batches_from(self, step: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of the steps after `step`, on their devices ahead of time."""
        layout, batch_size = self.setup.layout, self.config.batch_size
        batches = training_batches(
            self.setup.data.train,
            batch_size,
            seed=self.config.seed,
            start=self.schedule.epochs.seen(step),
            threads=self.config.data.threads,
            rows=layout.rows(batch_size),
        )
        return prefetch(layout.put(batch, batch_size) for batch in batches)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss, top-1 and top-5 accuracy over all images to evaluate on, each counted once."""
        layout, size = self.setup.layout, self.config.batch_size
        batches = evaluation_batches(
            self.setup.data.eval, size, threads=self.config.data.threads, rows=layout.rows(size)
        )
        totals = empty_totals(layout)
        for batch in batches:
            totals = self.eval_fn(totals, state.evaluated, state.mean, layout.put(batch, size))
        images = float(totals["images"])
        return {f"eval_{name}": float(totals[name]) / images for name in ("loss", "top1", "top5")}

    def inspect(self, state: TrainState) -> tuple[Params, jax.Array]:
        """Parameters on this host, and preprocessed images; all processes must call it together."""
        train = self.setup.data.train
        sample = train.take(range(min(SAMPLE, len(train))))["image"]
        images = preprocess(sample, self.config.preprocessing(np.asarray(state.mean)))
        return gather_params(state.evaluated, self.setup.layout), images


def make_trainer(config: Config, setup: Setup, checkpoints: Checkpoints) -> Trainer:
    """The parts of a run; nothing is compiled yet."""
    start = checkpoints.latest_step() or 0
    epochs = setup.history.epochs.going_on(start, config.batch_size)
    model = make_model(**vars(config.model) | {"num_classes": setup.num_classes})
    optimizer = make_optimizer(
        config.optimizer,
        epochs.images / config.batch_size,
        config.epochs,
        setup.layer_settings,
        epochs.first_step,
    )
    init_fn: Any = functools.partial(
        create_state,
        model=model,
        optimizer=optimizer,
        crop_size=config.augment.crop_size,
        frozen=setup.frozen,
        averaged=config.optimizer.average is not None,
    )
    template = state_template(init_fn, config.data.image_size, setup.layout)
    step_fn, eval_fn = compile_steps(config, model, optimizer, setup.layout, template, setup.frozen)
    schedule = Schedule(
        epochs,
        total_steps=min(epochs.steps(config.epochs), config.steps or sys.maxsize),
        log_every=config.log_every,
        eval_epochs=config.eval_epochs,
    )
    return Trainer(config, setup, schedule, checkpoints, model, init_fn, template, step_fn, eval_fn)
