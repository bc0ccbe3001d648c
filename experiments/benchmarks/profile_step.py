"""Where the time of a step goes: what XLA's own profile says of each layer, on the CPU.

Steps are run as `bench.py` runs them, under JAX's profiler, and the times of all operators of the
compiled program are added up by the layer and the direction that they were written for. The sum is
more than the step takes where operators run side by side, and less by what passes between them.

    python experiments/benchmarks/profile_step.py

With nothing else running it takes three minutes on two cores; no data is needed.
"""

import collections
import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from flax_alexnet.models.architectures import architecture

STEPS = 5  # under the profiler, after two before
AROUND = ("while", "conditional", "call")  # operators whose time is that of others inside them
BETWEEN = "norms, pools, ReLU, dropout, bias"
UPDATE, REST = "update, and whether all is finite", "crop, loss, and what XLA gives no name"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Adds up the operators of steps by layer."""

    output: Path = Path("results")
    """Where profile_cpu.md goes."""
    works: tuple[str, ...] = (
        "train/notebook/64",
        "train/paper/64",
        "train/torchvision/64",
        "infer/notebook/1",
        "infer/paper/1",
        "infer/torchvision/1",
        "infer/caffe/1",
        "infer/caffenet/1",
        "infer/torchvision/16",
        "infer/caffenet/16",
        "infer/cuda_convnet_19pct/16",
        "infer/cuda_convnet_19pct/64",
    )
    """Of each what, the variant, and images at once."""
    quick: bool = False
    """A tiny one: shows that it works."""


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles each in a process of its own, writes and prints tables; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    works = ("train/cuda_convnet_19pct/8",) if arguments.quick else arguments.works
    lines = [line for work in works for line in table(work, profile_apart(work))]
    path = arguments.output / f"profile_{'quick' if arguments.quick else 'cpu'}.md"
    arguments.output.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def profile_apart(work: str) -> dict[str, Any]:
    """What `profile` finds, in a process whose XLA writes down its programs."""
    code = "import json, sys, profile_step as p; print(json.dumps(p.profile(*sys.argv[1:])))"
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is not compiled is not written down
        }
        env.pop("JAX_NUM_CPU_DEVICES", None)
        command = [sys.executable, "-c", code, work, folder]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def profile(work: str, programs: str) -> dict[str, Any]:
    """Milliseconds of a step: "step", and in "times" those of each "layer/direction".

    `programs` is the folder that XLA writes its programs to.
    """
    import jax
    import works

    what, variant, batch = work.split("/")
    run = getattr(works, f"ours_{what}")(variant, int(batch), architecture(variant).image_size)
    run()
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for _ in range(STEPS):
                run()
            step = (time.perf_counter() - start) / STEPS
        events = [event for path in Path(folder).rglob("*.trace.json.gz") for event in read(path)]
    written = names(Path(programs))
    times: dict[str, float] = collections.defaultdict(float)
    for event in events:
        operator = event.get("args", {}).get("hlo_op", "")
        if event.get("ph") == "X" and operator and operator.partition(".")[0] not in AROUND:
            times["/".join(place(written.get(operator.split("__")[0], "")))] += event["dur"] / 1e3
    return {"step": 1e3 * step, "times": {k: v / STEPS for k, v in times.items()}}


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def names(folder: Path) -> dict[str, str]:
    """By operator, what JAX called the operation that it was written for.

    XLA forgets it of a dense layer's product for one image, which the layer's kernel tells.
    """
    name, kernel = r'[{ ]op_name="([^"]*)"', r"%params__(\w+?)____kernel__"
    pattern = re.compile(rf"^\s+(?:ROOT )?%?([\w.-]+) = (?:.*{name}|.*{kernel})", re.MULTILINE)
    texts = (path.read_text() for path in sorted(folder.glob("*after_optimizations.txt")))
    return {
        found[1]: found[2] or f"/{found[3]}/" for text in texts for found in pattern.finditer(text)
    }


def place(name: str) -> tuple[str, str]:
    """The layer, or what else, and the direction of an operation."""
    direction = "backward" if "transpose(jvp(" in name else "forward"
    layer = re.search(r"/((?:conv|fc)\d+)/", name)
    if layer and "reduce_sum" not in name.rpartition("/")[2]:  # but for the bias's gradient
        return layer[1], direction
    if "AlexNet" in name:
        return BETWEEN, direction
    if re.search(r"_where|reduce_sum|nan_to_num", name):
        return UPDATE, "forward"
    return REST, "forward"


def table(work: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    times: Mapping[str, float] = found["times"]
    layers = {name.rpartition("/")[0] for name in times}
    others = [name for name in (BETWEEN, UPDATE, REST) if name in layers]
    total = sum(times.values())
    yield f"`{work}`: {found['step']:,.1f} ms a step, {total:,.1f} of all operators"
    yield ""
    yield "| of | forward, ms | backward, ms | of all |"
    yield "|---|---|---|---|"
    for layer in [*sorted(layers - set(others)), *others]:
        forward, backward = (times.get(f"{layer}/{way}", 0) for way in ("forward", "backward"))
        share = (forward + backward) / total
        yield f"| {layer} | {forward:,.1f} | {backward:,.1f} | {share:.0%} |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())
