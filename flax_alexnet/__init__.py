"""The AlexNet of JAX. Public names load on first use, so that importing the package is cheap."""

import os
import signal
import sys

# `python -m flax_alexnet.NAME` imports the package first, with "-m" for its name. JAX and others
# lose a Ctrl-C that comes while they are imported, so until the command begins it ends the process.
_IS_COMMAND = os.path.basename(sys.argv[0] if sys.argv else "") == "flax-alexnet" or (
    sys.argv[:1] == ["-m"] and any("flax_alexnet" in word for word in sys.orig_argv)
)
if _IS_COMMAND and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib  # noqa: E402
import types  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

__version__ = "0.1.0"

_MODULES = {
    "AlexNet": "flax_alexnet.model",
    "Pretrained": "flax_alexnet.weights.pretrained",
    "TrainState": "flax_alexnet.step",
    "augment": "flax_alexnet.augment",
    "create_optimizer": "flax_alexnet.optimizer",
    "create_state": "flax_alexnet.step",
    "cross_entropy": "flax_alexnet.metrics",
    "eval_step": "flax_alexnet.step",
    "features": "flax_alexnet.activations",
    "from_hub": "flax_alexnet.hub",
    "grad_cam": "flax_alexnet.activations",
    "load": "flax_alexnet.weights.reading",
    "local_response_normalization": "flax_alexnet.ops.lrn",
    "lpips": "flax_alexnet.perceptual",
    "preprocess": "flax_alexnet.augment",
    "save": "flax_alexnet.weights.native",
    "train_step": "flax_alexnet.step",
    "zero_totals": "flax_alexnet.step",
}
__all__ = [*sorted(_MODULES), "__version__"]

if TYPE_CHECKING:
    from flax_alexnet.activations import features as features
    from flax_alexnet.activations import grad_cam as grad_cam
    from flax_alexnet.augment import augment as augment
    from flax_alexnet.augment import preprocess as preprocess
    from flax_alexnet.hub import from_hub as from_hub
    from flax_alexnet.metrics import cross_entropy as cross_entropy
    from flax_alexnet.model import AlexNet as AlexNet
    from flax_alexnet.ops.lrn import local_response_normalization as local_response_normalization
    from flax_alexnet.optimizer import create_optimizer as create_optimizer
    from flax_alexnet.perceptual import lpips as lpips
    from flax_alexnet.step import TrainState as TrainState
    from flax_alexnet.step import create_state as create_state
    from flax_alexnet.step import eval_step as eval_step
    from flax_alexnet.step import train_step as train_step
    from flax_alexnet.step import zero_totals as zero_totals
    from flax_alexnet.weights.native import save as save
    from flax_alexnet.weights.pretrained import Pretrained as Pretrained
    from flax_alexnet.weights.reading import load as load


class _Package(types.ModuleType):
    """A package in which the functions `features`, `lpips` and `augment` are not hidden by modules.

    When a submodule is imported, Python sets it as an attribute of its package; the commands
    `python -m flax_alexnet.features` and `lpips` and the module `augment` have the names of public
    functions.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package

if _IS_COMMAND:
    importlib.import_module("flax_alexnet.process").begin()
