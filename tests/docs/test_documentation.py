"""Every command and every block of Python in the README and the docs, as it is written there.

Each page is read by Sybil and runs top to bottom, in a folder of its own that holds what a reader
is said to have: images, a weight file. `NOT_RUN` lists what needs more than that, with the
reason; of these the flags are read all the same.
"""

import dataclasses
import importlib
import re
import shlex
import shutil
import tomllib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from sybil import Region
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

from flax_alexnet.config import recipes
from flax_alexnet.data import synthetic
from flax_alexnet.data.sources import FolderSource
from flax_alexnet.data.writer import write_dataset
from flax_alexnet.weights import name_maps, safetensors_files
from flax_alexnet.weights.labels import imagenet_labels, imagenet_synsets
from tests.foreign_files import (
    convnet_checkpoint,
    convnet_layers,
    convnet_meta,
    dump_python2,
)
from tests.pages import PAGES, ROOT
from tests.small_models import make_pretrained

NOT_RUN = {
    "pip install": "it changes the environment; .ci/run does it",
    "source .venv": "it changes the environment; .ci/run does it",
    "python -m venv": "it changes the environment; .ci/run does it",
    "pytest": "it is the tests themselves",
    "bash .ci/run": "it is the tests themselves",
    "python experiments/": "it takes minutes to hours; tests/experiments/ has short forms",
    "launch/local.sh": "it starts several processes; tests/robustness/test_processes.py does",
    "--parallel.coordinator": "it waits for another machine; tests/robustness/ has two here",
    "--parallel.mesh 2 8": "it needs 16 devices",
    "--data.name cifar10": "it downloads",
    "hub push": "it uploads; tests/commands/test_hub.py has a Hub of its own",
    "hub pull": "it downloads; tests/commands/test_hub.py has a Hub of its own",
    "bvlc_alexnet.caffemodel": "a large file; tests/parity/test_original_weights.py writes one",
    "alexnet.onnx": "it needs onnx; tests/parity/test_exported_programs.py has it",
    "alexnet_saved": "it needs TensorFlow; tests/parity/test_exported_programs.py has it",
    "torchvision.models": "no torchvision fits beside PyTorch's build for the CPU alone",
}
INLINE = re.compile(r"`((?:python -m flax_alexnet|python experiments/|pip install|bash )[^`]*)`")


def python(example):
    """Marks a block of Python; `run_page` runs it."""


def shell(example):
    """Marks commands for a shell; `run_page` runs them."""


def inline_commands(document):
    """A parser of Sybil's: commands within a sentence."""
    blocks = [match.span() for match in re.finditer(r"^```.*?^```", document.text, re.M | re.S)]
    for match in INLINE.finditer(document.text):
        if not any(start <= match.start() < end for start, end in blocks):
            yield Region(match.start(), match.end(), match[1], shell)


def examples(page):
    """(kind, text, line) of a page's blocks of Python and its commands, in their order."""
    document = Document.parse(
        str(ROOT / page),
        CodeBlockParser("python", evaluator=python),
        CodeBlockParser("sh", evaluator=shell),
        inline_commands,
    )
    for example in document.examples():
        if example.region.evaluator is python:
            yield python, example.parsed, example.line
        else:
            for line in example.parsed.replace("\\\n", " ").strip().splitlines():
                for command in line.split(" && "):
                    yield shell, command.strip(), example.line


def reasons(text):
    return [key for key in NOT_RUN if key in text]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a reader has, as the pages call it."""
    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)

    def image(path, size=72):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path)

    for name in ("images/cat", "images/dog"):
        for number in range(12):
            image(f"{name}/{number:03}.jpg")
    for name in ("photos/1", "photos/2", "cat", "originals/1", "compressed/1"):
        image(f"{name}.jpg")
    for name in ("a.png", "b.png"):
        image(name)
    cifar = make_pretrained("cuda_convnet_18pct", 10, 32, 32, width=1.0)
    checkpoint = convnet_checkpoint(convnet_layers(cifar))
    (folder / "140.5").write_bytes(dump_python2(checkpoint))
    (folder / "batches.meta").write_bytes(dump_python2(convnet_meta()))
    # ImageNet, as TFDS has it once it is prepared.
    listed = [(path, label) for label, path in enumerate(sorted(folder.glob("photos/*")))]
    source = FolderSource(listed, imagenet_synsets())
    prepared = folder / "tensorflow_datasets" / "imagenet2012" / "5.1.0"
    write_dataset({"train": source, "validation": source}, prepared, "imagenet2012", 64)
    return folder


def pretrained(width, seed=0, variant="torchvision"):
    """A model of ImageNet's classes; a narrow one for small images."""
    sizes = (224, 256) if width == 1 else (67, 72)
    made = make_pretrained(variant, 1000, *sizes, seed=seed, width=width)
    return dataclasses.replace(made, label_names=imagenet_labels())


