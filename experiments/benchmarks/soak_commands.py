"""Every command is as safe as training: what it leaves is right, or it says what is wrong.

Claimed of the commands that write files: killed (SIGKILL, SIGTERM) at any moment and started again,
each ends with the same bytes as one that was left alone, and nothing else is left behind. On a disk
that is full or read-only, twice at once, with few open files, with little memory, with a standard
output that is lost, or when its folder is moved away meanwhile, it ends in time with the right
bytes, or with exit code 2 and one line.

A small model and small photographs are made. Each command is run once undisturbed. Then each is
attacked, and after each attack run once more where that is allowed to, and what is there compared
byte for byte. Disks are file systems in memory of their own, which takes the right to mount them.

Run (half an hour on two cores, `--quick` two minutes; no data is needed):

    python experiments/benchmarks/soak.py --phases commands
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from PIL import Image
from soak_training import write_results

import flax_alexnet
from flax_alexnet.config.schema import ModelConfig
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.alexnet import AlexNet
from flax_alexnet.training.run_directory import PACKAGES
from flax_alexnet.utils.errors import STOPPED

CLASSES, IMAGES = ("cat", "dog", "hen"), 40  # of each
TIME_LIMIT = 120  # seconds, after which a command counts as one that never ends

# Each writes into the folder `out` alone, and `report` into `run/report`, the report of a run that
# has trained to its end; "{}" is where the model, the photographs and that run are.
COMMANDS = {
    "features .h5": "features {}/model.safetensors {}/photos --layers conv1 logits "
    "--batch-size 16 --output out/features.h5",
    "features .npy": "features {}/model.safetensors {}/photos --layers conv1 logits "
    "--batch-size 16 --output out/features.npy",
    "prepare": "prepare --data.name folder:{}/photos --data.image-size 32 --data.data-dir out",
    "convert": "convert {}/model.safetensors out/model.safetensors --labels {}/labels.txt",
    "evaluate": "evaluate {}/model.safetensors --data.name folder:{}/photos "
    "--output out/evaluation",
    "predict": "predict {}/model.safetensors {}/photos --output out/p.csv --plot out/p.png",
    "export": "export {}/model.safetensors out/model.stablehlo",
    "hub": "hub push {}/model.safetensors somebody/model --folder out/model",
    "plot": "plot {}/model.safetensors {}/photos/cat/0.jpg --output out/plots --layers conv1",
    "report": "train --workdir run --data.name folder:{}/photos --data.image-size 32 --steps 4 "
    "--model.variant cuda_convnet_19pct --augment.crop-size 24 --batch-size 8 "
    "--save-patience 0.05",
}
QUICK = ("predict", "features .h5")
SIZES = (16, 64, 256, 1024, 4096)  # of disks, in KiB


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Attacks every command that writes files, and looks at what is left."""

    output: Path = Path("results")
    """Where soak_commands.json and soak_commands.csv go."""
    kills: int = 20
    """Of each command with each of the two signals."""
    only: tuple[str, ...] = ()
    """Names of commands; none: all."""
    seed: int = 0
    """Determines the moments."""
    quick: bool = False
    """Two commands, two kills each, into soak_commands_quick.json and .csv."""


