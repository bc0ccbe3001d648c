"""What is tried on the program by force: training is killed, and every command that writes files.

`soak_training.py` and `soak_commands.py` say what is claimed, and how it is looked at.

Run (three quarters of an hour on two cores, `--quick` three minutes; no data is needed):

    python experiments/benchmarks/soak.py
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import soak_commands
import soak_training
import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kills and attacks, in one phase after the other, and counts what did not hold."""

    phases: tuple[Literal["training", "commands"], ...] = ("training", "commands")
    """Which."""
    output: Path = Path("results")
    """Where a .json and a .csv file of each go, such as soak_training.json."""
    kills: int = 100
    """Of training."""
    command_kills: int = 20
    """Of each other command with each of two signals."""
    seed: int = 0
    """Determines the moments."""
    quick: bool = False
    """A few kills of each, into files of their own, such as soak_training_quick.json."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the phases; returns 0 where all was withstood, else 1."""
    arguments = tyro.cli(Arguments, args=argv)
    flags = ["--output", str(arguments.output), "--seed", str(arguments.seed)]
    flags += ["--quick"] * arguments.quick
    failed = 0
    if "training" in arguments.phases:
        failed |= soak_training.main([*flags, "--kills", str(arguments.kills)])
    if "commands" in arguments.phases:
        failed |= soak_commands.main([*flags, "--kills", str(arguments.command_kills)])
    return failed


if __name__ == "__main__":
    sys.exit(main())
