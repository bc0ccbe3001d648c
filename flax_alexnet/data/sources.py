"""Where images come from: the embedded dataset, TFDS names, folders of class folders.

Each of these has `Splits`, and each split is a `Source`: it has a length, encoded images with their
labels by index, and label names.
"""

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError as DecodeProtoError
from tensorflow_datasets.proto import tf_example_pb2

from flax_alexnet.data import synthetic
from flax_alexnet.data.decode import read_file
from flax_alexnet.data.descriptions import (
    check_description,
    damaged,
    read_label_names,
    shards_of,
)
from flax_alexnet.data.digests import Digest, digest_files
from flax_alexnet.data.folders import (
    File,
    class_folders,
    describe_others,
    list_image_files,
    split_folders,
    standard_split,
    subfolders,
)
from flax_alexnet.utils.errors import UserError, first_line, unknown
from flax_alexnet.utils.outputs import alone
from flax_alexnet.utils.text import printable
from flax_alexnet.utils.user_folders import home

FOLDER = "folder:"
NO_LABEL = -1  # the label of an image whose class is not known
PREPARED_FOLDER = "prepared_folder"  # what TFDS calls folders once they are prepared
POLL = 0.2  # seconds between two checks whether another process has finished
END_OF_IMAGE = 2**12  # bytes that are compared at either end of an image file
END_OF_SHARD = 2**16  # the same for a shard; its last bytes say where each record is
# What TFDS raises for a prepared dataset whose description is damaged.
UNREADABLE = (ParseError, tfds.core.dataset_info.DatasetInfoFileError)
# What TFDS also raises for a description that is JSON, but has unexpected content.
MISREAD = (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError)


class Record(NamedTuple):
    """One encoded image, as it lies on the disk, or why it cannot be read."""

    image: bytes  # empty where there is a problem
    label: int
    name: str  # for messages: a path, or a split and an index
    problem: str = ""


class Records(Protocol):
    """Encoded images by index, any of which may turn out to be unreadable."""

    label_names: Sequence[str]

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def read(self, index: int, /) -> Record:
        """The image at `index`.

        Raises:
          DecodeError: the image cannot be read, and the message says why.
          UserError: the prepared dataset is damaged.
        """
        ...


class Source(Records, Protocol):
    """The interface of a split for the rest of the program."""

    prepared: bool  # whether every image was decoded once before, when it was prepared

    @property
    def paths(self) -> list[Path]:
        """The files that it reads."""
        ...

    def label(self, index: int, /) -> int:
        """The image's label, where that is known before it is read, else `NO_LABEL`."""
        ...

    def stamp(self, index: int, /) -> tuple[int, int]:
        """Size and modification time (ns) of the image's own file; 0, 0 if it has none."""
        ...

    def digest(self) -> Digest:
        """A digest of all images, which differs if some have changed or can no longer be read."""
        ...


class Dataset(NamedTuple):
    """A training and an evaluation source with the same label names."""

    name: str
    train: Source
    eval: Source
    label_names: Sequence[str]
    note: str = ""  # what the user should know of it, in lines


class Splits(Protocol):
    """The splits of a dataset, none of which is opened yet."""

    @property
    def names(self) -> Sequence[str]: ...

    def open(self, split: str, /) -> Source:
        """Opens a split by any name that the dataset accepts. Raises UserError for other names."""
        ...

    def note(self) -> str:
        """Lines that tell the user about the splits that were opened, or ""."""
        ...


def default_data_dir() -> Path:
    """Where TFDS keeps its datasets: `TFDS_DATA_DIR`, or `tensorflow_datasets` in the home.

    Raises:
      UserError: the variable is not set, and the user has no home, as in some containers.
    """
    if variable := os.environ.get("TFDS_DATA_DIR"):
        return Path(os.path.expanduser(variable))
    at_home = home()
    if at_home is None:
        raise UserError(
            "this user has no home for datasets: name a folder by --data.data-dir or TFDS_DATA_DIR"
        )
    return at_home / "tensorflow_datasets"


