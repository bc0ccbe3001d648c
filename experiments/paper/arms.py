"""The arms of the experiments on CIFAR-10: recipes that differ from one another in one thing.

`claims.py` trains an arm with several seeds by running this file, once for each:

    python experiments/paper/arms.py base 0 --workdir runs/base-0

It trains, measures, and prints the measures as a line of JSON. Started again, it goes on.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from flax_alexnet.config.recipes import parse_config
from flax_alexnet.models.architectures import (
    CUDA_CONVNET_11PCT,
    CUDA_CONVNET_18PCT,
    CUDA_CONVNET_80SEC,
    Architecture,
    Dense,
    Dropout,
    Layer,
    register,
)
from flax_alexnet.utils.errors import UserError, exit_code

Change = Callable[[Layer], Sequence[Layer]]


def changed(table: Architecture, name: str, change: Change) -> None:
    """Registers a variant that has, for each layer of another, the layers that `change` returns."""
    layers = [new for layer in table.layers for new in change(layer)]
    register(dataclasses.replace(table, name=name, layers=tuple(layers)))


def with_fields(**fields: Mapping[str, Any]) -> Change:
    """A change of fields of some layers, by their names."""
    return lambda layer: [dataclasses.replace(layer, **fields.get(layer.name, {}))]


def without(*names: str) -> Change:
    """A change that leaves out layers, by their names."""
    return lambda layer: [] if layer.name in names else [layer]


def wide_dense(layer: Layer) -> Sequence[Layer]:
    """The dense layer of 80sec with 1,024 units, and dropout after it."""
    if layer.name != "fc64":
        return [layer]
    return [Dense("fc1024", 1024, kernel_std=0.01), Dropout("dropout1024")]


PAIR, HALF, ONE = {"groups": 2}, {"features": 16}, {"bias": 1.0}
NO_OVERLAP = {f"pool{stage}": {"kernel_size": 2} for stage in (1, 2, 3)}

for name, change in {
    "pool2": with_fields(**NO_OVERLAP),
    "no_norm": without("map_norm1", "map_norm2"),
    "towers": with_fields(conv2=PAIR),
    "apart": with_fields(conv2=PAIR, conv3=PAIR),
    "half": with_fields(conv1=HALF, conv2=HALF),
    "without_conv2": without("conv2"),
    "without_conv3": without("conv3"),
    "biases_of_one": with_fields(conv2=ONE, conv3=ONE),
}.items():
    changed(CUDA_CONVNET_18PCT, f"claims_{name}", change)
changed(CUDA_CONVNET_80SEC, "claims_dense", wide_dense)
changed(CUDA_CONVNET_11PCT, "claims_11pct_no_norm", without("norm1", "norm2"))

# Ten epochs of 24 × 24 crops, with drops of the rate after eight and nine.
SHORT = (
    *("--recipe", "cifar10-18pct"),
    *("--augment.crop-size", "24", "--augment.random-crop", "--augment.flip"),
    *("--optimizer.layer-decays", "fc10=0.004"),
    *("--epochs", "10", "--optimizer.drop-epochs", "8", "9"),
    *("--eval-epochs", "2"),
)
NOT_AUGMENTED = ("--augment.no-random-crop", "--augment.no-flip")
# A rate that falls to nothing in the same ten epochs.
COSINE = (
    *("--optimizer.schedule", "cosine", "--optimizer.warmup-epochs", "1"),
    "--optimizer.drop-biases",
)
LONG = ("--epochs", "20", "--optimizer.drop-epochs", "18", "19")


# Half of the classes each, as folders of images that `make_halves` writes.
FIRST_HALF, SECOND_HALF = (
    ("--data.name", f"folder:{{folder}}/{half}", "--model.num-classes", "5")
    for half in ("first_half", "second_half")
)
# Section 3.1: no regularization and no augmentation, and a constant rate. Training goes on until
# the error of half an epoch is 25 %, or to the last epoch.
TARGET = 0.25
RATES = {"relu": (0.002, 0.004, 0.008), "tanh": (0.004, 0.008, 0.016)}
MOST_EPOCHS = {"relu": 20, "tanh": 80}
PART = 5  # epochs after which the error is looked at


@dataclasses.dataclass(frozen=True)
class Arm:
    """A configuration that is trained with several seeds.

    Attributes:
      flags: those of `python -m flax_alexnet.train`; {folder} is the folder of all runs.
      seeds: how many seeds are trained.
      measures: what else is measured than losses and errors; see `measures.py`.
      start: an arm whose run with the same seed it starts from.
      until: a training error at which the training ends early.
    """

    flags: tuple[str, ...]
    seeds: int = 5
    measures: tuple[str, ...] = ()
    start: str | None = None
    until: float | None = None


def _until_target(activation: str, rate: float) -> Arm:
    flags = (
        *("--recipe", "cifar10-19pct", "--model.activation", activation),
        *("--optimizer.learning-rate", str(rate), "--optimizer.schedule", "constant"),
        *("--optimizer.weight-decay", "0", "--optimizer.layer-decays"),
        *("--epochs", str(MOST_EPOCHS[activation]), "--eval-epochs", str(PART)),
        *("--log-every", "195"),  # half an epoch
    )
    return Arm(flags, seeds=3, until=TARGET)


def _variant(name: str, *flags: str, measures: tuple[str, ...] = ()) -> Arm:
    return Arm((*SHORT, "--model.variant", name, *flags), measures=measures)


def _published(name: str, *flags: str, seeds: int = 1) -> Arm:
    flags = ("--recipe", f"cifar10-{name}", "--eval-epochs", "5", "--log-every", "400", *flags)
    return Arm(flags, seeds=seeds, measures=("crops",))


ARMS = {
    "base": Arm(SHORT, measures=("crops", "neighbours", "probabilities")),
    "no_norm": _variant("claims_no_norm"),
    "pool2": _variant("claims_pool2"),
    "not_augmented": Arm((*SHORT, *NOT_AUGMENTED)),
    "pool2_not_augmented": _variant("claims_pool2", *NOT_AUGMENTED),
    "color_noise": Arm((*SHORT, "--augment.color-noise", "cuda-convnet")),
    "towers": _variant("claims_towers", measures=("towers",)),
    "apart": _variant("claims_apart", measures=("towers",)),
    "half": _variant("claims_half"),
    "without_conv2": _variant("claims_without_conv2"),
    "without_conv3": _variant("claims_without_conv3"),
    "narrow": Arm((*SHORT, "--model.width", "0.5")),
    "wide": Arm((*SHORT, "--model.width", "1.5")),
    "no_decay": Arm((*SHORT, "--optimizer.weight-decay", "0", "--optimizer.layer-decays")),
    "paper_decay": Arm((*SHORT, "--optimizer.weight-decay", "0.0005", "--optimizer.layer-decays")),
    "start": Arm((*SHORT, "--epochs", "1", "--eval-epochs", "0.1"), measures=("dead",)),
    "start_biases_of_one": _variant(
        "claims_biases_of_one", "--epochs", "1", "--eval-epochs", "0.1", measures=("dead",)
    ),
    "dense": _variant("claims_dense", *NOT_AUGMENTED, *LONG, "--model.dropout-rate", "0"),
    "dense_dropout": _variant("claims_dense", *NOT_AUGMENTED, *LONG),
    "11pct": _variant("cuda_convnet_11pct"),
    "11pct_no_norm": _variant("claims_11pct_no_norm"),
    "13pct": _variant("cuda_convnet_13pct"),
    "he": Arm((*SHORT, "--model.initialization", "he")),
    "cosine": Arm((*SHORT, *COSINE)),
    "label_smoothing": Arm((*SHORT, "--augment.label-smoothing", "0.1")),
    "mixup": Arm((*SHORT, "--augment.mixup", "0.2")),
    "resized_crops": Arm((*SHORT, "--augment.resized-area", "0.4")),
    "average": Arm((*SHORT, "--optimizer.average", "0.998")),
    "modern": Arm(
        (
            *SHORT,
            *COSINE,
            *("--model.initialization", "he", "--augment.label-smoothing", "0.1"),
            *("--augment.mixup", "0.2", "--augment.resized-area", "0.4"),
            *("--optimizer.average", "0.998"),
        ),
        measures=("crops",),
    ),
    "first_half": Arm((*SHORT, *FIRST_HALF)),
    "second_half": Arm((*SHORT, *SECOND_HALF)),
    "second_half_pretrained": Arm((*SHORT, *SECOND_HALF), start="first_half"),
    **{
        f"{activation}_{rate}": _until_target(activation, rate)
        for activation, rates in RATES.items()
        for rate in rates
    },
    "80sec": _published("80sec", seeds=5),
    "19pct": _published("19pct"),
    "18pct": _published("18pct"),
    "13pct_published": _published("13pct"),
    "11pct_published": _published("11pct"),
    "11pct_shortened": _published(
        "11pct", "--epochs", "140", "--optimizer.drop-epochs", "120", "130"
    ),
}


@dataclasses.dataclass(frozen=True)
class ArmArguments:
    """Trains an arm with one seed, and prints what was measured as a line of JSON."""

    arm: tyro.conf.Positional[str]
    """A name in ARMS."""
    seed: tyro.conf.Positional[int]
    """The seed of the run."""
    workdir: Path
    """The working directory of the run."""
    data_dir: Path | None = None
    """Folder with the prepared cifar10; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    quick: bool = False
    """Trains a narrow model on few images, which shows that it works."""


