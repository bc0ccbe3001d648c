"""The project's own weight files: safetensors with the model and its preprocessing inside.

Tensors are `params/LAYER/kernel`, `params/LAYER/bias` (float32, in Flax's layouts, for RGB images),
`preprocessing/mean`, and `lpips/lin0` … `lpips/lin4` where there are LPIPS heads. The metadata has
one entry, `flax_alexnet`, since the order of several is another each time a file is written: JSON
with `format` (1), `model`, `preprocessing`, `label_names` and `source`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_alexnet.config import ModelConfig
from flax_alexnet.errors import UserError, first_line
from flax_alexnet.inputs import check_regular, parse_json
from flax_alexnet.outputs import need_room, writing
from flax_alexnet.preprocessing import Preprocessing
from flax_alexnet.text import printable
from flax_alexnet.weights.formats import LARGEST
from flax_alexnet.weights.pretrained import (
    LPIPS_HEADS,
    Pretrained,
    expected_shapes,
    last_layers,
    need_sane,
    need_tensors,
    unflatten,
)

KEY, FORMAT = "flax_alexnet", 1
MODEL_FIELDS = ("variant", "num_classes", "width", "activation", "relu_logits")


def save(net: Pretrained, path: str | Path) -> None:
    """Writes a net; the file is whole even if the program is killed meanwhile.

    Raises:
      UserError: it cannot be written there.
    """
    path = Path(path).expanduser()
    with writing(path, SafetensorError) as partial:
        write(net, partial)


def write(net: Pretrained, path: Path) -> None:
    """Writes a net into a file that nobody else knows yet.

    Raises:
      UserError: the disk has no room for it.
      OSError, SafetensorError: it cannot be written.
    """
    rule = net.preprocessing
    tensors = {
        f"params/{layer}/{name}": np.asarray(value, np.float32)
        for layer, values in net.params.items()
        for name, value in values.items()
    }
    tensors["preprocessing/mean"] = np.asarray(rule.mean, np.float32)
    tensors |= {f"lpips/{k}": np.asarray(v, np.float32) for k, v in net.lpips_heads.items()}
    metadata = {
        "format": FORMAT,
        "model": {name: getattr(net.config, name) for name in MODEL_FIELDS},
        "preprocessing": {
            "image_size": rule.image_size,
            "resize": rule.resize,
            "crop_size": rule.crop_size,
            "scale": rule.scale,
            "channel_order": "RGB",
        },
        "label_names": net.label_names,
        "source": dict(net.source),
    }
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    need_room(path, sum(value.nbytes for value in contiguous.values()))
    save_file(contiguous, path, {KEY: json.dumps(metadata)})


def is_native(path: Path) -> bool:
    """Whether a safetensors file is one of ours; UserError where it cannot be read."""
    return KEY in _open(path, tensors=False)[0]


def read(path: Path) -> Pretrained:
    """Reads what `save` wrote.

    Raises:
      UserError: the file is damaged, of another version, or its tensors do not fit its model; all
        that do not are listed.
    """
    metadata, tensors = _open(path)
    try:
        said = parse_json(metadata[KEY])
        if said["format"] != FORMAT:
            raise UserError(f"{path} has the format {said['format']!r}; expected {FORMAT}")
        rule = dict(said["preprocessing"])
        if rule.pop("channel_order") != "RGB":
            raise UserError(f"{path} is not for RGB images; convert its source once more")
        scale = rule.pop("scale")
        mean = tensors.pop("preprocessing/mean")
        net = Pretrained(
            ModelConfig(**said["model"]),
            unflatten(_under("params/", tensors)),
            Preprocessing(**rule, mean=mean, scale=_scale(scale)),
            tuple(printable(name) for name in said["label_names"]),
            {printable(key): printable(str(value)) for key, value in said["source"].items()},
            _under("lpips/", tensors),
        )
        need_sane(net)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged (its metadata: {first_line(error)}); convert its source once more"
        ) from None
    expected = {f"params/{name}": shape for name, shape in expected_shapes(net).items()}
    last = last_layers(expected_shapes(net))
    optional = [frozenset(f"params/{name}" for name in names) for names in last]
    if net.lpips_heads:
        features = [shape[-1] for name, shape in expected.items() if name.endswith("kernel")]
        heads = zip(LPIPS_HEADS, features, strict=False)
        expected |= {f"lpips/{name}": (1, 1, count, 1) for name, count in heads}
    need_tensors({name: value.shape for name, value in tensors.items()}, expected, path, optional)
    whole = [name for name, v in tensors.items() if not np.issubdtype(v.dtype, np.floating)]
    if whole:
        raise UserError(f"{path} does not fit: not floating-point numbers are {', '.join(whole)}")
    return net


def _open(path: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        check_regular(path, LARGEST)
        with safe_open(path, framework="numpy") as file:
            names = file.keys() if tensors else ()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{path} is no safetensors file: {first_line(error)}") from None


def _under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _scale(value: Any) -> float | tuple[float, float, float]:
    if isinstance(value, list):
        red, green, blue = (float(v) for v in value)
        return red, green, blue
    return float(value)
