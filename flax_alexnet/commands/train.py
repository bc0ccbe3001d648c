"""`python -m flax_alexnet.train --workdir runs/`: trains; see `flax_alexnet.training.loop`."""

from collections.abc import Sequence
from pathlib import Path

from flax_alexnet.config.cli import command
from flax_alexnet.config.recipes import parse_config
from flax_alexnet.config.schema import Config
from flax_alexnet.utils.errors import starting


@command
def main(argv: Sequence[str]) -> int:
    """Runs the command; returns as `flax_alexnet.training.loop.train` does."""
    config = parse_config(argv, adapt=_adapt)
    # JAX and all that needs it take seconds to import: --help and a wrong flag do without.
    with starting():
        from flax_alexnet.parallel.distributed import join
        from flax_alexnet.training.loop import train

    parallel = config.parallel
    join(
        parallel.coordinator,
        parallel.num_processes,
        parallel.process_id,
        parallel.heartbeat_timeout,
        parallel.join_timeout,
    )
    return train(config)


def _adapt(recipe: Config, init_from: Path) -> Config:
    from flax_alexnet.weights.finetuning import adapt

    return adapt(recipe, init_from)
