"""`python -m flax_alexnet COMMAND`, which is also the console script `flax-alexnet COMMAND`."""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence

from flax_alexnet.utils.errors import UserError, exit_code, starting, unknown
from flax_alexnet.utils.process import begin, leave

COMMANDS = {
    "train": "train a model, or go on with a training",
    "prepare": "bring a dataset into the form that training reads",
    "convert": "read and write the weight files of PyTorch, Caffe and TensorFlow",
    "evaluate": "measure how often a trained model, or several, are right",
    "predict": "say what images show",
    "features": "write activations of many images into one file",
    "lpips": "measure how different two images look",
    "plot": "draw what a model has learned",
    "export": "write a model as StableHLO, ONNX or a TensorFlow SavedModel",
    "hub": "send a model to the Hugging Face Hub, or fetch one",
}


def console() -> None:
    """The console script."""
    begin()
    leave(find(sys.argv[1:]), training=sys.argv[1:2] == ["train"])


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the rest of the arguments to the command that the first one names."""
    return find(sys.argv[1:] if argv is None else argv)()


def find(argv: Sequence[str]) -> Callable[[], int]:
    """The command that the first argument names, imported, with the rest of the arguments."""
    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        try:
            with starting():
                module = importlib.import_module(f"flax_alexnet.commands.{name}")
        except UserError as error:
            return functools.partial(exit_code, error)
        return functools.partial(module.main, rest)
    return functools.partial(_explain, name)


def _explain(name: str) -> int:
    if name not in ("-h", "--help"):
        return exit_code(UserError(unknown("command", name, COMMANDS)))
    print("usage: flax-alexnet COMMAND [--help] [flags]\n")
    for command, purpose in COMMANDS.items():
        print(f"  {command:<10}{purpose}")
    return 0


if __name__ == "__main__":
    console()
