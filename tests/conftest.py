"""Strict numerics and eight CPU devices for every test, and the options and fixtures they share."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# JAX reads these once, when it is imported; processes that tests start inherit them.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
# Many tests compile the same small programs: all processes of a session share them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

from flax_alexnet.data import synthetic
from flax_alexnet.utils import plotting
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.pretrained import LPIPS_HEADS, Pretrained
from tests.foreign_files import CONVOLUTIONS
from tests.runs import arguments
from tests.small_models import make_pretrained

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what takes long, too")
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="a skipped test fails; for CI, where everything that a test may want is installed",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def _refuse_skip(config, report):
    # An expected failure is reported as skipped too, but it did run.
    if config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"--no-skips: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    return _refuse_skip(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    # A module that skips itself, as pytest.importorskip does, never gets as far as a test.
    return _refuse_skip(collector.config, (yield))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The pretrained weights and sample photographs that lie beside the project, if they do."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no sample data: {SHARED_DATA} does not exist")
    return SHARED_DATA


@pytest.fixture
def examples(monkeypatch):
    """For scripts that make the embedded dataset smaller: it is as before when the test ends."""
    for split, count in synthetic.EXAMPLES.items():
        monkeypatch.setitem(synthetic.EXAMPLES, split, count)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """The embedded dataset, but smaller: 64 images to train on, 20 to test."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic.EXAMPLES, "train", 64)
        patch.setitem(synthetic.EXAMPLES, "test", 20)
        synthetic.builder(folder).download_and_prepare()
    return folder


@pytest.fixture(scope="session")
def pretrained() -> Pretrained:
    """A torchvision model, a twentieth as wide, for 64 pixels and four classes."""
    return make_pretrained()


@pytest.fixture(scope="session")
def weights(pretrained, tmp_path_factory) -> Path:
    """Its file."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors_files.save(pretrained, path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder per class with three PNGs each, of colours that tell the classes apart."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("photographs")
    for label, letter in enumerate("abcd"):
        (folder / f"class {letter}").mkdir()
        for number in range(3):
            pixels = rng.integers(0, 256, (80, 90, 3)) // 2 + 32 * label
            path = folder / f"class {letter}" / f"{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A complete run, as a user makes it, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    code = (
        "import sys; from flax_alexnet.train import main; code = main(sys.argv[1:]); "
        "print('foreign:', sorted({'tensorflow', 'torch'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments(workdir, data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.fixture(scope="module")
def trunk():
    """Torchvision's convolution layers by its names, with random values."""
    rng = np.random.default_rng(0)
    return {
        f"{layer}.{name}": rng.standard_normal(sides, np.float32)
        for layer, shape in CONVOLUTIONS.items()
        for name, sides in (("weight", shape), ("bias", shape[:1]))
    }


@pytest.fixture
def no_torch(monkeypatch):
    """A machine without PyTorch."""

    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "torch":
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.fixture(scope="session")
def lpips_trunk(shared_data):
    """Torchvision's layers, the heads, and the three example images of the reference code."""
    with np.load(shared_data / "alexnet_owt" / "features_and_lpips.npz") as file:
        arrays = dict(file)
    params = unflatten_dict(
        {name: v for name, v in arrays.items() if name.startswith("conv")}, sep="/"
    )
    heads = {name: arrays[name] for name in LPIPS_HEADS}
    images = {name: shared_data / "alexnet_owt" / f"ex_{name}.png" for name in ("ref", "p0", "p1")}
    return params, heads, images


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in their order."""
    saved = []
    save = plotting._save
    monkeypatch.setattr(
        plotting, "_save", lambda figure, path: (saved.append(figure), save(figure, path))
    )
    return saved
