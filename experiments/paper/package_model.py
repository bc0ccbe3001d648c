"""Puts a trained model of CIFAR-10 into the package, with its command and its test error.

Run (some seconds):

    python experiments/paper/package_model.py runs/claims/full/18pct-0 cifar10-18pct --command '…'
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from measures import loss_and_error

import flax_alexnet
from flax_alexnet.data.dataset import CachedExamples
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.utils.errors import UserError, exit_code
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.packaged import FOLDER


@dataclasses.dataclass(frozen=True)
class PackageArguments:
    """Puts a trained model of CIFAR-10 into the package."""

    workdir: tyro.conf.Positional[Path]
    """The working directory of the run."""
    name: tyro.conf.Positional[str]
    """The name of the model."""
    command: str
    """The command that trained it."""
    data_dir: Path | None = None
    """Folder with the prepared cifar10; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    folder: Path = FOLDER
    """Where the file goes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and writes; returns an exit code."""
    arguments = tyro.cli(PackageArguments, args=argv)
    try:
        pretrained = flax_alexnet.load(arguments.workdir)
        test = CachedExamples(open_dataset("cifar10", arguments.data_dir).eval, 32)
        batch = test.take(range(len(test)))
        _, error = loss_and_error(pretrained, batch)
        source = {
            **pretrained.source,
            "file": arguments.name,
            "trained by": arguments.command,
            "test error": f"{error:.4f}",
            "test images": f"{len(test)} of CIFAR-10, the whole image once",
        }
        mean = np.asarray(pretrained.preprocessing.mean, np.float32)
        pretrained = dataclasses.replace(
            pretrained, source=source, preprocessing=pretrained.preprocessing.with_mean(mean)
        )
        arguments.folder.mkdir(parents=True, exist_ok=True)
        path = arguments.folder / f"{arguments.name}.safetensors"
        safetensors_files.save(pretrained, path)
    except UserError as mistake:
        return exit_code(mistake)
    print(f"{path}: {path.stat().st_size:,} bytes, test error {error:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
