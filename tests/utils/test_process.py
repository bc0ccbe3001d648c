"""Processes of commands: their output may be lost, and signals may come at any moment."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import arguments

# Says more than a pipe or a buffer holds, and then that it is done.
TALK = """
import sys
from pathlib import Path
from flax_alexnet.utils.process import leave

def main():
    for number in range(20_000):
        print(number, "of many lines")
    print("a warning", file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    return 0

leave(main, training=sys.argv[2] == "training")
"""
REDIRECTIONS = [
    *("| head -1", "> /dev/full", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"),
    *("> /dev/full 2> /dev/full", "2> /dev/full"),
]


def in_shell(command, redirection, **more):
    """Runs a command with a shell's redirection; gives its own exit code and what is said."""
    script = f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"'
    argv = ["bash", "-c", script, "bash", *command]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300, **more)


@pytest.mark.parametrize("kind", ["training", "another command"])
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_a_command_ends_its_work_without_its_output(tmp_path, redirection, kind):
    mark = tmp_path / "mark"
    done = in_shell([sys.executable, "-c", TALK, str(mark), kind], redirection)
    assert mark.read_text() == "done"
    assert "Traceback" not in done.stderr
    # A log may be lost. What a command was to print may not, and the reader alone has enough.
    lost = kind != "training" and redirection.startswith("> /dev/full")
    assert done.returncode == (2 if lost else 0), done.stderr
    if lost and "2>" not in redirection:
        expected = "error: cannot write the standard output: No space left on device"
        assert done.stderr.splitlines() == ["a warning", expected]


@pytest.mark.slow
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_a_run_is_saved_though_nobody_reads_its_output(data_dir, tmp_path, redirection):
    command = [sys.executable, "-m", "flax_alexnet.train", *arguments(tmp_path / "run", data_dir)]
    done = in_shell(command, redirection)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_does_not_block_is_waited_for(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, "-c", TALK, str(tmp_path / "mark"), "another command"]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        time.sleep(0.3)  # in which the pipe is filled
        with open(reader, "rb") as file:
            assert len(file.read().splitlines()) == 20_000
        assert process.stderr.read() == b"a warning\n"
    assert process.returncode == 0


def test_files_that_imports_open_do_not_get_the_numbers_of_closed_streams():
    code = (
        "from flax_alexnet.utils.process import begin, leave; import os, sys; begin()\n"
        "number = os.open(sys.executable, os.O_RDONLY)\n"
        "leave(lambda: 7 if number > 2 else 1)"
    )
    assert in_shell([sys.executable, "-c", code], "<&- >&- 2>&-").returncode == 7


# A call that does not come back, as one into XLA may not for minutes.
DEAF = """
import ctypes, sys
from flax_alexnet.utils import process

def main():
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)

process.PATIENCE = float(sys.argv[2])
process.leave(main, training=sys.argv[1] == "training")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("kind", "count", "patience"), [("training", 1, 300), ("other", 1, 0.2), ("other", 2, 300)]
)
def test_a_signal_ends_what_does_not_listen(number, kind, count, patience):
    command = [sys.executable, "-c", DEAF, kind, str(patience)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(count):
            time.sleep(0.2)
            process.send_signal(number)
        process.stdout.read()
        assert process.wait(10) == 128 + number


def test_a_signal_that_is_ignored_stays_so():
    code = (
        "import os, signal; from flax_alexnet.utils.process import leave\n"
        "leave(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7, training=True)"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", code], check=False)
    assert done.returncode == 7


# A signal that comes in a callback of the garbage collector, of which JAX has one.
LOSES = """
import gc, signal, sys, time
from pathlib import Path
from flax_alexnet.utils import process
from flax_alexnet.utils.outputs import replacing

def lose(phase, info):
    gc.callbacks.remove(lose)
    signal.raise_signal(signal.SIGTERM)
    sum(range(100))  # in which the signal is handled

def main():
    with replacing(Path(sys.argv[1])) as partial:
        partial.touch()
        gc.callbacks.append(lose)
        gc.collect()
        time.sleep(60)

process.leave(main)
"""


def test_a_signal_that_is_lost_in_a_callback_ends_the_command_tidily(tmp_path):
    command = [sys.executable, "-c", LOSES, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "terminated\n")
    assert not os.listdir(tmp_path)


IMPORTS = ("flax_alexnet.train", "flax_alexnet predict", "flax_alexnet")


@pytest.mark.parametrize("command", IMPORTS)
def test_a_signal_during_imports_ends_the_process(command):
    """From the package's first lines on: JAX and others lose what is raised within theirs."""
    code = (
        "import runpy, sys, signal; module, *rest = sys.argv[1:]; sys.argv = ['-m', *rest]\n"
        "sys.orig_argv[1:] = ['-m', module, *rest]\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        now = signal.getsignal(signal.SIGINT)\n"
        "        ends = now == signal.SIG_DFL or now.__name__ == '_end'  # which raises nothing\n"
        "        if name.startswith(('flax_alexnet.', 'jax', 'numpy')) and not ends:\n"
        "            sys.exit(f'{name} is imported under {now}')\n"
        "        if name in ('jax', 'flax_alexnet.utils.errors'):\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Watch()); runpy.run_module(module, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (-signal.SIGINT, 130)  # by itself, or by the command that has begun


@pytest.mark.parametrize(
    ("command", "kibibytes", "said"),
    [
        ("flax_alexnet.train", 1_000_000, "1.0 GB of addresses, and JAX takes more than 1.5 GB"),
        ("flax_alexnet predict", 1_000_000, "1.0 GB of addresses, and JAX takes more than 1.5 GB"),
        ("flax_alexnet.train", 2_000_000, "2.0 GB of addresses, and JAX takes more than 2.6 GB"),
    ],
)
def test_too_few_addresses_are_one_line(command, kibibytes, said):
    """With so few, JAX hangs for minutes, or does not load."""
    script = f'ulimit -v {kibibytes}; exec "$@"'
    command = ["bash", "-c", script, "bash", sys.executable, "-m", *command.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: `ulimit -v` allows {said}: raise it\n"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JAX_ENABLE_X64", "maybe", "cannot start: invalid truth value 'maybe'"),
        ("JAX_PLATFORMS", "none", "JAX finds no device (Unable to initialize backend 'none'"),
    ],
)
@pytest.mark.parametrize("command", ["flax_alexnet.train", "flax_alexnet predict"])
def test_what_jax_does_not_understand_is_one_line(
    command, variable, value, said, weights, photographs
):
    more = [weights, photographs] if command.endswith("predict") else []
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), *more],
        capture_output=True,
        text=True,
        check=False,
        # Old versions of protobuf warn of one another.
        env=os.environ | {variable: value, "PYTHONWARNINGS": "ignore"},
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {said}")


def test_a_working_directory_that_is_gone_is_one_line(weights, photographs):
    script = 'cd "$(mktemp -d)" && rmdir "$PWD" && exec "$@"'
    command = [sys.executable, "-m", "flax_alexnet", "evaluate", weights, "--output", "x"]
    command += ["--data.name", f"folder:{photographs}"]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command], capture_output=True, text=True, check=False
    )
    said = "error: this working directory has been removed: go to another one\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_too_little_memory_is_one_line():
    code = "from flax_alexnet.utils.process import leave; leave(lambda: len(bytes(2**62)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: there is too little memory")
