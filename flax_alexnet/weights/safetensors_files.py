"""The project's own weight files: safetensors with the model and its preprocessing inside.

Tensors are `params/LAYER/kernel`, `params/LAYER/bias` (float32, in Flax's layouts, for RGB images),
`preprocessing/mean`, and `lpips/lin0` … `lpips/lin4` where there are LPIPS heads. The metadata has
one entry, `flax_alexnet`, since the order of several is another each time a file is written: JSON
with `format` (1), `model`, `preprocessing`, `label_names` and `source`.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from flax_alexnet.config.schema import ModelConfig
from flax_alexnet.data.preprocessing import Preprocessing
from flax_alexnet.models.architectures import RENAMED
from flax_alexnet.utils.errors import UserError, first_line
from flax_alexnet.utils.inputs import parse_json
from flax_alexnet.utils.outputs import check_room, writing
from flax_alexnet.utils.text import printable
from flax_alexnet.weights.headers import LARGEST_HEADER, read_header
from flax_alexnet.weights.pickles import NONSENSE
from flax_alexnet.weights.pretrained import (
    LPIPS_HEADS,
    Pretrained,
    check_sane,
    check_tensors,
    expected_shapes,
    last_layers,
)

KEY, FORMAT = "flax_alexnet", 1
MODEL_FIELDS = ("variant", "num_classes", "width", "activation", "relu_logits")


def save(pretrained: Pretrained, path: str | Path) -> None:
    """Writes a model; the file is whole even if the program is killed meanwhile.

    Raises:
      UserError: it cannot be written there.
    """
    path = Path(path).expanduser()
    with writing(path, SafetensorError) as partial:
        write(pretrained, partial)


def write(pretrained: Pretrained, path: Path) -> None:
    """Writes a model into a file that nobody else knows yet.

    Raises:
      UserError: the disk has no room for it.
      OSError, SafetensorError: it cannot be written.
    """
    rule = pretrained.preprocessing
    tensors = {
        f"params/{path}": np.asarray(value, np.float32)
        for path, value in flatten_dict(pretrained.params, sep="/").items()
    }
    tensors["preprocessing/mean"] = np.asarray(rule.mean, np.float32)
    tensors |= {f"lpips/{k}": np.asarray(v, np.float32) for k, v in pretrained.lpips_heads.items()}
    metadata = {
        "format": FORMAT,
        "model": {name: getattr(pretrained.config, name) for name in MODEL_FIELDS},
        "preprocessing": {
            "image_size": rule.image_size,
            "resize": rule.resize,
            "crop_size": rule.crop_size,
            "scale": rule.scale,
            "channel_order": "RGB",
        },
        "label_names": pretrained.label_names,
        "source": dict(pretrained.source),
    }
    text = json.dumps(metadata)
    if len(text) > LARGEST_HEADER // 2:  # it is written as a text within JSON, with quotes escaped
        raise UserError(f"{path} would not be read again: its label names have too many letters")
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    check_room(path, sum(value.nbytes for value in contiguous.values()))
    save_file(contiguous, path, {KEY: text})


def is_native(path: Path) -> bool:
    """Whether a safetensors file is one of ours; UserError where it cannot be read."""
    return KEY in read_header(path)[0]


def read(path: Path) -> Pretrained:
    """Reads what `save` wrote.

    Raises:
      UserError: the file is damaged, of another version, or its tensors do not fit its model; all
        that do not are listed.
    """
    metadata, stored = read_header(path)
    try:
        content = parse_json(metadata[KEY])
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {str(content['format'])[:20]}; expected {FORMAT}"
            )
        rule = dict(content["preprocessing"])
        if rule.pop("channel_order") != "RGB":
            raise UserError(f"{path} is not for RGB images; convert its source once more")
        scale, labels, source = rule.pop("scale"), content["label_names"], content["source"]
        _check_texts("label_names", labels if isinstance(labels, list) else [None])
        _check_texts("source", source.values() if isinstance(source, dict) else [None])
        variant = content["model"]["variant"]
        mean: Any = stored["preprocessing/mean"]  # of which the shape is enough here
        pretrained = Pretrained(
            ModelConfig(**content["model"] | {"variant": RENAMED.get(variant, variant)}),
            {},
            Preprocessing(**rule, mean=mean, scale=_scale(scale)),
            tuple(printable(name) for name in labels),
            {printable(key): printable(value) for key, value in source.items()},
        )
        check_sane(pretrained)
        shapes = expected_shapes(pretrained)
    except NONSENSE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged (its metadata: {first_line(error)}); convert its source once more"
        ) from None
    expected = {f"params/{name}": shape for name, shape in shapes.items()}
    expected["preprocessing/mean"] = mean.shape
    optional = [frozenset(f"params/{name}" for name in names) for names in last_layers(shapes)]
    if any(name.startswith("lpips/") for name in stored):
        features = [shape[-1] for name, shape in expected.items() if name.endswith("kernel")]
        heads = zip(LPIPS_HEADS, features, strict=False)
        expected |= {f"lpips/{name}": (1, 1, count, 1) for name, count in heads}
    check_tensors({name: value.shape for name, value in stored.items()}, expected, path, optional)
    whole = [name for name, v in stored.items() if not np.issubdtype(v.dtype, np.floating)]
    if whole:
        raise UserError(f"{path} does not fit: not floating-point numbers are {', '.join(whole)}")
    tensors = {name: value.read() for name, value in stored.items()}
    return dataclasses.replace(
        pretrained,
        params=unflatten_dict(_under("params/", tensors), sep="/"),
        preprocessing=dataclasses.replace(
            pretrained.preprocessing, mean=tensors["preprocessing/mean"]
        ),
        lpips_heads=_under("lpips/", tensors),
    )


def _check_texts(name: str, values: Iterable[object]) -> None:
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"no model has such a value of {name}")


def _under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _scale(value: Any) -> float | tuple[float, float, float]:
    if isinstance(value, list):
        red, green, blue = (float(v) for v in value)
        return red, green, blue
    return float(value)
