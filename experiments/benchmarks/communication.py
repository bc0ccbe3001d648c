"""How many bytes cross devices in a step of training: in the compiled program, and in theory.

For each layout, variant, batch and number of devices the training step is compiled for simulated
CPU devices (nothing is executed), the collectives of the compiled program are read, and the bytes
that one device sends are added up as ring algorithms send them. Beside it stands what the layout
should need, from the shapes of the model alone:

- data: the sum of all gradients;
- zero: the dense kernels gathered and their gradients scattered, the sum of the other gradients;
- hybrid: the inputs of the dense layers and the gradients of these inputs, the sum of the
  convolutions' gradients;
- towers: the same for conv3 and the dense layers, the sum of the gradients of each tower.

From these follow, with published speeds of links and chips, the time of a step as the larger of
computation and communication, and the number of devices at which a layout stops scaling.

Run (a quarter of an hour on two cores, `--quick` a minute; no data is needed):

    python experiments/benchmarks/communication.py
"""

import csv
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if "jax" not in sys.modules:  # under test the number of devices is set already
    os.environ["JAX_NUM_CPU_DEVICES"] = "256"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure

from flax_alexnet.config.recipes import RECIPES
from flax_alexnet.models.alexnet import AlexNet, make_model
from flax_alexnet.models.architectures import (
    ARCHITECTURES,
    Conv,
    Dense,
    Norm,
    architecture,
    infer_shapes,
)
from flax_alexnet.parallel.layouts import Layout, LayoutName, make_layout
from flax_alexnet.training.build import compile_steps, make_optimizer, state_template
from flax_alexnet.training.step import create_state

FLOAT = 4  # bytes
LAYOUTS: tuple[LayoutName, ...] = ("data", "zero", "hybrid", "towers")


class Chip(NamedTuple):
    """A published accelerator: peak of bfloat16 products, and what its links carry one way."""

    name: str
    flops: float  # per second
    link: float  # bytes per second


# NVIDIA's H100 SXM data sheet (NVLink 900 GB/s, both ways together) and, beyond a machine, 400 Gb/s
# InfiniBand for each; Google Cloud's TPU v5e page (197 TFLOP/s, 1,600 Gb/s over all links of a
# chip, of which a ring along one axis of the torus has half).
CHIPS = (
    Chip("H100, NVLink", 989e12, 450e9),
    Chip("H100, InfiniBand", 989e12, 50e9),
    Chip("TPU v5e", 197e12, 100e9),
)
UTILIZATION = 0.4  # of the peak; a common share for convolutional models