class Command:
    """A command with a folder that it is run in, whose folder `out` it writes into."""

    def __init__(self, name: str, where: Path):
        self.name, self.folder = name, where / "here"
        self._before = where / "before" / name  # what is there before it is run, if anything
        words = COMMANDS[name].replace("{}", str(where)).split()
        self._argv = [sys.executable, "-m", "flax_alexnet", *words]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(where / "programs")}
        self._environment = os.environ | cache | {"JAX_PLATFORMS": "cpu"}

    @property
    def out(self) -> Path:
        """Where it writes."""
        return self.folder / ("run/report" if self.name == "report" else "out")

    def start(self, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """The process; `limit` is called in it before it begins."""
        return subprocess.Popen(
            self._argv,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=limit,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Its exit code and standard error; 124 where it does not end."""
        try:
            said = process.communicate(timeout=TIME_LIMIT)[1]
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return 124, process.communicate()[1]

    def run(self, limit: Callable[[], None] | None = None) -> tuple[int, str]:
        """Runs it to its end."""
        return self.finish(self.start(limit))

    def fresh(self) -> None:
        """Makes its folder again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._before.exists():
            shutil.copytree(self._before, self.folder)
        self.out.mkdir(parents=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Attacks; returns 0 where every attack was withstood, else 1."""
    arguments = tyro.cli(Arguments, args=argv)
    names = arguments.only or tuple(QUICK if arguments.quick else COMMANDS)
    kills = 2 if arguments.quick else arguments.kills
    rng = np.random.default_rng(arguments.seed)
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        if "report" in names:
            train(Command("report", Path(folder)), Path(folder) / "before" / "report")
        for name in names:
            for row in attacks(Command(name, Path(folder)), kills, arguments.quick, rng):
                rows.append(row)
                print(json.dumps(row), flush=True)
    failed = [row for row in rows if row["problem"]]
    result = {
        "attacks": len(rows),
        "withstood": len(rows) - len(failed),
        "problems": failed,
        "by_command": {
            name: f"{sum(row['command'] == name and not row['problem'] for row in rows)} of "
            f"{sum(row['command'] == name for row in rows)}"
            for name in names
        },
        "outcomes": collections.Counter(f"{row['attack']}: {row['outcome']}" for row in rows),
        "seconds": round(time.monotonic() - began),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "commands": {name: COMMANDS[name].replace("{}/", "") for name in names},
    }
    name = "soak_commands_quick" if arguments.quick else "soak_commands"
    write_results(arguments.output, name, result, rows)
    return 1 if failed else 0


def make_inputs(folder: Path) -> None:
    """A model of three classes, and photographs of noise."""
    rng = np.random.default_rng(0)
    for label in CLASSES:
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(IMAGES):
            noise = rng.integers(0, 256, (48, 60, 3), np.uint8)
            Image.fromarray(noise).save(folder / "photos" / label / f"{number}.jpg")
    (folder / "labels.txt").write_text("\n".join(CLASSES))
    config = ModelConfig(variant="cuda_convnet_19pct", num_classes=len(CLASSES), width=0.5)
    model = AlexNet(config.variant, len(CLASSES), width=config.width)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 24, 24, 3), np.float32))["params"]
    rule = Preprocessing(32, "paper", 24, np.full(3, 127, np.float32), 1 / 64)
    pretrained = flax_alexnet.Pretrained(config, jax.tree.map(np.asarray, params), rule, CLASSES)
    flax_alexnet.save(pretrained, folder / "model.safetensors")


def train(command: Command, folder: Path) -> None:
    """Leaves a run in a folder that has trained to its end, and has no report yet."""
    command.fresh()
    code, said = command.run()
    if code:
        raise RuntimeError(f"the run does not train:\n{said}")
    shutil.rmtree(command.out)
    (command.folder / "run" / "summary.json").unlink()  # which says that there is nothing to do
    folder.parent.mkdir()
    command.folder.rename(folder)


def attacks(
    command: Command, kills: int, quick: bool, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """A row for each attack on a command: what was done, how it ended, and what was wrong."""
    for _ in range(2):  # the second one finds its programs compiled
        command.fresh()
        began = time.monotonic()
        code, said = command.run()
        usual = time.monotonic() - began
        if code:
            raise RuntimeError(f"{command.name} does not run when left alone:\n{said}")
    expected = contents(command.out)

    def row(attack: str, detail: object, code: int, said: str, *, again: bool) -> dict[str, Any]:
        problem = looked_at(command, code, said, expected, again=again)
        outcome = {0: "done", 2: "one line"}.get(code, f"exit code {code}")
        return {
            "command": command.name,
            "attack": attack,
            "detail": detail,
            "outcome": outcome,
            "said": said.strip()[-200:] if code == 2 or problem else "",
            "problem": problem,
        }

    for number in (signal.SIGKILL, signal.SIGTERM):
        for _ in range(kills):
            command.fresh()
            moment = rng.uniform(0, usual)
            process = command.start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, number)
            code, said = command.finish(process)
            yield row(number.name, f"{moment:.2f} s", code, said, again=True)
    for size in SIZES[2:3] if quick else SIZES:
        command.fresh()
        with disk(command.out, size) as permitted:
            code, said = command.run(
                None if permitted else limit(resource.RLIMIT_FSIZE, size << 10)
            )
            problem = row("full disk", f"{size} KiB", code, said, again=False)
        yield problem
    command.fresh()
    with disk(command.out, 1024, read_only=True) as permitted:
        if permitted:
            code, said = command.run()
            yield row("read-only", "", code, said, again=False)
    command.fresh()
    first, second = command.start(), command.start()
    ends = [command.finish(first), command.finish(second)]
    code, said = max(ends)
    if not any(end[0] == 0 for end in ends):
        code, said = 1, f"neither is done: {said}"
    yield row("two at once", "", code, said, again=True)
    command.fresh()
    yield row("64 open files", "", *command.run(limit(resource.RLIMIT_NOFILE, 64)), again=True)
    for gigabytes in (1, 3):
        command.fresh()
        ends_with = command.run(limit(resource.RLIMIT_AS, gigabytes << 30))
        yield row("little memory", f"{gigabytes} GiB", *ends_with, again=True)
    for lost, lose in LOST_OUTPUTS.items():
        command.fresh()
        yield row("lost output", lost, *command.run(lose), again=True)
    command.fresh()
    process = command.start()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.7 * usual)
    command.out.rename(command.folder / "moved")
    code, said = command.finish(process)
    if (command.folder / "moved").exists() and not command.out.exists():
        (command.folder / "moved").rename(command.out)
    yield row("moved away", "", code, said, again=True)


def looked_at(
    command: Command, code: int, said: str, expected: dict[str, bytes], *, again: bool
) -> str:
    """What is wrong with how a command has ended, and with what is there after a second run."""
    if code == 124:
        return "it does not end"
    if "Traceback" in said:
        return f"a traceback: {said[-400:]}"
    if code == 2 and len(said.strip().splitlines()) != 1:
        return f"not one line: {said[-400:]}"
    if code not in (0, 2, STOPPED, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
        return f"exit code {code}: {said[-400:]}"
    there = contents(command.out)
    if code == 0 and there != expected:
        return f"done, but {difference(expected, there)}"
    if not again:
        return ""
    code, said = command.run()
    done = "exists already" in said or "is not empty" in said
    if code == 2 and done and there == expected:
        return ""  # it had been done
    if code:
        return f"it does not go on (exit code {code}): {said[-400:]}"
    return difference(expected, contents(command.out))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def difference(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    """In what files differ, in a few words; "" where they do not."""
    if expected.keys() != found.keys():
        return f"other files: {sorted(expected.keys() ^ found.keys())}"
    return ", ".join(
        f"{name} has other bytes" for name in expected if expected[name] != found[name]
    )


@contextlib.contextmanager
def disk(folder: Path, kibibytes: int, read_only: bool = False) -> Iterator[bool]:
    """Puts a small file system into a folder; gives whether that is permitted."""
    options = f"size={kibibytes}k{',ro' if read_only else ''}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    permitted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
    try:
        yield permitted
    finally:
        if permitted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def limit(what: int, value: int) -> Callable[[], None]:
    """A function that limits a resource of the process that calls it."""
    return functools.partial(resource.setrlimit, what, (value, value))


def fill_output() -> None:
    """Lets the standard output of the process that calls it go to a disk that is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def leave_output() -> None:
    """Lets it go to a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)


# How each is called from within a process that is to lose its standard output.
LOST_OUTPUTS: dict[str, Callable[[], None]] = {
    "full": fill_output,
    "its reader is gone": leave_output,
    "closed": functools.partial(os.close, 1),
}


if __name__ == "__main__":
    sys.exit(main())
