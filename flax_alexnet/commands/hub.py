"""`python -m flax_alexnet hub push | pull`: trained models to and from the Hugging Face Hub.

A repository holds `model.safetensors`, a weight file of our own, and `README.md`, its model card.
Nothing else is ever fetched or read, so a repository cannot bring code along.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import tyro
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from flax_alexnet.config.cli import command, parse
from flax_alexnet.utils.errors import UserError, starting, unknown
from flax_alexnet.utils.outputs import new_files, writing
from flax_alexnet.utils.text import markdown
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.load import load
from flax_alexnet.weights.pretrained import Pretrained

WEIGHTS, CARD = "model.safetensors", "README.md"


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Uploads a trained model with a model card to the Hugging Face Hub."""

    weights: tyro.conf.Positional[Path]
    """A weight file (see convert), or the --workdir of a run."""
    repository: tyro.conf.Positional[str]
    """USER/NAME on the Hub; created if it does not exist."""
    license: str = "unknown"
    """The licence of the weights, as the Hub spells it, such as cc-by-4.0."""
    accuracy: str = ""
    """A sentence for the card, such as "57.1 % top-1 on ImageNet's validation set"."""
    private: bool = False
    """Make a repository that only you can see."""
    folder: Path | None = None
    """Write the files into this folder instead of uploading them."""


@dataclasses.dataclass(frozen=True)
class PullConfig:
    """Downloads a trained model from the Hugging Face Hub."""

    repository: tyro.conf.Positional[str]
    """USER/NAME on the Hub, or a folder that push --folder wrote."""
    output: tyro.conf.Positional[Path]
    """The .safetensors file to write."""
    revision: str | None = None
    """A branch, tag or commit of the repository; none: main."""
    overwrite: bool = False
    """Replace a file that is there."""


COMMANDS = {"push": "upload a model with a model card", "pull": "download a model"}


@command
def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    with starting():
        huggingface_hub.logging.set_verbosity_error()  # what fails is said in one line
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m flax_alexnet hub COMMAND [--help] [flags]\n")
        for known, purpose in COMMANDS.items():
            print(f"  {known:<10}{purpose}")
    elif name == "push":
        _push(parse(PushConfig, rest, None, "flax_alexnet hub push"))
    elif name == "pull":
        _pull(parse(PullConfig, rest, None, "flax_alexnet hub pull"))
    else:
        raise UserError(unknown("command", name, COMMANDS))


def _push(config: PushConfig) -> None:
    pretrained, card = load(config.weights), (config.repository, config.license, config.accuracy)
    if config.folder is None:
        print(push(pretrained, *card, private=config.private))
    else:
        save_folder(pretrained, config.folder, *card)
        print(f"{config.folder}: {WEIGHTS} and {CARD}")


def _pull(config: PullConfig) -> None:
    if config.output.suffix != ".safetensors":
        raise UserError(f"{config.output} does not end in .safetensors, which is what is written")
    inputs = [Path(config.repository) / WEIGHTS]
    with new_files([config.output], inputs, overwrite=config.overwrite) as write:
        pretrained = from_hub(config.repository, config.revision)
        with write(config.output, SafetensorError) as partial:
            safetensors_files.write(pretrained, partial)
    print(config.output)


