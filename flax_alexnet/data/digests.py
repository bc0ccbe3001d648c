"""Digests that show whether image files have changed, without reading the whole files."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.utils.inputs import open_regular

CHUNK = 64  # files that a thread is given at once
READERS = 16  # threads, which mostly wait for a disk or a network


class Digest(NamedTuple):
    """Of files: what they are, and when they were changed."""

    content: str  # the same on every machine, whenever they were copied there
    times: str


def digest_files(files: Sequence[tuple[str, str | Path]], end: int) -> Digest:
    """The digest over the names, the sizes, and the first and last bytes of files.

    An image that became another one has another size or another end, but for one that is stored
    without compression: of such a change only the times tell.

    Args:
      files: what each is called in the digest, and where it is; one that cannot be read counts as
        such.
      end: bytes at either end.
    """
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    content, times = hashlib.sha256(), hashlib.sha256()
    for one, other in map_threads(lambda chunk: _digest_chunk(chunk, end), chunks, READERS):
        content.update(one)
        times.update(other)
    return Digest(content.hexdigest(), times.hexdigest())


def _digest_chunk(files: Sequence[tuple[str, str | Path]], end: int) -> tuple[bytes, bytes]:
    content, times = hashlib.sha256(), hashlib.sha256()
    for name, path in files:
        content.update(os.fsencode(name) + b"\0")
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                last = max(end, status.st_size - end)  # where the last bytes begin
                parts = (os.pread(file.fileno(), end, place) for place in (0, last))
                ends = b"".join(parts)
                content.update(f"{status.st_size} {len(ends)} ".encode() + ends)
                times.update(f"{status.st_mtime_ns} ".encode())
        except OSError:
            content.update(b"cannot be read")
    return content.digest(), times.digest()
