"""What importing the package costs and gives, and that the README tells the truth about names."""

import dataclasses
import importlib
import re
import runpy
import subprocess
import sys

import jax.numpy as jnp
import pytest

import flax_alexnet
from flax_alexnet.__main__ import COMMANDS
from flax_alexnet.config.cli import known_flags
from flax_alexnet.config.recipes import RECIPES
from flax_alexnet.config.schema import Config
from flax_alexnet.models.architectures import ARCHITECTURES, infer_shapes
from flax_alexnet.weights.load import load
from flax_alexnet.weights.packaged import packaged_names
from tests.pages import PAGES, ROOT

README = ROOT / "README.md"


def imported_by(code, packages):
    """Which of the packages are imported once a new interpreter has run the code."""
    code += f"\nimport sys; print('imported:', *sorted({set(packages)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("imported:")[2].split()


def test_importing_is_lazy():
    assert imported_by("import flax_alexnet", ["jax", "numpy"]) == []


@pytest.mark.parametrize("flag", ["--help", "--recipe=nonsense", "--epochs=-1"])
def test_training_answers_what_flags_decide_before_it_imports_jax(flag):
    code = f"""
import contextlib
from flax_alexnet.train import main
with contextlib.suppress(SystemExit):
    assert main(["{flag}"]) == 2
"""
    packages = ["grain", "jax", "matplotlib", "orbax", "tensorboardX", "tensorflow_datasets"]
    assert imported_by(code, packages) == []


def test_commands_import_late_what_few_of_their_uses_need():
    others = [name for name in COMMANDS if name != "train"]
    code = f"from flax_alexnet.commands import {', '.join(others)}"
    assert imported_by(code, ["grain", "matplotlib", "onnx", "orbax", "tensorflow"]) == []


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
        infos = infer_shapes(layers, table.image_size, table.image_size)
        assert f"{sum(info.parameters for info in infos):,}" in text
        assert f"{sum(info.macs for info in infos):,}" in text
    assert all(f"`{recipe}`" in text for recipe in RECIPES)


def test_the_readme_states_the_errors_of_the_models_in_the_package():
    text = README.read_text()
    for name in packaged_names():
        assert f"`{name}`" in text or f" {name} " in text
        assert f"{100 * float(load(name).source['test error']):.1f} %" in text


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_links_of_the_pages_exist(page, monkeypatch):
    path = README.parent / page
    others = {"--help", "--requeue", "--signal", "--output", "--no-skips", "--slow"}
    experiments = README.parent / "experiments"
    for folder in ("benchmarks", "paper"):
        monkeypatch.syspath_prepend(experiments / folder)
    flags = others | set(known_flags(Config()))
    for script in ("benchmarks/bench", "benchmarks/soak", "paper/imagenet"):
        found = runpy.run_path(str(experiments / f"{script}.py"))
        flags |= set(known_flags(found["Arguments"]()))
    for command in COMMANDS:
        module = importlib.import_module(f"flax_alexnet.commands.{command}")
        for name, schema in vars(module).items():
            if name.endswith("Config") and dataclasses.is_dataclass(schema):
                flags |= set(known_flags(schema))
    assert set(re.findall(r"(?<!-)--[a-z][a-z.-]+", path.read_text())) <= flags
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_commands_do_not_hide_the_functions_of_their_names():
    for name in ("features", "lpips"):
        importlib.import_module(f"flax_alexnet.commands.{name}")
    assert callable(flax_alexnet.features)
    assert callable(flax_alexnet.lpips)
    assert flax_alexnet.load is load
    assert jnp.ndim(flax_alexnet.AlexNet().width) == 0
