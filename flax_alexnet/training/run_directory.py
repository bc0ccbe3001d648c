"""The working directory of a run: its owner, its lock, and the files with its configuration."""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_alexnet.config.schema import CONTENT, misfit, upgrade
from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.inputs import read_json
from flax_alexnet.utils.outputs import lock, replacing
from flax_alexnet.utils.text import printable

SAVED = "saved"  # the marker of a run that has saved a checkpoint
FOLDERS = ("checkpoints", "damaged", "evaluation", "report", "tensorboard")
SECONDS = "seconds"  # the file that counts those of all sittings of a run
FILES = (
    *("bad_records.jsonl", "config.json", "lock", "metrics.jsonl"),
    *(SAVED, SECONDS, "summary.json"),
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def claim(
    workdir: Path,
    config: Mapping[str, Any],
    *,
    free_to_change: Collection[str] = (),
    allow_changes: bool = False,
) -> tuple[Mapping[str, Any], list[str]]:
    """Makes `workdir`, and makes sure that a run of this configuration may use it.

    Args:
      workdir: made if it is not there.
      config: flat, such as `{"data.name": "cifar10"}`, with values as JSON has them.
      free_to_change: names whose values may differ from those that the run was started with.
      allow_changes: whether any may.

    Returns:
      The configuration that the run there had last, or `config`; and what else than
      `free_to_change` has changed.

    Raises:
      UserError: it holds a run of another configuration (the difference is in the message), or
        cannot be written to.
    """
    path = workdir / "config.json"
    for name in (*FOLDERS, *FILES):
        place = workdir / name
        is_right = place.is_dir() if name in FOLDERS else _is_own_file(place)
        if os.path.lexists(place) and not is_right:
            raise UserError(f"{place} is not what a run left there; take another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
        exists = path.exists()
    except OSError as error:
        raise UserError(_cannot_write(workdir, error)) from None
    try:
        before = upgrade(read_json(path)["config"]) if exists else config
        differences = [
            f"{CONTENT[name]} have changed"
            if name in CONTENT
            else f"{name} was {before.get(name)!r}, is now {config.get(name)!r}"
            for name in sorted(before.keys() | config.keys())
            if before.get(name) != config.get(name)
            and name not in free_to_change
            and (name in before or not name.startswith("jax."))  # which once were not kept
        ]
    except OSError as error:
        raise UserError(f"cannot read {path}: {cause(error)}; take another --workdir") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is no configuration of a run; take another --workdir") from None
    if (problem := misfit(before)) and not allow_changes:
        raise UserError(f"{path} has {problem}; mend it, or take another --workdir")
    if differences and not allow_changes:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(differences)}): take "
            "another --workdir, or --allow-changes to go on with the new one"
        )
    return (config if problem else before), differences


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps every other run out of `workdir`, by whatever name they call it.

    The lock is the system's, on the open file `lock`: it ends with the process, however that ends,
    and the file that stays behind locks nothing.

    Raises:
      UserError: another run has it.
    """
    path = workdir / "lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(_cannot_write(workdir, error)) from None
    with file:
        try:
            lock(file.fileno(), path)
        except BlockingIOError:
            file.seek(0)
            who = printable(file.read(200).strip()) or "another run"
            raise UserError(
                f"{workdir} is in use by {who}: wait until it has ended, or take another --workdir"
            ) from None
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def record(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`: the configuration and the `versions`.

    Raises:
      UserError: the directory cannot be written to.
    """
    try:
        write_json(workdir / "config.json", {"config": dict(config), "versions": versions()})
    except OSError as error:
        raise UserError(_cannot_write(workdir, error)) from None


def versions() -> dict[str, str]:
    """Those of Python and of the packages that count."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def summarized_step(workdir: Path) -> int | None:
    """The step that `summary.json` is of; None where there is none that can be read."""
    try:
        step = read_json(workdir / "summary.json")["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def recorded(workdir: Path) -> dict[str, Any]:
    """The configuration in a run's `config.json`, as `claim` takes it; {} where there is none."""
    try:
        config = read_json(workdir / "config.json")["config"]
        return {} if misfit(config) else upgrade(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _cannot_write(workdir: Path, error: OSError) -> str:
    return f"cannot write to {workdir}: {error.strerror}; take another --workdir"


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()  # what a link leads to is not ours to write to


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is whole even if the program, or the machine, stops meanwhile."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")
