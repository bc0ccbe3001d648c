"""The logs of a run in progress: lines of JSON, TensorBoard events, and terminal output."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tqdm

from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.inputs import parse_json, read_text
from flax_alexnet.utils.outputs import moved_away, replacing

# tensorboardX imports PyTorch if it is installed, which takes seconds and memory and has no use.
_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]
from tensorboardX import RecordWriter  # noqa: E402
from tensorboardX.proto import event_pb2, summary_pb2  # noqa: E402

if _hidden:
    del sys.modules["torch"]

LARGEST_METRICS = 2**30  # bytes: some ten million lines
LARGEST_FLOAT = 3.4e38  # the largest float32; metrics are computed in float32
_MEND = "remove it or repair it by hand"


class RunLog:
    """Writes the metrics of a run to `metrics.jsonl`, to TensorBoard, and to the terminal.

    On a terminal it shows a progress bar with the latest loss, accuracy and images per second;
    elsewhere it prints each line of metrics as text. Lines that cannot be written, because the disk
    is full, are kept and written together with the next line.

    Args:
      workdir: the folder for the files.
      start_step: the step after which this process starts. Lines that an interrupted run logged
        beyond it are removed, since those steps are made again.
      total_steps: the last step.
      clock: saved with each line.

    Raises:
      UserError: the existing files are damaged, or the files cannot be written.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int, clock: "Clock"):
        self._workdir, self._clock = workdir, clock
        self._place = os.stat(workdir)
        self._failing = False
        self._files = contextlib.ExitStack()
        self.rewind(start_step)
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        self._bar.update()

    def rewind(self, step: int) -> None:
        """Removes what was logged beyond `step`, since those steps are made again."""
        path = self._workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        self._files.close()
        try:
            with replacing(path) as partial:  # so that a kill here loses nothing
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._lines = self._files.enter_context(contextlib.closing(Lines(path)))
            events = Events(self._workdir / "tensorboard", purge_step=step + 1)
            self._events = self._files.enter_context(contextlib.closing(events))
        except OSError as error:
            raise UserError(f"cannot write to {self._workdir}: {error.strerror}") from None

    def write(self, metrics: dict[str, Any]) -> None:
        """Writes one line of metrics, which has a "step" and an "epoch".

        Raises:
          UserError: the working directory was moved or removed.
        """
        try:
            in_place = os.path.samestat(os.stat(self._workdir), self._place)
        except OSError:
            in_place = False
        if not in_place:
            raise moved_away(self._workdir)
        self._clock.keep()
        self._lines.add(json.dumps(metrics))
        self._events.add(metrics)
        try:
            self._flush()
            self._failing = False
        except OSError as error:
            if not self._failing:  # once is enough
                say_line(
                    f"cannot write metrics to {self._workdir}: {error.strerror}; they are kept, "
                    "and written together with the next line"
                )
            self._failing = True
        if not self._bar.disable and "train_loss" in metrics:
            shown = {"loss": "train_loss", "top-1": "train_top1", "images/s": "images_per_second"}
            self._bar.set_postfix(
                {name: f"{metrics[key]:.4g}" for name, key in shown.items() if key in metrics}
            )
        else:
            say_line(_line(metrics))

    def _flush(self) -> None:
        self._lines.flush()
        self._events.flush()

    def sync(self) -> None:
        """Brings all lines to the disk, so that no crash can lose them; raises OSError."""
        self._flush()
        self._lines.sync()

    def close(self) -> None:
        """Closes the files."""
        self._clock.keep()
        self._bar.close()
        with contextlib.suppress(OSError):  # `write` and `sync` have reported it
            self._flush()
        self._files.close()


