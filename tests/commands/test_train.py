"""`python -m flax_alexnet.train`."""

import numpy as np
import pytest

from flax_alexnet.train import main
from tests.runs import arguments, lines, read


def test_training_imports_neither_tensorflow_nor_torch(finished):
    assert finished[1].splitlines()[-1] == "foreign: []"


@pytest.mark.slow
def test_photographs_in_class_folders_train(shared_data, tmp_path):
    """Two hundred ImageNet photographs of many sizes, ten a class."""
    for index, path in enumerate(sorted((shared_data / "imagenet_samples").glob("*.JPEG"))):
        folder = tmp_path / "images" / f"class{index // 20}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(path)
    argv = arguments(tmp_path / "runs", tmp_path, "--data.name", f"folder:{tmp_path / 'images'}")
    assert main([*argv, "--steps", "999", "--epochs", "2.5", "--log-every", "99"]) == 0
    assert np.isfinite(read(tmp_path / "runs", "summary.json")["eval_loss"])
    training = [line for line in lines(tmp_path / "runs") if "train_loss" in line]
    epochs = [line["epoch"] for line in training]
    assert epochs[0] == 8 / 180, "the curve starts with the first step"
    assert set(epochs) > {1, 2}, "a line an epoch, though --log-every is 99"
    assert epochs[-1] == 2.5
