"""Trained models that come with the package, and are called by a name instead of a path.

`experiments/paper/package_model.py` makes them of runs. Their `source` has the command that trained
them, and the error on the test images.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("packaged")


def packaged_names() -> list[str]:
    """The names of the models."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def find(path: Path) -> Path:
    """The file of the model that is called so, or else `path`, which may be a file or a folder.

    A file or folder of that name in the current folder is taken instead of the model.
    """
    if str(path) in packaged_names() and not path.exists():
        return FOLDER / f"{path}.safetensors"
    return path
