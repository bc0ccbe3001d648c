"""Sources, decoding, and the order in which pictures come."""

import io
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flax_alexnet.data.dataset import (
    CachedExamples,
    DecodedExamples,
    Examples,
    mean_image,
    open_examples,
)
from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.examples import open_split
from flax_alexnet.data.folders import list_pictures, natural
from flax_alexnet.data.loader import evaluation_batches, training_batches
from flax_alexnet.data.sources import FolderSource, open_dataset
from flax_alexnet.utils.errors import UserError


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed, height=20, width=20):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class Numbers(Examples):
    """Examples whose picture and label say their index."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, indices):
        labels = np.array(indices, np.int32)
        images = np.broadcast_to(labels[:, None, None, None] % 251, (len(labels), 2, 2, 3))
        return {"image": images.astype(np.uint8), "label": labels, "mask": labels >= 0}


def labels(batches, count):
    return [batch["label"].tolist() for batch in itertools.islice(batches, count)]


def joined(rows):
    return list(itertools.chain.from_iterable(rows))


class TestOrder:
    def test_every_epoch_is_a_permutation_and_each_is_another(self):
        stream = joined(labels(training_batches(Numbers(30), 8, seed=1), 15))  # 120: 4 epochs
        epochs = [stream[i : i + 30] for i in range(0, 120, 30)]
        assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert epochs[0] != list(range(30))

    def test_it_follows_from_seed_and_step_alone(self):
        whole = labels(training_batches(Numbers(30), 8, seed=1), 15)
        assert whole == labels(training_batches(Numbers(30), 8, seed=1, threads=7), 15)
        for step in (1, 4, 11):
            resumed = training_batches(Numbers(30), 8, seed=1, start=8 * step)
            assert labels(resumed, 15 - step) == whole[step:]
        assert whole != labels(training_batches(Numbers(30), 8, seed=2), 15)

    def test_batches_of_another_size_go_on_with_the_next_picture(self):
        stream = joined(labels(training_batches(Numbers(30), 8, seed=1), 15))
        for start in (5, 40):
            resumed = labels(training_batches(Numbers(30), 20, seed=1, start=start), 4)
            assert joined(resumed) == stream[start : start + 80]

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_read_blocks_of_the_same_batches(self, processes):
        whole = labels(training_batches(Numbers(30), 8, seed=1), 10)
        parts = [
            labels(
                training_batches(Numbers(30), 8, seed=1, rows=block),
                10,
            )
            for block in np.split(np.arange(8), processes)
        ]
        assert [joined(rows) for rows in zip(*parts, strict=True)] == whole

    @pytest.mark.parametrize("processes", [1, 2])
    def test_evaluation_gives_each_picture_once(self, processes):
        seen = []
        for block in np.split(np.arange(8), processes):
            for batch in evaluation_batches(Numbers(21), 8, rows=block):
                assert batch["image"].shape == (8 // processes, 2, 2, 3)
                seen += batch["label"][batch["mask"]].tolist()
        assert sorted(seen) == list(range(21))


class TestDecoding:
    def test_a_square_of_the_right_size_keeps_its_pixels(self):
        image = picture(0)
        np.testing.assert_array_equal(decode(encoded(image), 20), image)

    @pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (31, 33)])
    def test_the_shorter_side_is_scaled_and_the_centre_kept(self, height, width):
        """A picture whose colours say where they were: bands along both axes."""
        rows, columns = np.mgrid[:height, :width]
        image = np.stack([rows * 2, columns * 2, rows * 0], -1).astype(np.uint8)
        small = decode(encoded(image), 16).astype(float)
        assert small.shape == (16, 16, 3)
        short = min(height, width)
        centres = (np.arange(16) + 0.5) * short / 16 - 0.5
        inner = slice(2, -2)  # the filter reaches over the edge at the outermost pixels
        expected_rows = 2 * ((height - short) / 2 + centres)
        expected_columns = 2 * ((width - short) / 2 + centres)
        assert np.abs(small[..., 0].mean(1) - expected_rows)[inner].max() < 1
        assert np.abs(small[..., 1].mean(0) - expected_columns)[inner].max() < 1

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "I;16"])
    def test_other_colour_modes_become_rgb(self, mode):
        if mode == "I;16":
            image = Image.fromarray(picture(0)[..., 0].astype(np.uint16) * 256)
        else:
            image = Image.fromarray(picture(0)).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "jpeg" if mode in ("L", "CMYK") else "png")
        assert decode(buffer.getvalue(), 20).shape == (20, 20, 3)

    @pytest.mark.parametrize("kind", ["jpeg", "png"])
    def test_damage_is_an_error(self, kind):
        whole = encoded(picture(0, 64, 64), kind)
        for data in (b"", b"not a picture", whole[:100], whole[: len(whole) // 2]):
            with pytest.raises(DecodeError):
                decode(data, 16)

    @pytest.mark.parametrize("kind", ["jpeg", "png"])
    def test_a_picture_without_measure_is_refused_before_it_is_decoded(self, kind, monkeypatch):
        data = encoded(picture(0, 200, 300), kind)
        monkeypatch.setattr("flax_alexnet.data.decode.LARGEST_PICTURE", 200 * 300 - 1)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", (200 * 300 - 1) // 2)
        with pytest.raises(DecodeError, match=r"60,?000 pixels"):
            decode(data, 20)


class TestExamples:
    @pytest.fixture
    def dataset(self, tmp_path):
        return open_dataset(f"folder:{make_folder(tmp_path, {'a': 12, 'b': 18})}")

    def test_cached_and_decoded_agree(self, dataset):
        cached, decoded = CachedExamples(dataset.train, 9), DecodedExamples(dataset.train, 9)
        assert len(cached) == len(decoded) == 27
        for name, values in cached.take(range(27)).items():
            np.testing.assert_array_equal(values, decoded.take(range(27))[name])
        np.testing.assert_array_equal(mean_image(cached), mean_image(decoded))
        np.testing.assert_allclose(
            mean_image(cached),
            cached.take(range(len(cached)))["image"].mean(0),
            rtol=1e-5,
        )

    def test_large_sets_are_tried_and_not_cached(self, dataset, tmp_path, monkeypatch):
        assert isinstance(open_examples(dataset.train, 9), CachedExamples)
        monkeypatch.setattr("flax_alexnet.data.dataset.CACHE_BYTES", 1000)
        assert isinstance(open_examples(dataset.train, 9), DecodedExamples)
        (tmp_path / "a" / "003.png").write_bytes(b"damaged")
        with pytest.raises(UserError, match=r"cannot read picture .*003\.png"):
            open_examples(dataset.train, 9)


def make_folder(path, classes, size=20):
    """A folder of class folders with so many pictures each."""
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for index in range(count):
            data = encoded(picture(index, size, size + 3))
            (path / name / f"{index:03}.png").write_bytes(data)
    return path


class TestFolders:
    def test_every_tenth_picture_is_held_out(self, tmp_path):
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
            (lambda p: make_folder(p, {"cat": 20, "dog": 0}), "dog has no pictures"),
            (
                lambda p: make_folder(p, {"cat": 20, "dog": 20}) / "cat/007.png",
                r"cat/007\.png: it is empty",
            ),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, make, message):
        path = tmp_path / "pictures"
        path.mkdir()
        damaged = make(path)
        if damaged is not None and damaged.suffix:
            damaged.write_bytes(b"")
        with pytest.raises(UserError, match=message):
            open_examples(open_dataset(f"folder:{path}").train, 16)

    def test_what_is_no_picture_by_its_first_bytes_is_set_aside(self, tmp_path):
        """In the order of the parts of their paths; hidden files are passed over."""
        make_folder(tmp_path, {"cat": 9, "dog": 9})
        names = ("a.jpg/b.png", "a.png", "named wrongly.txt", "none.jpg", "pipe.jpg", "empty.png")
        names += (os.fsdecode(b"\xff.png"),)
        (tmp_path / "cat" / "a.jpg").mkdir()
        for name in (*names[:3], names[6], ".hidden.png", "@eaDir/small.png"):
            (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "cat" / name).write_bytes(encoded(picture(0)))
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
        pictures, others = list_pictures(tmp_path, ["cat", "dog"])
        files, _ = zip(*pictures, strict=True)
        assert files == tuple(map(str, sorted(map(Path, files))))
        found = {os.path.relpath(file, tmp_path / "cat") for file in files[:16]}
        assert found == {*names, *(f"{i:03}.png" for i in range(9))}
        assert {Path(other).name for other in others} == {*strays, "film.mp4"}

    def test_held_out_pictures_are_pictures(self, tmp_path):
        """With as many other files beside them; which ones are held out stays."""
        folder = make_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
        names = [open_dataset(f"folder:{folder}").eval.name(index) for index in range(4)]
        for path in list(folder.rglob("*.png")):
            path.with_suffix(".xml").write_text("<a/>")
        (folder / "__MACOSX" / "cat").mkdir(parents=True)
        dataset = open_dataset(f"folder:{folder}")
        assert [dataset.eval.name(index) for index in range(4)] == names
        assert dataset.note.startswith("40 files in the class folders are no pictures and are set")
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
        """Which pictures are held out does not depend on it, and a run keeps its own order."""
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


class Catalogued(tfds.core.GeneratorBasedBuilder):
    """A dataset of TFDS in one of the forms of its catalogue, of 20 grey pictures a split."""

    VERSION = tfds.core.Version("1.0.0")
    name = "catalogued"
    splits: tuple[str, ...] = ("train",)
    keys: tuple[str, ...] | None = None
    image, label = "image", "label"

    def _info(self):
        features = {
            self.image: tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "id": tfds.features.Text(),
            self.label: tfds.features.ClassLabel(names=["a", "b"]),
            "coarse": tfds.features.ClassLabel(names=["x", "y", "z"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=self.keys
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples() for split in self.splits}

    def _generate_examples(self):
        for index in range(20):
            # A file: arrays would be encoded by TensorFlow.
            grey = io.BytesIO(encoded(np.full((8, 8), index, np.uint8)))
            yield (
                index,
                {self.image: grey, "id": "x", self.label: index % 2, "coarse": index % 3},
            )


class TestCatalogue:
    """Datasets of TFDS in the forms of its catalogue."""

    @pytest.fixture
    def make(self, tmp_path, monkeypatch):
        def make(**values):
            for name, value in values.items():
                monkeypatch.setattr(Catalogued, name, value)
            builder = Catalogued(data_dir=str(tmp_path), file_format="array_record")
            builder.download_and_prepare()
            return tmp_path

        return make

    @pytest.mark.parametrize("split", ["test", "validation"])
    def test_one_split_is_enough_to_evaluate_on(self, make, split):
        data_dir = make(splits=(split,), keys=("image", "label"))
        source, note = open_split("catalogued", data_dir)
        assert (len(source), note, source.label_names) == (20, "", ["a", "b"])
        parts = f"--data.train-split '{split}[:90%]' --data.eval-split '{split}[90%:]'"
        with pytest.raises(UserError, match=re.escape(f"no train split, only {split}: ")) as error:
            open_dataset("catalogued", data_dir)
        assert parts in str(error.value)
        dataset = open_dataset("catalogued", data_dir, f"{split}[:90%]", f"{split}[90%:]")
        assert (len(dataset.train), len(dataset.eval)) == (18, 2)

    def test_train_alone_is_evaluated_on_by_name(self, make):
        data_dir = make()
        with pytest.raises(UserError, match=r"only train: choose with --data\.split"):
            open_split("catalogued", data_dir)
        assert len(open_split("catalogued", data_dir, "train[50%:]")[0]) == 10
        with pytest.raises(UserError, match=r"only train: split one, such as --data\.train-split"):
            open_dataset("catalogued", data_dir)

    @pytest.mark.parametrize("keys", [None, ("image", "label"), ("image", "label", "coarse")])
    def test_what_is_supervised_or_called_so_is_taken(self, make, keys):
        source, _ = open_split("catalogued", make(keys=keys), "train")
        records = [source.read(index) for index in range(20)]
        greys = [int(decode(record.image, 8)[0, 0, 0]) for record in records]
        assert [record.label for record in records] == [grey % 2 for grey in greys]
        assert sorted(greys) == list(range(20))

    def test_any_features_can_be_named(self, make):
        data_dir = make(image="photo", label="kind")
        with pytest.raises(UserError, match=r"has no image \(Image\) .* photo \(Image\)") as error:
            open_split("catalogued", data_dir, "train")
        assert "name others with --data.image-key and --data.label-key" in str(error.value)
        source, _ = open_split("catalogued", data_dir, "train", "photo", "coarse")
        assert source.label_names == ["x", "y", "z"]
        record = source.read(0)
        assert record.label == int(decode(record.image, 8)[0, 0, 0]) % 3


def test_cifar10_as_tfds_prepared_it(shared_data):
    dataset = open_dataset("cifar10", shared_data / "tfds")
    assert (len(dataset.train), len(dataset.eval)) == (50_000, 10_000)
    assert list(dataset.label_names[:3]) == ["airplane", "automobile", "bird"]
    record = dataset.train.read(17)
    assert decode(record.image, 32).shape == (32, 32, 3)
    assert record.name == "train[17]"


def test_photographs_are_brought_to_256(shared_data):
    for path in sorted((shared_data / "imagenet_samples").glob("*.JPEG"))[:5]:
        image = decode(path.read_bytes(), 256)
        assert image.shape == (256, 256, 3)
        assert image.std() > 10
