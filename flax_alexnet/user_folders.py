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

    It is `flax_alexnet` in XDG_CACHE_HOME, else in `.cache` of the home.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "flax_alexnet"
    at_home = home()
    return at_home / ".cache" / "flax_alexnet" if at_home else None
