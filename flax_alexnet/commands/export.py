"""`python -m flax_alexnet export WEIGHTS OUTPUT`: a trained model as a program for other systems.

The program contains preprocessing and weights. It maps a batch of any size of images as
`Pretrained.open` returns them, uint8[b, image_size, image_size, 3] in RGB, to logits,
float32[b, num_classes], or to another activation, whose maps are float32[b, h, w, c].
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import tyro

from flax_alexnet.config.cli import command, parse
from flax_alexnet.inference.batches import check_numbers
from flax_alexnet.models.activations import features
from flax_alexnet.utils.errors import UserError, first_line, unknown
from flax_alexnet.utils.inputs import read_bytes
from flax_alexnet.utils.outputs import new_files, writing
from flax_alexnet.weights.load import files_of, load
from flax_alexnet.weights.pretrained import Params, Pretrained, check_layers
from flax_alexnet.weights.stored import LARGEST

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # between two systems in float32, relative to the largest value
CHECKED_IMAGES = 3

Function = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a trained model as a program: StableHLO, ONNX or a TensorFlow SavedModel."""

    weights: tyro.conf.Positional[Path]
    """A weight file (see convert), or the --workdir of a run."""
    output: tyro.conf.Positional[Path]
    """NAME.stablehlo, NAME.onnx, or a new folder for a SavedModel."""
    format: Literal["stablehlo", "onnx", "savedmodel"] | None = None
    """Format to write; none: by the ending of OUTPUT."""
    layer: str = "logits"
    """The activation that the program gives, such as conv5 or fc7."""
    overwrite: bool = False
    """Replace a file that is there."""


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    config = parse(ExportConfig, argv, None, "flax_alexnet export")
    path = config.output
    with new_files([path], files_of(config.weights), overwrite=config.overwrite) as write:
        pretrained = load(config.weights)
        with write(path) as partial:
            line = _export(pretrained, path, partial, config.format, config.layer)
    print(line)