def open_dataset(
    name: str,
    data_dir: Path | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    label_order: Sequence[str] = (),
) -> Dataset:
    """The dataset called `name`, to be trained on; see `open_splits` for the arguments.

    Args:
      name: "shapes_and_textures", a TFDS name, or "folder:PATH".
      data_dir: where prepared datasets lie.
      train_split: a split of TFDS, or a slice such as "train[:90%]", or one of `FolderSplits`.
      eval_split: likewise; None is "validation" if there is one, else "test".
      image_key: the feature of TFDS with the images.
      label_key: the feature of TFDS with the labels.
      label_order: the order of the classes of a folder.

    Raises:
      UserError: the dataset or a split does not exist, is not prepared, has a form that cannot be
        read, or has no labels.
    """
    splits = open_splits(name, data_dir, image_key, label_key, label_order)
    held_out = eval_split or held_out_split(splits)
    no_train = train_split == "train" and "train" not in splits.names
    if no_train or held_out is None:
        first = (splits.names or ["train"])[0]
        raise UserError(
            f"dataset {name!r} has no {'train' if no_train else 'validation or test'} split, only "
            f"{', '.join(splits.names)}: "
            + (
                "add a folder for it"
                if name.startswith(FOLDER)
                else f"split one, such as --data.train-split '{first}[:90%]' --data.eval-split "
                f"'{first}[90%:]'"
            )
        )
    train, held_out_source = splits.open(train_split), splits.open(held_out)
    return Dataset(name, train, held_out_source, train.label_names, splits.note())


def held_out_split(splits: Splits) -> str | None:
    """The split that a run evaluates on and does not train on; None if there is none."""
    return next((split for split in ("validation", "test") if split in splits.names), None)


def open_splits(
    name: str,
    data_dir: Path | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    label_order: Sequence[str] = (),
) -> Splits:
    """The splits of the dataset called `name`; each of them is opened only on request.

    The embedded dataset is prepared here if it is not prepared yet; others must be prepared.

    Args:
      name: "shapes_and_textures", a TFDS name, or "folder:PATH"; a TFDS name may carry a
        configuration and a version, such as "cifar10:3.0.2".
      data_dir: where prepared datasets lie; None for `default_data_dir()`.
      image_key: the feature of TFDS with the images; None: the first of the supervised keys, or
        "image" if there are none.
      label_key: the feature of TFDS with the labels; None: the second of these keys, or "label".
      label_order: the classes of a folder in the order that a run has recorded.

    Raises:
      UserError: the dataset does not exist, is not prepared, or has a form that cannot be read.
    """
    if name.startswith(FOLDER):
        return FolderSplits(folder_of(name), label_order)
    data_dir = data_dir or default_data_dir()
    if name == synthetic.NAME:
        check_descriptions(name, data_dir)
        try:
            prepare_with_tfds(lambda: synthetic.builder(data_dir))
        except OSError as error:
            raise UserError(
                f"cannot prepare {name!r} in {data_dir} ({first_line(error)}); take another "
                "--data.data-dir"
            ) from None
        except (AssertionError, *UNREADABLE) as error:
            raise damaged(data_dir / name, error) from None
    return TfdsSplits(_open_builder(name, data_dir), image_key, label_key)


def prepare_with_tfds(
    make: Callable[[], tfds.core.DatasetBuilder],
) -> tfds.core.DatasetBuilder:
    """Prepares a dataset of TFDS: one process prepares it, and the others wait for it.

    Args:
      make: returns the builder; it is called again after another process prepared the dataset.

    Returns:
      The builder of the prepared dataset.
    """
    waits = False
    while not (builder := make()).is_prepared():
        folder = Path(builder.data_path)
        try:
            with alone(folder):
                # Remove the folders that a killed process left.
                for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
                    shutil.rmtree(left)
                if not (builder := make()).is_prepared():
                    builder.download_and_prepare()
        except UserError:  # there is another process
            if not waits:
                print(f"another process prepares {folder}; this one waits for it", flush=True)
            waits = True
            time.sleep(POLL)
    return builder


def place_of(name: str, data_dir: Path | None = None) -> Path:
    """The absolute path of the folder in which the dataset called `name` lies or is prepared."""
    folder = folder_of(name) if name.startswith(FOLDER) else data_dir or default_data_dir()
    return folder.resolve()


