"""The page docs/reproduction.md: tables and plots of what `claims.py` and others have measured.

Between two marks the page has what this script writes there, from `experiments/results/`; a test
fails if they part. Run (some seconds; from the root of the repository):

    python experiments/paper/reproduction.py
"""

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import arithmetic
import numpy as np
import tyro
from arms import ARMS
from claims import CLAIMS, PUBLISHED, with_best
from matplotlib.figure import Figure
from verdicts import Claim, Outcome, Run, Runs, Verdict, effect_text, interval, judge, read_runs

ROOT = Path(__file__).resolve().parents[2]
COLORS = {
    Verdict.HOLDS: "tab:green",
    Verdict.FAILS: "tab:red",
    Verdict.NEITHER: "tab:grey",
    Verdict.NOT_MEASURED: "tab:grey",
}
# The published error of each model on the test images, in percent, and over how many crops.
ERRORS = {
    "80sec": (26.0, 1),
    "19pct": (19.0, 1),
    "18pct": (18.0, 1),
    "13pct_published": (13.0, 10),
    "11pct_published": (11.0, 10),
    "11pct_shortened": (13.0, 10),
}


@dataclasses.dataclass(frozen=True)
class PageArguments:
    """Writes the tables and plots of docs/reproduction.md."""

    results: Path = ROOT / "experiments" / "results"
    """Folder of claims.csv."""
    page: Path = ROOT / "docs" / "reproduction.md"
    """The page."""
    images: Path = ROOT / "docs" / "images"
    """Folder of the plots."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and its plots; returns 0."""
    arguments = tyro.cli(PageArguments, args=argv)
    runs = with_best(read_runs(arguments.results / "claims.csv"))
    text = arguments.page.read_text()
    for name, table in tables(runs).items():
        text = replaced(text, name, table)
    arguments.page.write_text(text)
    plot_effects(runs, arguments.images / "claims_effects.png")
    plot_curves(runs, arguments.images / "claims_curves.png")
    return 0


def tables(runs: Runs) -> dict[str, str]:
    """The tables of the page by the names of their marks."""
    return {
        "claims": claims_table(runs),
        "published": published_table(runs),
        "arithmetic": arithmetic_table(),
        "machines": machines_table(runs),
    }


def replaced(text: str, name: str, table: str) -> str:
    """The text with a table between the marks of its name.

    Raises:
      ValueError: the text has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page has no marks {begin.strip()} and {end}")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def claims_table(runs: Runs) -> str:
    """A row for each claim."""
    rows = []
    for claim in CLAIMS:
        outcome = judge(claim, runs)
        effect = effect_text(claim, outcome) if outcome.effects else ""
        seeds = str(len(outcome.effects)) if outcome.effects else ""
        rows.append([claim.section, claim.text, claim.paper, effect, seeds, str(outcome.verdict)])
    header = ["section", "claim", "paper", "here (95 % interval)", "seeds", "verdict"]
    return markdown(header, rows)


def published_table(runs: Runs) -> str:
    """A row for each model of the original code: its published error, and ours."""
    rows = []
    for arm in (*PUBLISHED, "11pct_published"):
        published, crops = ERRORS[arm]
        found = [run for (name, _), run in runs.items() if name == arm]
        errors = [100 * error_over(run, crops) for run in found]
        low, high = interval(errors)
        ends = f" ({low:.2f} to {high:.2f})" if math.isfinite(low) else ""
        ours = f"{np.mean(errors):.2f} %{ends}" if errors else "not measured"
        hours = f"{np.mean([run.last('seconds') for run in found]) / 3600:.1f}" if found else ""
        flags = ARMS[arm].flags
        command = " ".join(("python -m flax_alexnet.train", *flags))
        rows.append([f"{published:g} %", ours, str(crops), str(len(errors)), hours, f"`{command}`"])
    header = ["published", "here (95 % interval)", "crops", "runs", "hours each", "command"]
    return markdown(header, rows)


def error_over(run: Run, crops: int) -> float:
    """The test error of a run over one or ten crops."""
    return run.last("test_error" if crops == 1 else f"test_error_{crops}_crops")


def arithmetic_table() -> str:
    """A row for each number that follows from arithmetic."""
    rows = [list(row) for row in arithmetic.rows(arithmetic.Arguments().bench)]
    return markdown(["section", "what", "paper", "computed", "note"], rows)


def machines_table(runs: Runs) -> str:
    """A row for each machine: its runs, and the hours that they took."""
    trained = [run for (arm, _), run in runs.items() if arm in ARMS]
    machines = sorted({run.machine for run in trained})
    rows = []
    for machine in machines:
        seconds = [run.last("seconds") for run in trained if run.machine == machine]
        rows.append([machine, str(len(seconds)), f"{sum(seconds) / 3600:.1f}"])
    return markdown(["machine", "runs", "hours, of one core each"], rows)


def plot_effects(runs: Runs, path: Path) -> None:
    """The effects in points with their intervals, above zero where the claim holds."""
    found: list[tuple[Claim, Outcome]] = [
        (claim, outcome)
        for claim in CLAIMS
        if claim.effect.unit == "points" and len((outcome := judge(claim, runs)).effects) > 1
    ]
    figure = Figure(figsize=(8, 1 + 0.3 * len(found)), layout="constrained")
    axis = figure.subplots()
    for row, (_, outcome) in enumerate(reversed(found)):
        half = outcome.mean - outcome.low
        color = COLORS[outcome.verdict]
        axis.errorbar(outcome.mean, row, xerr=half, fmt="o", color=color, capsize=3)
        axis.plot(outcome.effects, [row] * len(outcome.effects), "k.", markersize=2)
    names = [f"{claim.section} {claim.name}" for claim, _ in reversed(found)]
    axis.set_yticks(range(len(names)), names)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="effect in points of test error (of the share that the claim is about)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_curves(runs: Runs, path: Path) -> None:
    """Test errors by epoch of the published models, and training errors of section 3.1."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, arm in enumerate(PUBLISHED):
        for (name, seed), run in runs.items():
            if name == arm:
                curve = sorted(run.curves["test_error"].items())
                label = arm if seed == 0 else None
                left.plot(*zip(*curve, strict=True), color=f"C{color}", label=label, linewidth=1)
    for color, arm in enumerate(("relu_best", "tanh_best")):
        for (name, seed), run in runs.items():
            if name == arm:
                curve = sorted(run.curves["train_error"].items())
                label = arm.partition("_")[0] if seed == 0 else None
                right.plot(*zip(*curve, strict=True), color=f"C{color}", label=label, linewidth=1)
    right.axhline(0.25, color="grey", linewidth=0.8)
    left.set(xlabel="epoch", ylabel="test error", title="the models of the original code")
    right.set(xlabel="epoch", ylabel="training error", title="ReLU and tanh (section 3.1)")
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
