"""Folders of class folders: classes, splits, and what is no image."""

import os
from pathlib import Path

import pytest

from flax_alexnet.data.dataset import (
    open_examples,
)
from flax_alexnet.data.examples import open_split
from flax_alexnet.data.folders import list_image_files, natural
from flax_alexnet.data.sources import FolderSource, open_dataset
from flax_alexnet.utils.errors import UserError
from tests.images import encoded, make_folder, random_image


class TestFolders:
    def test_every_tenth_image_is_held_out(self, tmp_path):
        dataset = open_dataset(f"folder:{make_folder(tmp_path, {'cat': 23, 'dog': 17})}")
        assert dataset.label_names == ["cat", "dog"]
        names = [
            {source.read(index).name for index in range(len(source))}
            for source in (dataset.train, dataset.eval)
        ]
        assert [len(part) for part in names] == [36, 4]
        assert not names[0] & names[1]
        assert [dataset.eval.read(index).label for index in range(4)] == [0, 0, 1, 1]

    def test_train_and_test_folders_are_taken_as_they_are(self, tmp_path):
        make_folder(tmp_path / "train", {"cat": 3, "dog": 4})
        make_folder(tmp_path / "val", {"cat": 1, "dog": 2})
        dataset = open_dataset(f"folder:{tmp_path}")
        assert (len(dataset.train), len(dataset.eval)) == (7, 3)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: p.rmdir(), "no folder"),
            (lambda _: None, "0 class folders"),
            (lambda p: make_folder(p, {"cat": 20}), "1 class folders"),
            (lambda p: make_folder(p, {"cat": 4, "dog": 5}), "at least 10"),
            (lambda p: make_folder(p, {"cat": 20, "dog": 0}), "dog has no images"),
            (
                lambda p: make_folder(p, {"cat": 20, "dog": 20}) / "cat/007.png",
                r"cat/007\.png: it is empty",
            ),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, make, message):
        path = tmp_path / "images"
        path.mkdir()
        damaged = make(path)
        if damaged is not None and damaged.suffix:
            damaged.write_bytes(b"")
        with pytest.raises(UserError, match=message):
            open_examples(open_dataset(f"folder:{path}").train, 16)

    def test_what_is_no_image_by_its_first_bytes_is_set_aside(self, tmp_path):
        """In the order of the parts of their paths; hidden files are passed over."""
        make_folder(tmp_path, {"cat": 9, "dog": 9})
        names = ("a.jpg/b.png", "a.png", "named wrongly.txt", "none.jpg", "pipe.jpg", "empty.png")
        names += (os.fsdecode(b"\xff.png"),)
        (tmp_path / "cat" / "a.jpg").mkdir()
        for name in (*names[:3], names[6], ".hidden.png", "@eaDir/small.png"):
            (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "cat" / name).write_bytes(encoded(random_image(0)))
        (tmp_path / "cat" / ".hidden").mkdir()
        (tmp_path / "cat" / ".hidden" / "a.png").write_bytes(b"")
        (tmp_path / "cat" / "none.jpg").symlink_to("nowhere")
        (tmp_path / "cat" / "back").symlink_to(tmp_path)  # a link to a folder is passed over
        with (tmp_path / "cat" / "film.mp4").open("wb") as film:
            film.truncate(300_000_000)  # a hole in the file, which takes no room
        (tmp_path / "cat" / "empty.png").write_bytes(b"")
        os.mkfifo(tmp_path / "cat" / "pipe.jpg")
        strays = {"Thumbs.db": b"\xd0\xcf\x11\xe0" * 9, "labels.csv": b"x", "page.jpg": b"<html>"}
        strays |= {"car.txt": b"BMW of a sort, and blue", "snake.txt": b"Python, a snake"}
        for name, data in strays.items():
            (tmp_path / "cat" / name).write_bytes(data)
        images, others = list_image_files(tmp_path, ["cat", "dog"])
        files, _ = zip(*images, strict=True)
        assert files == tuple(map(str, sorted(map(Path, files))))
        found = {os.path.relpath(file, tmp_path / "cat") for file in files[:16]}
        assert found == {*names, *(f"{i:03}.png" for i in range(9))}
        assert {Path(other).name for other in others} == {*strays, "film.mp4"}

    def test_held_out_images_are_images(self, tmp_path):
        """With as many other files beside them; which ones are held out stays."""
        folder = make_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
        names = [open_dataset(f"folder:{folder}").eval.name(index) for index in range(4)]
        for path in list(folder.rglob("*.png")):
            path.with_suffix(".xml").write_text("<a/>")
        (folder / "__MACOSX" / "cat").mkdir(parents=True)
        dataset = open_dataset(f"folder:{folder}")
        assert [dataset.eval.name(index) for index in range(4)] == names
        assert dataset.note.startswith("40 files in the class folders are no images and are set")
        assert f"(40 .xml), such as {folder}/cat/000.xml" in dataset.note

    @pytest.mark.parametrize(
        ("train", "others"),
        [
            ("train", {"valid": "validation"}),
            ("Train", {"Val": "validation"}),
            ("TRAINING", {"Test": "test"}),
            ("training", {"testing": "test"}),
            ("training_set", {"test_set": "test"}),
            ("train", {"dev": "validation", "test": "test"}),
            ("train", {"validation": "validation", "Testing": "test"}),
        ],
    )
    def test_splits_by_the_names_in_use(self, tmp_path, train, others):
        make_folder(tmp_path / train, {"cat": 3, "dog": 4})
        (tmp_path / train / "labels.csv").write_text("0,cat")
        for count, name in enumerate(others, start=1):
            make_folder(tmp_path / name, {"cat": count, "dog": 2})
        dataset = open_dataset(f"folder:{tmp_path}")
        assert (len(dataset.train), len(dataset.eval)) == (7, 3)
        assert dataset.label_names == ["cat", "dog"]
        for count, pair in enumerate(others.items(), start=1):
            for name in pair:  # its own, and the standard one
                source, _ = open_split(f"folder:{tmp_path}", split=name)
                assert len(source) == count + 2
                assert str(tmp_path / next(iter(others)) / "cat") in source.name(0) or count > 1
        assert len(open_split(f"folder:{tmp_path}", split="train")[0]) == 7
        everything, _ = open_split(f"folder:{tmp_path}", split="all")
        assert len(everything) == 7 + sum(2 + count for count in range(1, len(others) + 1))
        assert {everything.read(index).label for index in range(len(everything))} == {0, 1}
        with pytest.raises(UserError, match="has no split 'train\\[:9\\]': choose train, "):
            open_dataset(f"folder:{tmp_path}", train_split="train[:9]")

    def test_one_split_alone(self, tmp_path):
        """Of train a tenth is held out; test is enough to evaluate on, but not to train."""
        make_folder(tmp_path / "a" / "Train", {"cat": 9, "dog": 11})
        dataset = open_dataset(f"folder:{tmp_path / 'a'}")
        assert (len(dataset.train), len(dataset.eval)) == (18, 2)
        assert not dataset.note
        make_folder(tmp_path / "a", {"test": 2})  # without labels
        dataset = open_dataset(f"folder:{tmp_path / 'a'}")
        assert (len(dataset.train), len(dataset.eval)) == (18, 2)
        assert dataset.note == f"{tmp_path}/a/test has no class folders and is not used"
        make_folder(tmp_path / "b" / "test", {"cat": 3, "dog": 4})
        assert len(open_split(f"folder:{tmp_path / 'b'}")[0]) == 7
        with pytest.raises(UserError, match="has no train split, only test: add a folder for it"):
            open_dataset(f"folder:{tmp_path / 'b'}")

    def test_a_class_may_be_called_train(self, tmp_path):
        make_folder(tmp_path, {"bus": 9, "train": 11})
        assert open_dataset(f"folder:{tmp_path}").label_names == ["bus", "train"]

    @pytest.mark.parametrize(
        ("folders", "message"),
        [
            (("my_train/cat", "my_train/dog", "my_val/cat", "my_val/dog"), "my_train holds fold"),
            (
                ("all/train/cat", "all/train/dog"),
                "all holds folders and no .* or take folder:.*all",
            ),
            (("train/train/cat", "train/train/dog"), "train/train holds folders"),
            (
                ("train/cat", "train/dog", "Training/cat", "Training/dog"),
                "both for the split train",
            ),
        ],
    )
    def test_folders_of_folders_are_no_classes(self, tmp_path, folders, message):
        for folder in folders:
            make_folder(tmp_path / folder, {"": 10})
        with pytest.raises(UserError, match=message):
            open_dataset(f"folder:{tmp_path}")

    def test_numbers_in_names_are_in_their_order(self, tmp_path):
        """Which images are held out does not depend on it, and a run keeps its own order."""
        assert natural(["a10", "a9", "b", "a", "a09"]) == ["a", "a09", "a9", "a10", "b"]
        folder = make_folder(tmp_path, {str(label): 10 for label in range(12)}, size=2)
        dataset = open_dataset(f"folder:{folder}")
        assert dataset.label_names == [str(label) for label in range(12)]
        of_run = open_dataset(f"folder:{folder}", label_order=sorted(dataset.label_names))
        assert of_run.label_names == sorted(dataset.label_names)
        for one, other in ((dataset.train, of_run.train), (dataset.eval, of_run.eval)):
            for index in range(len(one)):
                record, same = one.read(index), other.read(index)
                assert record.name == same.name
                assert Path(record.name).parent.name == dataset.label_names[record.label]
                assert Path(record.name).parent.name == of_run.label_names[same.label]
        other_classes = open_dataset(f"folder:{folder}", label_order=["cat", "dog"])
        assert other_classes.label_names == dataset.label_names

    @pytest.mark.parametrize(
        ("name", "why"),
        [("pipe.jpg", "it is no regular file"), ("none.jpg", "No such file or directory")],
    )
    def test_what_cannot_be_read_is_not_waited_for(self, tmp_path, name, why):
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "none.jpg").symlink_to("nowhere")
        source = FolderSource([(tmp_path / name, 0)], ("cat",))
        with pytest.raises(UserError, match=rf"cannot read .*{name}: {why}; remove or repair it"):
            open_examples(source, 32)

    def test_differing_classes_are_named(self, tmp_path):
        make_folder(tmp_path / "train", {"cat": 3, "dog": 4})
        make_folder(tmp_path / "test", {"cat": 1, "wolf": 2})
        with pytest.raises(UserError, match="same classes: dog, wolf"):
            open_dataset(f"folder:{tmp_path}")
