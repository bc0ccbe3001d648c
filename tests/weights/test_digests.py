"""Digests of published files."""

import hashlib

from flax_alexnet.checkpoint.manifest import sha256
from flax_alexnet.weights import digests
from flax_alexnet.weights.load import load
from tests.foreign_files import zip_pth


def test_digests(tmp_path):
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    path.write_bytes(b"other")
    digits = sha256(path)
    assert digits == hashlib.sha256(b"other").hexdigest()
    assert "expected 7be5be79" in digests.mismatch(path, digits)
    right = path.rename(tmp_path / f"alexnet-owt-{digits[:8]}.pth")
    assert digests.mismatch(right, digits) is None
    caffe = right.rename(tmp_path / "bvlc_alexnet.caffemodel")
    line = digests.mismatch(caffe, digits)
    assert hashlib.sha1(b"other").hexdigest() in line
    assert "9116a64c0fbe4459d18f4bb6b56d647b63920377" in line
    assert digests.mismatch(caffe.rename(tmp_path / "my.caffemodel"), digits) is None


def test_wrong_digest_is_said(trunk, tmp_path, capsys):
    load(zip_pth(tmp_path / "alexnet-owt-7be5be79.pth", trunk))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: alexnet-owt-7be5be79.pth")
