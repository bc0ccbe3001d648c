"""Writes files completely or not at all, under a lock, and never over existing files."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from flax_alexnet.utils.errors import UserError, cause
from flax_alexnet.utils.inputs import read_text

LOCK = "lock"


@contextlib.contextmanager
def alone(path: Path) -> Iterator[Path]:
    """Keeps other processes from writing `path`, and yields an empty folder for unfinished files.

    The folder, `.NAME.partial`, lies beside `path`; their parent folder is created if needed. It
    holds a lock, which ends with the process, however the process ends. Files that a killed process
    has left in it are removed when the next one begins; the folder itself is removed at the end.

    Raises:
      UserError: another process is writing there.
      OSError: the folder cannot be made.
    """
    folder = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The descriptor still refers to the parent folder if that is moved away meanwhile.
    with _opened(path.parent) as parent:
        file = _lock_folder(folder, path)
        try:
            _clear(folder.name, parent)
            yield folder
        finally:
            _clear(folder.name, parent)
            with contextlib.suppress(OSError):
                os.unlink(f"{folder.name}/{LOCK}", dir_fd=parent)
                os.rmdir(folder.name, dir_fd=parent)
            os.close(file)


def _lock_folder(folder: Path, path: Path) -> int:
    """Makes the folder of `alone` for `path`, and gives its lock."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if not stat.S_ISDIR(folder.lstat().st_mode):  # of a link, what it leads to is not ours
            raise FileExistsError(errno.EEXIST, "something else is in the way", str(folder))
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(folder / LOCK, flags, 0o666)
        except FileNotFoundError:  # another process has just ended, and removed it
            continue
        try:
            lock(file, folder / LOCK)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(folder / LOCK)):
                    return file
            os.close(file)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"another process is writing {path}: wait until it has ended, or take another path"
            ) from None


def lock(file: int, path: Path) -> None:
    """Takes the system's lock on an open file, whose `path` is for the message.

    Where a file system has no locks, a line warns of that.

    Raises:
      BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        print(
            f"warning: {path} cannot be locked ({error.strerror}): start no second process that "
            "writes there"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path for a file or a folder, which becomes `path` once all of it is on the disk.

    Raises:
      UserError: another process is writing there.
      OSError: `path`, which the error names, cannot be written; its old content is unchanged.
    """
    try:
        with alone(path) as folder:
            yield folder / path.name
            _publish(folder, path)
    except OSError as error:
        raise OSError(error.errno, cause(error), str(path)) from None


