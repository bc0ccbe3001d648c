"""Any trained net from a path."""

import dataclasses
import hashlib
import json
from pathlib import Path

from flax_alexnet.checkpoint import Checkpoints, digest
from flax_alexnet.config import ModelConfig
from flax_alexnet.errors import UserError
from flax_alexnet.preprocessing import Preprocessing
from flax_alexnet.weights import native
from flax_alexnet.weights.pretrained import Pretrained


def load(path: str | Path) -> Pretrained:
    """The trained net in a file or in the working directory of a run.

    Args:
      path: a `.safetensors` of ours (see `flax_alexnet.weights.native`), as
        `python -m flax_alexnet.convert` makes of other systems' files; or the working directory of
        a run, whose newest checkpoint is taken.

    Raises:
      UserError: there is no such file, it is damaged, or it is none of these.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_run(path)
    if not path.is_file():
        raise UserError(f"no weights {path}: expected a .safetensors file or a run's --workdir")
    if path.suffix == ".safetensors" and native.is_native(path):
        return native.read(path)
    raise UserError(
        f"{path} is not a weight file of flax_alexnet; bring it into that form with: "
        f"python -m flax_alexnet.convert {path} {path.with_suffix('.safetensors')}"
    )


def sha256(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_run(workdir: Path) -> Pretrained:
    """The newest checkpoint of a run, with the preprocessing that its configuration says."""
    try:
        config = json.loads((workdir / "config.json").read_text())["config"]
        names = tuple(config["dataset.label_names"])
        fields = [field.name for field in dataclasses.fields(ModelConfig)]
        model = ModelConfig(**{name: config[f"model.{name}"] for name in fields})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{workdir} is no working directory of a run: it has no config.json that says so"
        ) from None
    # An empty folder would be made where there is none, and this one is only read.
    steps = Checkpoints(workdir / "checkpoints") if (workdir / "checkpoints").is_dir() else None
    latest = steps.latest_step() if steps else None
    if steps is None or latest is None:
        raise UserError(f"{workdir} has no checkpoint yet; wait for the first evaluation")
    params, mean = steps.restore_model(latest)
    steps.close()
    scale = config["augment.scale"]
    rule = Preprocessing(
        image_size=config["data.image_size"],
        resize=config.get("data.resize", "paper"),
        crop_size=config["augment.crop_size"],
        mean=mean,
        scale=tuple(scale) if isinstance(scale, list) else scale,
    )
    model = dataclasses.replace(model, num_classes=model.num_classes or len(names))
    source = {"file": f"{workdir.name}, step {latest}", "format": "run", "sha256": digest(params)}
    return Pretrained(model, params, rule, names, source)
