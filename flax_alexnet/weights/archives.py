"""Reads zip files, the containers of NumPy and PyTorch, in pieces.

What a zip file says of its sizes may be wrong, and a small one may unpack to any size: so its
directory is read up to a limit, and of a file within it as much as the tensor has.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.weights.stored import LARGEST, MOST_TENSORS, read_exactly

LARGEST_DIRECTORY = 2 * 2**20  # bytes; 200 for each of as many files as there may be


class _InPieces:
    """A file that gives no piece longer than a directory may be."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size:,} bytes")
        return self._file.read(size if size >= 0 else LARGEST_DIRECTORY)


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file of tensors.

    Raises:
      OSError, BadZipFile and other errors of damaged files: it cannot be read, or holds more files
        than any weights.
    """
    with open_regular(path, LARGEST) as file, zipfile.ZipFile(_InPieces(file)) as archive:
        if len(archive.infolist()) > MOST_TENSORS:
            raise zipfile.BadZipFile(f"it has more than {MOST_TENSORS:,} files within")
        yield archive


def open_member(archive: zipfile.ZipFile, name: str) -> Any:
    """Opens a file within to be read; raises BadZipFile where that may unpack to any size at once.

    Only stored and deflated bytes come in pieces.
    """
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"its {name} is compressed by a method that is not read")
    return archive.open(name)


def read_member(archive: zipfile.ZipFile, name: str, size: int, start: int = 0) -> bytearray:
    """The bytes of a file within, which has `size` of them from `start` on, and no more.

    Raises:
      EOFError, BadZipFile: it has fewer or more, or is damaged.
    """
    with open_member(archive, name) as stream:
        read_exactly(stream, start)
        data = read_exactly(stream, size)
        if stream.read(1):
            raise zipfile.BadZipFile(f"its {name} is longer than it says")
    return data