# With --quick: half a minute, and numbers that mean nothing.
QUICK = ("--epochs", "1", "--eval-epochs", "0.5", "--batch-size", "32", "--model.width", "0.25")
QUICK_SPLITS = ("--data.train-split", "train[:256]", "--data.eval-split", "test[:128]")


def flags_of(arguments: ArmArguments) -> list[str]:
    """The flags of `python -m flax_alexnet.train` for an arm and a seed."""
    arm, folder = ARMS[arguments.arm], arguments.workdir.parent
    flags = [flag.format(folder=folder) for flag in arm.flags]
    flags += ["--seed", str(arguments.seed), "--data.threads", "1"]
    flags += ["--workdir", str(arguments.workdir)]
    if arm.start:
        flags += ["--init-from", str(folder / f"{arm.start}-{arguments.seed}")]
    if arguments.data_dir and "--data.name" not in flags:
        flags += ["--data.data-dir", str(arguments.data_dir)]
    if arguments.quick:
        flags += (*QUICK, *(QUICK_SPLITS if "--data.name" not in flags else ()))
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and measures; returns the exit code of the training."""
    from measures import measure, reached  # it imports JAX

    from flax_alexnet.training.loop import train
    from flax_alexnet.weights.finetuning import adapt

    arguments = tyro.cli(ArmArguments, args=argv)
    arm = ARMS[arguments.arm]
    try:
        config = parse_config(flags_of(arguments), adapt=adapt)
        most, config = config.epochs, dataclasses.replace(config, epochs=0)
        while config.epochs < most:
            part = most if arm.until is None else PART
            config = dataclasses.replace(config, epochs=min(most, config.epochs + part))
            if code := train(config):
                return code
            if arm.until is not None and reached(config.workdir, arm.until):
                break
        print(json.dumps(measure(config, arm.measures)), flush=True)
    except UserError as error:
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
