"""Identifies the program of a process: the code of this package, other packages, JAX settings."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax

from flax_alexnet.config.schema import JAX_SETTINGS
from flax_alexnet.utils.inputs import MB, read_bytes

PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax")  # whose versions may change numbers


def program() -> dict[str, Any]:
    """What must be the same on all processes of a run, by names that a user knows."""
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    return {"the digest of the code of flax_alexnet": _sources(), **versions, **settings()}


def settings() -> dict[str, Any]:
    """JAX's settings that change numbers, such as "jax.enable_x64"."""
    return {f"jax.{name}": getattr(jax.config, f"jax_{name}") for name in JAX_SETTINGS}


def _sources() -> str:
    """A short digest of the files of this package."""
    folder = Path(__file__).parents[1]
    hasher = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".txt")):
        hasher.update(path.relative_to(folder).as_posix().encode() + b"\0")
        hasher.update(hashlib.sha256(read_bytes(path, MB)).digest())
    return hasher.hexdigest()[:16]
