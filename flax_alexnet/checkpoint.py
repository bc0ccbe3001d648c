"""Checkpoints of a training state with Orbax: asynchronous, the latest and the best kept."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from flax_alexnet.errors import UserError, first_line

T = TypeVar("T")


class Checkpoints:
    """The steps saved under a folder: the latest two, and the best by top-1 accuracy."""

    def __init__(self, folder: Path):
        # `max_to_keep` with `best_fn` would delete the latest step whenever the metric worsens.
        keep = managers.AnyPreservationPolicy(
            [
                managers.LatestN(2),
                managers.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        # Without `best_fn` metrics stay in memory, and a resumed run would forget which is best.
        options = ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=_top1)
        try:
            self._manager = ocp.CheckpointManager(
                folder.absolute(), item_handlers=ocp.StandardCheckpointHandler(), options=options
            )
        except (ValueError, KeyError, TypeError) as error:  # of the metrics beside a step
            raise UserError(
                f"{folder} is damaged ({first_line(error)}); remove its newest folder"
            ) from None

    def latest_step(self) -> int | None:
        """The newest step that was saved completely."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts saving `state`, and returns as soon as it may change again.

        A step that is saved already is left as it is.
        """
        if step != self.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

    def restore(self, step: int, template: T) -> T:
        """The state of `step`, in the shapes, types and shardings of `template`.

        Raises:
          UserError: it is damaged, or of another model or optimizer, whose first difference is
            named.
        """
        try:
            saved, wanted = _shapes(self._manager.item_metadata(step).tree), _shapes(template)
        except (ValueError, AttributeError, KeyError, OSError):
            raise UserError(
                f"checkpoint {self._manager.directory / str(step)} is damaged: remove that folder "
                "to go on from the one before, or take another --workdir"
            ) from None
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {self._manager.directory / str(step)} is of another model or "
                    f"optimizer ({name} was {saved.get(name)}, is now {wanted.get(name)}): take "
                    "another --workdir"
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(template))

    def restore_model(self, step: int) -> tuple[Any, np.ndarray]:
        """The parameters and the mean image of `step` alone, in memory, without its optimizer.

        Raises:
          UserError: it is damaged.
        """
        folder = self._manager.directory / str(step)
        try:
            saved = self._manager.item_metadata(step).tree
            wanted = {name: saved[name] for name in ("params", "mean")}
            with ocp.PyTreeCheckpointer() as reader:
                restore = ocp.args.PyTreeRestore(
                    item=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), wanted),
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
                    ),
                    partial_restore=True,
                )
                tree = reader.restore(folder / "default", args=restore)
        except (ValueError, AttributeError, KeyError, OSError, TypeError):
            raise UserError(f"checkpoint {folder} is damaged; remove that folder") from None
        return tree["params"], tree["mean"]

    def close(self) -> None:
        """Waits until all that was started is saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def _top1(metrics: dict[str, float]) -> float:
    return metrics["eval_top1"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array by its path, such as "params/conv1/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def digest(params: Any) -> str:
    """SHA-256 of all parameters' bytes, in the order of their sorted paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    result = hashlib.sha256()
    for _, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()
