"""Opens files to read: only regular files, and only up to a plausible size.

A pipe in the place of a file would be waited for for ever, a device or a sparse file would fill the
memory. Every reader opens what comes from outside here, and says in its own words what was wrong.
"""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from flax_alexnet.utils.errors import first_line

MB = 2**20
LARGEST_TEXT = 64 * MB  # of names, of a configuration, of a manifest


def open_regular(path: str | Path, largest: int | None = None) -> io.BufferedReader:
    """Opens a regular file to read its bytes.

    Args:
      path: of the file; a link is followed.
      largest: the bytes that it may have; None: any number.

    Raises:
      OSError: it is not there, cannot be read, is a pipe, a device or a folder, or is larger; why
        is in `strerror`.
    """
    # A pipe that nobody writes to would keep an ordinary `open` waiting.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if largest is not None and status.st_size > largest:
            raise _too_large(path, status.st_size, largest)
        return open(path, "rb", opener=lambda *_: descriptor)  # which keeps its name
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | Path, largest: int | None = None) -> None:
    """Raises as `open_regular` does, for a library that opens the file itself."""
    open_regular(path, largest).close()


def read_bytes(path: str | Path, largest: int) -> bytes:
    """All bytes of a regular file; raises as `open_regular` does."""
    with open_regular(path, largest) as file:
        data = file.read(largest + 1)
    if data is None:  # a file of the system that would be waited for
        raise BlockingIOError(errno.EAGAIN, "it has nothing to read yet", str(path))
    if len(data) > largest:  # files of the system, as in /proc, say that they have none
        raise _too_large(path, len(data), largest)
    return data


def read_text(path: str | Path, largest: int = LARGEST_TEXT, encoding: str = "utf-8") -> str:
    """The text of a regular file; raises as `open_regular` does, and UnicodeDecodeError."""
    return read_bytes(path, largest).decode(encoding)


def read_json(path: str | Path, largest: int = LARGEST_TEXT) -> Any:
    """What a file of JSON holds; raises as `read_text` does, and as `parse_json`."""
    return parse_json(read_text(path, largest))


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
      ValueError: it is none, or is nested too deep to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested too deep ({first_line(error)})") from None


def _too_large(path: str | Path, size: int, largest: int) -> OSError:
    reason = f"it has {size:,} bytes; at most {largest:,} are read"
    return OSError(errno.EFBIG, reason, str(path))
