"""The AlexNet of JAX. Public names load on first use, so that importing the package is cheap."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "AlexNet": "flax_alexnet.model",
    "TrainState": "flax_alexnet.step",
    "create_optimizer": "flax_alexnet.optimizer",
    "cross_entropy": "flax_alexnet.metrics",
    "eval_step": "flax_alexnet.step",
    "local_response_normalization": "flax_alexnet.ops.lrn",
    "train_step": "flax_alexnet.step",
}
__all__ = [*sorted(_MODULES), "__version__"]

if TYPE_CHECKING:
    from flax_alexnet.metrics import cross_entropy as cross_entropy
    from flax_alexnet.model import AlexNet as AlexNet
    from flax_alexnet.ops.lrn import local_response_normalization as local_response_normalization
    from flax_alexnet.optimizer import create_optimizer as create_optimizer
    from flax_alexnet.step import TrainState as TrainState
    from flax_alexnet.step import eval_step as eval_step
    from flax_alexnet.step import train_step as train_step


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
