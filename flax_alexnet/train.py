"""`python -m flax_alexnet.train --workdir runs/`: trains a net; see `flax_alexnet.training`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flax_alexnet.config import Config
from flax_alexnet.errors import UserError, exit_code
from flax_alexnet.process import leave
from flax_alexnet.recipes import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after a mistake of the user, or as `training.train` does.

    Ctrl-C before the first step gives 130.
    """
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv, adapt=_adapt)
        # JAX and all that needs it take seconds to import: --help and a wrong flag do without.
        from flax_alexnet.cluster import join
        from flax_alexnet.training import train

        parallel = config.parallel
        join(
            parallel.coordinator,
            parallel.num_processes,
            parallel.process_id,
            parallel.heartbeat_timeout,
            parallel.join_timeout,
        )
        return train(config)
    except (UserError, KeyboardInterrupt) as error:
        return exit_code(error)


def _adapt(recipe: Config, init_from: Path) -> Config:
    from flax_alexnet.weights.finetuning import adapt

    return adapt(recipe, init_from)


if __name__ == "__main__":
    leave(main, training=True)
