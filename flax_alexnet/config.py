"""What a training run can be told: frozen dataclasses, their ranges, and the command line."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tyro

from flax_alexnet.architectures import ARCHITECTURES
from flax_alexnet.errors import UserError, unknown
from flax_alexnet.preprocessing import ResizeRule, Scale

# Beyond these a value is a slip of the keyboard.
LARGEST_NUMBER = 1e10
LARGEST_IMAGE = 8192
LARGEST_BATCH = 2**20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pictures, and at which size they enter the device."""

    name: str = "shapes_and_textures"
    """The embedded "shapes_and_textures", a TFDS name that has been prepared, or folder:PATH."""
    data_dir: Path | None = None
    """Where prepared datasets lie; none: TFDS_DATA_DIR or tensorflow_datasets in the home."""
    train_split: str = "train"
    """TFDS split to train on; slices such as train[:90%] work."""
    eval_split: str | None = None
    """TFDS split to evaluate on; none: validation where there is one, else test."""
    image_size: int = 256
    """Side in pixels to which pictures are brought before any crop."""
    resize: ResizeRule = "paper"
    """How: the paper's rule, torchvision's (bilinear), or Caffe's (warped to the square)."""
    threads: int = 2
    """Threads that decode and batch pictures."""
    max_bad: float = 0.001
    """Share of the pictures that may be unreadable and are skipped; more stop the run."""


@dataclasses.dataclass(frozen=True)
class UseDataConfig:
    """Pictures of a dataset that a trained net is used on."""

    name: str = ""
    """The embedded "shapes_and_textures", a TFDS name that has been prepared, or folder:PATH."""
    data_dir: Path | None = None
    """Where prepared datasets lie; none: TFDS_DATA_DIR or tensorflow_datasets in the home."""
    split: str | None = None
    """TFDS split; none: validation where there is one, else test. Of a folder: train, test or all;
    none: test, which training holds out."""


