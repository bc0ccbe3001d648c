"""What a run says while it goes: lines of JSON, TensorBoard events, and the terminal."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tqdm

from flax_alexnet.errors import UserError

# tensorboardX imports PyTorch where it is installed, to no use here: seconds and much memory.
_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = None  # type: ignore[assignment]
import tensorboardX  # noqa: E402

if _hidden:
    del sys.modules["torch"]


class RunLog:
    """Metrics of a run to `metrics.jsonl`, to TensorBoard, and to the terminal.

    On a terminal there is a progress bar with the latest loss, accuracy and images per second;
    elsewhere each line of metrics is a line of text.

    Args:
      workdir: where the files go.
      start_step: where this part of the run starts. What an interrupted one logged beyond that
        step is removed, since those steps are made again.
      total_steps: where it ends.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int):
        self._path = workdir / "metrics.jsonl"
        try:
            kept = [line for line in read_metrics(self._path) if line["step"] <= start_step]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._path} is damaged: remove it or repair it by hand") from None
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self._path)  # so that a kill here loses nothing
        self._file = self._path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        """One step was made."""
        self._bar.update()

    def write(self, metrics: dict[str, Any]) -> None:
        """One line of metrics; it has a "step" and an "epoch"."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._events.add_scalar(name, value, metrics["step"])
        if not self._bar.disable and "train_loss" in metrics:
            shown = {"loss": "train_loss", "top-1": "train_top1", "images/s": "images_per_second"}
            self._bar.set_postfix(
                {name: f"{metrics[key]:.4g}" for name, key in shown.items() if key in metrics}
            )
        else:
            self.say(_line(metrics))

    def say(self, text: str) -> None:
        """A line for the terminal that leaves the progress bar whole."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Closes the files."""
        self._bar.close()
        self._file.close()
        self._events.close()


class SilentLog:
    """In the place of a `RunLog` where another process writes it."""

    def advance(self) -> None:
        """Nothing."""

    def write(self, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Throughput:
    """Images per second of training, without compilation, evaluation and saving.

    The time from the dispatch of a first step to `pause`, before which the last must be complete.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._seconds = self._all_seconds = 0.0
        self._steps = self._all_steps = 0
        self._started: float | None = None  # None: paused

    def step(self) -> None:
        """One step was dispatched; the first is timed from here on, without its compilation."""
        self._started = time.monotonic() if self._started is None else self._started
        self._steps += 1

    def pause(self) -> None:
        """All steps are complete, and something else comes next."""
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
        self._started = None

    def lap(self) -> dict[str, float]:
        """Images per second since the last lap."""
        rate = {"images_per_second": self._steps * self._batch_size / self._seconds}
        self._all_seconds += self._seconds
        self._all_steps += self._steps
        self._seconds, self._steps = 0.0, 0
        return rate

    def average(self) -> float:
        """Images per second over all laps."""
        return self._all_steps * self._batch_size / self._all_seconds if self._all_steps else 0.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; none where there is no file."""
    result = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            result.append(json.loads(text))
        except json.JSONDecodeError:  # cut off when the run was killed
            break
    return result


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
