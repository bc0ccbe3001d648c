"""`python -m flax_alexnet convert INPUT OUTPUT`: trained models from other systems, and back."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from safetensors import SafetensorError

from flax_alexnet.config.cli import command, parse
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import new_files
from flax_alexnet.weights import name_maps, safetensors_files, torch_files
from flax_alexnet.weights.labels import read_labels
from flax_alexnet.weights.load import files_of, read, with_heads
from flax_alexnet.weights.pretrained import Pretrained, missing_layers


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Converts a trained model to this package's format, with preprocessing, or to torchvision's.

    Reads torchvision's alexnet in a state dict or a checkpoint of PyTorch (.pth, .pt, .bin, .ckpt)
    or .safetensors, Caffe's .caffemodel, the .npy of guerzh/tf_weights, the working directory of a
    run, checkpoints of the original code (cuda-convnet), and files that this command wrote. Code in
    a file is never run.
    """

    input: tyro.conf.Positional[Path]
    """The weight file, or the --workdir of a run."""
    output: tyro.conf.Positional[Path]
    """The file to write: .safetensors, or .pth with --format torchvision."""
    variant: str | None = None
    """caffe or caffenet, if a Caffe file does not say which of the two it is."""
    mean: Path | None = None
    """Caffe's mean image, a .binaryproto, or cuda-convnet's batches.meta; none: a mean colour."""
    head: str | None = None
    """Name of the last layer to use, if a Caffe model has several."""
    labels: Path | None = None
    """A text file with the name of each class on a line; none: ImageNet's, for 1000 classes."""
    heads: Path | None = None
    """LPIPS heads to put beside torchvision's model: alex.pth of the package lpips."""
    format: Literal["flax", "torchvision"] = "flax"
    """What to write: flax, for this package, or torchvision, a state dict for PyTorch."""
    overwrite: bool = False
    """Replace a file that is there."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    convert(parse(ConvertConfig, argv, None, "flax_alexnet convert"))


def convert(config: ConvertConfig) -> None:
    """Reads, writes, and prints what was read and written; warnings go to the standard error.

    Raises:
      UserError: a file that cannot be read or written, or does not fit the others.
    """
    path, output = config.input, config.output
    endings = (".safetensors",) if config.format == "flax" else (".pth", ".safetensors")
    if output.suffix not in endings:
        raise UserError(f"OUTPUT is {output}; expected a {' or '.join(endings)} file")
    others = (config.mean, config.labels, config.heads)
    with new_files(
        [output], [*files_of(path), *filter(None, others)], overwrite=config.overwrite
    ) as write:
        pretrained, notes = read(path, config.variant, config.mean, config.head)
        if config.labels:
            names = read_labels(config.labels, pretrained.num_classes)
            pretrained = dataclasses.replace(pretrained, label_names=names)
        if config.heads:
            pretrained = with_heads(pretrained, config.heads)
        for note in notes:
            print(note, file=sys.stderr)
        print(f"read {path}\n{describe(pretrained)}")
        if config.format == "flax":
            with write(output, SafetensorError) as partial:
                safetensors_files.write(pretrained, partial)
        else:
            with write(output, SafetensorError, RuntimeError) as partial:
                torch_files.write(_state_dict(pretrained, path), partial)
            print("a state dict has no room for preprocessing, label names and LPIPS heads")
    print(f"wrote {output}")


def describe(pretrained: Pretrained) -> str:
    """A few lines about a model: source, variant, parameters, classes, preprocessing."""
    rule, source = pretrained.preprocessing, pretrained.source
    count = sum(math.prod(value.shape) for value in jax.tree.leaves(pretrained.params))
    missing = ", ".join(missing_layers(pretrained))
    names = (
        f", {pretrained.name(0)} … {pretrained.name(pretrained.num_classes - 1)}"
        if pretrained.label_names
        else ""
    )
    mean = "a mean image" if rule.mean.ndim == 3 else " ".join(f"{v:.3f}" for v in rule.mean)
    scales = rule.scale if isinstance(rule.scale, tuple) else (rule.scale,)
    file, kind, digits = (source.get(name, "unknown") for name in ("file", "format", "sha256"))
    lines = [
        f"source {file} ({kind}), SHA-256 {digits}",
        f"variant {pretrained.config.variant}, {count:,} parameters"
        f"{missing and f', without {missing}'}",
        f"{pretrained.num_classes:,} classes{names}",
        f"images of {rule.image_size} × {rule.image_size} ({rule.resize}), less {mean}, "
        f"cut to {rule.crop_size}, times {' '.join(f'{v:.6g}' for v in scales)}",
    ]
    return "\n".join(lines + ["with LPIPS heads"] * bool(pretrained.lpips_heads))


def _state_dict(pretrained: Pretrained, path: Path) -> dict[str, np.ndarray]:
    config = pretrained.config
    settings = (config.variant, config.width, config.activation, config.relu_logits)
    if settings != ("torchvision", 1.0, "relu", False):
        raise UserError(
            f"{path} is of the variant {config.variant}, width {config.width:g}, "
            f"{config.activation}{', with ReLU on its logits' * config.relu_logits}; torchvision's "
            "alexnet is torchvision, width 1, relu"
        )
    return name_maps.write_params(name_maps.TORCHVISION, pretrained.params, config.variant)
