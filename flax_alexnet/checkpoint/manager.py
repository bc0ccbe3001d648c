"""Checkpoints of a training state with Orbax: asynchronous, verified, the latest and best kept."""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from flax_alexnet.checkpoint.manifest import damage, write_manifest
from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import LARGEST_TEXT, check_regular
from flax_alexnet.utils.outputs import moved_away

T = TypeVar("T")

# Failures are reported here in one line, and not by the tracebacks of Orbax's threads.
absl.logging.set_verbosity(absl.logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

TEMPORARY = ".orbax-checkpoint-tmp"
# What Orbax writes while the manifest is made, or afterwards: times and the names of handlers.
UNLISTED = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})
# What Orbax and TensorStore raise where a file cannot be written.
FAILURES = (OSError, ValueError, RuntimeError)
DISK = tuple(os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES))


class Checkpoints:
    """The steps saved under a folder: the latest two, and the best by top-1 accuracy.

    Each step has a manifest with the digests of its files, written before its folder gets its name.
    Steps that exist already must be whole; see `set_aside_damaged`.

    If a state cannot be saved, the earlier steps stay unchanged, a line is printed, and the next
    `save` is another attempt. In a run of several processes it is an error at once.

    Args:
      folder: the folder, which is created if it does not exist.
      patience: seconds after which failing attempts are an error.
      say: prints a line.
      marker: a file outside the folder, created once there is a step; see `check_steps`.
    """

    def __init__(
        self,
        folder: Path,
        patience: float = 0.0,
        say: Callable[[str], None] = print,
        marker: Path | None = None,
    ) -> None:
        self._folder, self._patience, self._say = _in_utf8(folder.absolute()), patience, say
        self._marker = marker
        self._started: int | None = None  # the step of a save that may still be in progress
        self._failing_since: float | None = None
        self._manager = self._open()
        if self.latest_step() is not None:
            self._mark()

    def _mark(self) -> None:
        if self._marker and jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the next save is another attempt
                self._marker.touch()

    def _open(self) -> ocp.CheckpointManager:
        # `max_to_keep` with `best_fn` would delete the latest step whenever the metric worsens.
        keep = managers.AnyPreservationPolicy(
            [
                managers.LatestN(2),
                managers.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            # Without `best_fn` metrics stay in memory, and a resumed run would forget the best.
            best_fn=_top1,
            cleanup_tmp_directories=True,
            # Orbax calls it when all files are written, before the folder gets its name.
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._certify),
        )
        try:
            return ocp.CheckpointManager(
                self._folder, item_handlers=ocp.StandardCheckpointHandler(), options=options
            )
        except OSError as error:
            raise UserError(f"cannot write to {self._folder}: {error.strerror}") from None

    def _certify(self) -> None:
        assert self._started is not None, "a save is under way"
        folder = self._folder / f"{self._started}{TEMPORARY}"
        write_manifest(folder, manifest(self._started), UNLISTED)

    def latest_step(self) -> int | None:
        """The newest step that was saved, or is being saved."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        metrics: dict[str, float] | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts saving `state`, and returns as soon as the caller may change it again.

        A step that is saved already is left as it is.

        Args:
          step: the number of the step.
          state: arrays of any structure.
          metrics: the evaluation of the state; "eval_top1" decides which step is the best.
          first: writes what must be on the disk before; if it fails, the step is not saved.

        Raises:
          UserError: no attempt has succeeded for `patience` seconds.
        """
        self.saved()
        if step == self.latest_step():
            return
        self._started = step
        try:
            first()
            self._check_room(state)
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)
        except FAILURES as error:
            self._fail(error)

    def _check_room(self, state: Any) -> None:
        """Raises OSError where the disk is too full or read-only.

        Orbax would fail later, and after some failures its threads wait for minutes.
        """
        tempfile.TemporaryFile(dir=self._folder).close()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def saved(self) -> bool:
        """Waits for the save in progress; returns whether the last save has succeeded.

        Raises:
          UserError: it has failed, and no attempt has succeeded for `patience` seconds.
        """
        if self._started is None:
            return self._failing_since is None
        try:
            self._manager.wait_until_finished()
        except FAILURES as error:
            self._fail(error)
            return False
        self._started = self._failing_since = None
        self._mark()
        return True

    def look(self) -> None:
        """Reports a failed save without waiting for one in progress; raises as `saved` does."""
        if not self._manager.is_saving_in_progress():
            self.saved()

    def _fail(self, error: Exception) -> None:
        """Reports a failed save, and removes its files so that they take no disk space."""
        step, self._started = self._started, None
        if not self._folder.parent.exists():  # `_open` would create it again
            raise moved_away(self._folder.parent) from None
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        minutes = (now - self._failing_since) / 60
        reason = next((text for text in DISK if text in str(error)), first_line(error))
        message = f"checkpoint {self._folder / str(step)} could not be saved: {reason}"
        if jax.process_count() > 1 or now - self._failing_since >= self._patience:
            raise UserError(
                f"{message} (for {minutes:.0f} minutes now); make room, and the same command goes "
                "on from the newest that is there"
            ) from None
        with contextlib.suppress(*FAILURES):
            self._manager.close()
        for left in self._folder.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._manager = self._open()
        latest = self.latest_step()
        there = "there is none before it" if latest is None else f"step {latest:,} is intact"
        self._say(f"{message}; {there}, and the next save is another attempt")

    def restore(self, step: int, template: T) -> T:
        """The state of `step`, in the shapes, types and shardings of `template`.

        Raises:
          UserError: the checkpoint is of another model or optimizer, and the message names the
            first difference; or it was damaged after the check at the start of the run.
        """
        folder = self._folder / str(step)
        if jax.process_index() == 0 and (problem := _damage(folder)):
            raise UserError(
                f"checkpoint {folder} is damaged ({problem}): the same command sets it aside and "
                "goes on from the one before"
            )
        with _reading(folder) as reader:
            saved = _shapes(reader.metadata(folder / "default").tree)
        wanted = _shapes(template)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {folder} is of another model or optimizer ({name} was "
                    f"{saved.get(name)}, is now {wanted.get(name)}): take another --workdir"
                )
        return self._manager.restore(step, args=ocp.args.StandardRestore(template))

    def close(self) -> bool:
        """Waits for the save in progress, and closes; returns whether the last save succeeded."""
        saved = self.saved()
        self._manager.close()
        return saved


