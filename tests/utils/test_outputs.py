"""Files that are written: whole or not at all, by one process at a time, never over others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import alone, check_room, new_files, replacing, writing


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


def half_written_and_moved(partial, where):
    (partial / "below").mkdir(parents=True)
    partial.parents[1].rename(where)


def test_a_folder_that_is_moved_away_meanwhile_is_left_as_it_was(tmp_path):
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(UserError, match=r"cannot write .*: No such file or directory"),
        writing(tmp_path / "folder" / "x") as partial,
    ):
        half_written_and_moved(partial, tmp_path / "moved")
    assert os.listdir(tmp_path) == ["moved"]
    assert os.listdir(tmp_path / "moved") == []


def test_what_was_written_and_is_gone_is_said(tmp_path):
    """By a folder that is moved away before its files get their names."""
    path = tmp_path / "folder" / "x"

    def write_and_move():
        with new_files([path]) as write:
            write_all(write, [path])
            path.parent.rename(tmp_path / "moved")

    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory"):
        write_and_move()
    assert os.listdir(tmp_path) == ["moved"]
    assert os.listdir(tmp_path / "moved") == []


def test_links_are_never_written_through(tmp_path):
    target = tmp_path / "target"
    target.write_text("not ours")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("not ours")
    link = tmp_path / "x.csv"
    link.symlink_to(target)
    with replacing(link) as partial:
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
import time
from pathlib import Path
from pathlib import Path
from flax_alexnet.utils.outputs import replacing
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
    with new_files([None]):
        pass
    for text in ("first", "second"):
        with new_files([path, None], [other], overwrite=text == "second") as write:
            with write(path) as partial:
                partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    with pytest.raises(UserError, match="exists already: take another path, or --overwrite"):
        new_files([path], [other]).__enter__()
    other.symlink_to(path)
    for read, overwrite in ((path, True), (other, True), (path, False)):
        with pytest.raises(UserError, match="is an input of this command and would be overwritten"):
            new_files([path], [read], overwrite=overwrite).__enter__()
    with pytest.raises(UserError, match="it is a folder"):
        new_files([tmp_path], [], overwrite=True).__enter__()
    with pytest.raises(
        UserError, match="is an input of this command and would be overwritten"
    ):  # as of a run
        new_files([path], [tmp_path], overwrite=True).__enter__()
    with pytest.raises(UserError, match="is in the folder of unfinished files of another output"):
        new_files([path, tmp_path / ".x.csv.partial" / "y.png"], overwrite=True).__enter__()
    (tmp_path / "nowhere").symlink_to("gone")
    with pytest.raises(UserError, match="exists already"):
        new_files([tmp_path / "nowhere"]).__enter__()
    assert path.read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["nowhere", "other", "x.csv"]


def written_then_failed(write, file):
    with write(file) as path:
        path.write_text("1")
    raise ZeroDivisionError


def test_several_files_get_their_names_together(tmp_path):
    first, second, third = (tmp_path / name for name in ("a.csv", "b.png", "c.png"))
    with pytest.raises(ZeroDivisionError), new_files([first, second]) as write:
        written_then_failed(write, first)
    assert os.listdir(tmp_path) == []
    with new_files([first, second, third]) as write:
        for file in (first, second):
            with write(file) as path:
                path.write_text(file.name)
            assert not first.exists()
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.png"]


def write_all(write, files):
    for file in files:
        with write(file) as path:
            path.write_text("whole")


def test_a_signal_while_names_are_given_leaves_all_or_none(tmp_path, monkeypatch):
    files = [tmp_path / "a.csv", tmp_path / "b.png"]
    usual = Path.replace

    def interrupted(self, target):
        if target == files[0]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return usual(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_files(files) as write:
        write_all(write, files)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.png"]


KILLED = """
import os
from pathlib import Path
from flax_alexnet.utils import outputs
files = [Path("a.csv"), Path("b.png")]
with outputs.new_files(files) as write:
    for file in files:
        with write(file) as path:
            path.write_text("half")
    outputs._to_disk = lambda path: path == Path(".") and os._exit(9)
"""


def test_a_command_that_is_killed_between_two_names_can_be_started_again(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False)
    assert done.returncode == 9
    assert (tmp_path / "a.csv").exists()
    assert not (tmp_path / "b.png").exists()
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.png exists already"):
        new_files([tmp_path / "a.csv", tmp_path / "mine.png"]).__enter__()
    assert (tmp_path / "mine.png").read_text() == "mine"
    (tmp_path / "mine.png").unlink()
    files = [tmp_path / "a.csv", tmp_path / "b.png"]
    with new_files(files) as write:
        write_all(write, files)
    assert [file.read_text() for file in files] == ["whole", "whole"]
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "b.png"]


@pytest.mark.parametrize("left", ["", "1 2 3"])
def test_what_is_left_of_another_process_lets_nothing_be_replaced(tmp_path, left):
    path, folder = tmp_path / "x.csv", tmp_path / ".x.csv.partial"
    path.write_text("mine")
    folder.mkdir()
    (folder / "lock").write_text(left)
    with pytest.raises(UserError, match="exists already: take another path, or --overwrite"):
        new_files([path]).__enter__()
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["file/x.csv", "x" * 300, "/proc/x.csv", "a/" * 3000 + "x", "/dev/full/x"]
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*; take another path") as caught:
        new_files([tmp_path / name]).__enter__()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot write"), writing(tmp_path / name) as partial:
        partial.touch()


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"cannot write x\.csv: No such file or directory; take"):
        new_files([Path("x.csv")]).__enter__()


def test_room_is_asked_for_where_the_path_will_be(tmp_path):
    check_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"GB free, and about 1,000,000,000\.0 GB are needed"):
        check_room(tmp_path / "not" / "yet", 10**18)
    with alone(tmp_path / "x") as folder, pytest.raises(UserError) as error:
        check_room(folder / "x", 10**18)
    assert str(error.value).startswith(f"the disk of {tmp_path / 'x'} has")