class Collective(NamedTuple):
    """One collective of a compiled program."""

    kind: str
    size: int  # bytes of its result on one device
    group: int  # devices that take part
    source: str  # the operation that it stems from

    @property
    def sent(self) -> float:
        """Bytes that one device sends, by ring algorithms."""
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * share * self.size
        if self.kind == "reduce-scatter":
            return (self.group - 1) * self.size
        return float(self.size) if self.kind == "collective-permute" else share * self.size


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes of collectives in a step, by layout."""

    output: Path = Path("results")
    """Where communication.csv, communication.md and communication.png go."""
    quick: bool = False
    """One variant on eight devices, into communication_quick.csv alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles all cases, writes tables and plot; returns 0."""
    arguments = tyro.cli(Arguments, args=argv)
    variants = ("paper",) if arguments.quick else tuple(ARCHITECTURES)
    counts = (8,) if arguments.quick else (8, 64, 256)
    rows = []
    for variant in variants:
        for name in LAYOUTS:
            if name == "towers" and architecture(variant).groups == 1:
                continue
            for count in counts:
                for per_device in (32, 128):
                    batch = per_device * count
                    layout = layout_for(name, variant, count)
                    measured = sum(c.sent for c in collectives(compiled(layout, variant, batch)))
                    expected = theory(layout, variant, batch)
                    row = {
                        "variant": variant,
                        "layout": name,
                        "mesh": "x".join(str(size) for size in layout.mesh.shape.values()),
                        "devices": count,
                        "batch": batch,
                        "compiled_mb": round(measured / 1e6, 2),
                        "theory_mb": round(expected / 1e6, 2),
                        "state_mb": round(state_bytes(layout, variant) / 1e6, 2),
                    }
                    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    rows.append(row)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / ("communication_quick" if arguments.quick else "communication")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if not arguments.quick:  # these are of all variants and numbers of devices
        path.with_suffix(".md").write_text(scaling_table(variants))
        draw(path.with_suffix(".png"))
    return 0


def layout_for(name: LayoutName, variant: str, count: int, width: float = 1.0) -> Layout:
    """A layout on the first `count` devices; "hybrid" splits the dense layers over eight each."""
    table = architecture(variant)
    shape = (count // 8, 8) if name == "hybrid" else ()
    layers = table.scaled(table.num_classes, width)
    return make_layout(name, layers, shape, jax.devices()[:count])


def state_bytes(layout: Layout, variant: str) -> int:
    """Bytes of parameters and velocities on one device."""
    table = architecture(variant)
    model = AlexNet(variant, table.num_classes)
    images = jnp.zeros((1, table.image_size, table.image_size, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images)["params"])
    shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), params, layout.shardings(params))
    sizes = jax.tree.leaves(shards, is_leaf=lambda x: isinstance(x, tuple))
    return sum(2 * FLOAT * math.prod(shape) for shape in sizes)


def compiled(layout: Layout, variant: str, batch_size: int, width: float = 1.0) -> str:
    """The text of the compiled training step."""
    table, recipe = architecture(variant), RECIPES["paper"]
    crop = table.image_size
    config = dataclasses.replace(
        recipe,
        batch_size=batch_size,
        model=dataclasses.replace(recipe.model, variant=variant, width=width),
        augment=dataclasses.replace(recipe.augment, crop_size=crop, color_noise="none"),
    )
    model = make_model(**vars(config.model) | {"num_classes": table.num_classes})
    optimizer = make_optimizer(config.optimizer, steps_per_epoch=1000.0)
    init = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=crop)
    size = crop + 8
    template = state_template(init, size, layout)
    step_fn, _ = compile_steps(config, model, optimizer, layout, template)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch)
        for name, shape, dtype in (
            ("image", (batch_size, size, size, 3), jnp.uint8),
            ("label", (batch_size,), jnp.int32),
        )
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert isinstance(step_fn, jax.stages.Wrapped)
    # The collectives are there before the machine code, which nobody will run.
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    text = step_fn.lower(template, batch, key).compile(compiler_options=options).as_text()
    assert text, "XLA gives a program's text"
    return text


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program's text (HLO)."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    result = []
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if not found:
            continue
        assert not found[3], "CPU programs have no asynchronous collectives"
        size = 0
        for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", found[1]):
            dtype = {"f32": "float32", "s32": "int32", "pred": "bool", "bf16": "bfloat16"}
            elements = math.prod(int(n) for n in shape.split(",") if n)
            size += elements * jnp.dtype(dtype.get(kind, kind)).itemsize
        source = re.search(r'op_name="([^"]*)"', line)
        group = 1 if found[2] == "collective-permute" else _group(line)
        result.append(Collective(found[2], size, group, source[1] if source else ""))
    return result


def _group(line: str) -> int:
    """How many devices exchange data with one another, in any of XLA's three notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    assert named, f"unknown notation of groups: {line}"
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    return math.prod(sizes[name] for name in re.findall(r"\w+", named[2]))


