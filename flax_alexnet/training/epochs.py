"""Steps, images and epochs of a run, whose batches may have changed in size on the way."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple


class Part(NamedTuple):
    """Steps with batches of one size."""

    step: int  # how many were made before
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Epochs:
    """How many images a run has seen after a step, and which epoch that is.

    The stream of images is cut into batches across epochs. An epoch ends with the step that sees
    its last image, though the batch may go on with images of the next one.

    Attributes:
      images: in an epoch, ≥ 1.
      parts: of the run, by their steps; the first from step 0 on.
    """

    images: int
    parts: tuple[Part, ...]

    def going_on(self, step: int, batch_size: int) -> "Epochs":
        """The same until `step`, and batches of `batch_size` from there on."""
        parts = [part for part in self.parts if part.step < step]
        if not parts or parts[-1].batch_size != batch_size:
            parts.append(Part(step, batch_size))
        return Epochs(self.images, tuple(parts))

    def seen(self, step: int) -> int:
        """How many images the first `step` steps see; one of two epochs counts twice."""
        return sum(
            part.batch_size * max(min(step, end) - part.step, 0) for part, end in self._spans()
        )

    def steps(self, epochs: float) -> int:
        """The fewest steps that see so many epochs."""
        left = max(math.ceil(epochs * self.images - 1e-6), 1)  # 0.1 · 30 is a little more than 3
        for part, end in self._spans():
            step = part.step + -(-left // part.batch_size)
            if step <= end:
                return step
            left -= part.batch_size * (end - part.step)
        raise AssertionError("the last part has no end")

    def fraction(self, step: int) -> float:
        """The epochs that are seen after `step`, to the image."""
        return self.seen(step) / self.images

    def ends(self, step: int) -> bool:
        """Whether `step` sees the last image of an epoch."""
        return self.seen(step) // self.images > self.seen(step - 1) // self.images

    def epoch(self, step: int) -> float:
        """The epoch after `step`, to show: a whole number where one ends with it."""
        return float(int(self.fraction(step))) if self.ends(step) else self.fraction(step)

    @property
    def first_step(self) -> float:
        """The step at which epoch 0 would have begun, had all batches been as large as the last.

        0 where their size never changed.
        """
        last = self.parts[-1]
        return last.step - self.seen(last.step) / last.batch_size

    def _spans(self) -> Iterator[tuple[Part, int]]:
        """Each part, and the step at which it ends."""
        return zip(self.parts, [*(part.step for part in self.parts[1:]), sys.maxsize], strict=True)