def folder_of(name: str) -> Path:
    """The folder that "folder:PATH" means; UserError where it names none."""
    path = name.removeprefix(FOLDER)
    if not path:
        raise UserError("--data.name is folder: without a path; expected folder:PATH")
    return Path(os.path.expanduser(path))


class TfdsSplits:
    """The splits of a prepared TFDS dataset of labelled images."""

    def __init__(
        self, builder: tfds.core.DatasetBuilder, image_key: str | None, label_key: str | None
    ):
        self._builder = builder
        self.names = list(builder.info.splits)
        # Two keys are those of an image and its label; a third key is that of a weight.
        keys: Sequence[str] = builder.info.supervised_keys or ()
        named = len(keys) in (2, 3) and all(isinstance(key, str) for key in keys)
        image, label = keys[:2] if named else ("image", "label")
        self._keys = image_key or image, label_key or label
        features = builder.info.features
        is_dict = isinstance(features, tfds.features.FeaturesDict)
        kinds = {key: type(features[key]).__name__ for key in features} if is_dict else {}
        if [kinds.get(key) for key in self._keys] != ["Image", "ClassLabel"]:
            has = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
            raise UserError(
                f"dataset {builder.name!r} has no {self._keys[0]} (Image) with a {self._keys[1]} "
                f"(ClassLabel), but {has}; name others with --data.image-key and --data.label-key"
            )

    def open(self, split: str) -> "TfdsSource":
        """A split of TFDS, such as "train[:90%]"."""
        return TfdsSource(self._builder, split, *self._keys)

    def note(self) -> str:
        """Nothing."""
        return ""


class TfdsSource:
    """A split of a prepared TFDS dataset of labelled images, still encoded."""

    prepared = True

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, image_key: str, label_key: str
    ):
        name, info = builder.name, builder.info
        self._image, self._label = image_key, label_key
        self._split, self._folder = split, Path(builder.data_path)
        classes = info.features[label_key].num_classes
        self.label_names: Sequence[str] = read_label_names(self._folder, label_key, classes)
        try:
            length = info.splits[split].num_examples
        except (ValueError, KeyError) as error:
            raise UserError(
                f"dataset {name!r} has no split {split!r}: {first_line(error)}"
            ) from None
        try:
            self._files = shards_of(self._folder, info.splits, split)
            if length <= 0:
                raise UserError(f"split {split!r} of dataset {name!r} is empty; choose another")
            self._data = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except NotImplementedError:
            raise UserError(
                f"dataset {name!r} in {builder.data_path} is not stored as ArrayRecord; prepare "
                f"it into another folder: {prepare_command(name, Path('FOLDER'))}"
            ) from None

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """The name of the image in messages."""
        return f"{self._split}[{index}]"

    def label(self, index: int) -> int:
        """`NO_LABEL`, since the label is not known before the record is read."""
        del index
        return NO_LABEL

    @property
    def paths(self) -> list[Path]:
        """The files of the split."""
        return list(self._files)

    def stamp(self, index: int) -> tuple[int, int]:
        """0, 0, since many images share a file."""
        del index
        return 0, 0

    def digest(self) -> Digest:
        """The digest of its files, without their modification times."""
        digest = digest_files([(path.name, path) for path in self._files], END_OF_SHARD)
        return digest._replace(times="")

    def read(self, index: int) -> Record:
        """The record at `index`; UserError where its file is missing, cut off, or damaged."""
        try:
            # TFDS's own parsing takes eight times as long, in Python, where threads must wait.
            example = tf_example_pb2.Example.FromString(self._data[index])
            values = example.features.feature
            (image,) = values[self._image].bytes_list.value
            (label,) = values[self._label].int64_list.value
            return Record(image, label, self.name(index))
        except (RuntimeError, ValueError, IndexError, TypeError, DecodeProtoError) as error:
            raise damaged(self._folder, error) from None


