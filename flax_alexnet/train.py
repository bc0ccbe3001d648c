"""`python -m flax_alexnet.train --workdir runs/`: the command `train`."""

from flax_alexnet.commands.train import main
from flax_alexnet.utils.process import leave

if __name__ == "__main__":
    leave(main, training=True)