def say_line(text: str) -> None:
    """Prints a line on the terminal without breaking a progress bar."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Clock:
    """Counts the seconds that a run has taken over all its starts.

    The count is kept in a file. A kill loses only the time since the last line of metrics.

    Args:
      path: the file, which need not exist.
      started: the time of this start, by the monotonic clock.
    """

    def __init__(self, path: Path, started: float):
        self._path, self._started, self._before = path, started, 0.0
        try:
            before = float(read_text(path)) if path.exists() else 0.0
            if not 0 <= before < float("inf"):
                raise ValueError(before)
            self._before = before
        except (OSError, ValueError):
            print(f"{path} has no number of seconds; they are counted from 0", flush=True)

    def seconds(self) -> float:
        """The seconds over all starts of the run, including this one until now."""
        return self._before + time.monotonic() - self._started

    def keep(self) -> None:
        """Overwrites the seconds in the file, which needs no more disk space than before."""
        with contextlib.suppress(OSError):  # a full disk, which `RunLog` reports
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                written = os.pwrite(file, f"{self.seconds():.3f}\n".encode(), 0)
                os.ftruncate(file, written)
            finally:
                os.close(file)


class Lines:
    """Appends lines to a file; only whole lines are written, even when the disk is full."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a+b", buffering=0)
        self._size = path.stat().st_size  # of whole lines
        self._pending = b""

    def add(self, line: str) -> None:
        """Adds a line, which the next `flush` writes."""
        self._pending += line.encode() + b"\n"

    def flush(self) -> None:
        """Writes all pending lines. If it raises OSError, it has written none of them."""
        self._put_back()
        try:
            written = 0
            while written < len(self._pending):
                written += self._file.write(self._pending[written:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(self._pending)
        self._pending = b""

    def _put_back(self) -> None:
        """Restores the file if it was removed; the open file still has its lines."""
        if not self._pending or self._path.exists() or not self._path.parent.exists():
            return
        with replacing(self._path) as partial:
            partial.write_bytes(os.pread(self._file.fileno(), self._size, 0))
        self._file.close()
        self._file = self._path.open("a+b", buffering=0)

    def sync(self) -> None:
        """Waits until the disk has what was flushed; raises OSError."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Events:
    """Writes scalars for TensorBoard.

    `tensorboardX.SummaryWriter` writes in a thread that dies when the disk is full, and then waits
    for that thread forever. This class abandons a file that cannot be written, and writes the
    pending events to a new one.
    """

    _numbers = itertools.count()

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._writer: RecordWriter | None = None
        # With this event TensorBoard discards the earlier events from `purge_step` on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._pending = [event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=start)]
        self.flush()

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds all values of a line of metrics except its step; the next `flush` writes them."""
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if name != "step"
        ]
        summary = summary_pb2.Summary(value=values)
        event = event_pb2.Event(wall_time=time.time(), step=metrics["step"], summary=summary)
        self._pending.append(event)

    def flush(self) -> None:
        """Writes what is pending; raises OSError."""
        try:
            if self._writer is None:
                number = next(self._numbers)
                name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}.{number}"
                self._writer = RecordWriter(str(self._folder / name))
                version = event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")
                self._writer.write(version.SerializeToString())
            for event in self._pending:
                self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError:
            self.close()
            raise
        self._pending = []

    def close(self) -> None:
        """Closes the file."""
        if self._writer:
            with contextlib.suppress(OSError):  # of what could not be written before
                self._writer.close()
        self._writer = None


class SilentLog:
    """Replaces `RunLog` on a process that does not write the log."""

    def _ignore(self, *_: Any) -> None: ...

    advance = write = rewind = sync = close = _ignore


class Throughput:
    """Measures images per second of training, without compilation, evaluation and saving.

    The time counts from the dispatch of a step until `pause`, when all steps must be complete.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._seconds, self._steps = 0.0, 0
        self._started: float | None = None  # None: paused
        self._first = True  # whether there was no lap yet

    def step(self) -> None:
        """Counts a dispatched step. The first one starts the time, after its compilation."""
        self._started = time.monotonic() if self._started is None else self._started
        self._steps += 1

    def pause(self) -> None:
        """Stops the time; all steps must be complete."""
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
        self._started = None

    def lap(self) -> dict[str, float]:
        """Images per second since the last lap; {} for the first step alone, which compiles."""
        compiled = self._first and self._steps == 1
        throughput = {"images_per_second": self._steps * self._batch_size / self._seconds}
        self._seconds, self._steps, self._first = 0.0, 0, False
        return {} if compiled else throughput


def average_throughput(metrics: Iterable[Mapping[str, Any]]) -> float:
    """Images per second over all training lines; each line has the rate since the line before."""
    epochs = time_taken = before = 0.0
    for line in metrics:
        if "images_per_second" in line:
            epochs += line["epoch"] - before
            time_taken += (line["epoch"] - before) / line["images_per_second"]
            before = line["epoch"]
    return epochs / time_taken if time_taken else 0.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file, without a last line that a kill cut off; [] without a file.

    Raises:
      UserError: the file cannot be read, or a line is not valid; the message names the line.
    """
    try:
        texts = read_text(path, LARGEST_METRICS).splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged (it is not a text file): {_MEND}") from None
    result = []
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
        except ValueError:
            if number == len(texts):
                break
            line = None
        if not _is_of_a_run(line):
            raise UserError(f"{path} is damaged (line {number}): {_MEND}")
        result.append(line)
    return result


def _is_of_a_run(line: Any) -> bool:
    """Whether a line of metrics has all values that are plotted or averaged, as valid numbers."""
    return (
        isinstance(line, dict)
        and line.keys() >= {"step", "epoch"}
        and ("eval_loss" in line) == ("eval_top1" in line)
        and ("train_loss" in line) == ("train_top1" in line)
        and type(line["step"]) is int
        and all(
            type(value) in (int, float) and abs(value) <= LARGEST_FLOAT for value in line.values()
        )
        and line.get("images_per_second", 1) > 0
    )


_FORMATS: dict[str, Callable[[Any], str]] = {
    "step": lambda v: f"step {v:>6}",
    "epoch": lambda v: f"epoch {v:6.2f}",
    "train_loss": lambda v: f"loss {v:.4f}",
    "train_top1": lambda v: f"top-1 {v:7.2%}",
    "learning_rate": lambda v: f"rate {v:.2g}",
    "images_per_second": lambda v: f"{v:,.0f} images/s",
    "eval_loss": lambda v: f"test loss {v:.4f}",
    "eval_top1": lambda v: f"test top-1 {v:7.2%}",
    "eval_top5": lambda v: f"test top-5 {v:7.2%}",
}


def _line(metrics: dict[str, Any]) -> str:
    return "  ".join(_FORMATS[name](value) for name, value in metrics.items())
