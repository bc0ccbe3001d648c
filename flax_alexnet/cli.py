"""The console script `flax-alexnet`: each command is also `python -m flax_alexnet.NAME`."""

import importlib
import sys
from collections.abc import Sequence

from flax_alexnet.errors import UserError, exit_code, leave, unknown

COMMANDS = {
    "train": "train a net, or go on with a training",
    "prepare": "bring a dataset into the form that training reads",
    "convert": "read and write the weight files of PyTorch, Caffe and TensorFlow",
    "evaluate": "measure how often a trained net, or several, are right",
    "predict": "say what pictures show",
    "features": "write activations of many pictures into one file",
    "lpips": "measure how different two pictures look",
    "plot": "draw what a net has learned",
    "export": "write a net as StableHLO, ONNX or a TensorFlow SavedModel",
    "hub": "send a net to the Hugging Face Hub, or fetch one",
}


def console() -> None:
    """The console script."""
    leave(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the rest of the arguments to the command that the first one names."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: flax-alexnet COMMAND [--help] [flags]\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:<10}{purpose}")
        return 0
    if name not in COMMANDS:
        return exit_code(UserError(unknown("command", name, COMMANDS)))
    return importlib.import_module(f"flax_alexnet.{name}").main(rest)
