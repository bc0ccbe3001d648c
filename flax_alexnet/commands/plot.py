"""`python -m flax_alexnet plot WEIGHTS [IMAGE …]`: figures of what a model has learned."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flax_alexnet.config.cli import command, parse
from flax_alexnet.data.augment import center_crop
from flax_alexnet.inference.batches import check_numbers
from flax_alexnet.models.activations import features, grad_cam, map_names
from flax_alexnet.models.architectures import activation_names, architecture
from flax_alexnet.utils.errors import UserError, unknown
from flax_alexnet.utils.outputs import new_files
from flax_alexnet.utils.plotting import plot_activations, plot_grad_cam, plot_kernels
from flax_alexnet.weights.load import files_of, load
from flax_alexnet.weights.pretrained import Pretrained, check_classifier, check_layers

of_layers = jax.jit(features, static_argnames=("model", "layers"))
maps_of_classes = jax.jit(grad_cam, static_argnames=("model", "layer"))


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    """Draws the first layer's kernels and, for images, activations and Grad-CAM."""

    weights: tyro.conf.Positional[Path]
    """A weight file (see convert), or the --workdir of a run."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files with images."""
    output: Path = Path("plots")
    """Folder for the figures."""
    layers: tuple[str, ...] = ()
    """Activations to draw, such as conv1 pool5 fc7; none: all."""
    classes: tuple[str, ...] = ()
    """Names or numbers of the classes for Grad-CAM; none: the five likeliest of each image."""
    overwrite: bool = False
    """Replace files that are there."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    plot(parse(PlotConfig, argv, None, "flax_alexnet plot"))


def plot(config: PlotConfig) -> None:
    """Draws what `config` asks for, and prints a line for each file written.

    Raises:
      UserError: weights or an image that cannot be read, two images of one name, a layer or a
        class that the model does not have, or a folder that cannot be written to.
    """
    pretrained = load(config.weights)
    layers = config.layers or drawable(pretrained)
    check_layers(pretrained, layers)
    if config.classes:
        check_classifier(pretrained)
    chosen = [find_class(pretrained, name) for name in config.classes]
    for stem, count in Counter(path.stem for path in config.images).items():
        if count > 1:
            raise UserError(f"{count} images are called {stem}; draw them into different folders")
    images = [jnp.asarray(pretrained.open(path)) for path in config.images]
    folder = config.output
    kernels = folder / "conv1.png"
    endings = ("activations", "grad_cam")[: 1 + pretrained.is_classifier]
    files_of_images = [
        [folder / f"{path.stem}_{ending}.png" for ending in endings] for path in config.images
    ]
    files = [kernels, *itertools.chain(*files_of_images)]
    inputs = [*files_of(config.weights), *config.images]
    with new_files(files, inputs, overwrite=config.overwrite) as write:
        with write(kernels) as path:
            groups = architecture(pretrained.config.variant).groups
            plot_kernels(pretrained.params["conv1"]["kernel"], path, groups)
        for image, (activations, *cams) in zip(images, files_of_images, strict=True):
            with write(activations) as path:
                draw_activations(pretrained, image, layers, path)
            for cam in cams:
                with write(cam) as path:
                    draw_grad_cam(pretrained, image, chosen, path)
    for file in files:
        print(f"wrote {file}", flush=True)


def draw_activations(
    pretrained: Pretrained, image: jax.Array, layers: Sequence[str], path: Path
) -> None:
    """Draws what each of `layers` makes of uint8[image_size, image_size, 3]."""
    maps = of_layers(
        pretrained.model, pretrained.params, pretrained.preprocess(image[None]), tuple(layers)
    )
    activations = {layer: np.asarray(maps[layer][0], np.float32) for layer in layers}
    for layer, values in activations.items():
        check_numbers(values, f"{layer} of an image")
    plot_activations(_crop(pretrained, image), activations, path)


def draw_grad_cam(
    pretrained: Pretrained, image: jax.Array, labels: Sequence[int], path: Path
) -> None:
    """Draws where uint8[image_size, image_size, 3] looks like classes; none: the five likeliest."""
    seen = pretrained.preprocess(image[None])
    logits = of_layers(pretrained.model, pretrained.params, seen, ("logits",))["logits"][0]
    probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    check_numbers(probabilities, "an image")
    chosen = np.array(labels or np.argsort(-probabilities, kind="stable")[:5], np.int32)
    images = jnp.broadcast_to(seen, (len(chosen), *seen.shape[1:]))
    maps = np.asarray(maps_of_classes(pretrained.model, pretrained.params, images, chosen))
    names = [f"{pretrained.name(label)} ({probabilities[label]:.1%})" for label in chosen]
    plot_grad_cam(_crop(pretrained, image), maps, names, path)


def _crop(pretrained: Pretrained, image: jax.Array) -> np.ndarray:
    return np.asarray(center_crop(image[None], pretrained.preprocessing.crop_size)[0])


def drawable(pretrained: Pretrained) -> tuple[str, ...]:
    """The activations that a model's parameters give: all, or those of the trunk."""
    table = architecture(pretrained.config.variant)
    return activation_names(table.layers) if pretrained.is_classifier else map_names(table.name)


def find_class(pretrained: Pretrained, name: str) -> int:
    """The class of a name, or of a number; UserError where there is none."""
    if name in pretrained.label_names:
        return pretrained.label_names.index(name)
    if name.isdecimal() and len(name) < 10 and int(name) < pretrained.num_classes:
        return int(name)
    numbers = f"a number up to {pretrained.num_classes - 1}"
    raise UserError(
        unknown("class", name, pretrained.label_names, [*pretrained.label_names[:10], numbers])
    )
