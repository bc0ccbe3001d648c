"""Files that are written: whole or not at all, by one process at a time, never over others."""

import os
import signal
import subprocess
import sys

import pytest

from flax_alexnet.errors import UserError
from flax_alexnet.outputs import alone, need_room, need_writable, replacing, writing


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        1 / partial.write_text("")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["table.csv"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(TypeError), replacing(path) as partial:
        (partial / "below").mkdir(parents=True) + 1
    assert os.listdir(tmp_path) == []
    with replacing(path) as partial:
        (partial / "below").mkdir(parents=True)
        (partial / "below" / "file").write_text("1")
    assert (path / "below" / "file").read_text() == "1"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_rules_whatever_a_library_sets(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "x") as partial:
            partial.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / ".table.csv.partial"
    left.mkdir()
    (left / "lock").touch()
    (left / "table.csv").write_text("half")
    (left / "below").mkdir()
    (left / "below" / "file").touch()
    with replacing(tmp_path / "table.csv") as partial:
        assert os.listdir(left) == ["lock"]
        partial.write_text("whole")
    assert os.listdir(tmp_path) == ["table.csv"]


def test_links_are_never_written_through(tmp_path):
    target = tmp_path / "target"
    target.write_text("not ours")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("not ours")
    link = tmp_path / "x.csv"
    link.symlink_to(target)
    with replacing(link) as partial:  # which `need_writable` has allowed
        partial.write_text("ours")
    assert not link.is_symlink()
    for there in (target, tmp_path / "folder"):
        partial = tmp_path / ".y.csv.partial"
        partial.symlink_to(there)
        with (
            pytest.raises(UserError, match=r"cannot write .*y\.csv: something else is in the way"),
            writing(tmp_path / "y.csv") as path,
        ):
            path.write_text("ours")
        partial.unlink()
    left = tmp_path / ".z.csv.partial"
    left.mkdir()
    (left / "lock").symlink_to(target)
    with pytest.raises(UserError, match="cannot write"), writing(tmp_path / "z.csv") as path:
        path.write_text("ours")
    (left / "lock").unlink()
    (left / "z.csv").symlink_to(target)
    (left / "more").symlink_to(tmp_path / "folder")
    with writing(tmp_path / "z.csv") as path:
        path.write_text("ours")
    assert target.read_text() == "not ours"
    assert (tmp_path / "folder" / "file").read_text() == "not ours"


HOLD = """
import sys
from pathlib import Path
from flax_alexnet.outputs import replacing
with replacing(Path("x.csv")) as partial:
    partial.write_text("half")
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_process_writes_at_a_time(tmp_path):
    def hold():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "held\n"
        return process

    path = tmp_path / "x.csv"
    with hold() as first:
        with pytest.raises(UserError, match=r"another process is writing .*x\.csv"), alone(path):
            pass
        with alone(tmp_path / "y.csv"):
            pass
        first.communicate("\n")
    assert path.read_text() == "half"
    path.unlink()
    with hold() as killed:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    assert os.listdir(tmp_path) == [".x.csv.partial"]
    with writing(path) as partial:
        partial.write_text("whole")
    assert os.listdir(tmp_path) == ["x.csv"]


def test_what_is_there_is_replaced_only_where_that_is_wanted(tmp_path):
    path, other = tmp_path / "x.csv", tmp_path / "other"
    need_writable(None, [])
    need_writable(path, [other])
    path.write_text("there")
    with pytest.raises(UserError, match="is there already: take another path, or --overwrite"):
        need_writable(path, [other])
    need_writable(path, [other], overwrite=True)
    other.symlink_to(path)
    for read, overwrite in ((path, True), (other, True), (path, False)):
        with pytest.raises(UserError, match="would be written over, but is read"):
            need_writable(path, [read], overwrite)
    with pytest.raises(UserError, match="it is a folder"):
        need_writable(tmp_path, [], overwrite=True)
    (tmp_path / "nowhere").symlink_to("gone")
    with pytest.raises(UserError, match="is there already"):
        need_writable(tmp_path / "nowhere", [])


@pytest.mark.parametrize(
    "name", ["file/x.csv", "x" * 300, "/proc/x.csv", "a/" * 3000 + "x", "/dev/full/x"]
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*; take another path") as caught:
        need_writable(tmp_path / name, [])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot write"), writing(tmp_path / name) as partial:
        partial.touch()


def test_room_is_asked_for_where_the_path_will_be(tmp_path):
    need_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"GB free and about 1000000000\.0 GB are needed"):
        need_room(tmp_path / "not" / "yet", 10**18)