NO_DATASET = UseDataConfig()
EMBEDDED_DATASET = UseDataConfig(name="shapes_and_textures")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which net; the fields are those of AlexNet."""

    variant: str = "notebook"
    """notebook, paper, caffe, caffenet, torchvision or cuda_convnet_cifar10."""
    num_classes: int | None = None
    """Outputs; none: as many as the dataset has classes."""
    width: float = 1.0
    """Multiplier of the features of every layer but the last."""
    dropout_rate: float = 0.5
    """Share of units dropped where the variant has dropout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32 always."""
    initialization: Literal["published", "he"] = "published"
    """Initial values: the variant's own, or He et al.'s."""
    activation: Literal["relu", "tanh"] = "relu"
    """The function after each layer."""
    relu_logits: bool = False
    """The notebook's fault of a ReLU on the last layer."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What happens to pictures on the device; evaluation takes the central crop."""

    crop_size: int = 224
    """Side in pixels of what the net sees."""
    random_crop: bool = True
    """Crop at random places in training, else at the centre."""
    flip: bool = True
    """Mirror half of the pictures left to right in training."""
    color_noise: Literal["none", "cuda-convnet", "eigenvalues"] = "none"
    """PCA colour noise: as strong as in the original code, or by the eigenvalues in wide use."""
    scale: Scale = 1.0
    """What grey levels are multiplied with once the mean is subtracted, or one for each channel; 1
    in the original nets."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD with momentum and weight decay, and the schedule of its rate."""

    rule: Literal["paper", "notebook"] = "paper"
    """The paper's update, or the notebook's (decay multiplied by the rate twice)."""
    learning_rate: float = 0.01
    """Rate after warm-up and before any drop."""
    momentum: float = 0.9
    """Share of the velocity that is kept."""
    weight_decay: float = 0.0005
    """Share of the weights added to the gradient."""
    bias_rate: float = 1.0
    """Multiplier of the rate for biases; the original code and Caffe take 2."""
    decay_biases: bool = True
    """Whether biases decay; in the original code and Caffe they do not."""
    layer_rates: tuple[str, ...] = ()
    """Multipliers of the rate of some layers, such as conv.*=0.1 fc8=10 (patterns of names)."""
    clip_norm: float | None = None
    """Global norm down to which gradients are scaled; none: not at all."""
    schedule: Literal["constant", "steps", "plateau"] = "constant"
    """Constant; drops at drop_epochs; or drops when the validation error stops improving."""
    drop_epochs: tuple[float, ...] = ()
    """With steps: the epochs at which the rate drops."""
    drop_factor: float = 0.1
    """What a drop multiplies the rate with."""
    patience: int = 3
    """With plateau: evaluations without a new best before a drop."""
    max_drops: int = 3
    """With plateau: how many drops there can be."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """What lies and is computed on which device, and which processes take part."""

    layout: Literal["data", "zero", "hybrid", "towers"] = "data"
    """Whole copies; dense layers stored, or computed, in shares; or the paper's two towers."""
    mesh: tuple[int, ...] = ()
    """Devices along each axis of the layout (data; or data and model, or tower); none: see docs."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where all processes of a run meet; none: as a known launcher says."""
    num_processes: int | None = None
    """Processes of the run; 1 stays alone even where a launcher started several."""
    process_id: int | None = None
    """Which of them this one is, from 0."""
    heartbeat_timeout: int = 100
    """Seconds of silence after which a process counts as lost, and the others end."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    recipe: str = "quickstart"
    """Where the defaults come from: quickstart, notebook, paper, cifar10 or finetune."""
    workdir: Path = Path("runs")
    """Where all that the run writes goes; starting again in the same place resumes."""
    allow_changes: bool = False
    """Resume even though the configuration differs from the one that the run was started with."""
    seed: int = 0
    """Determines initial values, the order of pictures and every random draw."""
    init_from: Path | None = None
    """Start from a trained net: a weight file (see convert) or a run's --workdir. Its variant and
    preprocessing become the defaults; its last layer is replaced where the classes differ."""
    freeze: tuple[str, ...] = ()
    """Layers that keep their values, such as conv1,conv2 or conv.* (patterns of names)."""
    batch_size: int = 128
    """Pictures in a step, over all devices."""
    epochs: float = 90.0
    """Passes over the training pictures."""
    steps: int | None = None
    """Stop after this many steps, even if the epochs are not over."""
    eval_epochs: float = 1.0
    """Epochs between evaluations; each is followed by a checkpoint."""
    log_every: int = 50
    """Steps between lines of metrics."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """When the loss or a gradient is not finite: stop, or go back to the last checkpoint with half
    the rate, three times at most."""
    save_patience: float = 60.0
    """Minutes for which a run goes on although nothing can be saved, such as with a full disk."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()


# What may differ between the processes of a run, and when it is resumed.
LOCAL = frozenset(
    {
        "compilation_cache",
        "data.data_dir",
        "data.threads",
        "parallel.coordinator",  # only process 0 needs to know itself by another name
        "parallel.num_processes",
        "parallel.process_id",
    }
)
# What may also differ when a run is resumed: the result is the same but for rounding.
FREE_TO_CHANGE = LOCAL | {
    "workdir",
    "allow_changes",
    "on_divergence",
    "save_patience",
    "data.max_bad",
    "parallel.layout",
    "parallel.mesh",
    "parallel.heartbeat_timeout",
}


