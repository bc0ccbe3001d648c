"""The configuration of a training run: frozen dataclasses, and the ranges of their values."""

import builtins
import dataclasses
import fnmatch
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from flax_alexnet.config.cli import LARGEST_BATCH, check_flag
from flax_alexnet.data.preprocessing import Preprocessing, ResizeRule, Scale
from flax_alexnet.models.architectures import RENAMED, architecture
from flax_alexnet.utils.errors import UserError, unknown
from flax_alexnet.utils.text import printable

# A larger value is a typing error.
LARGEST_NUMBER = 1e10
LARGEST_IMAGE = 8192
LARGEST_TIMEOUT = 10**6  # seconds; a larger value would overflow in JAX


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may have.

    Attributes:
      least: the smallest number.
      above: a bound below all numbers, not included.
      most: the largest number.
      below: a bound above all numbers, not included.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether a number, or each number of a tuple, is in the range; None always is."""
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        return all(
            (self.least is None or self.least <= number)
            and (self.above is None or self.above < number)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
            for number in numbers
        )

    def __str__(self) -> str:
        below = None if self.below is None else f"below {self.below}"
        if self.above is None:
            last = below or self.most
            return f"{self.least} or more" if last is None else f"{self.least} to {last}"
        last = below or (None if self.most is None else f"at most {self.most}")
        return f"more than {self.above}" if last is None else f"more than {self.above}, {last}"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images, and their size on the device."""

    name: str = "shapes_and_textures"
    """The embedded "shapes_and_textures", a TFDS name that has been prepared, or folder:PATH."""
    data_dir: Path | None = None
    """Folder of prepared datasets; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    train_split: str = "train"
    """Split to train on; with TFDS also a slice such as train[:90%]."""
    eval_split: str | None = None
    """Split to evaluate on; none: validation where there is one, else test."""
    image_key: str | None = None
    """TFDS feature with the images; none: as the dataset says, else image."""
    label_key: str | None = None
    """TFDS feature with the labels; none: as the dataset says, else label."""
    image_size: Annotated[int, Range(least=1, most=LARGEST_IMAGE)] = 256
    """Side in pixels to which images are resized before any crop."""
    resize: ResizeRule = "paper"
    """Resize rule: the paper's, torchvision's (bilinear), or Caffe's (warped to a square)."""
    threads: Annotated[int, Range(least=1)] = 2
    """Threads that decode and batch images."""
    max_bad: Annotated[float | None, Range(least=0, most=1)] = None
    """Largest share of unreadable images, which are skipped, in each class of a folder or in a
    prepared split; with more the run stops; none: 0.1 of a class, 0.001 of a prepared split."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model; the fields are those of AlexNet."""

    variant: str = "notebook"
    """notebook, paper, original, caffe, caffenet, torchvision, or cuda_convnet_ with 80sec, 19pct,
    18pct, 13pct or 11pct."""
    num_classes: Annotated[int | None, Range(least=2)] = None
    """Number of outputs; none: the number of classes in the dataset."""
    width: Annotated[float, Range(above=0, most=100)] = 1.0
    """Multiplier of the features of every layer but the last."""
    dropout_rate: Annotated[float, Range(least=0, below=1)] = 0.5
    """Share of units dropped where the variant has dropout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters are float32 always."""
    initialization: Literal["published", "he"] = "published"
    """Initial values: the variant's own, or He et al.'s."""
    activation: Literal["relu", "tanh"] = "relu"
    """The function after each layer."""
    relu_logits: bool = False
    """Apply a ReLU to the last layer, which is a fault of the notebook."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Preprocessing of images on the device; evaluation takes the central crop."""

    crop_size: int = 224
    """Side in pixels of the images that the model sees."""
    random_crop: bool = True
    """Crop at random places in training, else at the centre."""
    flip: bool = True
    """Mirror half of the images left to right in training."""
    resized_area: Annotated[float | None, Range(above=0, most=1)] = None
    """Smallest share of an image that a random crop has, which is then resized to crop_size; none:
    crops have crop_size pixels and are not resized."""
    chunk: Annotated[int, Range(least=1)] = 1
    """Images in a row that share a random crop and a flip; 32 in the original code."""
    color_noise: Literal["none", "cuda-convnet", "eigenvalues", "original"] = "none"
    """PCA colour noise: as strong as in the original code, with the widely used eigenvalues, or
    with the original code's own components and its division by 1.1."""
    mixup: Annotated[float, Range(least=0)] = 0.0
    """Parameter of the Beta distribution by which images are mixed in pairs; 0: they are not."""
    label_smoothing: Annotated[float, Range(least=0, below=1)] = 0.0
    """Share of the target that is spread evenly over all classes."""
    scale: Annotated[Scale, Range(above=0)] = 1.0
    """Factor for pixel values after the mean is subtracted, or one for each channel; 1 in the
    original models."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD with momentum and weight decay, and the schedule of its rate."""

    rule: Literal["paper", "notebook"] = "paper"
    """The paper's update, or the notebook's (decay multiplied by the rate twice)."""
    learning_rate: Annotated[float, Range(above=0)] = 0.01
    """Rate after warm-up and before any drop."""
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    """Share of the velocity that is kept."""
    weight_decay: Annotated[float, Range(least=0)] = 0.0005
    """Share of the weights added to the gradient."""
    bias_rate: Annotated[float, Range(least=0)] = 1.0
    """Multiplier of the learning rate of biases; 2 in the original code and in Caffe."""
    decay_biases: bool = True
    """Whether biases decay; in the original code and Caffe they do not."""
    layer_rates: tuple[str, ...] = ()
    """Multipliers of the rate of layers, such as 'conv*=0.1' fc8=10; patterns as in --freeze."""
    layer_decays: tuple[str, ...] = ()
    """Weight decays of layers instead of weight_decay, such as 'conv*=0' fc10=1."""
    clip_norm: Annotated[float | None, Range(above=0)] = None
    """Largest global norm of gradients; larger ones are scaled down to it; none: no clipping."""
    freeze_epochs: tuple[str, ...] = ()
    """Epochs after which layers keep their values, such as conv1=72."""
    average: Annotated[float | None, Range(least=0, below=1)] = None
    """Decay, at each step, of a moving average of the weights, which is evaluated and saved as the
    model; none: no average."""
    schedule: Literal["constant", "steps", "plateau", "exponential", "cosine"] = "constant"
    """constant: no drops; steps: drops at drop_epochs; plateau: drops when the validation error
    stops improving; exponential, cosine: falls from the first step to the last epoch."""
    final_rate: Annotated[float, Range(least=0, most=1)] = 0.0
    """With exponential and cosine: the last rate, as a share of the first."""
    rate_levels: Annotated[int | None, Range(least=2)] = None
    """With exponential and cosine: equal parts of the run that have a constant rate each; none: the
    rate falls with each step."""
    bias_final_rate: Annotated[float | None, Range(least=0, most=1)] = None
    """final_rate of biases; none: that of the kernels."""
    bias_rate_levels: Annotated[int | None, Range(least=2)] = None
    """rate_levels of biases; none: those of the kernels."""
    drop_epochs: tuple[float, ...] = ()
    """With steps: the epochs at which the rate drops."""
    drop_factor: Annotated[float, Range(above=0, below=1)] = 0.1
    """Factor by which a drop multiplies the learning rate."""
    drop_biases: bool = True
    """Whether drops concern biases too; in the original code they do not."""
    patience: Annotated[int, Range(least=1)] = 3
    """With plateau: number of evaluations without improvement before a drop."""
    max_drops: Annotated[int, Range(least=0)] = 3
    """With plateau: largest number of drops."""
    warmup_epochs: Annotated[float, Range(least=0)] = 0.0
    """Epochs over which the rate rises linearly."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """What each device stores and computes, and the processes of the run."""

    layout: Literal["data", "zero", "hybrid", "towers"] = "data"
    """data: whole copies; zero: dense layers stored in shares; hybrid: dense layers also computed
    in shares; towers: the paper's two towers."""
    mesh: tuple[int, ...] = ()
    """Devices along each axis of the layout (data; or data and model; or data and tower); none: see
    docs/parallelism.md."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where all processes of a run meet; none: taken from the launcher."""
    num_processes: int | None = None
    """Number of processes; with 1 this process runs alone even if a launcher started several."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_timeout: Annotated[int, Range(least=1, most=LARGEST_TIMEOUT)] = 100
    """Seconds of silence after which a process counts as lost, and the others end."""
    join_timeout: Annotated[int, Range(least=1, most=LARGEST_TIMEOUT)] = 300
    """Seconds that a process waits for the others to come."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    recipe: str = "quickstart"
    """Recipe that gives the defaults; see the README."""
    workdir: Path = Path("runs")
    """Folder for everything that the run writes; another start in the same folder resumes it."""
    allow_changes: bool = False
    """Resume even if the configuration differs from that of the first start; with another batch
    size the run continues after the images that it has seen."""
    seed: Annotated[int, Range(least=0, most=2**32 - 1)] = 0
    """Determines initial values, the order of images and every random draw."""
    init_from: Path | None = None
    """Start from a trained model: a weight file (see convert) or a run's --workdir. Its variant and
    preprocessing become the defaults; its last layer is replaced where the classes differ."""
    freeze: tuple[str, ...] = ()
    """Layers whose parameters do not change: names, patterns as for file names, or regular
    expressions, such as conv1,conv2 or 'conv*' or 'fc[67]'."""
    batch_size: Annotated[int, Range(least=1, most=LARGEST_BATCH)] = 128
    """Images in a step, over all devices."""
    epochs: Annotated[float, Range(above=0)] = 90.0
    """Passes over the training images; a larger number continues an existing run for longer."""
    steps: Annotated[int | None, Range(least=1)] = None
    """Stop after this many steps, of any batch size, even before the last epoch; a larger number
    continues an existing run for longer."""
    eval_epochs: Annotated[float, Range(least=1e-6)] = 1.0
    """Epochs between evaluations; each is followed by a checkpoint."""
    log_every: Annotated[int, Range(least=1)] = 50
    """Steps between lines of metrics; there is at least one line in each epoch."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """When the loss or a gradient is not finite: stop, or go back to the last checkpoint with half
    the rate, three times at most."""
    save_patience: Annotated[float, Range(least=0)] = 60.0
    """Minutes for which a run continues while nothing can be saved, for example on a full disk."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder for the next start."""
    keep_memory: bool = True
    """On a CPU: keep freed memory for the next step, rather than giving it back to the system."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()

    def preprocessing(self, mean: Any) -> Preprocessing:
        """What is done to an image before the model sees it, with the mean of the run."""
        data, augment = self.data, self.augment
        return Preprocessing(data.image_size, data.resize, augment.crop_size, mean, augment.scale)

    def with_preprocessing(self, preprocessing: Preprocessing) -> "Config":
        """The same run with the preprocessing of a trained model; the mean is no part of it."""
        size, resize = preprocessing.image_size, preprocessing.resize
        crop_size, scale = preprocessing.crop_size, preprocessing.scale
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, image_size=size, resize=resize),
            augment=dataclasses.replace(self.augment, crop_size=crop_size, scale=scale),
        )


# What may differ between the processes of a run, and when it is resumed.
LOCAL = frozenset(
    {
        "compilation_cache",
        "keep_memory",
        "data.data_dir",
        "data.threads",
        "dataset.folder",
        "dataset.times",
        "parallel.coordinator",  # process 0 may know its own host by another name
        "parallel.join_timeout",
        "parallel.num_processes",
        "parallel.process_id",
    }
)
# What has changed if a digest differs, in words.
CONTENT = {
    "dataset.train_digest": "the images to train on",
    "dataset.eval_digest": "the images to evaluate on",
}
# What may also differ when a run is resumed: its steps are the same but for rounding.
FREE_TO_CHANGE = LOCAL | {
    "workdir",
    "allow_changes",
    "batch_sizes",
    "epochs",
    "steps",
    "on_divergence",
    "save_patience",
    "data.max_bad",
    "parallel.layout",
    "parallel.mesh",
    "parallel.heartbeat_timeout",
}
# Settings of JAX that change the numbers of a run, such as JAX_ENABLE_X64, with their types. A run
# records them under names such as "jax.enable_x64".
JAX_SETTINGS: dict[str, Any] = {
    "default_matmul_precision": str | None,
    "default_prng_impl": str,
    "enable_x64": bool,
    "random_seed_offset": int,
    "threefry_partitionable": bool,
}


def validate(config: Config) -> None:
    """Raises UserError for the first value that is out of its range, or does not fit another."""
    architecture(config.model.variant)  # raises UserError for an unknown one
    for name, value in flatten(config).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(n, int | float) and not abs(n) <= LARGEST_NUMBER for n in numbers):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}; expected numbers up to {LARGEST_NUMBER:g}")
    _check_ranges(config)
    image_size, crop_size = config.data.image_size, config.augment.crop_size
    optimizer = config.optimizer
    steps, epochs = optimizer.schedule == "steps", optimizer.drop_epochs
    for flag, value, fits, expected in (
        (
            "augment.crop-size",
            crop_size,
            1 <= crop_size <= image_size,
            f"1 to --data.image-size, which is {image_size}",
        ),
        (
            "augment.resized-area",
            config.augment.resized_area,
            config.augment.resized_area is None or config.augment.random_crop,
            "nothing with --augment.no-random-crop",
        ),
        (
            "optimizer.schedule",
            optimizer.schedule,
            (optimizer.schedule, optimizer.rule) != ("plateau", "notebook"),
            "another one with --optimizer.rule notebook",
        ),
        (
            "optimizer.drop-epochs",
            epochs,
            min(epochs, default=0.0 if steps else 1.0) > 0,
            "positive epochs, one or more with --optimizer.schedule steps",
        ),
        (
            "optimizer.final-rate",
            optimizer.final_rate,
            optimizer.schedule != "exponential" or optimizer.final_rate > 0,
            "more than 0 with --optimizer.schedule exponential",
        ),
        (
            "optimizer.bias-final-rate",
            optimizer.bias_final_rate,
            optimizer.schedule != "exponential" or optimizer.bias_final_rate != 0,
            "more than 0 with --optimizer.schedule exponential",
        ),
    ):
        check_flag(flag, value, fits, expected)


def _check_ranges(config: Any, prefix: str = "") -> None:
    """Raises UserError for the first field of a dataclass, or of one in it, out of its range."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, flag = getattr(config, name), prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{flag}.")
        for bounds in getattr(hint, "__metadata__", ()):
            check_flag(flag, value, bounds.holds(value), str(bounds))


