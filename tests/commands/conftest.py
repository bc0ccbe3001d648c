"""What the tests of several commands start from."""

import dataclasses

import numpy as np
import pytest

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.config.recipes import QUICKSTART
from flax_alexnet.config.schema import flatten
from flax_alexnet.training.run_directory import claim, record
from flax_alexnet.weights import safetensors_files
from tests.small_models import make_pretrained


@pytest.fixture
def run(pretrained, photographs, tmp_path):
    """A run of the model on photographs, started in another version of the program."""
    size = pretrained.preprocessing.image_size
    config = dataclasses.replace(
        QUICKSTART,
        model=pretrained.config,
        data=dataclasses.replace(
            QUICKSTART.data, name=f"folder:{photographs}", image_size=size, eval_split="test"
        ),
    )
    identity = flatten(config) | {
        "dataset.label_names": list(pretrained.label_names),
        "dataset.eval": 1,
    }
    for name in ("data.image_key", "data.label_key"):
        del identity[name]
    claim(tmp_path / "run", identity)
    record(tmp_path / "run", identity)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    state = {"params": pretrained.params, "mean": np.zeros((size, size, 3), np.float32)}
    checkpoints.save(3, state, {"eval_top1": 0.5})
    checkpoints.close()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A model whose weights are finite, and too large for what is computed from them."""
    pretrained = make_pretrained()
    for layer in ("conv1", "conv2"):
        pretrained.params[layer]["kernel"] *= np.float32(1e30)
    path = tmp_path_factory.mktemp("huge") / "huge.safetensors"
    safetensors_files.save(pretrained, path)
    return path
