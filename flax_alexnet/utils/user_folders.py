"""The folders of the user who runs a process; in a container there may be none."""

import os
from pathlib import Path


def home() -> Path | None:
    """The user's home; None for a user whom the system does not know, without HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder() -> Path | None:
    """Where this package keeps what it can make again, or None where there is no place for it.

    It is `flax_alexnet` in XDG_CACHE_HOME, else in `.cache` of the home, and is made here.
    """
    at_home = home()
    parent = os.environ.get("XDG_CACHE_HOME") or (at_home and at_home / ".cache")
    if not parent:
        return None
    folder = Path(os.path.expanduser(parent)) / "flax_alexnet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is not there, or not the user's
        return None
    return folder