@contextlib.contextmanager
def writing(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """Like `replacing`, but raises UserError if it fails.

    Args:
      path: see `replacing`.
      failures: what the writing may raise besides OSError and ValueError.

    Raises:
      UserError: `path` cannot be written; its old content is unchanged.
    """
    with _explain_failures(path, *failures), replacing(path) as partial:
        yield partial


class Write(Protocol):
    """What `new_files` yields: like `writing`, it maps a path to one for the unfinished file."""

    def __call__(
        self, path: Path, *failures: type[Exception]
    ) -> contextlib.AbstractContextManager[Path]: ...


@contextlib.contextmanager
def new_files(
    paths: Iterable[Path | None], inputs: Iterable[Path] = (), *, overwrite: bool = False
) -> Iterator[Write]:
    """Claims the files or folders that a command will create, before it begins its work.

    All files that were written get their names together, when the block ends without an error. A
    command that is killed at that moment can be started again, and replaces the files that have
    their names already.

    Args:
      paths: the paths of the files; None is left out.
      inputs: the files and folders that the command reads.
      overwrite: whether existing files may be replaced.

    Raises:
      UserError: a path cannot be written, another process is writing it, it is an input or lies in
        one, or it exists and `overwrite` is not set.
    """
    chosen = list(dict.fromkeys(path for path in paths if path is not None))
    read = list(inputs)
    for path in chosen:
        check_not_read(path, read)
        with _explain_failures(path):  # as where the working directory has been removed
            if {_partial(other).absolute() for other in chosen} & {*path.absolute().parents}:
                raise UserError(
                    f"{path} is in the folder of unfinished files of another output; take another "
                    "path"
                )
        _check_new(path, overwrite)
    folders: dict[Path, Path] = {}
    written: list[Path] = []

    @contextlib.contextmanager
    def write(path: Path, *failures: type[Exception]) -> Iterator[Path]:
        with _explain_failures(path, *failures):
            yield folders[path] / path.name
        written.append(path)

    def publish() -> None:
        for path in written:
            with _explain_failures(path):
                # If this process is killed now, the next one recognizes the file by its identity.
                (folders[path] / LOCK).write_text(_identity(folders[path] / path.name))
                _publish(folders[path], path)

    with contextlib.ExitStack() as resources:
        for path in chosen:
            with _explain_failures(path):
                folders[path] = resources.enter_context(alone(path))
                _check_new(path, overwrite)  # another process may have written it just now
        yield write
        # A signal does not interrupt this thread, so that all files get their names, or none does.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(int).result()  # it runs from here on, so that its end is waited for
            thread.submit(publish).result()


def _partial(path: Path) -> Path:
    """The folder for the unfinished file of `path`."""
    return path.with_name(f".{path.name}.partial")


def _target(path: Path) -> Path:
    """The final path of a file in such a folder; any other path is returned unchanged."""
    target = path.parent.with_name(path.name)
    return target if _partial(target) == path.parent else path


def _publish(folder: Path, path: Path) -> None:
    """Moves the finished file from a folder of `alone` to `path`."""
    partial = folder / path.name
    mode = (folder / LOCK).stat().st_mode & 0o777  # as the umask has it
    for file in (partial, *partial.rglob("*")):
        if file.is_file():
            file.chmod(mode)  # which some libraries set without asking
        _to_disk(file)  # else a loss of power may leave the name without the bytes
    partial.replace(path)
    _to_disk(path.parent)


def _check_new(path: Path, overwrite: bool) -> None:
    """Raises UserError if `path` exists and may not be replaced.

    It may be replaced if the process that gave it its name was killed soon after.
    """
    if overwrite or not os.path.lexists(path):
        return
    with contextlib.suppress(OSError):
        if read_text(_partial(path) / LOCK, encoding="latin-1") == _identity(path):
            return
    raise UserError(f"{path} exists already: take another path, or --overwrite")


def _identity(path: Path) -> str:
    """A text that stays the same when a file is renamed, and differs for any other file."""
    status = path.lstat()
    return f"{status.st_dev} {status.st_ino} {status.st_mtime_ns}"


@contextlib.contextmanager
def _explain_failures(path: Path, *failures: type[Exception]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, *failures) as error:  # type: ignore[misc]
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: BaseException) -> UserError:
    """The UserError for an error in writing."""
    reason = cause(error)
    return UserError(f"cannot write {path}: {reason}; take another path")


def moved_away(workdir: Path) -> UserError:
    """The UserError that ends a run whose directory was moved or removed.

    Otherwise later checkpoints of the run would be in another place than the earlier ones.
    """
    return UserError(
        f"{workdir} was moved or removed while the run went on: move it back, and the same "
        "command goes on from the newest checkpoint in it"
    )


def check_not_read(path: Path, inputs: Iterable[Path]) -> None:
    """Raises UserError for a folder, or for an existing path that is an input or lies in one."""
    if os.path.exists(path) and any(_holds(other, path) for other in inputs):
        raise UserError(
            f"{path} is an input of this command and would be overwritten; take another path"
        )
    # Python 3.12's `Path.is_dir` raises where a name is too long.
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; take another path")


def _holds(place: Path, path: Path) -> bool:
    """Whether `path` is the input `place` or lies in it; False if the input is gone."""
    with contextlib.suppress(OSError):
        status = place.stat()  # one look at each, since a dataset may have a million files
        if stat.S_ISDIR(status.st_mode):
            return path.resolve().is_relative_to(place.resolve())
        return os.path.samestat(status, path.stat())
    return False


def check_room(path: Path, needed: int) -> None:
    """Raises UserError unless the disk of `path`, which may not exist, has `needed` bytes free."""
    try:
        ancestors = (path.absolute(), *path.absolute().parents)
    except OSError as error:  # the working directory has been removed
        raise cannot_write(path, error) from None
    folder = next(place for place in ancestors if os.path.exists(place))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {_target(path)} has {_size(free)} free, and about {_size(needed)} are "
            "needed: make room, or take a path on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _clear(name: str, parent: int) -> None:
    """Removes all but the lock from the folder `name` of an open folder; it follows no link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    with contextlib.suppress(OSError), _opened(name, flags, parent) as folder:
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.name, ignore_errors=True, dir_fd=folder)
            elif entry.name != LOCK:
                os.unlink(entry.name, dir_fd=folder)


def _to_disk(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path | str, flags: int = os.O_RDONLY, parent: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
