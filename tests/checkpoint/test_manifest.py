"""Manifests: any change of a folder is said in a few words."""

import pytest

from flax_alexnet.checkpoint.manifest import damage, digest_of_file, sha256, write_manifest

UNLISTED = frozenset({"later"})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, "MANIFEST", UNLISTED)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("sha256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ("md5", "900150983cd24fb0d6963f7d28e17f72"),
    ],
)
def test_digests(tmp_path, kind, digest):
    """Of three bytes, as FIPS 180 and RFC 1321 give them."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_of_file(tmp_path / "abc", kind) == digest
    if kind == "sha256":
        assert sha256(tmp_path / "abc") == digest


def test_a_folder_that_nobody_touched_is_whole(folder):
    (folder / "later").write_text("which may come")
    assert damage(folder, "MANIFEST", UNLISTED) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "a").write_text("b"), "a has changed"),
        (lambda f: (f / "sub/b").unlink(), "sub/b is missing"),
        (lambda f: (f / "more").write_text(""), "more does not belong to it"),
        (lambda f: ((f / "a").unlink(), (f / "a").symlink_to("sub/b")), "a is no file"),
        (lambda f: (f / "MANIFEST").unlink(), "it has no MANIFEST"),
        (lambda f: (f / "MANIFEST").write_text("x"), "its MANIFEST is damaged"),
        (lambda f: (f / "MANIFEST").write_bytes(b"\xff"), "its MANIFEST is damaged"),
    ],
)
def test_what_is_wrong_is_said(folder, change, said):
    change(folder)
    assert damage(folder, "MANIFEST", UNLISTED) == said


def test_what_is_no_folder(tmp_path):
    assert damage(tmp_path / "none", "MANIFEST", UNLISTED) == "it is no folder"
