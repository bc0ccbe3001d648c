"""What the trunk of torchvision's ImageNet AlexNet has learned: kernels, neighbours, LPIPS.

After the paper's Figure 3 (the first layer's kernels) and Figure 4, right (the nearest neighbours
of photographs), here by the features of conv5, since the trunk has no dense layers; and a table of
LPIPS against the plain error for distortions of photographs.

It reads torchvision's `alexnet` (the convolution layers will do) with the heads of LPIPS v0.1, the
example images of LPIPS's reference code, and every fifth of 1,000 photographs of ImageNet. Get
them and run (a minute on two cores):

    git clone https://github.com/richzhang/PerceptualSimilarity
    git clone https://github.com/EliSchwartz/imagenet-sample-images
    curl -O https://download.pytorch.org/models/alexnet-owt-7be5be79.pth
    python -m flax_alexnet convert alexnet-owt-7be5be79.pth alexnet_lpips.safetensors \
        --heads PerceptualSimilarity/lpips/weights/v0.1/alex.pth
    python experiments/paper/real_trunk.py
"""

import csv
import dataclasses
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageFilter

from flax_alexnet import features, lpips
from flax_alexnet.commands.lpips import check_heads
from flax_alexnet.data.decode import DecodeError, decode_whole, read_file
from flax_alexnet.data.examples import find_images, read_examples
from flax_alexnet.models.lpips import signed
from flax_alexnet.utils.errors import UserError, exit_code
from flax_alexnet.utils.plotting import color_selectivity, plot_kernels, plot_neighbours
from flax_alexnet.weights.load import load
from flax_alexnet.weights.pretrained import Pretrained

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from photographs import FOLDER, find_photographs

REPOSITORY = "https://github.com/richzhang/PerceptualSimilarity"
FIRST_DOG, AFTER_DOGS = "n02085620", "n02114"  # the 118 breeds, by their numbers in WordNet
# Of LPIPS's reference code, with what PyTorch gives (tests/parity/test_torch_lpips.py).
EXAMPLES = (("p0", 0.72188), ("p1", 0.13757))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Images and tables of the trunk of torchvision's AlexNet."""

    weights: Path = Path("alexnet_lpips.safetensors")
    """Torchvision's model or its trunk, with LPIPS heads."""
    examples: Path = Path("PerceptualSimilarity/imgs")
    """Where ex_ref.png, ex_p0.png and ex_p1.png lie."""
    photographs: Path = FOLDER
    """A folder of JPEGs, of which 200 are taken."""
    output: Path = Path("results")
    """Where trunk_conv1.png, trunk_neighbours.png and .csv, and trunk_lpips.csv go."""
    distorted: int = 50
    """How many photographs are distorted for the table."""
    neighbours: int = 6
    """Neighbours of each query."""
    quick: bool = False
    """Twenty photographs, of which four are distorted, into trunk_quick_conv1.png and so on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draws and writes all; returns 0, or 2 where the data is not there."""
    arguments = tyro.cli(Arguments, args=argv)
    try:
        photographs = find_photographs(arguments.photographs)
        examples = open_examples(arguments.examples)
        pretrained = load(arguments.weights)
        check_heads(pretrained)
        base, distorted = arguments.output / "trunk", arguments.distorted
        if arguments.quick:
            base, distorted = arguments.output / "trunk_quick", 4
            photographs = photographs[::10]
        arguments.output.mkdir(parents=True, exist_ok=True)
        draw_kernels(pretrained, Path(f"{base}_conv1.png"))
        images = open_images(pretrained, photographs)
        draw_neighbours(pretrained, images, arguments.neighbours, Path(f"{base}_neighbours"))
        compare_distortions(pretrained, examples, images, distorted, Path(f"{base}_lpips.csv"))
    except UserError as error:
        return exit_code(error)
    return 0


def open_examples(folder: Path) -> dict[str, jax.Array]:
    """The reference and what is compared with it: float32[1, h, w, 3] in [-1, 1] each.

    Raises:
      UserError: one of them cannot be read.
    """
    opened = {}
    for name in ("ref", *(name for name, _ in EXAMPLES)):
        path = folder / f"ex_{name}.png"
        try:
            opened[name] = signed(decode_whole(read_file(path))[None])
        except DecodeError as error:
            raise UserError(
                f"cannot read example {path}: {error}; run `git clone {REPOSITORY}`, and give its "
                "folder imgs as --examples"
            ) from None
    return opened


def open_images(pretrained: Pretrained, photographs: Sequence[Path]) -> dict[str, np.ndarray]:
    """The photographs by their names, uint8[256, 256, 3] each."""
    rule = pretrained.preprocessing
    found = find_images([str(path) for path in photographs])
    read = read_examples(found, rule.image_size, rule.resize)
    return {Path(p.name).stem: p.image for p in read if p.image is not None}