def frozen_layers(config: Config, names: Sequence[str]) -> frozenset[str]:
    """The layers among `names` that `--freeze` selects.

    Raises:
      UserError: a pattern is not valid or matches no layer, or all layers are frozen.
    """
    patterns = [pattern for value in config.freeze for pattern in value.split(",") if pattern]
    if config.freeze and not patterns:
        raise UserError("--freeze names no layer; leave it out, or name some, such as conv1,conv2")
    frozen = frozenset(n for pattern in patterns for n in _matching("freeze", pattern, names))
    if frozen == set(names):
        raise UserError("--freeze leaves no layer to train; name fewer")
    return frozen


def layer_values(flag: str, values: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The number for each layer that the values of a flag such as `optimizer.layer-rates` select.

    Args:
      flag: the flag's name, without `--`.
      values: PATTERN=NUMBER each; a later one goes before an earlier one.
      names: the layers of the model.

    Raises:
      UserError: a value is not PATTERN=NUMBER, or a pattern matches no layer.
    """
    result: dict[str, float] = {}
    for value in values:
        pattern, equals, text = value.rpartition("=")
        try:
            number = float(text) if equals else -1.0
        except ValueError:
            number = -1.0
        check_flag(flag, value, 0 <= number <= LARGEST_NUMBER, "PATTERN=NUMBER, such as conv.*=0.1")
        result |= dict.fromkeys(_matching(flag, pattern, names), number)
    return result


def _matching(flag: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The names that match a pattern: a regular expression, or else a file name pattern.

    Raises:
      UserError: the pattern matches no name.
    """
    problem = ""
    try:
        regular = pattern.replace("[!", "[^")  # which means the same in patterns of file names
        matches = [name for name in names if re.fullmatch(regular, name)]
    except (re.error, OverflowError, RecursionError) as error:
        matches, problem = [], f"{pattern} is no pattern: {error}"
    matches = matches or fnmatch.filter(names, pattern)
    if not matches:
        raise UserError(f"--{flag}: {problem or unknown('layer', pattern, names)}")
    return matches


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a run's `config.json`, as this version would have written them.

    Older versions lack fields, which then have their defaults, and have other names of variants.
    """
    result = {**flatten(Config()), **values}
    variant = result["model.variant"]
    return result | {"model.variant": RENAMED.get(variant, variant)}


def misfit(values: Mapping[str, Any]) -> str:
    """The first entry of a run's `config.json` that is not valid, in a few words; "" if none.

    An entry is not valid if its key is unknown or its value is not of its field's type.

    Args:
      values: flat, as JSON has them; some may be missing, as in a file of an older version.
    """
    hints = _hints(Config) | {  # besides the flags: data, batch sizes so far, --init-from, JAX
        "batch_sizes": tuple[tuple[int, int], ...],
        "dataset.train": int,
        "dataset.eval": int,
        "dataset.train_digest": str,
        "dataset.eval_digest": str,
        "dataset.times": str,
        "dataset.folder": str,
        "dataset.label_names": tuple[str, ...],
        "init_from.sha256": str,
        **{f"jax.{name}": hint for name, hint in JAX_SETTINGS.items()},
    }
    for name, value in sorted(values.items()):
        if name not in hints:
            return f"an {unknown('key', printable(name), hints, shown=('those of --help',))}"
        if not _fits(value, hint := hints[name]):
            # Module names are removed: that of a path depends on the version of Python.
            whole = hint.__name__ if isinstance(hint, type) else str(hint)
            expected = re.sub(r"(\w+\.)+(?=\w)", "", whole)
            return f"{name} {value!r}, where {expected} is expected"
    return ""


def _hints(schema: type, prefix: str = "") -> dict[str, Any]:
    """The types of a dataclass's fields and of those in them, by names such as "data.name"."""
    result: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema).items():
        inner = dataclasses.is_dataclass(hint)
        result |= _hints(hint, f"{prefix}{name}.") if inner else {prefix + name: hint}
    return result


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the type of a field."""
    choices = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return isinstance(value, str) and value in choices
        case types.UnionType | typing.Union:
            return any(_fits(value, choice) for choice in choices)
        case builtins.tuple:
            several = choices[-1] is ...
            return (
                isinstance(value, list)
                and (several or len(value) == len(choices))
                and all(_fits(part, choices[0]) for part in value)
            )
    return type(value) in {float: (float, int), Path: (str,)}.get(hint, (hint,))


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
