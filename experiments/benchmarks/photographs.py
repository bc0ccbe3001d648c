"""The photographs of ImageNet that some scripts read, and that are no part of this project."""

from pathlib import Path

from flax_alexnet.utils.errors import UserError

REPOSITORY = "https://github.com/EliSchwartz/imagenet-sample-images"
FOLDER = Path("imagenet-sample-images")  # where `git clone` puts it
COUNT = 200  # taken of its 1,000, one for each class


def find_photographs(folder: Path) -> list[Path]:
    """At most `COUNT` JPEGs of a folder, evenly spread over the order of their names.

    Raises:
      UserError: there are none, with where to get them.
    """
    found = sorted(folder.glob("*.JPEG"))
    if not found:
        raise UserError(
            f"no photographs (*.JPEG) in {folder}: run `git clone {REPOSITORY}`, and give its "
            "folder as --photographs"
        )
    return found[:: max(1, len(found) // COUNT)][:COUNT]