def write_models(folder, width):
    """The weight files of the pages; torchvision's by PyTorch's names where it is whole."""
    downloaded = folder / "alexnet-owt-7be5be79.pth"
    if width == 1:
        params = pretrained(1).params
        save_file(name_maps.write_params(name_maps.TORCHVISION, params, "torchvision"), downloaded)
        heads = zip(name_maps.LPIPS.names.values(), (64, 192, 384, 256, 256), strict=True)
        save_file({n: np.ones((1, c, 1, 1), np.float32) for n, c in heads}, folder / "alex.pth")
    else:
        whole = folder / "whole.safetensors"
        safetensors_files.save(pretrained(width), whole)
        whole.rename(downloaded)
    for seed, name in enumerate(("one", "two", "three")):
        safetensors_files.save(pretrained(0.02, seed), folder / f"{name}.safetensors")
    safetensors_files.save(pretrained(0.02, variant="caffe"), folder / "caffe.safetensors")


@pytest.fixture
def reader(made, tmp_path, monkeypatch):
    """The reader's folder, in which recipes take a few steps of a small model."""
    folder = tmp_path / "reader"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", "tensorflow_datasets")
    monkeypatch.setitem(synthetic.EXAMPLES, "train", 64)
    monkeypatch.setitem(synthetic.EXAMPLES, "test", 20)
    small = {
        name: dataclasses.replace(
            recipe,
            batch_size=8,
            steps=2,
            compilation_cache=False,
            model=dataclasses.replace(recipe.model, width=1 / 16),  # eight devices divide it
        )
        for name, recipe in recipes.RECIPES.items()
    }
    for name, recipe in small.items():
        monkeypatch.setitem(recipes.RECIPES, name, recipe)
        monkeypatch.setattr(recipes, name.upper().replace("-", "_"), recipe)
    return folder


class FlagsReadError(Exception):
    """Raised once the flags of a command were read, so that it is not run."""


def command_of(words):
    """The module of the command that a line runs, and its arguments; None where it is another."""
    match words:
        case ["python", "-m", "flax_alexnet.train", *argv]:
            return importlib.import_module("flax_alexnet.commands.train"), argv
        case ["python", "-m", "flax_alexnet", name, *argv]:
            return importlib.import_module(f"flax_alexnet.commands.{name}"), argv
    return None


def read_flags(command, monkeypatch):
    """Reads the flags of a command as it does, and checks the files and extras that it names."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if found := command_of(words):
        module, argv = found
        at = recipes if module.__name__.endswith(".train") else module
    elif words[0] == "launch/local.sh":
        module, argv, at = (
            importlib.import_module("flax_alexnet.commands.train"),
            words[2:],
            recipes,
        )
        assert (ROOT / words[0]).is_file()
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for word in words[2:]:
            if named := re.fullmatch(r"\.\[(.*)\]", word):
                assert set(named[1].split(",")) <= set(extras)
        return
    else:
        for word in words:
            assert "/" not in word or word.startswith(".venv") or (ROOT / word).exists(), command
        return
    parse = at.parse

    def read_only(*arguments, **keywords):
        parse(*arguments, **keywords)
        raise FlagsReadError

    with monkeypatch.context() as patch:
        patch.setattr(at, "parse", read_only)
        if at is recipes:  # and not what --init-from names
            patch.setattr(module, "_adapt", lambda recipe, _: recipe)
        if "--help" not in argv:
            with pytest.raises(FlagsReadError):
                module.main(argv)


def run_page(page, monkeypatch, capfd):
    namespace = {}
    for kind, text, line in examples(page):
        where = f"{page}:{line}: {text}"
        if reasons(text):
            if kind is python:
                compile(text, page, "exec")
            else:
                read_flags(text, monkeypatch)
        elif kind is python:
            exec(compile(text, page, "exec"), namespace)
        else:
            found = command_of(shlex.split(text))
            assert found, f"{where}: run it here, or say why not"
            module, argv = found
            try:
                code = module.main(argv)
            except SystemExit as ended:  # of --help
                code = ended.code
            assert code == 0, f"{where}\n{''.join(capfd.readouterr())}"
    return namespace


def test_every_command_has_flags_and_files_that_are_there(monkeypatch):
    """At once, where the pages as a whole take minutes; and every reason of `NOT_RUN` is needed."""
    used = set()
    for page in PAGES:
        for kind, text, _ in examples(page):
            used |= set(reasons(text))
            if kind is python:
                compile(text, page, "exec")
            else:
                read_flags(text, monkeypatch)
    assert used == NOT_RUN.keys()


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/pretrained.md"}))
@pytest.mark.filterwarnings("ignore::UserWarning:flax_alexnet.models.lpips")
def test_a_page_runs_from_top_to_bottom(page, reader, monkeypatch, capfd):
    write_models(reader, 1 / 16)
    namespace = run_page(page, monkeypatch, capfd)
    if page == "README.md":  # the loop of one's own has learnt what it was given
        assert namespace["totals"]["top1"] > 0.5 * namespace["totals"]["images"]


@pytest.mark.slow
def test_the_page_of_trained_models_runs_from_top_to_bottom(reader, monkeypatch, capfd):
    write_models(reader, 1)
    run_page("docs/pretrained.md", monkeypatch, capfd)


@pytest.mark.usefixtures("reader")
def test_a_new_command_that_cannot_be_run_is_noticed(tmp_path, monkeypatch, capfd):
    page = tmp_path / "page.md"
    for text in ("flax-alexnet train", "python -m flax_alexnet predict nothing.safetensors a.png"):
        page.write_text(f"# A page\n\n```sh\n{text}\n```\n")
        with pytest.raises((AssertionError, ValueError)):
            run_page(str(page), monkeypatch, capfd)