def set_aside_damaged(folder: Path, aside: Path) -> list[str]:
    """Reads every step under `folder`, and moves those that are not whole into `aside`.

    It also moves what a kill in the middle of a save has left. It deletes nothing. If there are
    steps but none is whole, it moves nothing.

    Returns:
      A line for each folder that was moved.

    Raises:
      UserError: there are steps, but none is whole; or a folder cannot be moved.
    """
    problems = {step: _damage(folder / step) for step in _steps(folder)}
    damaged = {step: problem for step, problem in problems.items() if problem}
    if damaged and len(damaged) == len(problems):
        listing = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise UserError(
            f"no checkpoint in {folder} is whole ({listing}): restore one from a copy, or take "
            "another --workdir"
        )
    for path in sorted(folder.glob(f"*{TEMPORARY}*")):
        damaged[path.name] = "its saving was cut off"
    moved = []
    for step, problem in damaged.items():
        place, number = aside / step, 1
        while os.path.lexists(place):
            place, number = aside / f"{step}.{number}", number + 1
        try:
            aside.mkdir(exist_ok=True)
            (folder / step).rename(place)
        except OSError as error:
            raise UserError(
                f"checkpoint {folder / step} is damaged ({problem}) and cannot be moved to "
                f"{aside}: {error.strerror}"
            ) from None
        moved.append(f"checkpoint {step} is damaged ({problem}) and was moved to {place}")
    return moved


def check_steps(folder: Path, marker: Path) -> None:
    """Raises UserError if `marker` shows that steps were saved, but `folder` has none."""
    if marker.exists() and not _steps(folder):
        raise UserError(
            f"{folder} has no checkpoint, though this run has saved some: restore one from a copy, "
            "or take another --workdir"
        )


def newest_intact(folder: Path) -> tuple[int | None, list[str]]:
    """The newest step under `folder` that is whole, and a line for each newer one that is not.

    It changes nothing, so that it may look into a run that goes on.
    """
    passed: list[str] = []
    for step in _steps(folder):
        problem = _damage(folder / step)
        if not problem:
            return int(step), passed
        passed.append(f"checkpoint {folder / step} is damaged ({problem}) and passed over")
    return None, passed


def manifest(step: int) -> str:
    """The name of a step's manifest; in a folder of another step it counts as damage."""
    return f"{step}.sha256"


def _damage(folder: Path) -> str:
    """What is wrong with the folder of a step; "" if it is whole."""
    if problem := damage(folder, manifest(int(folder.name)), UNLISTED):
        return problem
    try:
        for name in UNLISTED:
            if (folder / name).exists():
                check_regular(folder / name, LARGEST_TEXT)
        ocp.metadata.get_step_metadata(folder)
    except (KeyError, TypeError, AttributeError, RecursionError, *FAILURES):
        return "its _CHECKPOINT_METADATA is damaged"
    return ""


def _steps(folder: Path) -> list[str]:
    """The names under `folder` that Orbax takes for steps, newest first."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((name for name in names if name.isdecimal()), key=int, reverse=True)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Orbax's reader; if it cannot read the step in `folder`, a UserError gives its reason.

    The reader is the handler itself, since a `Checkpointer` hides why there are no metadata.
    """
    reader = ocp.PyTreeCheckpointHandler()
    try:
        yield reader
    except (KeyError, *FAILURES) as error:
        reason = first_line(error)
        raise UserError(f"{folder} cannot be read as a checkpoint of a run: {reason}") from None
    finally:
        reader.close()


def restore_model(folder: Path) -> tuple[Any, np.ndarray]:
    """Reads only the parameters and the mean image of a step's folder, not the optimizer's state.

    If the run keeps a moving average of its parameters, the average is read instead of them.

    Raises:
      UserError: the folder is not a checkpoint of a run.
    """
    path = _in_utf8(folder.absolute()) / "default"  # Orbax takes no relative path
    with _reading(folder) as reader:
        saved = reader.metadata(path).tree
        if not (isinstance(saved, dict) and {"params", "mean"} <= saved.keys()):
            raise ValueError("it has no parameters, or no mean image")
        params = "average" if "average" in saved else "params"
        wanted = {name: saved[name] for name in (params, "mean")}
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(wanted)):
            raise ValueError("its parameters are no arrays")
        restore = ocp.args.PyTreeRestore(
            item=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), wanted),
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
            partial_restore=True,
        )
        tree = reader.restore(path, args=restore)
    return tree[params], tree["mean"]


def _in_utf8(folder: Path) -> Path:
    """Returns the folder. Raises UserError if its path is not UTF-8, which TensorStore needs."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"checkpoints need a path in UTF-8, and {folder} is none in this locale: set "
            "PYTHONUTF8=1, or take another --workdir"
        ) from None
    return folder


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