def validate(config: Config) -> None:
    """Raises UserError for the first value that is out of its range."""
    if config.model.variant not in ARCHITECTURES:
        raise UserError(unknown("variant", config.model.variant, ARCHITECTURES))
    for name, value in flatten(config).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, int | float) and not abs(n) <= LARGEST_NUMBER for n in numbers):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}; expected numbers up to {LARGEST_NUMBER:g}")
    data, model, optimizer = config.data, config.model, config.optimizer
    need_batch(config.batch_size)
    for flag, value, fits, expected in (
        ("epochs", config.epochs, config.epochs > 0, "more than 0"),
        ("steps", config.steps, config.steps is None or config.steps >= 1, "1 or more"),
        ("eval-epochs", config.eval_epochs, config.eval_epochs > 0, "more than 0"),
        ("log-every", config.log_every, config.log_every >= 1, "1 or more"),
        ("save-patience", config.save_patience, config.save_patience >= 0, "0 or more"),
        ("seed", config.seed, 0 <= config.seed < 2**32, "0 to 4294967295"),
        (
            "data.image-size",
            data.image_size,
            1 <= data.image_size <= LARGEST_IMAGE,
            f"1 to {LARGEST_IMAGE}",
        ),
        ("data.threads", data.threads, data.threads >= 1, "1 or more"),
        ("data.max-bad", data.max_bad, 0 <= data.max_bad <= 1, "0 to 1"),
        (
            "model.num-classes",
            model.num_classes,
            model.num_classes is None or model.num_classes >= 2,
            "2 or more",
        ),
        ("model.width", model.width, 0 < model.width <= 100, "more than 0, at most 100"),
        ("model.dropout-rate", model.dropout_rate, 0 <= model.dropout_rate < 1, "0 to below 1"),
        (
            "augment.crop-size",
            config.augment.crop_size,
            1 <= config.augment.crop_size <= data.image_size,
            f"1 to --data.image-size, which is {data.image_size}",
        ),
        (
            "augment.scale",
            config.augment.scale,
            np.min(config.augment.scale) > 0,
            "more than 0",
        ),
        (
            "optimizer.learning-rate",
            optimizer.learning_rate,
            optimizer.learning_rate > 0,
            "more than 0",
        ),
        ("optimizer.momentum", optimizer.momentum, 0 <= optimizer.momentum < 1, "0 to below 1"),
        (
            "optimizer.weight-decay",
            optimizer.weight_decay,
            optimizer.weight_decay >= 0,
            "0 or more",
        ),
        ("optimizer.bias-rate", optimizer.bias_rate, optimizer.bias_rate >= 0, "0 or more"),
        (
            "optimizer.clip-norm",
            optimizer.clip_norm,
            optimizer.clip_norm is None or optimizer.clip_norm > 0,
            "more than 0",
        ),
        (
            "optimizer.drop-factor",
            optimizer.drop_factor,
            0 < optimizer.drop_factor < 1,
            "between 0 and 1",
        ),
        (
            "optimizer.schedule",
            optimizer.schedule,
            (optimizer.schedule, optimizer.rule) != ("plateau", "notebook"),
            "constant or steps with --optimizer.rule notebook",
        ),
        (
            "optimizer.drop-epochs",
            optimizer.drop_epochs,
            min(optimizer.drop_epochs, default=0.0 if optimizer.schedule == "steps" else 1.0) > 0,
            "positive epochs, one or more with --optimizer.schedule steps",
        ),
        ("optimizer.patience", optimizer.patience, optimizer.patience >= 1, "1 or more"),
        ("optimizer.max-drops", optimizer.max_drops, optimizer.max_drops >= 0, "0 or more"),
        (
            "parallel.heartbeat-timeout",
            config.parallel.heartbeat_timeout,
            config.parallel.heartbeat_timeout >= 1,
            "1 or more",
        ),
        (
            "optimizer.warmup-epochs",
            optimizer.warmup_epochs,
            optimizer.warmup_epochs >= 0,
            "0 or more",
        ),
    ):
        need(flag, value, fits, expected)


def frozen_layers(config: Config, names: Sequence[str]) -> frozenset[str]:
    """The layers of those called `names` that `--freeze` means.

    Raises:
      UserError: a pattern that is none, or means no layer; or all are frozen.
    """
    patterns = [pattern for value in config.freeze for pattern in value.split(",") if pattern]
    if config.freeze and not patterns:
        raise UserError("--freeze names no layer; leave it out, or name some, such as conv1,conv2")
    frozen = frozenset(n for pattern in patterns for n in _matching("freeze", pattern, names))
    if frozen == set(names):
        raise UserError("--freeze leaves no layer to train; name fewer")
    return frozen