class FolderSource:
    """Image files, each with the label of the folder that it lies in."""

    prepared = False

    def __init__(self, files: Sequence[tuple[str | Path, int]], label_names: Sequence[str]):
        self.files = files
        self.label_names = label_names

    @property
    def paths(self) -> list[Path]:
        """The files of the images."""
        return [Path(path) for path, _ in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The image's path, printable."""
        return printable(str(self.files[index][0]))

    def label(self, index: int) -> int:
        """The label of the folder that the image is in."""
        return self.files[index][1]

    def stamp(self, index: int) -> tuple[int, int]:
        """Size and modification time (ns) of the image's file; 0, 0 if it cannot be read."""
        try:
            status = os.stat(self.files[index][0])
        except OSError:
            return 0, 0
        # A feature file stores the time in 64 bits, which hold nanoseconds until the year 2262.
        return status.st_size, min(status.st_mtime_ns, 2**63 - 1)

    def digest(self) -> Digest:
        """The digest of its files, by their paths relative to their common folder."""
        paths = [os.fspath(path) for path, _ in self.files]
        top = len(os.path.commonpath(paths))
        return digest_files([(path[top:], path) for path in paths], END_OF_IMAGE)

    def read(self, index: int) -> Record:
        """The record at `index`; DecodeError says why its file cannot be read."""
        path, label = self.files[index]
        return Record(read_file(Path(path)), label, self.name(index))


class FolderSplits:
    """The splits of a folder of class folders, or of a folder with one such folder per split.

    The splits are PATH/train, PATH/validation and PATH/test, by any of the names in `SPLITS`. If
    there is only PATH, or PATH/train alone, a tenth of it is held out as "test": every tenth image
    in the order of classes and names, so that each class gives its share and the same images are
    held out every time.

    Args:
      path: the folder.
      label_order: the order of the classes; if it has other classes, their natural order is used.

    Raises:
      UserError: the folder does not exist or cannot be read.
    """

    def __init__(self, path: Path, label_order: Sequence[str] = ()):
        self.path, self._label_order = path, label_order
        self._listed: dict[Path, tuple[list[File], list[str]]] = {}
        with reading():
            if not path.is_dir():
                raise UserError(
                    f"no folder {path}: --data.name folder:PATH needs one with a folder per class"
                )
            self._folders = {s: path / name for s, name in split_folders(path).items()}
            others = [path / name for name in subfolders(path) if standard_split(name)]
        self._unused = [p for p in others if self._folders and p not in self._folders.values()]
        # The folder of which a tenth is held out, if there is no other held-out split.
        self._whole = (
            self._folders.get("train", path) if self._folders.keys() <= {"train"} else None
        )
        self.names = ["train", "test"] if self._whole else list(self._folders)

    def open(self, split: str) -> FolderSource:
        """Opens a split by its standard name or another one in `SPLITS`; "all" joins all splits.

        Raises:
          UserError: the split does not exist, cannot be read, has too few classes or images, or
            has other classes than the other splits.
        """
        if split == "all":
            parts = [self.open(name) for name in self.names]
            files = [file for part in parts for file in part.files]
            return FolderSource(files, parts[0].label_names)
        name = standard_split(split)
        if name not in self.names:
            raise UserError(
                f"{self.path} has no split {split!r}: choose {', '.join(self.names)} or all"
            )
        with reading():
            if self._whole is None:
                return self._source(self._folders[name])
            whole = self._source(self._whole)
        if len(whole) < 10:
            raise UserError(
                f"{self._whole} has {len(whole)} images; at least 10 are needed to test on one"
            )
        if name == "test":
            return FolderSource(whole.files[9::10], whole.label_names)
        seen = [file for index, file in enumerate(whole.files) if index % 10 != 9]
        return FolderSource(seen, whole.label_names)

    def _source(self, folder: Path) -> FolderSource:
        """All images of a folder of class folders; it is listed once."""
        first = next(iter(self._folders.values()), folder)
        if differ := sorted(set(subfolders(first)) ^ set(subfolders(folder))):
            raise UserError(
                f"{first} and {folder} must hold the same classes: {', '.join(differ)}; add "
                "folders for them, or move one of both elsewhere"
            )
        names = class_folders(folder)
        shown = [printable(name) for name in names]
        if (twice := Counter(shown).most_common(1)[0])[1] > 1:
            raise UserError(f"{folder} has two classes that both show as {twice[0]}; rename one")
        order = [printable(name) for name in self._label_order]
        if sorted(shown) == sorted(order):
            names, shown = [names[shown.index(name)] for name in order], order
        if folder not in self._listed:
            self._listed[folder] = list_image_files(folder, names)
        return FolderSource(self._listed[folder][0], shown)

    @property
    def images(self) -> list[str]:
        """All images in the class folders of what was opened."""
        return [path for images, _ in self._listed.values() for path, _ in images]

    @property
    def others(self) -> list[str]:
        """The files in these class folders that are not images."""
        return [other for _, others in self._listed.values() for other in others]

    def note(self) -> str:
        """Lines with the number of `others`, and with split folders that have no class folders."""
        lines = [
            f"{printable(str(folder))} has no class folders and is not used"
            for folder in self._unused
        ]
        return "\n".join([*lines, *filter(None, [describe_others(self.others)])])


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns an OSError into a UserError that says which folder cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {printable(str(error.filename))}: {error.strerror}; take another folder"
        ) from None


