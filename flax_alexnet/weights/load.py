"""Loads any trained model from a path."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from flax_alexnet.checkpoint.manifest import sha256
from flax_alexnet.config.schema import ModelConfig, misfit
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.architectures import RENAMED, architecture
from flax_alexnet.utils.errors import UserError, first_line, unknown
from flax_alexnet.utils.inputs import read_json
from flax_alexnet.utils.text import printable
from flax_alexnet.weights import name_maps, safetensors_files
from flax_alexnet.weights.caffe_files import read_caffemodel, read_mean
from flax_alexnet.weights.convnet_files import read_checkpoint, read_data_meta
from flax_alexnet.weights.digests import mismatch
from flax_alexnet.weights.formats import KINDS, format_of
from flax_alexnet.weights.labels import imagenet_labels
from flax_alexnet.weights.numpy_files import read_npy, read_npz
from flax_alexnet.weights.packaged import find, packaged_names
from flax_alexnet.weights.pretrained import (
    LPIPS_HEADS,
    Pretrained,
    check_sane,
    check_tensors,
    expected_shapes,
)
from flax_alexnet.weights.stored import LARGEST, Tensor
from flax_alexnet.weights.torch_files import read_pth, read_safetensors

CAFFE_VARIANTS = ("caffe", "caffenet")

TORCHVISION = Preprocessing(
    image_size=256,
    resize="torchvision",
    crop_size=224,
    mean=255 * np.array([0.485, 0.456, 0.406], np.float32),
    scale=(1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225)),
)
# The mean colours of the training images of CIFAR-10 and of ILSVRC-2012.
CIFAR10_MEAN = np.array([125.3, 123.0, 113.9], np.float32)
ILSVRC_MEAN = np.array([127.3, 119.7, 104.9], np.float32)
# The mean colour of ImageNet's training images, which Caffe's own examples subtract if they do not
# use the mean image.
CAFFE = Preprocessing(
    image_size=256,
    resize="caffe",
    crop_size=227,
    mean=np.array([122.67891434, 116.66876762, 104.00698793], np.float32),
)


def load(path: str | Path, head: str | None = None) -> Pretrained:
    """The trained model in a file or in the working directory of a run.

    Code in a file is never executed. Weights of other systems get the preprocessing that they were
    trained with, for RGB images, and ImageNet's label names if they have 1000 classes. Notes on
    them, such as a wrong digest, are printed to standard error.

    Args:
      path: one of

        - the name of a model that comes with the package, such as "cifar10-18pct";
        - a `.safetensors` of ours, as `python -m flax_alexnet convert` writes it;
        - the working directory of a run, whose newest checkpoint is taken;
        - torchvision's `alexnet`, a state dict as `.pth` or `.safetensors`;
        - Caffe's bvlc_alexnet or bvlc_reference_caffenet, a `.caffemodel`;
        - the `bvlc_alexnet.npy` of guerzh/tf_weights;
        - an `.npz` of torchvision's layers with our names, with or without LPIPS heads;
        - a checkpoint of cuda-convnet, the original code, of #145 or of its CIFAR-10 models.
      head: the name of the last layer, for a model of Caffe's that has several.

    Raises:
      UserError: there is no such file, it is damaged, or it is none of these.
    """
    pretrained, notes = read(Path(path).expanduser(), head=head)
    for note in notes:
        print(note, file=sys.stderr)
    return pretrained


def read(
    path: Path,
    variant: str | None = None,
    mean: Path | None = None,
    head: str | None = None,
) -> tuple[Pretrained, list[str]]:
    """Like `load`, but returns the notes as lines instead of printing them.

    Args:
      path: see `load`.
      variant: which of Caffe's two models the file is, if it does not say so itself.
      mean: for a model of Caffe's, a `.binaryproto` of the mean image, and for one of cuda-convnet
        a `batches.meta`; None: the mean colour of the images it was trained on.
      head: see `load`.

    Raises:
      UserError: as in `load`; or the file is of another variant, or has its mean already.
    """
    try:
        path = find(path)
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long
        raise UserError(f"no weights {path}: {error.strerror}") from None
    if not is_folder and not is_file:
        names = f"; {', '.join(packaged_names())} come with the package"
        raise UserError(f"no weights {path}: expected {KINDS}{names if packaged_names() else ''}")
    if is_file and not 0 < path.stat().st_size <= LARGEST:
        raise UserError(f"{path} is empty or larger than 2 GiB; expected weights of AlexNet")
    kind = format_of(path) if is_file else "run"
    for flag, value in (("mean", mean), ("head", head)):
        if value and kind not in ("caffe", "npy") and (flag, kind) != ("mean", "convnet"):
            raise UserError(
                f"--{flag} is for Caffe's models, and {path} is not one of them; leave it out"
            )
    notes: list[str] = []
    if kind == "run":
        pretrained, notes = _read_run(path)
    elif kind == "safetensors" and safetensors_files.is_native(path):
        pretrained = safetensors_files.read(path)
    elif kind == "convnet":
        pretrained, notes = _read_convnet(path, mean)
    else:
        pretrained, notes = _read_foreign(path, kind, variant, mean, head)
    if variant not in (None, pretrained.config.variant):
        raise UserError(f"{path} is of the variant {pretrained.config.variant}, not {variant}")
    if odd := _not_finite(pretrained):
        notes.append(f"warning: {path} has values that are not finite: {odd}")
    return pretrained, notes


def with_heads(pretrained: Pretrained, path: Path) -> Pretrained:
    """The model with LPIPS heads, from the `alex.pth` of the package lpips or a `.safetensors`.

    Raises:
      UserError: the file is damaged or has no such heads, or the model is not torchvision's.
    """
    if pretrained.config.variant != "torchvision":
        raise UserError(
            f"LPIPS heads are for the variant torchvision, not {pretrained.config.variant}"
        )
    if not path.is_file():
        raise UserError(f"no LPIPS heads {path}: expected a .pth or .safetensors")
    read_file = read_safetensors if format_of(path) == "safetensors" else read_pth
    tensors, _ = read_file(path, name_maps.LPIPS.names.values())
    heads = name_maps.read_heads(name_maps.LPIPS, tensors, pretrained.params, path)
    return dataclasses.replace(pretrained, lpips_heads=heads)


def _read_foreign(
    path: Path, kind: str, variant: str | None, mean: Path | None, head: str | None
) -> tuple[Pretrained, list[str]]:
    notes: list[str] = []
    heads: Mapping[str, Tensor] = {}
    tensors: Mapping[str, Tensor]
    match kind:
        case "torch" | "safetensors":
            system, name_map = "PyTorch", name_maps.TORCHVISION
            read_file = read_pth if kind == "torch" else read_safetensors
            known = (*name_map.names.values(), *name_maps.LPIPS.names.values())
            tensors, notes = read_file(path, known)
        case "npz":
            system, name_map, tensors = "NumPy", name_maps.FLAX, read_npz(path)
            heads = {name: tensors[name] for name in LPIPS_HEADS if name in tensors}
            tensors = {name: tensors[name] for name in tensors.keys() - heads}
        case "npy":
            system, name_map, tensors = (
                "caffe-tensorflow",
                name_maps.CAFFE_TENSORFLOW,
                read_npy(path),
            )
            variant = variant or "caffe"
        case _:
            caffe = read_caffemodel(path)
            system, name_map, tensors = "Caffe", name_maps.CAFFE, caffe.tensors
            variant = caffe.variant or variant
    if name_maps.LPIPS.names["lin0"] in tensors:
        raise UserError(
            f"{path} has LPIPS heads alone; give it as --heads to convert, with torchvision's model"
        )
    rule = TORCHVISION
    tensors, grey = name_maps.read_grey(name_map, tensors)
    if grey and not name_map.bgr:
        raise UserError(
            f"{path} reads grey images, and does not say how they were normalized; repeat the "
            "kernels of its first layer over three channels, divided by 3, and save it again"
        )
    if not name_map.bgr:
        variant = "torchvision"
    elif variant is None:
        raise UserError(
            f"{path} does not say which model it is: use convert with --variant caffe or caffenet"
        )
    elif variant not in CAFFE_VARIANTS:
        raise UserError(unknown("variant of Caffe", variant, CAFFE_VARIANTS))
    else:
        tensors, notes = name_maps.name_dense(name_map, tensors, path, head)
        notes += grey
        rule = _caffe_rule(mean, is_grey=bool(grey))
        if mean is None:
            red, green, blue = (f"{value:.3f}" for value in rule.mean)
            notes.append(
                f"note: no --mean, so Caffe's mean colour is taken: BGR {blue} {green} {red}"
            )

    params, num_classes = name_maps.read_params(name_map, tensors, variant, path)
    lpips_heads = name_maps.read_heads(name_maps.FLAX_HEADS, heads, params, path) if heads else {}
    names = imagenet_labels() if num_classes == len(imagenet_labels()) else ()
    digits = sha256(path)
    notes += [f"warning: {line}" for line in [mismatch(path, digits)] if line]
    source = {"file": printable(path.name), "format": system, "sha256": digits}
    config = ModelConfig(variant=variant, num_classes=num_classes)
    return Pretrained(config, params, rule, names, source, lpips_heads), notes


def _read_convnet(path: Path, mean: Path | None) -> tuple[Pretrained, list[str]]:
    model = read_checkpoint(path)
    table = architecture(model.variant)
    cifar = model.variant != "original"
    image_size, crop_size = 32 if cifar else 256, table.image_size
    notes: list[str] = []
    names: tuple[str, ...] = ()
    if mean is None:
        image = CIFAR10_MEAN if cifar else ILSVRC_MEAN
        color = " ".join(f"{value:.1f}" for value in image)
        notes = [f"note: no --mean batches.meta, so a mean colour is taken: RGB {color}"]
    else:
        image, names = read_data_meta(mean)
        if len(image) != image_size:
            raise UserError(
                f"{mean} is of {len(image)}×{len(image)} pixels, and {path} of {image_size}"
            )
    if len(names) != model.num_classes:
        names = imagenet_labels() if model.num_classes == len(imagenet_labels()) else ()
    rule = Preprocessing(image_size, "paper", crop_size, image)
    source = {"file": printable(path.name), "format": "cuda-convnet", "sha256": sha256(path)}
    config = ModelConfig(variant=model.variant, num_classes=model.num_classes)
    return Pretrained(config, model.params, rule, names, source), notes


def _caffe_rule(mean: Path | None, is_grey: bool) -> Preprocessing:
    if mean is None:
        return CAFFE
    image = read_mean(mean)
    height, width, channels = image.shape
    if (channels == 1) != is_grey:
        raise UserError(
            f"{mean} has {channels} channels, but the model reads {1 if is_grey else 3}"
        )
    image = np.broadcast_to(image, (height, width, 3))
    if (height, width) == (1, 1):
        return dataclasses.replace(CAFFE, mean=image[0, 0])
    if height != width or height < CAFFE.crop_size:
        raise UserError(f"{mean} is {height}×{width}; expected a square of at least 227 pixels")
    return dataclasses.replace(CAFFE, mean=image, image_size=height)


def _not_finite(pretrained: Pretrained) -> str:
    counts = {
        path: np.count_nonzero(~np.isfinite(value))
        for path, value in flatten_dict(pretrained.params, sep="/").items()
    }
    return ", ".join(f"{count} in {path}" for path, count in counts.items() if count)


def files_of(path: Path) -> list[Path]:
    """What `load` reads of a path: the weight file, or a run's configuration and checkpoints."""
    return [path / "config.json", path / "checkpoints"] if path.is_dir() else [path]


