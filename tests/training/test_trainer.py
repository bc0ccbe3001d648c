"""The parts of a run: its newest state, its batches, its evaluation."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.training.setup import set_up
from flax_alexnet.training.trainer import make_trainer
from tests.runs import arguments


@pytest.fixture(scope="module")
def trainer(data_dir, tmp_path_factory):
    workdir: Path = tmp_path_factory.mktemp("run")
    config = parse_config(arguments(workdir, data_dir))
    with contextlib.ExitStack() as held:
        setup = set_up(config, held)
        checkpoints = held.enter_context(
            contextlib.closing(Checkpoints(workdir / "checkpoints", 60))
        )
        yield make_trainer(config, setup, checkpoints)


def test_without_a_checkpoint_the_newest_state_is_the_first(trainer):
    step, state = trainer.newest()
    assert (step, int(state.step)) == (0, 0)
    mean = trainer.setup.data.train.take(range(64))["image"].mean(axis=0)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-4)


def test_batches_go_on_after_those_of_the_steps_made(trainer):
    batches = trainer.batches_from(0)
    next(batches)
    second, other = next(batches), next(trainer.batches_from(1))
    for name in ("image", "label"):
        np.testing.assert_array_equal(second[name], other[name])


def test_an_evaluation_is_over_all_images(trainer):
    _, state = trainer.newest()
    evaluated = trainer.evaluate(state)
    assert evaluated.keys() == {"eval_loss", "eval_top1", "eval_top5"}
    assert evaluated["eval_top1"] * 20 == pytest.approx(round(evaluated["eval_top1"] * 20))
    assert evaluated["eval_top5"] >= evaluated["eval_top1"]


def test_a_diagnosis_sees_images_as_the_model_does(trainer):
    _, state = trainer.newest()
    params, images = trainer.inspect(state)
    size = trainer.config.augment.crop_size
    assert images.shape == (64, size, size, 3)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
