"""How fast it is where it runs, beside TensorFlow, PyTorch and the limits of the machine.

One command measures every row of the README's table on the device that is there, with the peers
that are installed:

    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python experiments/benchmarks/bench.py --photographs imagenet-sample-images

Without photographs the row about input is left out; the others need no data.

A row times the same work in ours and in others, each in a process of its own (`works.py`), in turn
for some rounds; a ratio is of the medians, above 1 where ours is faster, and beside it stand the
smallest and the largest of the rounds. Ours is the whole step that a run makes (crop, flip and mean
included), the peers' begin with float32 images. With nothing else running it takes half an hour on
two cores (`--rows train/notebook` takes those whose names begin so), on a GPU some minutes.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from photographs import find_photographs
from works import Work, Worker

from flax_alexnet.models.architectures import architecture, infer_shapes
from flax_alexnet.utils.errors import UserError, exit_code

VARIANTS = ("notebook", "paper", "torchvision", "caffe", "caffenet", "cuda_convnet_19pct")
NORMS = ((64, 56, 56, 96), (64, 28, 28, 256))  # of the notebook, batch 64
SIZE, IMAGES, BATCH = 256, 4096, 64  # of the rows about input
SIDE = 4096  # of the matrices whose product is the limit of a CPU
LIMITS = ("limit", "copy")
OTHER = "the other Python"
GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # each process takes what it needs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures ours beside others."""

    output: Path = Path("results")
    """Where bench_DEVICE.json and .png go."""
    photographs: Path | None = None
    """A folder of JPEGs, of which 200 are taken, for the row about input; none: it is left out."""
    rounds: int = 5
    """How often each is timed; some short work three times as often."""
    rows: tuple[str, ...] = ("",)
    """How the names of the rows begin that are measured."""
    other_python: Path | None = None
    """The Python of another environment, such as with another JAX: in rows of training on a CPU
    ours there is one of the others."""
    quick: bool = False
    """A round of one tiny row: shows that it works."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Work that ours and others do."""

    name: str
    goals: dict[str, float]  # ratios to reach against each other, or against the "best" of them
    ours: Work
    others: dict[str, Work]
    amount: float  # of `unit` a time
    unit: str = "images/s"
    limit: float = 0.0  # of `unit` that the others called "limit" and "copy" stand for a time
    settle: bool = False  # each does it once untimed before: the one before may still read ahead
    rounds: int = 1  # for one of other rows: short work is more at the mercy of other tenants


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all rows, and writes and prints them; returns 0, or 2 where data is not there."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        photographs = find_photographs(arguments.photographs) if arguments.photographs else []
    except UserError as error:
        return exit_code(error)
    gpu = on_gpu()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows: Iterator[Row] = (
            gpu_rows()
            if gpu
            else cpu_rows(arguments.rows, photographs, Path(folder), arguments.other_python)
        )
        if arguments.quick:
            model: dict[str, Any] = {"variant": "cuda_convnet_19pct", "batch": 8, "size": 32}
            rows = iter(
                [Row("quick", {"best": 1}, Work("ours_infer", model), peers("infer", model), 8)]
            )
        for row in rows:
            if row.name.startswith(arguments.rows):
                rounds = 1 if arguments.quick else arguments.rounds * row.rounds
                results.append(measure(row, rounds))
                save(results, arguments, gpu)
        if not gpu and not arguments.quick and "start".startswith(arguments.rows):
            results += starts(Path(folder), arguments.rounds)
            save(results, arguments, gpu)
    return 0


def save(results: Sequence[dict[str, Any]], arguments: Arguments, gpu: bool) -> None:
    """Writes what has been measured so far."""
    described = {k: v for result in results for k, v in result["said"].items()}
    described["machine"] = machine(gpu)
    device = "quick" if arguments.quick else described.get("device", "cpu")
    rows = [{k: v for k, v in result.items() if k != "said"} for result in results]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"bench_{device.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps({"versions": described, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(table(results)) + "\n")
    plot(results, path.with_suffix(".png"))