def theory(layout: Layout, variant: str, batch_size: int) -> float:
    """Bytes that a device sends in a step, from the shapes of the model alone.

    Left out are the sums of losses and hits: some hundred bytes.
    """
    image_size = architecture(variant).image_size
    infos = infer_shapes(layout.layers, image_size, image_size)
    parameters = {info.layer.name: FLOAT * info.parameters for info in infos}
    inputs = dict(
        zip(
            (info.layer.name for info in infos),
            ((image_size, image_size, 3), *(info.shape for info in infos)),
            strict=False,
        )
    )
    dense = [info.layer.name for info in infos if isinstance(info.layer, Dense)]
    convolutions = [info.layer for info in infos if isinstance(info.layer, Conv)]
    classes = infos[-1].shape[-1]
    data = layout.mesh.devices.shape[0]
    count = layout.mesh.size
    along = count // data

    def summed(size: float, devices: int) -> float:
        return 2 * (devices - 1) / devices * size

    def gathered_and_scattered(names: Sequence[str]) -> float:
        images = batch_size / data
        features = sum(math.prod(inputs[name]) for name in names)
        return summed(FLOAT * images * features, along)

    everything = sum(parameters.values())
    if layout.name in ("data", "zero"):  # a sum is a scatter and a gather
        return summed(everything, count)
    logits = summed(FLOAT * batch_size / data * classes / along, along)  # exchanged, and back
    last_bias = FLOAT * classes  # on all devices whole
    if layout.name == "hybrid":
        if classes % along:  # as for ten classes: then the last layer, the only one, is not split
            return summed(everything, count)
        held = sum(parameters[name] for name in dense) - last_bias
        return (
            summed(everything - held, count)
            + summed(held / along, data)
            + gathered_and_scattered(dense)
            + logits
        )
    reading_both = [layer.name for layer in convolutions[1:] if layer.groups == 1]
    halo = 0.0  # of a normalization across the towers: its radius of channels, there and back
    for info in infos:
        if isinstance(info.layer, Norm) and info.layer.groups == 1:
            height, width, _ = info.shape
            halo += 2 * 2 * FLOAT * batch_size / data * height * width * info.layer.depth_radius
    return (
        summed((everything - last_bias) / along, data)
        + summed(last_bias, count)
        + gathered_and_scattered([*reading_both, *dense])
        + logits
        + halo
    )


def step_seconds(
    chip: Chip, name: LayoutName, variant: str, batch_size: int, count: int
) -> tuple[float, float]:
    """(computation, communication) of a step on `count` chips, in seconds."""
    layout = layout_for(name, variant, count)
    size = architecture(variant).image_size
    macs = sum(info.macs for info in infer_shapes(layout.layers, size, size))
    # Two operations a multiply-accumulate; backward costs twice forward.
    compute = 2 * 3 * macs * batch_size / count / (UTILIZATION * chip.flops)
    return compute, theory(layout, variant, batch_size) / chip.link


def scaling_table(variants: Sequence[str]) -> str:
    """How many devices pay for a batch that is given, and how long a step then takes."""
    lines = [
        "Devices (of 8, 16, … 256) beyond which twice as many shorten a step by less than a "
        "tenth, and milliseconds of that step: the larger of computation at "
        f"{UTILIZATION:.0%} of the peak and communication, all at the speed of one kind of link. "
        "hybrid splits the dense layers over 8 devices.",
        "",
        "| variant | batch | layout | " + " | ".join(chip.name for chip in CHIPS) + " |",
        "|---|---|---|" + "---|" * len(CHIPS),
    ]
    counts = [count for count in (8, 16, 32, 64, 128, 256) if count <= jax.device_count()]
    for variant in variants:
        for batch_size in (1024, 8192, 32768):
            for name in LAYOUTS:
                if name == "zero" or (name == "towers" and architecture(variant).groups == 1):
                    continue  # zero sends as much as data
                cells = []
                for chip in CHIPS:
                    seconds = [
                        max(step_seconds(chip, name, variant, batch_size, count))
                        for count in counts
                    ]
                    last = 0
                    while last + 1 < len(counts) and seconds[last + 1] <= 0.9 * seconds[last]:
                        last += 1
                    cells.append(f"{counts[last]}, {1e3 * seconds[last]:.2f} ms")
                lines.append(f"| {variant} | {batch_size:,} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Bytes that a device sends in a step against the number of devices, for two global batches."""
    shown = ("notebook", "paper", "torchvision")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, len(shown), sharex=True)
    counts = [c for c in (2, 4, 8, 16, 32, 64, 128, 256) if c <= jax.device_count()]
    for row, batch_size in zip(axes, (1024, 8192), strict=True):
        for axis, variant in zip(row, shown, strict=True):
            for name in LAYOUTS:
                if name == "zero" or (name == "towers" and architecture(variant).groups == 1):
                    continue  # zero sends as much as data
                points = [c for c in counts if name != "hybrid" or c >= 8]
                sent = [theory(layout_for(name, variant, c), variant, batch_size) for c in points]
                axis.plot(points, [s / 1e6 for s in sent], marker="o", markersize=3, label=name)
            axis.set(xscale="log", yscale="log", title=f"{variant}, batch {batch_size:,}")
            axis.set_xticks(counts, [str(c) for c in counts])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("MB sent by a device in a step")
    for axis in axes[-1]:
        axis.set_xlabel("devices")
    axes[0][1].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
