"""Images for a trained model, as paths, folders and globs name them."""

import glob
import shutil
from pathlib import Path

import pytest

from flax_alexnet.data.decode import decode
from flax_alexnet.data.examples import find_images
from flax_alexnet.utils.errors import UserError
from tests.images import image_files


def test_photographs_are_brought_to_256(shared_data):
    for path in sorted((shared_data / "imagenet_samples").glob("*.JPEG"))[:5]:
        image = decode(path.read_bytes(), 256)
        assert image.shape == (256, 256, 3)
        assert image.std() > 10


def test_arguments_are_files_folders_and_globs(photographs):
    files = image_files(photographs)

    def found(*arguments):
        source = find_images(arguments)
        return [source.name(index) for index in range(len(source))]

    assert found(str(photographs)) == [str(file) for file in files]
    assert found(f"{photographs}/*/0.png", f"{photographs}/class a") == [
        *(str(file) for file in files if file.name == "0.png"),
        *(str(file) for file in files[1:3]),
    ]
    for wrong in ([], [f"{photographs}/*.jpg"], ["nothing"]):
        with pytest.raises(UserError, match="no images"):
            found(*wrong)
    odd = photographs.parent / "[odd].png"
    odd.write_bytes(files[0].read_bytes())
    assert found(str(odd)) == [str(odd)]


@pytest.mark.parametrize(
    "pattern", ["", "/**", "/**/*", "/**/*.png", "/*", "/**/**/*.png", "/*/**"]
)
def test_links_that_lead_back_are_not_followed_for_ever(
    photographs, tmp_path, monkeypatch, pattern
):
    folder = tmp_path / "images"
    shutil.copytree(photographs, folder)
    for inside in (folder, *folder.iterdir()):
        for number in range(3):  # 3 ** 40 ways
            (inside / f"a link {number}").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    expected = [str(path) for path in sorted(folder.glob("*/*.png"))]

    def found(pattern):
        paths = find_images([pattern, pattern]).paths
        return sorted(str(path) for path in paths if path.name != "loop")

    assert found(f"{folder}{pattern}") == expected
    monkeypatch.chdir(folder)
    relative = [path.removeprefix(f"{folder}/") for path in expected]
    assert found(pattern.removeprefix("/") or ".") == relative


def test_globs_name_what_they_always_did(photographs, tmp_path, monkeypatch):
    """Without links and hidden files, as Python's own."""
    folder = tmp_path / "a" / "[odd]"
    shutil.copytree(photographs, folder)
    shutil.copytree(photographs, folder / "class a" / "deeper")
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.png", "a/**/0.png", "*/*/*/*.png", "**/class */**/1.png", "**/deeper/**"):
        named = (Path(path) for path in glob.glob(pattern, recursive=True))
        assert set(find_images([pattern]).paths) == {path for path in named if path.is_file()}