def export(
    pretrained: Pretrained, path: str | Path, kind: str | None = None, layer: str = "logits"
) -> str:
    """Writes a model as a program, and returns a line that says what is there now.

    The program gets its name once it was loaded back and gave, for a few random images on the
    CPU, what the model gives.

    Args:
      pretrained: the model; it is computed in float32, whatever it was trained in.
      path: the file to write, or the folder of a SavedModel.
      kind: "stablehlo", "onnx" or "savedmodel"; None: as the ending of the path says.
      layer: the activation that the program gives.

    Raises:
      UserError: an unknown format, ending or layer; a trunk that does not reach that far; a model
        that gives what is not a number; a path
        that cannot be written to; or the packages of the format are not installed.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder that exists already; take another path")
    with writing(path) as partial:
        return _export(pretrained, path, partial, kind, layer)


def _export(pretrained: Pretrained, path: Path, partial: Path, kind: str | None, layer: str) -> str:
    """As `export`, into a file or folder `partial` that is not whole yet."""
    kind = kind or _kind_of(path)
    if kind not in FORMATS:
        raise UserError(unknown("format", kind, FORMATS))
    check_layers(pretrained, (layer,))
    config = dataclasses.replace(pretrained.config, dtype="float32")
    pretrained = dataclasses.replace(
        pretrained, config=config, params=jax.tree.map(np.asarray, pretrained.params)
    )
    size = pretrained.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (CHECKED_IMAGES, size, size, 3), np.uint8)
    write, extra = FORMATS[kind]
    try:
        with jax.default_device(_cpu()):
            program = write(pretrained, layer, partial)
            ours = np.asarray(jax.jit(_forward(pretrained, layer))(pretrained.params, images))
            check_numbers(ours, "random images")
            if program is None:
                check = "not checked, since onnxruntime is not installed"
            else:
                difference = np.abs(np.asarray(program(images)) - ours).max()
                largest = np.abs(ours).max()
                check = f"loaded back: largest difference {difference:.2g}, values to {largest:.3g}"
                if not difference <= TOLERANCE * largest:
                    raise UserError(f"{path} was not written, as it would be wrong ({check})")
            megabytes = sum(file.stat().st_size for file in _files(partial)) / 1e6
    except ModuleNotFoundError as error:
        raise UserError(
            f"{kind} needs the package {error.name}: pip install 'flax-alexnet[{extra}]'"
        ) from None
    shape = ", ".join(map(str, ("b", *ours.shape[1:])))
    return (
        f"{path} ({megabytes:.1f} MB): uint8[b, {size}, {size}, 3] to {layer}, float32[{shape}]; "
        f"{check}"
    )


def load_exported(path: str | Path) -> Function:
    """The program in a `.stablehlo` file: uint8[b, image_size, image_size, 3] to float32[b, …].

    Nothing of this package is needed to run it: but for the message of an error, this is
    `jax.jit(jax.export.deserialize(bytearray(Path(path).read_bytes())).call)`. The first call with
    a batch size compiles, which takes a while, since the weights are constants.

    Raises:
      UserError: the file cannot be read, or is no such program.
    """
    try:
        exported = jax.export.deserialize(bytearray(read_bytes(Path(path).expanduser(), LARGEST)))
    except Exception as error:  # the decoder checks nothing: anything can be raised on its way
        reason = first_line(error)
        raise UserError(f"{path} is no exported StableHLO program: {reason}") from None
    return jax.jit(exported.call)


def _stablehlo(pretrained: Pretrained, layer: str, path: Path) -> Function:
    (batch,) = jax.export.symbolic_shape("b")
    size = pretrained.preprocessing.image_size
    forward = _forward(pretrained, layer)
    program = jax.jit(lambda images: forward(pretrained.params, images))
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    path.write_bytes(jax.export.export(program, platforms=PLATFORMS)(images).serialize())
    return load_exported(path)


def _onnx(pretrained: Pretrained, layer: str, path: Path) -> Function | None:
    import onnx

    from flax_alexnet.inference.onnx import onnx_model

    onnx.save(
        onnx_model(pretrained.model, pretrained.params, pretrained.preprocessing, layer), path
    )
    onnx.checker.check_model(path, full_check=True)
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _savedmodel(pretrained: Pretrained, layer: str, path: Path) -> Function:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it tells of the processor on its way in
    import tensorflow as tf
    from jax.experimental import jax2tf

    convert = jax2tf.convert(
        _forward(pretrained, layer),
        polymorphic_shapes=[None, "(b, ...)"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    size = pretrained.preprocessing.image_size
    images = tf.TensorSpec((None, size, size, 3), tf.uint8, "images")
    module = tf.Module()
    module.params = jax.tree.map(tf.Variable, pretrained.params)
    module.call = tf.function(
        lambda images: {layer: convert(module.params, images)},
        input_signature=[images],
        autograph=False,
    )
    tf.saved_model.save(module, path, {"serving_default": module.call})
    loaded = tf.saved_model.load(path).signatures["serving_default"]
    return lambda images: loaded(images=tf.constant(images))[layer].numpy()


FORMATS: dict[str, tuple[Callable[[Pretrained, str, Path], Function | None], str]] = {
    "stablehlo": (_stablehlo, ""),
    "onnx": (_onnx, "onnx"),
    "savedmodel": (_savedmodel, "prepare"),
}
"""What writes a format and loads it back, if it can; and the extra with the packages it takes."""


def _forward(pretrained: Pretrained, layer: str) -> Callable[[Params, jax.Array], jax.Array]:
    def forward(params: Params, images: jax.Array) -> jax.Array:
        return features(pretrained.model, params, pretrained.preprocess(images), (layer,))[layer]

    return forward


def _kind_of(path: Path) -> str:
    kinds = {".stablehlo": "stablehlo", ".onnx": "onnx", "": "savedmodel"}
    if path.suffix not in kinds:
        raise UserError(
            f"unknown ending {path.suffix!r} of {path}: expected .stablehlo, .onnx, or none for a "
            "SavedModel; else say --format"
        )
    return kinds[path.suffix]


def _cpu() -> jax.Device:
    """Where programs are compared: all systems round alike there, to a few bits."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError("JAX_PLATFORMS leaves out the CPU, which export needs: add ,cpu") from None


def _files(path: Path) -> list[Path]:
    return [file for file in (path, *path.rglob("*")) if file.is_file()]
