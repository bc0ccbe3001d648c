"""Files that commands write: whole or not at all, and never over what they read."""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from flax_alexnet.errors import UserError, first_line


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which gets the name `path` once all is written and on the disk.

    Its folder is made if it is not there.

    Raises:
      OSError: it cannot be written, with its name; then what was there before is as it was.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)  # it may be a link, and what that leads to is not ours
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode  # as the umask has it, which safetensors does not ask
            yield partial
            partial.chmod(mode)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # else a loss of power may leave the name without the bytes
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror or first_line(error), str(path)) from None


@contextlib.contextmanager
def writing(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """As `replacing`, with a line for the user where that fails.

    Args:
      path: as there.
      failures: what may be raised while it is written, beside OSError and ValueError.

    Raises:
      UserError: it cannot be written there; then what was there before is as it was.
    """
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, ValueError, *failures) as error:  # type: ignore[misc]
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {path}: {reason}; take another path") from None


def need_writable(path: Path | None, inputs: Iterable[Path]) -> None:
    """Raises UserError, before all the work, for a path that cannot be written or is an input's."""
    if path is None:
        return
    with contextlib.suppress(OSError):  # an input that is not there is said elsewhere
        if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"{path} would be written over, but is read; take another path")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; take another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}; take another path") from None
