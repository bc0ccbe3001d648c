"""Digests of published weight files, to check files against."""

import re
from pathlib import Path

from flax_alexnet.checkpoint.manifest import digest_of_file

# From the `readme.md` of Caffe's model zoo, beside each model.
SHA1 = {
    "bvlc_alexnet.caffemodel": "9116a64c0fbe4459d18f4bb6b56d647b63920377",
    "bvlc_reference_caffenet.caffemodel": "4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46",
}


def mismatch(path: Path, sha256: str) -> str | None:
    """A line that says so where a well-known file has not the digest that it was published with.

    PyTorch puts the first digits of the SHA-256 into the name, as in `alexnet-owt-7be5be79.pth`.
    """
    name, actual = path.name, sha256
    in_name = re.fullmatch(r"alexnet-owt-([0-9a-f]{8,64})\.pth", name)
    expected = in_name[1] if in_name else ""
    if name in SHA1:
        expected, actual = SHA1[name], digest_of_file(path, "sha1")
    if actual.startswith(expected):
        return None
    return (
        f"{name} is not the well-known file, or is damaged: its digest is "
        f"{actual[: len(expected)]}, expected {expected}"
    )