def on_gpu() -> bool:
    """Whether JAX would use a GPU, looked at in another process, which takes no memory of it."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "gpu"


def machine(gpu: bool) -> str:
    """The machine in words."""
    if gpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    info = Path("/proc/cpuinfo").read_text()
    name = next((line for line in info.splitlines() if line.startswith("model name")), "")
    return f"{name.partition(': ')[2]}, {cores}{', AVX-512' if 'avx512f' in info else ''}"


def peers(
    work: str, arguments: dict[str, Any], frameworks: Sequence[str] = ("tensorflow", "torch")
) -> dict[str, Work]:
    """The same work in the peers that are installed."""
    there = [name for name in frameworks if importlib.util.find_spec(name)]
    return {name: Work(f"{name}_{work}", arguments) for name in there}


def macs_of_training(variant: str, size: int) -> float:
    """Multiply-accumulates of a step for one image: three passes, but no first input gradient."""
    table = architecture(variant)
    infos = infer_shapes(table.scaled(table.num_classes), size, size)
    return 3 * sum(info.macs for info in infos) - infos[0].macs


def cpu_rows(
    begin: tuple[str, ...],
    photographs: Sequence[Path],
    folder: Path,
    other_python: Path | None = None,
) -> Iterator[Row]:
    """The rows for a CPU."""
    for variant, batch, goals in (
        ("notebook", 64, {"tensorflow": 1.1, "torch": 1.5, "limit": 0.8}),
        ("notebook", 128, {"tensorflow": 1.1, "torch": 1.5, "limit": 0.8}),
        ("paper", 64, {"tensorflow": 1.1, "torch": 1.1}),
        ("torchvision", 64, {"tensorflow": 1.1, "torch": 1.1}),
    ):
        model = {"variant": variant, "batch": batch, "size": 224}
        others = peers("train", model) | {"limit": Work("product", {"side": SIDE})}
        images = SIDE**3 / macs_of_training(variant, 224)  # that one product could be spent on
        ours = Work("ours_train", model)
        if other_python:
            goals, others = (
                goals | {OTHER: 1},
                others | {OTHER: dataclasses.replace(ours, python=str(other_python))},
            )
        yield Row(f"train/{variant}/{batch}", goals, ours, others, batch, limit=images)
    for variant in VARIANTS:
        size = architecture(variant).image_size
        for batch in (1, 16, 64):
            model = {"variant": variant, "batch": batch, "size": size}
            ours = Work("ours_infer", model)
            others = peers("infer", model)
            yield Row(f"infer/{variant}/{batch}", {"best": 1}, ours, others, batch)
    for shape in NORMS:
        a = {"shape": shape, "times": 3}
        ours = Work("ours_lrn", a | {"dtype": "float32", "implementation": None})
        plain = Work("ours_lrn", a | {"dtype": "float32", "implementation": "reference"})
        others = {**peers("lrn", a), "reduce_window": plain}
        name = f"lrn/{'×'.join(map(str, shape))}"
        yield Row(name, {"best": 2}, ours, others, 3, "passes/s", rounds=3)
    if "input".startswith(begin):
        if photographs:
            yield input_row(photographs, folder)
        else:
            print("input: left out, since no --photographs are given", flush=True)


def prepared_images(photographs: Sequence[Path], folder: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with each photograph eight times, and what `ours_batches` needs to read them."""
    from flax_alexnet.commands.prepare import prepare

    images = folder / "images"
    for number, path in enumerate(photographs):
        for copy in range(8):
            place = images / f"class{number % 10}" / f"{number}_{copy}.JPEG"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    prepare(f"folder:{images}", folder, SIZE)
    where = {"data_dir": str(folder), "name": "prepared_folder/images", "size": SIZE}
    return images, where | {"batch": BATCH, "images": IMAGES}