def draw_kernels(pretrained: Pretrained, path: Path) -> None:
    """Figure 3: the kernels of conv1, ordered by how much of them is colour."""
    kernels = np.asarray(pretrained.params["conv1"]["kernel"])
    plot_kernels(kernels, path)
    selectivity = color_selectivity(kernels)
    print(
        f"{kernels.shape[-1]} kernels of conv1: {np.mean(selectivity < 0.1):.0%} nearly without "
        f"colour (selectivity below 0.1), {np.mean(selectivity > 0.5):.0%} mostly colour (above "
        f"0.5); wrote {path}"
    )


def draw_neighbours(
    pretrained: Pretrained, images: dict[str, np.ndarray], count: int, path: Path
) -> None:
    """Figure 4, right: the photographs whose strongest activations of conv5 are most alike.

    The image and the table have the name `path` with .png and .csv.

    A channel counts by its largest value, wherever in the image that is, and vectors of channels
    by their direction, since their lengths differ much between images.
    """
    names = list(images)
    every_image = np.stack(list(images.values()))

    @jax.jit
    def strongest(seen: jax.Array) -> jax.Array:
        maps = features(pretrained.model, pretrained.params, seen, ("conv5",))["conv5"]
        return maps.max((1, 2))

    batches = [every_image[i : i + 50] for i in range(0, len(images), 50)]
    vectors = np.concatenate([strongest(pretrained.preprocess(batch)) for batch in batches])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    every = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    np.fill_diagonal(every, np.inf)
    order = np.argsort(every, axis=1)[:, :count]
    queries = np.linspace(0, len(names) - 1, 8).astype(int)[1:-1]  # chosen by nobody
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "neighbour", "distance"])
        for query, line in enumerate(order):
            for rank, row in enumerate(line, 1):
                writer.writerow([names[query], rank, names[row], f"{every[query, row]:.4f}"])
    plot_neighbours(
        every_image[queries],
        every_image[order[queries]],
        np.take_along_axis(every, order, axis=1)[queries],
        [title(names[row]) for row in queries],
        [[title(names[row]) for row in line] for line in order[queries]],
        path.with_suffix(".png"),
    )
    dogs = np.array([FIRST_DOG <= name < AFTER_DOGS for name in names])
    print(
        f"of the {count} nearest to a dog's photograph {dogs[order[dogs]].mean():.0%} are of dogs, "
        f"which {dogs.mean():.1%} of the {len(names)} photographs are; wrote {path}.png"
    )


def title(name: str) -> str:
    """A class's name without its number in WordNet."""
    return name.partition("_")[2].replace("_", " ")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image stored as JPEG and read again."""
    encoded = io.BytesIO()
    image.save(encoded, "jpeg", quality=quality)
    return Image.open(encoded)


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    """The image with Gaussian noise of `sigma` grey levels."""
    noise = np.random.default_rng(0).normal(0, sigma, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))


def shifted(image: Image.Image, pixels: int) -> Image.Image:
    """The image moved to the right, its edge repeated."""
    columns = np.maximum(np.arange(image.width) - pixels, 0)
    return Image.fromarray(np.asarray(image)[:, columns])


DISTORTIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "shifted by 1 pixel": lambda image: shifted(image, 1),
    "shifted by 4 pixels": lambda image: shifted(image, 4),
    "brighter by 8 grey levels": lambda image: image.point(
        [min(v + 8, 255) for v in range(256)] * 3
    ),
    "noise of 8 grey levels": lambda image: noisy(image, 8),
    "noise of 25 grey levels": lambda image: noisy(image, 25),
    "JPEG, quality 50": lambda image: jpeg(image, 50),
    "JPEG, quality 10": lambda image: jpeg(image, 10),
    "blurred, 1 pixel": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "blurred, 3 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
}


def compare_distortions(
    pretrained: Pretrained,
    examples: Mapping[str, jax.Array],
    images: Mapping[str, np.ndarray],
    count: int,
    path: Path,
) -> None:
    """LPIPS and the mean squared error of photographs and their distortions, on average."""
    distance = jax.jit(lambda a, b: lpips(pretrained.params, pretrained.lpips_heads, a, b))

    rows = []
    for name, expected in EXAMPLES:
        value = float(distance(examples["ref"], examples[name])[0])
        error = float(jnp.square(examples["ref"] - examples[name]).mean())
        rows.append((f"example {name} (PyTorch: {expected})", value, 10 * np.log10(4 / error)))
    chosen = list(images.values())[:: max(1, len(images) // count)][:count]
    originals = signed(np.stack(chosen))
    for name, distort in DISTORTIONS.items():
        changed = signed(
            np.stack([np.asarray(distort(Image.fromarray(image))) for image in chosen])
        )
        values = [
            distance(originals[i : i + 10], changed[i : i + 10]) for i in range(0, len(chosen), 10)
        ]
        errors = jnp.square(originals - changed).mean(axis=(1, 2, 3))
        rows.append(
            (name, float(np.concatenate(values).mean()), float((10 * jnp.log10(4 / errors)).mean()))
        )
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["images", "lpips", "psnr_db"])
        writer.writerows([name, f"{value:.5f}", f"{psnr:.2f}"] for name, value, psnr in rows)
    for name, value, psnr in rows:
        print(f"{name:<34} LPIPS {value:.5f}   PSNR {psnr:5.2f} dB")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
