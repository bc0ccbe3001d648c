"""Manifests of folders: the digest of each file, so that damage is seen before it is used.

A manifest is a text file in the folder, of lines as `sha256sum` writes them, so that `sha256sum -c`
there says the same as `damage`.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flax_alexnet.utils.inputs import open_regular, read_text
from flax_alexnet.utils.text import printable

LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sha256(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal digits."""
    return digest_of_file(path, "sha256")


def digest_of_file(path: Path, kind: str) -> str:
    """The digest of a file's bytes by an algorithm of `hashlib`, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, kind).hexdigest()


def write_manifest(folder: Path, manifest: str, unlisted: frozenset[str]) -> None:
    """Writes the digests of all files below `folder` but those that are `unlisted`.

    The manifest's name is a part of what is attested: by another name it is not found.
    """
    names = sorted(_files(folder) - unlisted)
    lines = [f"{digest}  {name}\n" for name, digest in _digests(folder, names).items()]
    (folder / manifest).write_text("".join(lines))


def damage(folder: Path, manifest: str, unlisted: frozenset[str]) -> str:
    """What is wrong with a folder that has a manifest, in a few words; "" if it is whole.

    Every file is read. Files that the manifest does not name are damage too, but for `unlisted`.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    try:
        lines = read_text(folder / manifest).splitlines()
        matches = [LINE.fullmatch(line) for line in lines]
        digests = {match[2]: match[1] for match in matches if match}
        files = _files(folder)
        if not digests or len(digests) < len(lines):
            return f"its {manifest} is damaged"
        for name in sorted(digests.keys() - files):
            return f"{name} is missing"
        for name in sorted(files - digests.keys() - {manifest} - unlisted):
            return f"{printable(name)} does not belong to it"
        for name in sorted(digests):
            if (folder / name).is_symlink() or not (folder / name).is_file():
                return f"{name} is no file"
        now = _digests(folder, sorted(digests))
    except FileNotFoundError:
        return f"it has no {manifest}"
    except UnicodeDecodeError:
        return f"its {manifest} is damaged"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    changed = [name for name in now if now[name] != digests[name]]
    return f"{changed[0]} has changed" if changed else ""


def _files(folder: Path) -> set[str]:
    """What lies below a folder and is no folder itself: paths relative to it."""
    below = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in below}


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # the interpreter lock is free while bytes are hashed
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))
