"""Each module has its tests; one opens what is read, one writes, one makes text fit to be shown.

Every place of the package that opens, writes or parses a file, or prints a table, is found in its
source; those outside the three modules are listed here, each with why it may.
"""

import ast
import re
from pathlib import Path

import pytest

import flax_alexnet
from tests.pages import ROOT

PACKAGE = Path(flax_alexnet.__file__).parent
HOMES = ("utils/inputs.py", "utils/outputs.py", "utils/text.py")
MODULES = {f"flax_alexnet.{home[:-3].replace('/', '.')}" for home in HOMES}

# Calls by the last part of their name, such as `open` of `Path.open`.
READS = {"read_text", "read_bytes", "loads", "fdopen", "memmap", "open_memmap", "safe_open"}
READS |= {"ZipFile", "File", "mmap", "load_file"}
WRITES = {"write_text", "write_bytes", "savefig", "save_file", "rename", "pwrite", "savez", "flock"}
WRITES |= {"TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "mkstemp", "mkdtemp"}
SHOWS = {"writer", "DictWriter", "reader"}

PARTIAL = "into a path of `outputs`, which becomes the file when it is whole"
OWN = "a file of this package or of the system"
OPENED = "after `inputs` has looked at it, for a library that opens it itself"
LINES = "adds lines to a file of a run, in a working directory that is locked"
MAY = {
    ("data/bad_records.py", "open"): LINES,
    ("data/imagenet.py", "read_text"): OWN,
    ("data/writer.py", "open"): "the lock, and files in a folder that gets its name when whole",
    ("data/writer.py", "rename"): "gives that folder its name",
    ("data/writer.py", "write_text"): "into that folder",
    ("commands/evaluate.py", "open"): PARTIAL,
    ("commands/evaluate.py", "write_text"): PARTIAL,
    ("commands/export.py", "write_bytes"): PARTIAL,
    ("inference/feature_file.py", "File"): OPENED,
    ("inference/feature_file.py", "mmap"): OPENED,
    ("inference/feature_file.py", "open"): OPENED,
    ("inference/feature_file.py", "open_memmap"): OPENED,
    (
        "inference/feature_file.py",
        "pwrite",
    ): "rows of a file that is locked, each counted once it is there",
    ("commands/hub.py", "TemporaryDirectory"): "what is uploaded",
    ("commands/hub.py", "write_text"): PARTIAL,
    ("checkpoint/manifest.py", "write_text"): "into a checkpoint that gets its name when whole",
    ("commands/lpips.py", "open"): PARTIAL,
    ("ops/onednn.py", "TemporaryDirectory"): "where a process of our own works",
    ("ops/onednn.py", "read_text"): OWN,
    ("ops/onednn.py", "write_text"): PARTIAL,
    ("utils/plotting.py", "savefig"): PARTIAL,
    ("commands/predict.py", "open"): PARTIAL,
    ("training/setup.py", "loads"): "what another process of the run says",
    ("utils/process.py", "open"): OWN,
    ("training/logger.py", "open"): LINES,
    ("training/logger.py", "pwrite"): LINES,
    ("training/logger.py", "write_bytes"): PARTIAL,
    ("training/logger.py", "write_text"): PARTIAL,
    ("weights/archives.py", "ZipFile"): OPENED,
    ("weights/headers.py", "safe_open"): OPENED,
    ("weights/safetensors_files.py", "save_file"): PARTIAL,
    ("weights/torch_files.py", "save_file"): PARTIAL,
    ("training/run_directory.py", "TemporaryFile"): "asks whether a folder can be written to",
    ("training/run_directory.py", "open"): "the lock",
    ("training/run_directory.py", "write_text"): PARTIAL,
    ("checkpoint/manager.py", "TemporaryFile"): "asks whether a folder can be written to",
    ("checkpoint/manager.py", "rename"): "moves a damaged checkpoint aside",
    ("config/schema.py", "loads"): "what `json.dumps` has just written",
}


def calls():
    """(file, name of what is called) for every call above outside the three modules."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if str(path.relative_to(PACKAGE)) in HOMES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = getattr(function, "attr", getattr(function, "id", ""))
                owner = ast.unparse(function).rpartition(".")[0]
                opens = name == "open" and (owner in ("", "os") or opens_a_path(node))
                if opens or (name in READS | WRITES | SHOWS and not imported(path, name)):
                    found.add((str(path.relative_to(PACKAGE)), name))
    return found


def opens_a_path(node):
    """Whether a call of some object's `open` has a mode, as that of a path has."""
    modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
    return any(isinstance(mode, str) and mode.strip("rwabx+t") == "" for mode in modes)


def imported(path, name):
    """Whether a module has a name from `inputs`, `outputs` or `text`."""
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module in MODULES
        and name in {alias.name for alias in node.names}
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_files_are_opened_written_and_shown_in_one_place_each():
    found = calls()
    assert sorted(found - MAY.keys()) == [], "go through inputs, outputs or text, or say why not"
    assert sorted(MAY.keys() - found) == [], "these are no longer there"


def test_every_module_has_the_test_file_of_its_name():
    for module in PACKAGE.rglob("*.py"):
        folder = module.relative_to(PACKAGE).parent
        if folder.name and module.stem != "__init__":
            assert (ROOT / "tests" / folder / f"test_{module.name}").is_file(), module


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *ROOT.glob("docs/*.md")],
    ids=lambda page: Path(page).name,
)
def test_tests_that_pages_name_exist(page):
    for name in re.findall(r"[\w/]*\btest_\w+\.py", (ROOT / page).read_text()):
        assert (ROOT / "tests" / name.removeprefix("tests/")).is_file(), name


def names_of(tree):
    """All names that a module defines: modules, functions, classes, arguments, variables."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def test_names_are_the_fields_words():
    rows = re.findall(r"(?m)^\| .* \| .* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text())
    words = {word for row in rows for word in row.split(", ")} - {"not", "rate", "speed", ""}
    assert {"picture", "net", "need"} <= words
    # A learning rate has that name; a throughput has not, which no test can tell.
    alone = {"said", "found", "made", "given", "held"}
    for path in PACKAGE.rglob("*.py"):
        for name in {path.stem, *names_of(ast.parse(path.read_text()))}:
            parts = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_").split("_")
            singular = {part.removesuffix("s") for part in parts}
            if path.name != "caffe_files.py":  # a `net` is what Caffe calls it
                assert name == "AlexNet" or not words & singular, (path, name)
            assert name.strip("_") not in alone, (path, name)