def prepare_command(name: str, data_dir: Path | None = None) -> str:
    """What a user types to prepare `name`."""
    where = f" --data.data-dir {data_dir}" if data_dir else ""
    name = f"{FOLDER}PATH" if _base(name) == PREPARED_FOLDER else name
    return f"python -m flax_alexnet prepare --data.name {name}{where}"


def check_known(name: str, data_dir: Path) -> None:
    """Raises UserError with the nearest name where no dataset is called `name`."""
    if os.path.isdir(name):
        raise UserError(f"unknown dataset {name!r}: did you mean folder:{name}?")
    public = tfds.list_builders(with_community_datasets=False)
    own = {synthetic.NAME, *(_base(folder) for folder in _prepared(data_dir))}
    known = {*own, *public, PREPARED_FOLDER}
    if _base(name) not in known:
        message = unknown("dataset", name, known, shown=sorted(own))
        raise UserError(f"{message} (or folder:PATH, or a name of TFDS)")


def _open_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The newest version of `name` on the disk, read without the code that prepared it."""
    check_descriptions(name, data_dir)
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=str(data_dir))
    # The dataset does not exist or cannot be read, or the name is not valid.
    except (tfds.core.DatasetNotFoundError, *MISREAD, *UNREADABLE) as error:
        reason = error
    others = []
    for prepared, folder in _prepared(data_dir).items():
        if f"{prepared}:".startswith((f"{name}:", f"{name}/")):
            raise damaged(folder, reason)
        if _base(prepared) == _base(name):
            others.append(prepared)
    check_known(name, data_dir)
    instead = f", which has {', '.join(others)}" if others else ""
    raise UserError(
        f"dataset {name!r} is not prepared in {data_dir}{instead}; run: "
        + prepare_command(name, data_dir)
    )


def check_descriptions(name: str, data_dir: Path) -> None:
    """Checks that TFDS can read the description of each prepared version of the dataset `name`.

    Raises:
      UserError: one description cannot be read; TFDS reads those of all versions.
    """
    # TFDS looks in this folder for the version to use if none is named.
    default = data_dir / _base(name) / ".config"
    others = [
        folder for other, folder in _prepared(data_dir).items() if _base(other) == _base(name)
    ]
    for folder in [*others, *([default] if default.is_dir() else [])]:
        check_description(folder)


def _prepared(data_dir: Path) -> dict[str, Path]:
    """Names with versions of what is prepared in `data_dir`, such as "cifar10:3.0.2"."""
    described = [*data_dir.glob("*/*/*.json"), *data_dir.glob("*/*/*/*.json")]
    folders = sorted({p.parent for p in described if tfds.core.Version.is_valid(p.parent.name)})
    return {f"{p.parent.relative_to(data_dir).as_posix()}:{p.name}": p for p in folders}


def _base(name: str) -> str:
    """A dataset's name without configuration and version."""
    return name.partition(":")[0].partition("/")[0]
