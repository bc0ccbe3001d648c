"""What importing the package costs and gives, and that the README tells the truth about names."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_alexnet
from flax_alexnet.architectures import ARCHITECTURES, trace
from flax_alexnet.cli import COMMANDS
from flax_alexnet.config import Config, known_flags
from flax_alexnet.recipes import RECIPES

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = [f"docs/{path.name}" for path in (README.parent / "docs").glob("*.md")]


def test_importing_is_lazy():
    code = "import sys, flax_alexnet; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_public_names_are_there():
    assert set(flax_alexnet.__all__) >= {
        "AlexNet",
        "create_optimizer",
        "local_response_normalization",
    }
    for name in flax_alexnet.__all__:
        assert getattr(flax_alexnet, name) is not None
    assert not hasattr(flax_alexnet, "train_forever")


def test_the_readme_names_what_exists():
    text = README.read_text()
    for variant, table in ARCHITECTURES.items():
        assert f"`{variant}`" in text
        layers = table.scaled(table.num_classes)
        infos = trace(layers, table.image_size, table.image_size)
        assert f"{sum(info.parameters for info in infos):,}" in text
        assert f"{sum(info.macs for info in infos):,}" in text
    assert all(f"`{recipe}`" in text for recipe in RECIPES)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_flags_and_links_of_the_pages_exist(page):
    path = README.parent / page
    flags = {"--help", "--data-dir", "--requeue", "--signal", "--kills", "--no-skips"} | set(
        known_flags(Config())
    )
    for command in COMMANDS:
        module = importlib.import_module(f"flax_alexnet.{command}")
        for name, schema in vars(module).items():
            if name.endswith("Config") and dataclasses.is_dataclass(schema):
                flags |= set(known_flags(schema))
    assert set(re.findall(r"(?<!-)--[a-z][a-z.-]+", path.read_text())) <= flags
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