def push(
    pretrained: Pretrained | str | Path,
    repository: str,
    license_id: str = "unknown",
    accuracy: str = "",
    *,
    private: bool = False,
) -> str:
    """Uploads a model with a model card to the Hugging Face Hub, and returns the address.

    What is there under the same names is replaced; the Hub keeps the older versions.

    Args:
      pretrained: the model, or a path for `flax_alexnet.load`.
      repository: "USER/NAME"; it is made where there is none.
      license_id: the licence of the weights, as the Hub spells it.
      accuracy: a sentence for the card; empty: none.
      private: whether a repository that is made can be seen by its owner only.

    Raises:
      UserError: the Hub cannot be reached, nobody is logged in, or it refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_folder(pretrained, folder, repository, license_id, accuracy)
        try:
            api = huggingface_hub.HfApi(library_name="flax_alexnet")
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder)
        except Exception as error:  # of many kinds, as proxies and other servers answer
            raise UserError(f"cannot push to {repository}: {_reason(error)}") from None
    return str(address)


def save_folder(
    pretrained: Pretrained | str | Path,
    folder: str | Path,
    repository: str,
    license_id: str = "unknown",
    accuracy: str = "",
) -> None:
    """Writes what `push` uploads into a folder, which must be empty or not there yet.

    Raises:
      UserError: there is something in the folder, or it cannot be written to.
    """
    pretrained, folder = (
        pretrained if isinstance(pretrained, Pretrained) else load(pretrained),
        Path(folder).expanduser(),
    )
    if not folder.name:
        raise UserError(f"cannot write {folder}: it has no name of its own; name a new folder")
    with writing(folder, SafetensorError) as partial:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; take another folder")
        partial.mkdir()
        card = model_card(pretrained, repository, license_id, accuracy)
        (partial / CARD).write_text(card, encoding="utf-8")
        safetensors_files.write(pretrained, partial / WEIGHTS)


def from_hub(repository: str | Path, revision: str | None = None) -> Pretrained:
    """The model in a repository of the Hugging Face Hub, which is downloaded once and then cached.

    Args:
      repository: "USER/NAME"; or a folder as `save_folder` writes it, which comes first.
      revision: a branch, tag or commit; None: main.

    Raises:
      UserError: there is no such repository, revision or model in it, or it cannot be fetched.
    """
    folder = Path(repository).expanduser()
    file = folder / WEIGHTS
    if folder.is_dir() and revision:
        raise UserError(f"{repository} is a folder, which has no revisions; leave --revision out")
    if not file.is_file():
        try:
            file = Path(
                huggingface_hub.hf_hub_download(str(repository), WEIGHTS, revision=revision)
            )
        except Exception as error:  # as in `push`
            raise UserError(f"cannot fetch {repository}: {_reason(error)}") from None
    if not safetensors_files.is_native(file):
        raise UserError(f"the {WEIGHTS} of {repository} is not one of flax_alexnet")
    return safetensors_files.read(file)


def model_card(
    pretrained: Pretrained, repository: str, license_id: str = "unknown", accuracy: str = ""
) -> str:
    """The README.md of a repository: metadata for the Hub, what the model is, and how to use it."""
    config, rule, source = pretrained.config, pretrained.preprocessing, pretrained.source
    parameters = sum(np.size(value) for value in jax.tree.leaves(pretrained.params))
    if pretrained.is_classifier:
        task, layer = "image-classification", "logits"
        command = "predict alexnet.safetensors image.jpg"
        names = "named" if pretrained.label_names else "without names"
        output = f"{pretrained.num_classes} classes, {names}"
    else:
        task, layer = "image-feature-extraction", max(pretrained.params)  # of conv1 … conv5
        command = f"features alexnet.safetensors image.jpg --layers {layer}"
        output = f"features up to `{layer}`, and no classes"
    mean = "a mean image"
    if rule.mean.ndim == 1:
        mean = f"the mean colour ({', '.join(f'{value:.6g}' for value in rule.mean)})"
    facts = {
        "Model": f"`{config.variant}`, width {config.width:g}, activation {config.activation}"
        + (", ReLU on the logits" if config.relu_logits else ""),
        "Parameters": f"{parameters:,}, float32",
        "Output": output,
        "Accuracy": accuracy,
        "Preprocessing": f"RGB images brought to {rule.image_size}×{rule.image_size} by the rule "
        f"`{rule.resize}`, less {mean}, the central {rule.crop_size}×{rule.crop_size}, "
        f"times {rule.scale}",
        "Source": f"{markdown(source.get('file', ''))} ({markdown(source.get('format', ''))}), "
        f"SHA-256 {markdown(source.get('sha256', ''))}"
        if source
        else "",
    }
    metadata = huggingface_hub.ModelCardData(
        library_name="flax_alexnet",
        license=license_id,
        pipeline_tag=task,
        tags=["alexnet", "flax", "jax", config.variant],
    )
    lines = "\n".join(f"- **{name}:** {value}" for name, value in facts.items() if value)
    return f"""---
{metadata.to_yaml()}
---

# {repository.rpartition("/")[2]}

An AlexNet for `flax_alexnet`: weights, preprocessing and names of the classes in one file.

{lines}

## Use

```python
from flax_alexnet.models.activations import features
from flax_alexnet.commands.hub import from_hub

pretrained = from_hub("{repository}")
images = pretrained.preprocess(pretrained.open("image.jpg")[None])
features(pretrained.model, pretrained.params, images, ["{layer}"])
```

```sh
python -m flax_alexnet hub pull {repository} alexnet.safetensors
python -m flax_alexnet.{command}
```
"""


def _reason(error: BaseException) -> str:
    """Why the Hub gave nothing, in one line."""
    message = " ".join(str(error).split())
    if not isinstance(error, OSError | HTTPError) or not message:
        message = f"{type(error).__name__} {message}".strip()
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError | RepositoryNotFoundError):
        return "there is no such repository, or not for you; log in with: hf auth login"
    if isinstance(error, HTTPError) and not status:
        return f"the Hub cannot be reached ({message}); check the network"
    return message