def _near(folder: Path) -> str:
    """A suggestion for a folder that is not a run: a run above or below it, or a weight file."""
    above = folder.absolute().parents[:2]  # of a checkpoint
    with contextlib.suppress(OSError):  # of a folder that cannot be listed
        below = sorted(itertools.islice(folder.iterdir(), 1000))
        for path in (*above, *below):
            if (path / "config.json").is_file() or path.suffix == ".safetensors":
                return f"did you mean {path}?"
    return f"expected {KINDS}"


def _read_run(workdir: Path) -> tuple[Pretrained, list[str]]:
    """The newest checkpoint of a run, with the preprocessing that its configuration says."""
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"{workdir} is no working directory of a run: it has no config.json; {_near(workdir)}"
        )
    try:
        config = read_json(workdir / "config.json")["config"]
        if problem := misfit(config):
            raise ValueError(problem)
        names = tuple(map(printable, config["dataset.label_names"]))
        fields = [field.name for field in dataclasses.fields(ModelConfig)]
        model = ModelConfig(**{name: config[f"model.{name}"] for name in fields})
        model = dataclasses.replace(model, variant=RENAMED.get(model.variant, model.variant))
        num_classes = model.num_classes or len(names)
        model = dataclasses.replace(model, num_classes=num_classes)
        scale = config["augment.scale"]
        size, crop_size = config["data.image_size"], config["augment.crop_size"]
        rule = Preprocessing(
            image_size=size,
            resize=config.get("data.resize", "paper"),
            crop_size=crop_size,
            mean=np.zeros((size, size, 3), np.float32),
            scale=tuple(scale) if isinstance(scale, list) else scale,
        )
        check_sane(Pretrained(model, {}, rule, ()))  # before `names` grows to `num_classes`
        # A run may have more outputs than its data has classes.
        names += tuple(f"class {label}" for label in range(len(names), num_classes))
        pretrained = Pretrained(model, {}, rule, names)
        check_sane(pretrained)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{workdir} is no working directory of a run: no config.json that says so "
            f"({first_line(error)})"
        ) from None
    # Orbax, which takes a while to import, is for runs alone.
    from flax_alexnet.checkpoint.manager import digest, newest_intact, restore_model

    step, notes = newest_intact(workdir / "checkpoints")
    if step is None:
        reason = "; ".join(notes) or "wait for the first evaluation"
        raise UserError(f"{workdir} has no checkpoint that is whole: {reason}")
    params, mean = restore_model(workdir / "checkpoints" / str(step))
    file = f"{workdir.resolve().name}, step {step}"
    source = {"file": file, "format": "run", "sha256": digest(params)}
    rule = dataclasses.replace(rule, mean=mean)
    pretrained = dataclasses.replace(pretrained, params=params, preprocessing=rule, source=source)
    actual = {path: np.shape(value) for path, value in flatten_dict(params, sep="/").items()}
    check_tensors(actual, expected_shapes(pretrained), f"checkpoint {step} of {workdir}")
    return pretrained, notes
