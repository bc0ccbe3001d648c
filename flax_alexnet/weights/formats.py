"""Recognizes the format of a weight file by its content, because its ending says little."""

import os
import zipfile
from pathlib import Path
from typing import Literal

from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import open_regular
from flax_alexnet.weights.archives import open_zip
from flax_alexnet.weights.pickles import NONSENSE
from flax_alexnet.weights.stored import LARGEST

Format = Literal["safetensors", "torch", "npz", "npy", "caffe", "convnet"]

KINDS = (
    "a .safetensors, a .pth, .pt, .bin or .ckpt of PyTorch, a .caffemodel, an .npy or .npz, a "
    "checkpoint of cuda-convnet, or the --workdir of a run"
)
# What is often taken for weights, by its first bytes in small letters, and what helps.
MISTAKEN = {
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
    b"\x89hdf\r\n\x1a\n": "is an HDF5 file, which is not read here",
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<!doctype html": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself",
}
# A message of protocol buffers has no mark; it begins with the number and type of its first field,
# and of a model that is its name or a layer, old or new.
CAFFE = (b"\x0a", b"\x12", b"\xa2\x06")


def format_of(path: Path) -> Format:
    """The format that the first bytes of a file tell.

    Raises:
      UserError: it is none of them, or cannot be read.
    """
    try:
        with open_regular(path, LARGEST) as file:
            start = file.read(512)
            size = os.fstat(file.fileno()).st_size
        # The length of a header, whose bytes may look like any other mark, and the header.
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
            return "safetensors"
        if start.startswith(b"PK"):
            with open_zip(path) as archive:
                names = archive.namelist()
            if names == ["data"]:
                return "convnet"
            return "npz" if all(name.endswith(".npy") for name in names) else "torch"
    except (OSError, zipfile.BadZipFile, *NONSENSE) as error:
        reason = first_line(error)
        raise UserError(f"cannot read {path}: {reason}; fetch or copy it once more") from None
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"\x80\x02}"):  # a pickle of Python 2, of a dictionary
        return "convnet"
    if start.startswith(b"\x80"):  # another pickle
        return "torch"
    for magic, problem in MISTAKEN.items():
        if start.lower().startswith(magic):
            raise UserError(f"{path} {problem}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it first")
    if path.suffix.lower() == ".binaryproto":
        raise UserError(f"{path} is a mean image; give it as --mean to convert, with a .caffemodel")
    if start.startswith(CAFFE) or path.suffix.lower() == ".caffemodel":
        return "caffe"
    raise UserError(f"{path} is not known as a weight file: expected {KINDS}")
