"""`python -m flax_alexnet COMMAND`: the same as the console script."""

from flax_alexnet.cli import console

console()
