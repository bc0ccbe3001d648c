"""What `prepare` writes goes on after any interruption."""

import contextlib
import fcntl
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from flax_alexnet.commands.prepare import main as prepare_main
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data import synthetic, writer
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.utils.errors import UserError
from tests.datasets import contents
from tests.images import make_folder

KILLS = """
import os, signal, sys
from pathlib import Path
from flax_alexnet.data import writer
from flax_alexnet.utils.errors import UserError
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.utils.text import read_table

name, out, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
writer.SHARD = 4


def run(data_dir, last_line=None):  # counts the lines of writer.py, and dies at one of them
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename != writer.__file__:
            return None
        seen += event == "line"
        if seen == last_line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        prepare(name, data_dir, image_size=16)
    finally:
        sys.settrace(None)
    return seen


lines = run(out / "reference")
for kill in range(kills):
    data_dir, last_line = out / str(kill), 1 + kill * (lines - 1) // (kills - 1)
    pid = os.fork()
    if not pid:
        run(data_dir, last_line)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended")
    try:
        run(data_dir)
    except UserError as error:  # it was killed when all was done
        print(error)
print("tensorflow" in sys.modules)
"""


@contextlib.contextmanager
def full_disk(shards):
    """The disk is full after so many shards."""
    original = writer.ArrayRecordWriter
    room = [None] * shards

    def write(path, options):
        return original(path if room and not room.pop() else "/dev/full", options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ArrayRecordWriter", write)
        yield


class TestInterruption:
    @pytest.fixture
    def pets(self, tmp_path, monkeypatch):
        """A folder of 9 shards, with one image that cannot be read."""
        monkeypatch.setattr(writer, "SHARD", 4)
        folder = make_folder(tmp_path / "pets", {"cat": 17, "dog": 18})
        (folder / "cat" / "003.png").write_bytes(b"")
        return folder

    def test_killed_anywhere_it_ends_with_the_same_bytes(self, tmp_path, pets):
        """Kills at lines evenly spaced over the whole run, each followed by a second start."""
        kills = 16
        arguments = [f"folder:{pets}", str(tmp_path), str(kills)]
        said = subprocess.run(
            [sys.executable, "-u", "-c", KILLS, *arguments],  # unbuffered: a fork writes it twice
            env=os.environ | {"JAX_PLATFORMS": "none"},  # no device is asked for
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert said.count("9") == kills
        assert said[-1] == "False"  # TensorFlow was not needed
        whole = contents(tmp_path / "reference")
        assert sum("array_record" in name for name in whole) == 9
        for kill in range(kills):
            assert contents(tmp_path / str(kill) / "prepared_folder" / "pets" / "1.0.0") == {
                name.removeprefix("prepared_folder/pets/1.0.0/"): data
                for name, data in whole.items()
            }

    def test_a_full_disk_is_one_line_and_whole_shards_stay(self, tmp_path, pets, capsys):
        flags = ["--data.data-dir", str(tmp_path / "data"), "--data.image-size", "16"]
        with full_disk(5):
            assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert said.count("\n") == 1
        with pytest.raises(UserError, match="is not prepared in"):  # nor is it damaged
            open_dataset("prepared_folder/pets", tmp_path / "data")
        with full_disk(4):  # of nine; the others are whole
            assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 0
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    def test_files_that_a_loss_of_power_cut_off_are_written_again(self, tmp_path, pets):
        with full_disk(5), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        shards = sorted(path.name for path in work.glob("*array_record*"))
        assert len(shards) == 5
        os.truncate(work / "dataset" / shards[1], 100_000)
        os.truncate(work / shards[2], 10)
        with full_disk(6):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    @pytest.mark.parametrize("change", ["other images", "another size"])
    def test_what_was_begun_otherwise_is_not_mixed_in(self, tmp_path, pets, capsys, change):
        with full_disk(5), pytest.raises(UserError, match="the same command goes on where it"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=12)
        size = 12
        if change == "another size":
            size = 16
        else:
            (pets / "dog" / "000.png").rename(pets / "dog" / "100.png")
        prepare(f"folder:{pets}", tmp_path / "data", image_size=size)
        said = capsys.readouterr().out
        assert said.count("was begun with other images or another size; it is begun again") == 1
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=size)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    def test_two_at_the_same_time_are_one_too_many(self, tmp_path, pets):
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        work.mkdir(parents=True)
        with (work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match=r"another process is at work in .*\.incomplete"):
                prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)

    def test_a_link_in_the_place_of_the_lock_is_refused(self, tmp_path, pets):
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        work.mkdir(parents=True)
        (tmp_path / "precious").write_text("mine")
        (work / "lock").symlink_to(tmp_path / "precious")
        with pytest.raises(UserError, match=r"cannot write to .*: Too many levels of symbolic"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert (tmp_path / "precious").read_text() == "mine"

    @pytest.mark.parametrize("where", ["data", "data/prepared_folder/pets/1.0.0.incomplete"])
    @pytest.mark.parametrize("what", ["moved", "deleted", "made again"])
    def test_a_place_that_is_gone_meanwhile_is_one_line(self, tmp_path, pets, where, what, capsys):
        """Nothing is written into what is there now, which may be another process's."""

        def attack():
            (tmp_path / where).rename(tmp_path / "elsewhere")
            if what == "deleted":
                shutil.rmtree(tmp_path / "elsewhere")
            elif what == "made again":
                shutil.copytree(tmp_path / "elsewhere", tmp_path / where)

        flags = ["--data.data-dir", str(tmp_path / "data"), "--data.image-size", "16"]
        with meanwhile(attack):
            assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 2
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        said = capsys.readouterr().err
        assert said.startswith(f"error: cannot write to {work}: ")
        assert said.count("\n") == 1
        assert what != "made again" or "it was moved or removed, and made once more" in said
        if what == "moved":
            assert not (tmp_path / where).exists()
        assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 0
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    @pytest.mark.parametrize("what", ["a file", "a folder", "a link"])
    def test_what_is_put_in_the_place_meanwhile_stays(self, tmp_path, pets, what):
        folder = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"

        def attack():
            if what == "a link":
                folder.symlink_to("nowhere")
            elif what == "a folder":
                folder.mkdir()
            else:
                folder.write_text("mine")

        with meanwhile(attack), pytest.raises(UserError, match=r"1\.0\.0 exists already; remove"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert folder.is_symlink() == (what == "a link")
        folder.rmdir() if folder.is_dir() else folder.unlink()
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    @pytest.mark.parametrize("name", ["lock", "plan", "dataset", "a result"])
    def test_a_pipe_in_the_place_of_a_file_of_ours_is_not_waited_for(self, tmp_path, pets, name):
        with full_disk(2), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        path = min(work.glob("*array_record*")) if name == "a result" else work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.mkfifo(path)
        if name == "a result":  # it is made once more
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        else:
            with pytest.raises(UserError, match="cannot write to "):
                prepare(f"folder:{pets}", tmp_path / "data", image_size=16)

    def test_what_a_kill_left_does_not_keep_other_images_out(self, tmp_path, pets):
        with full_disk(2), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=12)
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        (work / ".plan.partial").mkdir()  # as a kill within `replacing` does
        (work / ".plan.partial" / "plan").write_text("")
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    def test_what_a_kill_left_when_all_was_done_is_removed(self, tmp_path, pets):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        folder = tmp_path / "data" / "prepared_folder" / "pets"
        assert sorted(path.name for path in folder.iterdir()) == ["1.0.0", "1.0.0.incomplete"]
        with pytest.raises(UserError, match="exists already"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert [path.name for path in folder.iterdir()] == ["1.0.0"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_a_signal_costs_nothing(self, tmp_path, pets, number):
        """One of them here, at a moment of its own; many in the slow test."""
        assert kill_and_go_on(pets, tmp_path, [number], shards=2) == 1

    @pytest.mark.slow
    def test_signals_at_random_moments_cost_nothing(self, tmp_path, pets):
        numbers = 5 * [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        assert kill_and_go_on(pets, tmp_path, numbers) > 10

    @pytest.mark.slow
    def test_disks_of_several_sizes_that_are_full(self, tmp_path, pets):
        """Each in a small file system of its own, which grows then; and a read-only one."""
        own = ["unshare", "--user", "--map-root-user", "--mount"]
        if subprocess.run([*own, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
            pytest.skip("the system permits no file systems of one's own")
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        arguments = [sys.executable, "-c", DISKS, f"folder:{pets}", str(tmp_path)]
        done = subprocess.run([*own, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "9 disks"

    def test_leavings_of_a_render_that_was_killed_are_removed(self, tmp_path, monkeypatch):
        for split in ("train", "test"):
            monkeypatch.setitem(synthetic.EXAMPLES, split, 10)
        left = tmp_path / "shapes_and_textures" / "incomplete.ABC123_1.0.0"
        left.mkdir(parents=True)
        (left / "part").write_text("")
        assert len(open_dataset("shapes_and_textures", tmp_path).train) == 10
        assert [path.name for path in left.parent.iterdir()] == ["1.0.0"]


@contextlib.contextmanager
def meanwhile(attack):
    """Something happens when the third of the shards is written."""
    write = writer._write
    written = []

    def watched(*arguments):
        written.append(write(*arguments))
        if len(written) == 3:
            attack()
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write", watched)
        yield


COMMAND = """
from flax_alexnet.utils.process import end_on_signals, leave
end_on_signals()  # as `python -m` does while it imports
from flax_alexnet.data import writer
from flax_alexnet.commands.prepare import main

writer.SHARD = 4
leave(main)
"""
# Prepares into disks of so many kB, each full before the end; then again with more room.
DISKS = """
import contextlib, io, subprocess, sys
from pathlib import Path
from flax_alexnet.data import writer
from flax_alexnet.commands.prepare import main

name, where = sys.argv[1], Path(sys.argv[2])
writer.SHARD = 4
disk = where / "disk"
disk.mkdir()

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)

def run():
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(["--data.name", name, "--data.data-dir", str(disk), "--data.image-size", "16"])
    return code, error.getvalue()

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

whole = contents(where / "reference")
total = sum(map(len, whole.values())) // 1024
sizes = [4, 16, 36, 64, 100, 200, total // 2, total - 8]
for size in sizes:
    mount(f"size={size}k")
    code, error = run()
    lines = [line for line in error.splitlines() if "images/s" not in line]
    assert (code, len(lines)) == (2, 1), (size, code, error)
    assert "No space left on device" in lines[0], (size, error)
    mount("remount,size=100m")
    assert run()[0] == 0, size
    assert contents(disk) == whole, size
    subprocess.run(["umount", str(disk)], check=True)
mount("size=10m,ro")
code, error = run()
assert code == 2 and "Read-only file system" in error and error.count("\\n") == 1, error
subprocess.run(["umount", str(disk)], check=True)
print(len(sizes) + 1, "disks")
"""


def kill_and_go_on(pets, tmp_path, numbers, shards=None):
    """Sends signals to the command, each to one of its own, and starts it again undisturbed.

    Args:
      pets: the images.
      tmp_path: where datasets go.
      numbers: of the signals.
      shards: after how many of nine each is sent; None: within the time that it all takes.

    Returns:
      How many commands were not through yet.
    """

    def start(data_dir):
        flags = ["--data.name", f"folder:{pets}", "--data.data-dir", str(data_dir)]
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *flags, "--data.image-size", "16"],
            env=os.environ | {"JAX_PLATFORMS": "none"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
    whole, rng, ended = contents(tmp_path / "reference"), np.random.default_rng(0), 0
    usual = math.inf  # seconds; the least of three, since other programs may slow one down
    for number in range(3 if shards is None else 0):
        begun = time.perf_counter()
        start(tmp_path / f"undisturbed {number}").communicate()
        usual = min(usual, time.perf_counter() - begun)
    for turn, number in enumerate(numbers):
        data_dir = tmp_path / f"killed {turn}"
        command = start(data_dir)
        if shards is None:
            time.sleep(rng.uniform(0.3, 1) * usual)
        else:
            work = data_dir / "prepared_folder" / "pets" / "1.0.0.incomplete" / "dataset"
            while not (work.exists() and len(list(work.iterdir())) >= shards):
                time.sleep(0.001)
        with command:
            command.send_signal(number)
            said = command.communicate(timeout=60)[1]
        assert command.returncode in (0, -number, 128 + number)
        assert "Traceback" not in said
        if command.returncode:
            ended += 1
            with contextlib.suppress(UserError):  # all was done
                prepare(f"folder:{pets}", data_dir, image_size=16)
        assert contents(data_dir) == whole, "the same bytes, and nothing that was left behind"
    return ended


class TestProgress:
    """Images a second and the time left, at a terminal and in a log."""

    @pytest.fixture
    def pets(self, tmp_path, monkeypatch):
        """A folder of 5 shards."""
        monkeypatch.setattr(writer, "SHARD", 4)
        return make_folder(tmp_path / "pets", {"cat": 8, "dog": 8})

    @pytest.mark.parametrize("terminal", [True, False])
    def test_is_shown(self, tmp_path, pets, monkeypatch, capsys, terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        with full_disk(2), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        capsys.readouterr()
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        captured = capsys.readouterr()
        shown, silent = captured.out.splitlines(), captured.err
        if terminal:
            shown, silent = captured.err.split("\r"), captured.out
        assert silent == ""
        made = [int(re.search(r" (\d+)/16 \[", line)[1]) for line in shown if line.strip()]
        assert (made[0], made[-1]) == (8 if terminal else 12, 16)
        assert re.search(r"\[\d\d:\d\d<00:00, +[\d.]+ images/s\]", shown[-1])
