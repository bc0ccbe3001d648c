"""What is due after a step of a run: a line of metrics, an evaluation, the end."""

import dataclasses
import math
from typing import NamedTuple

from flax_alexnet.training.epochs import Epochs


class Due(NamedTuple):
    """What is to be done after a step."""

    line: bool  # a line of metrics
    evaluation: bool  # at the interval of the schedule; the last step is always evaluated, too
    last: bool  # it is the last step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a run logs and evaluates.

    Attributes:
      epochs: the epochs of the run.
      total_steps: the number of steps after which the run ends.
      log_every: steps between lines of metrics.
      eval_epochs: epochs between evaluations.
    """

    epochs: Epochs
    total_steps: int
    log_every: int
    eval_epochs: float

    def due(self, step: int) -> Due:
        """What is to be done after `step`."""
        evaluation = self._evaluations(step) > self._evaluations(step - 1)
        return Due(self._line(step), evaluation, step == self.total_steps)

    def _line(self, step: int) -> bool:
        """Whether a line is due; the first and the last step have one, and each epoch has one."""
        per_epoch = self.epochs.images / self.epochs.parts[-1].batch_size
        short = per_epoch < self.log_every and self.epochs.ends(step)
        return step % self.log_every == 0 or step in (1, self.total_steps) or short

    def _evaluations(self, step: int) -> int:
        return math.floor(self.epochs.fraction(step) / self.eval_epochs + 1e-9)
