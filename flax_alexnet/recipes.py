"""Configurations worth starting from. A recipe is a value; flags override any part of it."""

import dataclasses
from collections.abc import Sequence

from flax_alexnet.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    parse,
    validate,
    value_of,
)
from flax_alexnet.errors import UserError, unknown

QUICKSTART = Config(
    recipe="quickstart",
    batch_size=32,
    epochs=24,
    log_every=100,
    data=DataConfig(name="shapes_and_textures", image_size=72),
    model=ModelConfig(variant="notebook", width=0.25, dropout_rate=0.2, initialization="he"),
    augment=AugmentConfig(crop_size=64, scale=1 / 64),
    optimizer=OptimizerConfig(schedule="steps", drop_epochs=(20,)),
)

NOTEBOOK = Config(
    recipe="notebook",
    data=DataConfig(name="imagenet2012"),
    model=ModelConfig(variant="notebook"),
    optimizer=OptimizerConfig(rule="notebook"),
)

PAPER = Config(
    recipe="paper",
    data=DataConfig(name="imagenet2012"),
    model=ModelConfig(variant="paper"),
    augment=AugmentConfig(color_noise="cuda-convnet"),
    optimizer=OptimizerConfig(schedule="plateau"),
)

CIFAR10 = Config(
    recipe="cifar10",
    epochs=13,
    data=DataConfig(name="cifar10", image_size=32),
    model=ModelConfig(variant="cuda_convnet_cifar10"),
    augment=AugmentConfig(crop_size=32, random_crop=False, flip=True),
    optimizer=OptimizerConfig(
        learning_rate=0.001,
        weight_decay=0.004,
        bias_rate=2.0,
        decay_biases=False,
        schedule="steps",
        drop_epochs=(10, 12),
    ),
)

RECIPES = {recipe.recipe: recipe for recipe in (QUICKSTART, NOTEBOOK, PAPER, CIFAR10)}


def parse_config(argv: Sequence[str], program: str = "flax_alexnet.train") -> Config:
    """The recipe that `--recipe` names, with every other flag applied and all values checked.

    Raises:
      UserError: an unknown recipe or flag, or a value out of its range.
    """
    name = value_of("--recipe", argv, default=QUICKSTART.recipe)
    if name not in RECIPES:
        raise UserError(unknown("recipe", name, RECIPES))
    config = parse(Config, argv, RECIPES[name], program)
    validate(config)
    return dataclasses.replace(config, workdir=config.workdir.expanduser())
