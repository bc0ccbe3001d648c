"""The AlexNet of JAX. Public names load on first use, so that importing the package is cheap."""

import os
import signal
import sys

# `python -m flax_alexnet` imports the package first, with "-m" for its name. JAX and others
# lose a Ctrl-C that comes while they are imported, so until the command begins it ends the process.
_IS_COMMAND = os.path.basename(sys.argv[0] if sys.argv else "") == "flax-alexnet" or (
    sys.argv[:1] == ["-m"] and any("flax_alexnet" in word for word in sys.orig_argv)
)
if _IS_COMMAND and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

__version__ = "0.1.0"

_MODULES = {
    "AlexNet": "flax_alexnet.models.alexnet",
    "Preprocessing": "flax_alexnet.data.preprocessing",
    "Pretrained": "flax_alexnet.weights.pretrained",
    "TrainState": "flax_alexnet.training.step",
    "augment": "flax_alexnet.data.augment",
    "create_optimizer": "flax_alexnet.training.optimizer",
    "create_state": "flax_alexnet.training.step",
    "cross_entropy": "flax_alexnet.training.metrics",
    "eval_step": "flax_alexnet.training.step",
    "features": "flax_alexnet.models.activations",
    "from_hub": "flax_alexnet.commands.hub",
    "grad_cam": "flax_alexnet.models.activations",
    "load": "flax_alexnet.weights.load",
    "local_response_normalization": "flax_alexnet.ops.lrn",
    "lpips": "flax_alexnet.models.lpips",
    "preprocess": "flax_alexnet.data.augment",
    "save": "flax_alexnet.weights.safetensors_files",
    "train_step": "flax_alexnet.training.step",
    "zero_totals": "flax_alexnet.training.step",
}
__all__ = [*sorted(_MODULES), "__version__"]

if TYPE_CHECKING:
    from flax_alexnet.commands.hub import from_hub as from_hub
    from flax_alexnet.data.augment import augment as augment
    from flax_alexnet.data.augment import preprocess as preprocess
    from flax_alexnet.data.preprocessing import Preprocessing as Preprocessing
    from flax_alexnet.models.activations import features as features
    from flax_alexnet.models.activations import grad_cam as grad_cam
    from flax_alexnet.models.alexnet import AlexNet as AlexNet
    from flax_alexnet.models.lpips import lpips as lpips
    from flax_alexnet.ops.lrn import local_response_normalization as local_response_normalization
    from flax_alexnet.training.metrics import cross_entropy as cross_entropy
    from flax_alexnet.training.optimizer import create_optimizer as create_optimizer
    from flax_alexnet.training.step import TrainState as TrainState
    from flax_alexnet.training.step import create_state as create_state
    from flax_alexnet.training.step import eval_step as eval_step
    from flax_alexnet.training.step import train_step as train_step
    from flax_alexnet.training.step import zero_totals as zero_totals
    from flax_alexnet.weights.load import load as load
    from flax_alexnet.weights.pretrained import Pretrained as Pretrained
    from flax_alexnet.weights.safetensors_files import save as save


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__


if _IS_COMMAND:
    importlib.import_module("flax_alexnet.utils.process").begin()