def input_row(photographs: Sequence[Path], folder: Path) -> Row:
    """From prepared images to batches."""
    from flax_alexnet.data.sources import open_dataset

    images, a = prepared_images(photographs, folder)
    jpegs = folder / "jpegs"
    train = open_dataset(a["name"], folder, "train", None).train
    jpegs.mkdir()
    for number in range(len(train)):
        (jpegs / f"{number:05}.jpg").write_bytes(train.read(number).image)
    ours = Work("ours_batches", a)
    alone = Work("decoder", {"data_dir": str(jpegs), "images": IMAGES})
    goals, others = {"decoder alone": 0.85}, {"decoder alone": alone}
    if importlib.util.find_spec("tensorflow"):
        for name, goal, source in (
            ("tf.data, prepared", 1.1, jpegs),
            ("tf.data, photographs", 4.0, images),
        ):
            theirs = {"pattern": str(source), "size": SIZE, "resize": source is images}
            theirs |= {"batch": BATCH, "images": IMAGES}
            goals[name], others[name] = goal, Work("tensorflow_batches", theirs)
    return Row("input", goals, ours, others, IMAGES, settle=True, rounds=3)


def gpu_rows() -> Iterator[Row]:
    """The rows for a GPU: bfloat16."""
    for variant in VARIANTS:
        batch = 1024  # of 256 and 1024 the better one for both
        model = {"variant": variant, "batch": batch, "size": architecture(variant).image_size}
        ours = Work("ours_train", model | {"dtype": "bfloat16"}, GPU)
        others = peers("train", model, ("torch",))
        yield Row(f"train/{variant}/{batch}", {"torch": 1.2}, ours, others, batch)
    for _, *shape in NORMS:
        for dtype, width in (("bfloat16", 2), ("float32", 4)):
            a = {"shape": (512, *shape), "dtype": dtype, "times": 30}
            array = 512 * shape[0] * shape[1] * shape[2] * width * 30 / 1e9
            ours = Work("ours_lrn", a | {"implementation": None}, GPU)
            copy = {"copy": Work("copy", a, GPU)}
            name = f"lrn/512×{'×'.join(map(str, shape))}/{dtype}"
            # Forward reads one array and writes one, backward reads two and writes one.
            yield Row(name, {"copy": 0.7}, ours, copy, 5 * array, "GB/s", limit=2 * array)


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Times ours and the others in turn; prints a line."""
    seconds: dict[str, list[float]] = {}
    result: dict[str, Any] = {"row": row.name, "unit": row.unit, "against": {}, "said": {}}
    with contextlib.ExitStack() as held:
        workers: dict[str, Worker] = {}
        with ThreadPoolExecutor() as pool:  # they compile at the same time
            works = {"ours": row.ours, **row.others}
            starting = {name: pool.submit(Worker, work) for name, work in works.items()}
        for name, future in starting.items():
            try:
                workers[name] = future.result()
            except RuntimeError as error:
                if name == "ours":
                    raise
                print(f"{row.name}: {name} cannot: {error}", flush=True)
                continue
            held.callback(workers[name].close)
            said = workers[name].said
            result["said"] |= (
                {f"{k} of {name}": v for k, v in said.items()} if name == OTHER else said
            )
        for _ in range(rounds):
            for name, worker in workers.items():
                if row.settle:
                    worker.seconds()
                seconds.setdefault(name, []).append(worker.seconds())
    amounts = {name: row.limit if name in LIMITS else row.amount for name in seconds}
    rates = {name: [amounts[name] / value for value in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result["rates"] = medians
    result["peak_bytes"] = {name: worker.peak for name, worker in workers.items()}
    print(f"{row.name}: " + ", ".join(f"{n} {r:,.1f}" for n, r in medians.items()) + f" {row.unit}")
    print("  GiB: " + ", ".join(f"{n} {p / 2**30:.2f}" for n, p in result["peak_bytes"].items()))
    for name, goal in row.goals.items():
        others = [other for other in medians if other != "ours"]
        if name == "best" and others:
            name = max(others, key=lambda other: medians[other])
        if name in others:
            each = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
            ratio = medians["ours"] / medians[name]
            found = {"ratio": ratio, "from": min(each), "to": max(each), "goal": goal}
            result["against"][name] = found
            print(f"  {ratio:.2f} of {name} ({min(each):.2f} to {max(each):.2f}), goal {goal}")
    sys.stdout.flush()
    return result


def starts(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """What it takes to import the package, to see `--help`, and to come to the first step."""

    def seconds(*command: str) -> float:
        best = []
        for _ in range(rounds):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            best.append(time.perf_counter() - start)
        return statistics.median(best)

    def first_step(workdir: Path) -> float:
        command = [sys.executable, "-u", "-m", "flax_alexnet.train", "--workdir", str(workdir)]
        flags = ["--steps", "1", "--log-every", "1", "--data.data-dir", str(folder / "data")]
        start = time.perf_counter()
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
        took = 0.0
        with subprocess.Popen(
            command + flags, stdout=subprocess.PIPE, text=True, env=env
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step ") and not took:
                    took = time.perf_counter() - start
        return took

    bare = seconds("-c", "pass")
    results = []
    for name, goal, command in (
        ("start/import", 0.3, ("-c", "import flax_alexnet")),
        ("start/--help", 1.5, ("-m", "flax_alexnet.train", "--help")),
    ):
        more = seconds(*command) - bare
        results.append({"row": name, "goal": goal, "unit": "s more", "seconds": more, "said": {}})
    first_step(folder / "dataset")  # renders the dataset, and finds all that is read in a cache
    subprocess.run(["rm", "-r", str(folder / "programs")], check=True)
    cold, warm = (first_step(folder / name) for name in ("cold", "warm"))
    result = {"row": "start/first step", "goal": 0.5, "unit": "s", "cold": cold, "seconds": warm}
    results.append({**result, "ratio": warm / cold, "said": {}})
    for result in results:
        print({name: value for name, value in result.items() if name != "said"}, flush=True)
    return results


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the README shows: a line for each ratio or time, and at the end the peaks of memory."""
    yield "| work | against | ours | the other | ratio (rounds) | goal |"
    yield "|---|---|---|---|---|---|"
    for result in results:
        name, unit = result["row"], result["unit"]
        for other, found in result.get("against", {}).items():
            rates = [result["rates"][key] for key in ("ours", other)]
            ours, theirs = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates)
            spread = f"{found['ratio']:.2f} ({found['from']:.2f} to {found['to']:.2f})"
            yield f"| {name} | {other} | {ours} | {theirs} {unit} | {spread} | {found['goal']} |"
        if "seconds" in result:
            cold = (
                f"{result['ratio']:.2f} of {result['cold']:.1f} s cold" if "cold" in result else ""
            )
            yield f"| {name} | | {result['seconds']:.2f} {unit} | | {cold} | {result['goal']} |"
    yield ""
    yield "| peak memory, GiB | ours | TensorFlow | PyTorch |"
    yield "|---|---|---|---|"
    for result in results:
        peaks = result.get("peak_bytes", {})
        if result["row"].startswith(("train", "infer")):
            shown = (
                f"{peaks[name] / 2**30:.1f}" if peaks.get(name) else "–"
                for name in ("ours", "tensorflow", "torch")
            )
            yield f"| {result['row']} | {' | '.join(shown)} |"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws each ratio with its spread, beside its goal."""
    shown = [
        (f"{result['row']} / {other}", found)
        for result in reversed(results)
        for other, found in reversed(result.get("against", {}).items())
    ]
    figure = Figure(figsize=(7, 1 + 0.24 * max(1, len(shown))), layout="constrained")
    axis = figure.subplots()
    for place, (_, found) in enumerate(shown):
        low, high = (abs(found["ratio"] - found[end]) for end in ("from", "to"))
        color = "tab:green" if found["ratio"] >= found["goal"] else "tab:orange"
        axis.barh(place, found["ratio"], xerr=[[low], [high]], color=color)
        axis.plot([found["goal"]] * 2, [place - 0.45, place + 0.45], color="black")
    axis.set_yticks(range(len(shown)), [name for name, _ in shown])
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("ours / the other (above 1: ours is faster); black: the goal")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
