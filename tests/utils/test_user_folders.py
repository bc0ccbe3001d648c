"""A user whom the system does not know, as in a container started with a foreign number."""

from pathlib import Path

import jax
import pytest

from flax_alexnet.data.sources import default_data_dir
from flax_alexnet.train import main
from flax_alexnet.training.build import use_compilation_cache
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.user_folders import cache_folder, home


@pytest.fixture
def nobody(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_there_is_no_cache_and_a_line_says_so(capsys):
    before = jax.config.jax_compilation_cache_dir
    assert home() is None
    assert cache_folder() is None
    use_compilation_cache()
    assert capsys.readouterr().out.startswith(
        "this user has no home folder for a cache of compiled"
    )
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.usefixtures("nobody")
def test_without_a_home_a_folder_for_datasets_is_asked_for(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="this user has no home for datasets"):
        default_data_dir()
    assert main(["--workdir", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert default_data_dir() == tmp_path


def test_the_folders_of_a_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "flax_alexnet"
    assert default_data_dir() == tmp_path / "tensorflow_datasets"
    for given in (str(tmp_path / "cache"), "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == tmp_path / "cache" / "flax_alexnet"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() is None  # as in a home that is not there