def layer_rates(config: Config, names: Sequence[str]) -> dict[str, float]:
    """What multiplies the rate of each layer that `--optimizer.layer-rates` means.

    Raises:
      UserError: something that is not PATTERN=NUMBER, or a pattern that means no layer.
    """
    flag = "optimizer.layer-rates"
    rates: dict[str, float] = {}
    for value in config.optimizer.layer_rates:
        pattern, equals, number = value.rpartition("=")
        try:
            factor = float(number) if equals else -1.0
        except ValueError:
            factor = -1.0
        need(flag, value, 0 <= factor <= LARGEST_NUMBER, "PATTERN=NUMBER, such as conv.*=0.1")
        rates |= dict.fromkeys(_matching(flag, pattern, names), factor)
    return rates


def _matching(flag: str, pattern: str, names: Sequence[str]) -> list[str]:
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"--{flag} {pattern} is no pattern: {error}") from None
    if not found:
        raise UserError(f"--{flag}: {unknown('layer', pattern, names)}")
    return found


def flatten(config: Any) -> dict[str, Any]:
    """A configuration as {"data.name": …}, with values as JSON has them."""

    def walk(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                result |= walk(f"{prefix}{name}.", value)
            else:
                result[prefix + name] = value
        return result

    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return walk("", values)


T = TypeVar("T")


def need(flag: str, value: object, fits: bool, expected: str) -> None:
    """Raises UserError for the value of a flag that does not fit."""
    if not fits:
        raise UserError(f"--{flag} is {value}; expected {expected}")


def need_batch(size: int) -> None:
    """Raises UserError for a `--batch-size` that is out of its range."""
    need("batch-size", size, 1 <= size <= LARGEST_BATCH, f"1 to {LARGEST_BATCH}")


def need_png(flag: str, path: Path | None) -> None:
    """Raises UserError for a picture to be written under another ending."""
    need(flag, path, path is None or path.suffix == ".png", "a .png file")


def parse(schema: type[T], argv: Sequence[str], default: T | None, program: str) -> T:
    """`default` with the flags of `argv` applied; None where `schema` has positional arguments.

    Raises:
      UserError: an unknown flag, with the nearest one, or a value that is not of its type or
        names another user's home that is not there.
      SystemExit: after `--help`.
    """
    start: Any = tyro.MISSING_NONPROP if default is None else default
    if {"-h", "--help"} & set(argv):
        return tyro.cli(schema, args=argv, default=start, prog=program)
    flags = known_flags(schema if default is None else default)
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in flags:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see python -m {program} --help"
            raise UserError(f"unknown flag {name}: {hint}")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return _expand(tyro.cli(schema, args=argv, default=start, prog=program))
    except SystemExit:
        raise UserError(_first_paragraph(output.getvalue())) from None


def _expand(config: Any) -> Any:
    """Paths with the home for "~", which a shell leaves alone in `--flag=~/path`."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _expand(value)
        elif isinstance(value, Path):
            try:
                changes[field.name] = value.expanduser()
            except RuntimeError as error:
                raise UserError(f"{value}: {error}") from None
    return dataclasses.replace(config, **changes)


def known_flags(default: Any, prefix: str = "--") -> list[str]:
    """Every flag of a dataclass or its type, nested ones with their prefix, in tyro's spelling."""
    flags = []
    for field in dataclasses.fields(default):
        name, value = field.name.replace("_", "-"), getattr(default, field.name, None)
        if dataclasses.is_dataclass(value):
            flags += known_flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            flags += [f"{prefix}{name}", f"{prefix}no-{name}"]
        else:
            flags.append(prefix + name)
    return flags


def value_of(flag: str, argv: Sequence[str], default: str) -> str:
    """The value that `argv` gives a flag, before it is parsed as a whole."""
    for index, word in reversed(list(enumerate(argv))):  # the last one counts, as in tyro
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:  # as tyro reads it
            if equals:
                return value
            if index + 1 < len(argv):
                return argv[index + 1]
    return default


def _first_paragraph(box: str) -> str:
    """What tyro says first in its box of text, which is a title and paragraphs between rulers."""
    text = re.sub(r"^╭.*╮$", "title\n---", box.strip(), flags=re.MULTILINE)
    lines = [line.strip(" │|") for line in text.splitlines()]
    paragraphs = "\n".join(line if re.search(r"\w", line) else "---" for line in lines).split("---")
    said = [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]
    return said[1] if len(said) > 1 else "the command line could not be read; see --help"
