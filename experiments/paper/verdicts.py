"""From the measures of runs to the verdict on a claim, by rules that do not depend on the runs."""

import csv
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats

COLUMNS = ("arm", "seed", "measure", "epoch", "value", "machine")
LAST = "seconds"  # the last measure of a run, which marks it as complete
CHANCE = 0.05  # a result that chance gives as often as this shows nothing


class Verdict(enum.StrEnum):
    """What the runs say of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    NEITHER = "cannot be told apart from none"
    NOT_MEASURED = "not measured"


@dataclasses.dataclass
class Run:
    """The measures of an arm with a seed.

    Attributes:
      curves: for each measure its value by epoch.
      machine: where it was trained.
    """

    curves: dict[str, dict[float, float]] = dataclasses.field(default_factory=dict)
    machine: str = ""

    @property
    def complete(self) -> bool:
        """Whether all measures are there."""
        return LAST in self.curves

    def last(self, measure: str) -> float:
        """The value after the last epoch."""
        curve = self.curves[measure]
        return curve[max(curve)]

    def mean(self, measure: str) -> float:
        """The mean of the values over the epochs at which they were logged."""
        return float(np.mean(list(self.curves[measure].values())))

    def epochs_to(self, measure: str, target: float) -> float:
        """The epoch at which a measure falls to a target, between its points; ∞ if it does not."""
        before: tuple[float, float] | None = None
        for epoch, value in sorted(self.curves[measure].items()):
            if value <= target:
                if before is None:
                    return epoch
                share = (before[1] - target) / (before[1] - value)
                return before[0] + share * (epoch - before[0])
            before = epoch, value
        return math.inf


Runs = dict[tuple[str, int], Run]  # by arm and seed


def read_runs(path: Path) -> Runs:
    """The complete runs in a file that `claims.py` has written; none if there is no file."""
    runs: Runs = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                run = runs.setdefault((row["arm"], int(row["seed"])), Run())
                run.curves.setdefault(row["measure"], {})[float(row["epoch"])] = float(row["value"])
                run.machine = row["machine"] or run.machine
    return {key: run for key, run in runs.items() if run.complete}


@dataclasses.dataclass(frozen=True)
class Effect:
    """A number that the runs of one seed have, and that a claim says something about.

    Attributes:
      arms: the arms whose runs it needs; runs of the same seed are compared.
      of: the effect, of the runs by arm.
      unit: of the effect. "times" shows exp(effect); "chance" is the probability of such a result
        if the claim were wrong.
    """

    arms: tuple[str, ...]
    of: Callable[[Mapping[str, Run]], float]
    unit: Literal["points", "nats", "times", "chance"] = "points"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and how it is tested.

    It says that the mean effect over all seeds is more than zero, which the 95 % interval by
    Student's t decides; or, of a "chance", that it is less than `CHANCE` for every seed. One seed
    decides nothing.

    Attributes:
      name: for `--only`.
      section: of the paper.
      text: the claim.
      effect: how it is tested.
      paper: the paper's number, or "" where it gives none.
    """

    name: str
    section: str
    text: str
    effect: Effect
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the runs say of a claim.

    Attributes:
      verdict: by the rule of the claim.
      effects: of the seeds whose runs are all there.
      low: the lower end of the 95 % interval of the mean effect.
      high: the upper end.
    """

    verdict: Verdict
    effects: tuple[float, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    @property
    def mean(self) -> float:
        """The mean effect."""
        return float(np.mean(self.effects))


def judge(claim: Claim, runs: Runs) -> Outcome:
    """The verdict on a claim, from the seeds for which all of its arms have a complete run."""
    seeds = sorted({seed for arm, seed in runs if arm in claim.effect.arms})
    effects = []
    for seed in seeds:
        own = {arm: runs[arm, seed] for arm in claim.effect.arms if (arm, seed) in runs}
        if len(own) == len(claim.effect.arms):
            effects.append(claim.effect.of(own))
    if not effects:
        return Outcome(Verdict.NOT_MEASURED)
    if claim.effect.unit == "chance" and len(effects) > 1:
        verdict = Verdict.HOLDS if max(effects) < CHANCE else Verdict.FAILS
        return Outcome(verdict, tuple(effects))
    low, high = interval(effects)
    verdict = Verdict.HOLDS if low > 0 else Verdict.FAILS if high < 0 else Verdict.NEITHER
    return Outcome(verdict, tuple(effects), low, high)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, by Student's t distribution.

    One value has no finite interval.
    """
    count = len(values)
    if count < 2 or not np.isfinite(values).all():
        return -math.inf, math.inf
    width = scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return float(np.mean(values) - width), float(np.mean(values) + width)


def describe(claim: Claim, outcome: Outcome) -> str:
    """A line with the effect, its interval, the number of seeds and the verdict."""
    if not outcome.effects:
        return f"{claim.name}: not measured"
    return f"{claim.name}: {effect_text(claim, outcome)}, {len(outcome.effects)} seeds: " + (
        outcome.verdict
    )


def effect_text(claim: Claim, outcome: Outcome) -> str:
    """The mean effect with its interval, such as "1.20 (0.31 to 2.09) points"."""
    if claim.effect.unit == "chance":
        return f"chance at most {max(outcome.effects):.2g}"
    show: Callable[[float], float] = math.exp if claim.effect.unit == "times" else float
    mean, low, high = (show(value) for value in (outcome.mean, outcome.low, outcome.high))
    ends = f" ({low:.2f} to {high:.2f})" if math.isfinite(outcome.low) else ""
    return f"{mean:.2f}{ends} {claim.effect.unit}"
