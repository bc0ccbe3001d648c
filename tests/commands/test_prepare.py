"""`prepare`: every image has an outcome, and what was interrupted goes on."""

import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_alexnet.commands.prepare import main as prepare_main
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data import synthetic
from flax_alexnet.data.decode import decode
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.utils.errors import UserError
from tests.datasets import contents, outcomes, stored
from tests.images import encoded, make_folder, random_image


class TestPrepare:
    def test_a_folder_becomes_squares_that_train_reads(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13}, size=40)
        said = prepare(f"folder:{folder}", tmp_path / "data", image_size=16).splitlines()
        written = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"
        size = sum(path.stat().st_size for path in written.glob("*.array_record-*"))
        beginning = f"prepared_folder/pets: 23 train, 2 test images in {written}, "
        rate = re.fullmatch(rf"{re.escape(beginning)}{size / 1e6:,.1f} MB, (\S+) images/s", said[0])
        assert int(rate[1].replace(",", "")) > 0
        assert said[1:] == [
            "25 of 25 images read",
            f"what became of each: {written}/outcomes.csv",
        ]
        dataset = open_dataset("prepared_folder/pets", tmp_path / "data")
        assert dataset.label_names == ["cat", "dog"]
        assert (len(dataset.train), len(dataset.eval)) == (23, 2)
        assert not list(tmp_path.rglob("*.incomplete"))

    def test_records_hold_the_images_of_their_names(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13}, size=40)
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        dataset = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"
        records = stored(dataset, "train") + stored(dataset, "test")
        names = [record["name"].decode() for record in records]
        assert sorted(names) == sorted(map(str, folder.rglob("*.png")))
        for name, record in zip(names, records, strict=True):
            assert record["label"] == ["cat", "dog"].index(Path(name).parent.name)
            with Image.open(io.BytesIO(record["image"])) as image:
                assert (image.format, image.size) == ("JPEG", (16, 16))
                expected = decode(Path(name).read_bytes(), 16).astype(int)
                assert np.abs(np.asarray(image) - expected).mean() < 40  # noise, and lossy

    def test_any_part_of_a_split_has_all_classes(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 40, "dog": 40})
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        for part in ("train[:30%]", "train[70%:]"):
            pets = open_dataset("prepared_folder/pets", tmp_path / "data", part).train
            assert {pets.read(index).label for index in range(len(pets))} == {0, 1}

    def test_the_embedded_dataset_is_rendered_the_same_each_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 40, "test": 20})
        assert prepare_main(["--data.data-dir", str(tmp_path)]) == 0
        dataset = open_dataset(synthetic.NAME, tmp_path)
        assert tuple(dataset.label_names) == synthetic.CLASSES
        assert (len(dataset.train), len(dataset.eval)) == (40, 20)
        counts = np.bincount([dataset.train.read(index).label for index in range(40)])
        assert counts.tolist() == [4] * 10
        np.testing.assert_array_equal(synthetic.render("train", 7), synthetic.render("train", 7))
        assert (synthetic.render("train", 7) != synthetic.render("test", 7)).any()

    def test_processes_that_prepare_at_the_same_time_all_find_it(self, tmp_path):
        code = (
            "import sys; from pathlib import Path; from flax_alexnet.data import synthetic; "
            "from flax_alexnet.data.sources import open_dataset; "
            "synthetic.EXAMPLES.update(train=40, test=20); "
            "print(len(open_dataset(synthetic.NAME, Path(sys.argv[1])).train))"
        )
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        assert [process.communicate()[0].split()[-1] for process in started] == ["40"] * 3

    def test_a_dataset_among_its_own_images_is_refused(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "pets", {"cat": 10, "dog": 10})
        for place in (folder, folder / "prepared"):
            flags = ["--data.name", f"folder:{folder}", "--data.data-dir", str(place)]
            assert prepare_main(flags) == 2
            assert "take a folder beside it" in capsys.readouterr().err
        assert sorted(os.listdir(folder)) == ["cat", "dog"]

    def test_mistakes_are_one_line(self, tmp_path, capsys):
        for argv, message in (
            (["--data.name", "cifar1O"], "unknown dataset 'cifar1O': did you mean 'cifar10'?"),
            (["--data.nam", "x"], "unknown flag --data.nam: did you mean --data.name?"),
            (["--data.name", f"folder:{tmp_path}/none"], "no folder"),
            (["--data.name", str(tmp_path)], f"did you mean folder:{tmp_path}?"),
            (["--data.name", ""], "choose one of: shapes_and_textures (or folder:PATH"),
            (["--data.name", "cifar10:9.9.9"], "only: 3.0.2"),
            (["--data.name", "imagenet2012"], "You need to register on https://image-net.org"),
            (["--data.name", "folder:"], "expected folder:PATH"),
            (["--data.image-size", "0"], "expected 1 to 8192"),
            (["--name", "x"], "--name is x; expected no value: it is for folders"),
            (["--data.name", "folder:x", "--name", "a/b"], "expected letters of ASCII, digits"),
        ):
            assert prepare_main([*argv, "--data.data-dir", str(tmp_path / "data")]) == 2
            said = capsys.readouterr().err
            assert message in said
            assert said.count("\n") == 1

    def test_a_folder_is_not_prepared_over_an_older_one(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        with pytest.raises(UserError, match=r"pets/1\.0\.0 exists already; remove it"):
            prepare(f"folder:{folder}", tmp_path / "data", image_size=16)


class TestOutcomes:
    def test_every_image_has_one_and_none_stops_the_others(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
        whole = encoded(random_image(1, 40, 50))
        expected = {
            "cut.png": (whole[:1000], "image file is truncated"),
            "empty.png": (b"", "it is empty"),
            "notes.txt": (b"Buy a cat.", "it is no image in a known format"),
            "named wrongly.txt": (whole, "ok"),
            os.fsdecode(b"caf\xe9.png"): (whole, "ok"),
            "x.jpg/inside.png": (whole, "ok"),
        }
        (folder / "cat" / "x.jpg").mkdir()
        for name, (data, _) in expected.items():
            (folder / "cat" / name).write_bytes(data)
        os.mkfifo(folder / "cat" / "pipe.png")
        (folder / "cat" / "link").symlink_to("nowhere")
        (folder / "cat" / "all dogs").symlink_to("../dog")
        with (folder / "cat" / "huge.png").open("wb") as file:
            file.truncate(10**12)
        flags = ["--data.image-size", "16", "--data.data-dir", str(tmp_path / "data")]
        assert prepare_main(["--data.name", f"folder:{folder}", *flags]) == 0
        dataset = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"
        found = {name.split("/pets/")[1]: why for (_, name), why in outcomes(dataset).items()}
        assert len(found) == 50
        for name, (_, outcome) in expected.items():
            name = name.replace(os.fsdecode(b"\xe9"), r"\xe9")
            assert found.pop(f"cat/{name}").startswith(outcome)
        assert found.pop("cat/pipe.png") == "it is no regular file"
        assert found.pop("cat/huge.png") == "it is no image in a known format"  # but zeros
        assert found.pop("cat/all dogs") == "it is a link to a folder"
        assert found.pop("cat/link") == "No such file or directory"
        assert set(found.values()) == {"ok"}
        pets = open_dataset("prepared_folder/pets", tmp_path / "data")
        assert len(pets.train) + len(pets.eval) == 43
        said = capsys.readouterr().out
        assert "43 of 47 images read; 4 not:" in said
        assert "\n2 other files: it is no image in a known format, such as" in said
        assert f"{folder}/cat/empty.png: it is empty" in said

    @pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
    def test_what_is_in_no_split_is_named(self, tmp_path, splits):
        """What is hidden, or beside the class folders or the splits."""
        folder = tmp_path / "pets"
        folder.mkdir()
        for split in splits:
            make_folder(tmp_path / "elsewhere" / split, {"cat": 12, "dog": 13})
        for link in (tmp_path / "elsewhere").iterdir():  # what is read may be links
            (folder / link.name).symlink_to(link)
        reasons = {
            "README.txt": "it is in no class folder that is read",
            ".DS_Store": "it is hidden",
            ".thumbnails/cat/000.png": "it is hidden",
            f"{splits[-1]}cat/.000.png": "it is hidden",
            f"{splits[-1]}loose.png": "it is in no class folder that is read",
        }
        if len(splits) > 1:
            reasons["more/cat/000.png"] = "it is in no class folder that is read"
            (folder / "loop").symlink_to(".")
            reasons["loop"] = "it is a link to a folder"
        for name in reasons.keys() - {"loop"}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        said = prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        table = outcomes(tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0")
        assert list(table.values()).count("ok") == 25 * len(splits)
        left_out = {name: why for (split, name), why in table.items() if not split}
        assert left_out == {f"{folder}/{name}": why for name, why in reasons.items()}
        assert len(table) == 25 * len(splits) + len(reasons)
        for why, count in Counter(reasons.values()).items():
            first = min(name for name, other in left_out.items() if other == why)
            assert f"\n{count} other files: {why}, such as {first}\n" in said

    def test_all_splits_of_a_folder_are_kept(self, tmp_path):
        for count, split in enumerate(("Train", "valid", "test"), start=1):
            make_folder(tmp_path / "pets" / split, {"cat": count, "dog": 2})
        prepare(f"folder:{tmp_path}/pets", tmp_path / "data", image_size=16)
        for count, split in enumerate(("train", "validation", "test"), start=1):
            pets = open_dataset("prepared_folder/pets", tmp_path / "data", split).train
            assert len(pets) == count + 2
        assert len(open_dataset("prepared_folder/pets", tmp_path / "data").eval) == 4

    @pytest.mark.parametrize(
        ("folder", "name"),
        [
            ("Bilder-2024 neu", "Bilder_2024_neu"),
            ("chien d'été", "chien_d_ete"),
            ("_pets", "_pets"),
            ("猫", "folder_a810bf84"),
        ],
    )
    def test_a_folder_of_any_name_is_prepared(self, tmp_path, folder, name, capsys):
        path = make_folder(tmp_path / folder, {"it's": 12, "$x_1$ 猫": 13})
        flags = ["--data.name", f"folder:{path}", "--data.data-dir", str(tmp_path / "data")]
        assert prepare_main(flags) == 0
        said = f"{path} is prepared as prepared_folder/{name}"
        assert (said in capsys.readouterr().out) == (folder != name)
        dataset = open_dataset(f"prepared_folder/{name}", tmp_path / "data")
        assert dataset.label_names == ["$x_1$ 猫", "it's"]
        assert prepare_main(flags) == 2
        assert "take another --name or --data.data-dir" in capsys.readouterr().err
        assert prepare_main([*flags, "--name", "mine"]) == 0
        assert len(open_dataset("prepared_folder/mine", tmp_path / "data").train) == 23

    def test_a_split_without_an_image_is_a_mistake_that_can_be_mended(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})
        images = contents(folder)
        for name in images:
            (folder / name).write_bytes(b"")
        with pytest.raises(UserError, match=r"no image of the split 'train' .*: it is empty"):
            prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        for name, data in images.items():
            (folder / name).write_bytes(data)
        assert "25 of 25" in prepare(f"folder:{folder}", tmp_path / "data", image_size=16)

    def test_a_class_that_tfds_cannot_name_is_a_mistake(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat ": 12, "dog": 13})
        with pytest.raises(UserError, match=r"class folder 'cat ' has .* rename it"):
            prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
