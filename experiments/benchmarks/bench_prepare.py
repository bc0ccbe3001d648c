"""How fast `prepare` is beside the decoder alone, and how much memory it takes.

In turn, on the same photographs: `decode(bytes, 256)` of bytes that lie in memory, in as many
threads as there are cores, and the whole of `prepare`, which lists and reads files, decodes,
encodes, writes shards, waits for the disk, and writes metadata. The 200 photographs are linked
several times into class folders. The goal is nine tenths of the decoder's speed. Then `prepare`
runs once more in a process of its own, with one JPEG of 100 megapixels among the photographs: its
peak of memory less that of the program at rest (the goal: less than 500 MB). Both are printed
beside their goals, and neither is judged: the script ends with 0 whatever they are.

Run, with nothing else running (three minutes on two cores):

    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python experiments/benchmarks/bench_prepare.py

It reads every fifth of these 1,000 photographs of ImageNet.
"""

import collections
import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import tyro
from photographs import FOLDER, find_photographs

from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data.decode import decode
from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.utils.errors import UserError, exit_code

SIZE, CLASSES = 256, 10
MEMORY = """
import re, sys
from pathlib import Path
from flax_alexnet.commands.prepare import main
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
idle = peak()
assert main(sys.argv[1:]) == 0
print(peak() - idle)
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """`prepare` beside the decoder alone."""

    photographs: Path = FOLDER
    """A folder of JPEGs, of which 200 are taken."""
    output: Path = Path("results")
    """Where bench_prepare.csv goes."""
    copies: int = 20
    """How often each photograph is linked."""
    rounds: int = 5
    """How often each is timed, in turn."""
    quick: bool = False
    """A few photographs and megapixels: shows that it works, and nothing about speed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Times both; returns 0, or 2 where the data is not there."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        photographs = find_photographs(arguments.photographs)
    except UserError as error:
        return exit_code(error)
    side = 10_000
    if arguments.quick:
        photographs, side = photographs[:20], 1000
        arguments = dataclasses.replace(arguments, copies=1, rounds=2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        link(photographs, arguments.copies, images)
        encoded = [path.read_bytes() for path in photographs] * arguments.copies
        for number in range(-1, arguments.rounds):
            start = time.perf_counter()
            collections.deque(map_threads(lambda data: decode(data, SIZE), encoded), maxlen=0)
            between = time.perf_counter()
            prepare(f"folder:{images}", Path(folder) / str(number), SIZE)
            seconds = between - start, time.perf_counter() - between
            if number >= 0:  # the first round fetches the files, and counts for nothing
                rows.append([len(encoded) / value for value in seconds])
        memory = peak_memory(photographs, side, Path(folder))
    ratios = [both / alone for alone, both in rows]
    alone, both = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"{len(encoded):,} images, {os.cpu_count()} threads; medians of {len(rows)} rounds")
    print(f"decoder {alone:.0f} images/s, prepare {both:.0f} images/s")
    print(
        f"ratio {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f} "
        "(the goal: 0.9)"
    )
    print(
        f"memory {memory / 1e6:.0f} MB above idle, with {side**2 / 1e6:.0f} megapixels among them"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "bench_prepare_quick.csv" if arguments.quick else "bench_prepare.csv"
    with (arguments.output / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "decoder_images_s", "prepare_images_s", "ratio", "peak_bytes"])
        for number, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
            writer.writerow([number, *(f"{value:.1f}" for value in row), f"{ratio:.4f}", memory])
    return 0


def link(photographs: Sequence[Path], copies: int, folder: Path) -> None:
    """Class folders with each photograph several times."""
    for number, path in enumerate(photographs):
        class_folder = folder / f"class{number % CLASSES}"
        class_folder.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            (class_folder / f"{number:03}_{copy:03}.JPEG").symlink_to(path.resolve())


def peak_memory(photographs: Sequence[Path], side: int, folder: Path) -> int:
    """Bytes that `prepare` takes at most, above the program at rest, with a very large image."""
    link(photographs, 1, folder / "large")
    noise = np.random.default_rng(0).integers(0, 256, (side // 10, side // 10, 3), np.uint8)
    large = simplejpeg.encode_jpeg(np.tile(noise, (10, 10, 1)), 90, colorsubsampling="420")
    (folder / "large" / "class0" / "large.JPEG").write_bytes(large)
    flags = ["--data.name", f"folder:{folder / 'large'}", "--data.data-dir", str(folder / "data")]
    said = subprocess.run(
        [sys.executable, "-c", MEMORY, *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    return 1024 * int(said.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
