"""Feature files: what is written counts once it is on the disk, and no other file is touched."""

import errno
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from flax_alexnet.inference.feature_file import READ, UNREADABLE, FeatureFile, nearest
from flax_alexnet.utils.errors import UserError

NAMES = [f"{row}.png" for row in range(6)]
LAYERS = {"conv1": (2, 2, 3), "fc7": (5,)}
VALUES = {
    "conv1": np.arange(72, dtype=np.float32).reshape(6, 2, 2, 3),
    "fc7": -np.arange(30, dtype=np.float32).reshape(6, 5),
}
STATUS = np.array([READ, READ, UNREADABLE, READ, READ, READ], np.uint8)


@pytest.fixture(params=[".h5", ".npy"])
def suffix(request):
    return request.param


def make(path, rows=range(6)):
    file = FeatureFile(path, NAMES, LAYERS)
    rows = list(rows)
    file.write(rows, {name: values[rows] for name, values in VALUES.items()}, STATUS[rows])
    file.close()
    return path


def columns(path):
    if path.suffix == ".npy":
        array = np.load(path)
        return {name: array[name] for name in array.dtype.names}
    with h5py.File(path) as file:
        return {name: file[name][:] for name in file}


def test_rows_may_come_in_any_order(tmp_path, suffix):
    whole = make(tmp_path / f"whole{suffix}")
    parts = tmp_path / f"parts{suffix}"
    for rows in ([4], [0, 1, 5], [2, 3]):
        make(parts, rows)
    assert parts.read_bytes() == whole.read_bytes()
    found = columns(whole)
    assert [name.decode() for name in found["name"]] == NAMES
    assert found["status"].tolist() == STATUS.tolist()
    for name, values in VALUES.items():
        np.testing.assert_array_equal(found[name], values)
    assert sorted(os.listdir(tmp_path)) == [parts.name, whole.name]


def test_a_row_counts_once_its_values_are_on_the_disk(tmp_path, suffix, monkeypatch):
    """Its status is written after the values have been flushed, and not where that fails."""
    path = make(tmp_path / f"x{suffix}", [0])

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = FeatureFile(path, NAMES, LAYERS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="No space left on device"):
            file.write([1], {name: values[[1]] for name, values in VALUES.items()}, STATUS[[1]])
    file.close()
    assert columns(path)["status"].tolist() == [READ, 0, 0, 0, 0, 0]


