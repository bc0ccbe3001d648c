"""The digest by which processes find that they have other pictures."""

import shutil

import pytest

from flax_alexnet.data import contents
from flax_alexnet.data.sources import FolderSource, FolderSplits, open_dataset


def digest_of(folder):
    return contents.digest(FolderSplits(folder).open("all"))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def swap(path):
    other = path.with_name("2.png")
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        swap,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.rename(path.parents[1] / "class a" / "9.png"),
        lambda path: path.parent.rename(path.parents[1] / "class e"),
    ],
)
def test_other_pictures_have_another_digest(photographs, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(photographs, folder)
    assert digest_of(folder) == digest_of(photographs)
    change(folder / "class b" / "1.png")
    assert digest_of(folder) != digest_of(photographs)


def test_of_many_pictures_some_are_read(photographs, monkeypatch):
    read = []
    monkeypatch.setattr(contents, "SAMPLE", 3)
    source = FolderSource(FolderSplits(photographs).open("train").files, "abcd")
    real = source.read
    source.read = lambda index: read.append(index) or real(index)
    contents.digest(source)
    assert set(read) == set(range(11))
    read.clear()
    monkeypatch.setattr(contents, "BYTES", 5 * len(real(0).image))
    contents.digest(source)
    assert {0, 10} < set(read)
    assert len(set(read)) < 8


def test_prepared_pictures_have_one_too(data_dir):
    dataset = open_dataset("shapes_and_textures", data_dir)
    assert contents.digest(dataset.train) == contents.digest(dataset.train)
    assert contents.digest(dataset.train) != contents.digest(dataset.eval)
