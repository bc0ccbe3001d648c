"""Datasets by name: those of a catalogue, and prepared ones."""

import io
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data.decode import decode
from flax_alexnet.data.examples import open_split
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.utils.errors import UserError
from tests.images import encoded, make_folder


class Catalogued(tfds.core.GeneratorBasedBuilder):
    """A dataset of TFDS in one of the forms of its catalogue, of 20 grey images a split."""

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


class TestPreparedDatasets:
    @pytest.fixture
    def data_dir(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        return tmp_path / "data"

    @pytest.mark.parametrize("damage", ["cut off", "empty", "missing"])
    @pytest.mark.parametrize("kind", ["dataset_info.json", "features.json", "*-train.*"])
    def test_damage_names_the_folder(self, data_dir, kind, damage):
        (path,) = data_dir.rglob(kind)
        contents = path.read_bytes()
        path.write_bytes(contents[: 100 if damage == "cut off" else 0])
        if damage == "missing":
            path.unlink()
        with pytest.raises(UserError, match=r"pets/1\.0\.0 is damaged \("):
            open_dataset("prepared_folder/pets", data_dir).train.read(0)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("prepared_folder/pets:2.0.0", "which has prepared_folder/pets:1.0.0; run"),
            ("prepared_folder/cars", "--data.name folder:PATH"),
            ("cifar10", "--data.name cifar10 "),
        ],
    )
    def test_what_is_not_there_is_named_with_what_is(self, data_dir, name, message):
        with pytest.raises(UserError, match="is not prepared in") as error:
            open_dataset(name, data_dir)
        assert message in str(error.value)

    @pytest.mark.parametrize("split", ["train[:0]", "train[50%:20%]"])
    def test_an_empty_split_is_refused(self, data_dir, split):
        with pytest.raises(UserError, match="is empty; choose another"):
            open_dataset("prepared_folder/pets", data_dir, split)
