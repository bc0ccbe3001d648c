"""What is checked before anything is compiled: each mistake is one line."""

import os
import subprocess
import sys

import pytest

from tests.runs import arguments, refused


class TestMistakes:
    def test_a_batch_that_does_not_divide(self, data_dir, tmp_path, capsys):
        said = refused(capsys, arguments(tmp_path, data_dir, "--batch-size", "12"))
        assert "--batch-size 12 is not a multiple of the number of devices, 8" in said

    def test_an_image_that_does_not_fit(self, data_dir, tmp_path, capsys):
        said = refused(capsys, arguments(tmp_path, data_dir, "--augment.crop-size", "8"))
        assert "--augment.crop-size 8: an image of 8×8 does not fit: pool2 is left with" in said

    def test_a_dataset_that_is_not_prepared(self, tmp_path, capsys):
        said = refused(capsys, arguments(tmp_path, tmp_path, "--data.name", "cifar10"))
        assert f"flax_alexnet prepare --data.name cifar10 --data.data-dir {tmp_path}" in said

    def test_an_unknown_dataset(self, tmp_path, capsys):
        said = refused(capsys, arguments(tmp_path, tmp_path, "--data.name", "imagenet2013"))
        assert "unknown dataset 'imagenet2013': did you mean 'imagenet2012'?" in said

    def test_an_unknown_split(self, data_dir, tmp_path, capsys):
        said = refused(capsys, arguments(tmp_path, data_dir, "--data.eval-split", "tset"))
        assert "has no split 'tset'" in said

    def test_too_few_outputs(self, data_dir, tmp_path, capsys):
        said = refused(capsys, arguments(tmp_path, data_dir, "--model.num-classes", "3"))
        assert "shapes_and_textures has 10 classes" in said

    def test_a_directory_of_another_configuration(self, finished, data_dir, capsys):
        said = refused(capsys, arguments(finished[0], data_dir, "--seed", "7"))
        assert "(seed was 0, is now 7)" in said
        assert "--allow-changes" in said

    def test_changes_that_do_not_fit_the_checkpoint(self, finished, data_dir, capsys):
        before = (finished[0] / "config.json").read_text()
        argv = arguments(finished[0], data_dir, "--model.width", "0.06", "--allow-changes")
        assert "conv1/bias was (5,), is now (6,)" in refused(capsys, argv)
        assert (finished[0] / "config.json").read_text() == before

    def test_other_data_is_another_run(self, finished, data_dir, capsys):
        said = refused(capsys, arguments(finished[0], data_dir, "--data.train-split", "train[:60]"))
        assert "dataset.train was 64, is now 60" in said

    @pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
    def test_a_directory_with_something_else_in_a_place_of_ours(
        self, data_dir, tmp_path, capsys, name
    ):
        os.mkfifo(tmp_path / name)
        said = refused(capsys, arguments(tmp_path, data_dir))
        assert f"{tmp_path / name} is not what a run left there" in said

    def test_a_damaged_checkpoint(self, data_dir, tmp_path, capsys):
        (tmp_path / "checkpoints" / "2" / "default").mkdir(parents=True)
        (tmp_path / "checkpoints" / "2" / "default" / "x").write_text("")
        said = refused(capsys, arguments(tmp_path, data_dir))
        assert "no checkpoint in" in said
        assert "checkpoints is whole (2: it has no 2.sha256)" in said

    def test_no_device(self, data_dir, tmp_path):
        command = [sys.executable, "-m", "flax_alexnet.train", *arguments(tmp_path, data_dir)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"JAX_PLATFORMS": "abacus"},
        )
        assert done.returncode == 2
        # Packages that are older than others may have warned before.
        assert done.stderr.splitlines()[-1].startswith("error: JAX finds no device")

    def test_a_directory_that_cannot_be_written(self, data_dir, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        said = refused(capsys, arguments(tmp_path / "file" / "runs", data_dir))
        assert "cannot write to" in said

    def test_a_disk_without_room(self, data_dir, tmp_path, capsys, monkeypatch):
        usage = type("usage", (), {"free": 10_000})
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        assert "needed: make room" in refused(capsys, arguments(tmp_path, data_dir))
