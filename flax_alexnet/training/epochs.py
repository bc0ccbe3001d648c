"""Steps, images and epochs of a run whose batch size may have changed during the run."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple


class Part(NamedTuple):
    """Steps with batches of one size."""

    step: int  # the number of steps before this part
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Epochs:
    """How many images a run has seen after a step, and which epoch that is.

    The stream of images is cut into batches across epochs. An epoch ends with the step that sees
    its last image, though the batch may go on with images of the next one.

    Attributes:
      images: the number of images in an epoch, ≥ 1.
      parts: the parts of the run in the order of their steps; the first begins at step 0.
    """

    images: int
    parts: tuple[Part, ...]

    def going_on(self, step: int, batch_size: int) -> "Epochs":
        """The same epochs up to `step`, with batches of `batch_size` after it."""
        parts = [part for part in self.parts if part.step < step]
        if not parts or parts[-1].batch_size != batch_size:
            parts.append(Part(step, batch_size))
        return Epochs(self.images, tuple(parts))

    def seen(self, step: int) -> int:
        """How many images the first `step` steps see; an image counts once for each epoch."""
        return sum(
            part.batch_size * max(min(step, end) - part.step, 0) for part, end in self._spans()
        )

    def steps(self, epochs: float) -> int:
        """The smallest number of steps that see `epochs` epochs."""
        left = max(math.ceil(epochs * self.images - 1e-6), 1)  # 0.1 · 30 is a little more than 3
        for part, end in self._spans():
            step = part.step + -(-left // part.batch_size)
            if step <= end:
                return step
            left -= part.batch_size * (end - part.step)
        raise AssertionError("the last part has no end")

    def fraction(self, step: int) -> float:
        """The number of epochs that are seen after `step`, exact to the image."""
        return self.seen(step) / self.images

    def ends(self, step: int) -> bool:
        """Whether `step` sees the last image of an epoch."""
        return self.seen(step) // self.images > self.seen(step - 1) // self.images

    def epoch(self, step: int) -> float:
        """The epoch after `step`, for display; a whole number if an epoch ends with the step."""
        return float(int(self.fraction(step))) if self.ends(step) else self.fraction(step)

    @property
    def first_step(self) -> float:
        """The step at which epoch 0 would begin if all batches had the size of the last one.

        It is 0 if the batch size never changed.
        """
        last = self.parts[-1]
        return last.step - self.seen(last.step) / last.batch_size

    def _spans(self) -> Iterator[tuple[Part, int]]:
        """Each part, and the step at which it ends."""
        return zip(self.parts, [*(part.step for part in self.parts[1:]), sys.maxsize], strict=True)