def test_a_disk_without_room_is_one_line_before_the_work(tmp_path, suffix, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(UserError, match=r"cannot use .* \(No space left on device\)"):
        FeatureFile(tmp_path / f"x{suffix}", NAMES, LAYERS)
    assert os.listdir(tmp_path) == []


def test_all_room_is_taken_when_the_file_is_made(tmp_path, suffix):
    names = [f"{row}.png" for row in range(500)]
    FeatureFile(tmp_path / f"x{suffix}", names, {"fc6": (1000,)}).close()
    status = (tmp_path / f"x{suffix}").stat()
    assert status.st_blocks * 512 >= 4 * 500 * 1000


HOLD = """
import sys
from pathlib import Path
from flax_alexnet.inference.feature_file import FeatureFile
file = FeatureFile(Path(sys.argv[1]), ["a.png"], {"fc7": (5,)})
print("held", flush=True)
sys.stdin.readline()
"""


def test_one_process_at_a_time(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing"):
            FeatureFile(path, ["a.png"], {"fc7": (5,)})
        process.kill()
    FeatureFile(path, ["a.png"], {"fc7": (5,)}).close()


def test_links_and_pipes_are_no_feature_files(tmp_path, suffix):
    good, path = make(tmp_path / f"good{suffix}"), tmp_path / f"x{suffix}"
    before = good.read_bytes()
    for make_it in (
        lambda: path.symlink_to(good),
        lambda: path.symlink_to("gone"),
        lambda: os.mkfifo(path),
        path.mkdir,
        path.touch,
        lambda: path.write_bytes(before[:-9]),
        lambda: path.write_bytes(before[: len(before) // 2]),
    ):
        make_it()
        with pytest.raises(UserError, match=r"cannot use .*take another --output"):
            FeatureFile(path, NAMES, LAYERS)
        path.rmdir() if path.is_dir() else path.unlink()
    assert good.read_bytes() == before


def external_link(file, folder):
    with h5py.File(folder / "victim.h5", "w") as victim:
        victim["fc7"] = VALUES["fc7"]
    del file["fc7"]
    file["fc7"] = h5py.ExternalLink(str(folder / "victim.h5"), "/fc7")


def external_storage(file, folder):
    (folder / "victim.bin").write_bytes(b"not ours" * 100)
    del file["fc7"]
    places = [(str(folder / "victim.bin"), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("fc7", (6, 5), "f4", external=places)


def soft_link(file, _):
    file.move("fc7", "other")
    file["fc7"] = h5py.SoftLink("/other")
    del file["conv1"]


def virtual(file, folder):
    with h5py.File(folder / "victim.h5", "w") as victim:
        victim["fc7"] = VALUES["fc7"]
    del file["fc7"]
    layout = h5py.VirtualLayout((6, 5), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "victim.h5"), "fc7", (6, 5))
    file.create_virtual_dataset("fc7", layout)


def group(file, _):
    del file["fc7"]
    file.create_group("fc7")


def named_type(file, _):
    del file["fc7"]
    file["fc7"] = np.dtype("f4")


def big_endian(file, _):
    del file["fc7"]
    file.create_dataset("fc7", data=VALUES["fc7"].astype(">f4"))


def compressed(file, _):
    del file["name"]
    file.create_dataset("name", (6,), "S2000000", compression="gzip", chunks=(6,))


def chunked(file, _):
    del file["fc7"]
    file.create_dataset("fc7", data=VALUES["fc7"], chunks=(6, 5))


def unknown_filter(file, _):
    del file["fc7"]
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((6, 5))
    made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(file.id, b"fc7", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((6, 5)), made)


def without_room(file, _):
    del file["fc7"]
    late = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    late.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    file.create_dataset("fc7", (6, 5), "f4", dcpl=late)


def many_more(file, _):
    for number in range(1000):
        file.create_group(f"group {number}")


@pytest.mark.parametrize(
    "attack",
    [
        *(external_link, external_storage, soft_link, virtual, group, named_type, big_endian),
        *(compressed, chunked, unknown_filter, without_room, many_more),
    ],
)
def test_a_column_that_lies_elsewhere_is_refused(tmp_path, attack):
    path = make(tmp_path / "x.h5", [0])
    with h5py.File(path, "r+") as file:
        attack(file, tmp_path)
    before = {other: other.read_bytes() for other in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"cannot use .*take another --output"):
        FeatureFile(path, NAMES, LAYERS)
    assert {other: other.read_bytes() for other in tmp_path.iterdir()} == before


def test_a_block_of_the_user_before_the_file_is_counted(tmp_path):
    whole, path = make(tmp_path / "whole.h5"), tmp_path / "x.h5"
    path.write_bytes(bytes(512) + make(tmp_path / "part.h5", [0]).read_bytes())
    make(path, range(1, 6))
    assert path.read_bytes() == bytes(512) + whole.read_bytes()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_nearest_neighbours(tmp_path, distance):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 5, 2)).astype(np.float32)
    names = [f"{row}.png" for row in range(30)]
    file = FeatureFile(tmp_path / "x.h5", names, {"conv5": (5, 2)})
    status = np.full(30, READ, np.uint8)
    status[4] = 2
    file.write(range(30), {"conv5": values}, status)
    flat = values.reshape(30, -1)
    if distance == "cosine":
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    rows, distances = nearest(file, "conv5", [3, 7], 28, distance, block=7)
    for query, found, away in zip([3, 7], rows, distances, strict=True):
        exact = np.linalg.norm(flat - flat[query], axis=1)
        others = [row for row in np.argsort(exact, kind="stable") if row not in (query, 4)]
        assert found.tolist() == others
        np.testing.assert_allclose(away, exact[others], rtol=1e-5)
    file.close()
