"""Where images come from: the embedded dataset, TFDS names, folders of class folders.

Each has `Splits`; each split is a `Source`: a length, encoded images with their labels by index,
and label names.
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
from flax_alexnet.data.digests import Digest, digest_files, join
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
NO_LABEL = -1  # of an image whose right class nobody said
PREPARED_FOLDER = "prepared_folder"  # what TFDS calls folders once they are prepared
POLL = 0.2  # seconds between two looks at what another process does
END_OF_IMAGE = 2**12  # bytes at either end of a file that are compared
END_OF_SHARD = 2**16  # the last ones say where each of its records lies
# What TFDS raises for a prepared dataset whose description is damaged.
UNREADABLE = (ParseError, tfds.core.dataset_info.DatasetInfoFileError)
# What else it stumbles over in one that is JSON, but is not what it expects.
MISREAD = (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError)


class Record(NamedTuple):
    """One encoded image, as it lies on the disk, or why it cannot be read."""

    image: bytes  # empty where there is a problem
    label: int
    name: str  # for messages: a path, or a split and an index
    problem: str = ""


class Records(Protocol):
    """Encoded images by index, any of which may turn out to be none."""

    label_names: Sequence[str]

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def read(self, index: int, /) -> Record:
        """The image at `index`.

        Raises:
          DecodeError: why there is none.
          UserError: the prepared dataset is damaged.
        """
        ...


class Source(Records, Protocol):
    """What any dataset is to the rest of the program."""

    prepared: bool  # whether every image was decoded once before, when it was prepared

    @property
    def paths(self) -> list[Path]:
        """The files that it reads."""
        ...

    def label(self, index: int, /) -> int:
        """The image's label, where that is known before it is read, else `NO_LABEL`."""
        ...

    def stamp(self, index: int, /) -> tuple[int, int]:
        """The bytes of the image's own file and when it was changed, in ns; 0, 0 of none."""
        ...

    def digest(self) -> Digest:
        """Over all images: another one says that some have changed, or cannot be read now."""
        ...


class Dataset(NamedTuple):
    """A training and an evaluation source with the same label names."""

    name: str
    train: Source
    eval: Source
    label_names: Sequence[str]
    note: str = ""  # what the user should know of it, in lines


class Splits(Protocol):
    """A dataset of which nothing is opened yet."""

    @property
    def names(self) -> Sequence[str]: ...

    def open(self, split: str, /) -> Source:
        """A split, or what else the dataset calls so; UserError where there is none."""
        ...

    def note(self) -> str:
        """What the user should know of what was opened, in lines, or ""."""
        ...


def default_data_dir() -> Path:
    """Where TFDS keeps its datasets: `TFDS_DATA_DIR`, or `tensorflow_datasets` in the home.

    Raises:
      UserError: neither is there, as in a container whose user the system does not know.
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
      train_split: of TFDS, slices such as "train[:90%]" included; of a folder as `FolderSplits`.
      eval_split: likewise; None is "validation" where there is one, else "test".
      image_key: of the images.
      label_key: of the labels.
      label_order: of a folder.

    Raises:
      UserError: no such dataset or split, not prepared, of a form that cannot be read, or without
        labels.
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
    """The split that a training does not see, and evaluates on; None where there is none."""
    return next((split for split in ("validation", "test") if split in splits.names), None)


def open_splits(
    name: str,
    data_dir: Path | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    label_order: Sequence[str] = (),
) -> Splits:
    """What splits the dataset called `name` has; only those that are asked for are opened.

    The embedded dataset is prepared here if it is not yet; others must have been.

    Args:
      name: "shapes_and_textures", a TFDS name, or "folder:PATH"; a TFDS name may carry a
        configuration and a version, such as "cifar10:3.0.2".
      data_dir: where prepared datasets lie; None for `default_data_dir()`.
      image_key: the feature of TFDS with the images; None for the first of its supervised keys,
        or "image" where it has none.
      label_key: that with the labels; None for the second, or "label".
      label_order: the classes of a folder in the order that a run has them in.

    Raises:
      UserError: no such dataset, not prepared, or of a form that cannot be read.
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
    """Prepares what a builder of TFDS makes: one process does, and the others wait for it.

    Args:
      make: gives the builder, again where another process has prepared the dataset.

    Returns:
      The builder of the dataset, which is prepared.
    """
    waits = False
    while not (builder := make()).is_prepared():
        folder = Path(builder.data_path)
        try:
            with alone(folder):
                # A process that was killed leaves them.
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
    """The folder, from everywhere, that a dataset called `name` lies in or is prepared in."""
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
        # With two there are an image and its label; with three, a weight as well.
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
        """What messages call the image."""
        return f"{self._split}[{index}]"

    def label(self, index: int) -> int:
        """Not known before the record is read."""
        del index
        return NO_LABEL

    @property
    def paths(self) -> list[Path]:
        """The files of the split."""
        return list(self._files)

    def stamp(self, index: int) -> tuple[int, int]:
        """Nothing, since many images share a file."""
        del index
        return 0, 0

    def digest(self) -> Digest:
        """Over its files; their times count for nothing."""
        digest = digest_files([(path.name, path) for path in self._files], END_OF_SHARD)
        return digest._replace(times="")

    def read(self, index: int) -> Record:
        """The record at `index`; UserError where its file is missing, cut off, or damaged."""
        try:
            # As TFDS does, eight times as fast: Python, in which threads wait for one another.
            example = tf_example_pb2.Example.FromString(self._data[index])
            values = example.features.feature
            (image,) = values[self._image].bytes_list.value
            (label,) = values[self._label].int64_list.value
            return Record(image, label, self.name(index))
        except (RuntimeError, ValueError, IndexError, TypeError, DecodeProtoError) as error:
            raise damaged(self._folder, error) from None


class FolderSource:
    """Example files with the label of the folder each lies in."""

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
        """That of its folder."""
        return self.files[index][1]

    def stamp(self, index: int) -> tuple[int, int]:
        """The bytes of the image's file and when it was changed; 0, 0 where it cannot be read."""
        try:
            status = os.stat(self.files[index][0])
        except OSError:
            return 0, 0
        # It is stored in 64 bits, which count the nanoseconds until the year 2262.
        return status.st_size, min(status.st_mtime_ns, 2**63 - 1)

    def digest(self) -> Digest:
        """Over its files, by their places below the folder that all are in."""
        paths = [os.fspath(path) for path, _ in self.files]
        top = len(os.path.commonpath(paths))
        return digest_files([(path[top:], path) for path in paths], END_OF_IMAGE)

    def read(self, index: int) -> Record:
        """The record at `index`; DecodeError says why its file cannot be read."""
        path, label = self.files[index]
        return Record(read_file(Path(path)), label, self.name(index))


class FolderSplits:
    """The images of a folder of class folders, or of folders that hold such.

    These are PATH/train, PATH/validation and PATH/test, by any of the names in `SPLITS`. Or they
    are PATH, or PATH/train alone, with a tenth held out as "test": every tenth image in the order
    of classes and names, so that each class gives its share and the same image is held out every
    time.

    Args:
      path: the folder.
      label_order: of the classes; their natural order where these are not the classes.

    Raises:
      UserError: no folder, or one that cannot be read.
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
        # A tenth is held out where nothing else is.
        self._whole = (
            self._folders.get("train", path) if self._folders.keys() <= {"train"} else None
        )
        self.names = ["train", "test"] if self._whole else list(self._folders)

    def open(self, split: str) -> "FolderSource | Joined":
        """The split of a standard name, or of one of its `SPLITS`; "all" is all of them.

        Raises:
          UserError: none of that name, one that cannot be read, too few classes or images, or
            classes that are not those of the other splits.
        """
        if split == "all":
            return Joined([self.open(name) for name in self.names])
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

    def _source(self, folder: Path) -> "FolderSource":
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
        """Files there that are none."""
        return [other for _, others in self._listed.values() for other in others]

    def note(self) -> str:
        """How many these others are; and folders called as splits that have no class folders."""
        lines = [
            f"{printable(str(folder))} has no class folders and is not used"
            for folder in self._unused
        ]
        return "\n".join([*lines, *filter(None, [describe_others(self.others)])])


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Says in a line which folder cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {printable(str(error.filename))}: {error.strerror}; take another folder"
        ) from None


class Joined:
    """The images of sources with the same label names, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self.label_names = parts[0].label_names
        self.prepared = all(part.prepared for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _find(self, index: int) -> tuple[Source, int]:
        for part in self._parts[:-1]:
            if index < len(part):
                return part, index
            index -= len(part)
        return self._parts[-1], index

    def name(self, index: int) -> str:
        """What its part calls the image."""
        source, index = self._find(index)
        return source.name(index)

    def label(self, index: int) -> int:
        """What its part says."""
        source, index = self._find(index)
        return source.label(index)

    def stamp(self, index: int) -> tuple[int, int]:
        """That of its part."""
        source, index = self._find(index)
        return source.stamp(index)

    @property
    def paths(self) -> list[Path]:
        """Those of its parts."""
        return [path for part in self._parts for path in part.paths]

    def digest(self) -> Digest:
        """Over those of its parts."""
        return join([part.digest() for part in self._parts])

    def read(self, index: int) -> Record:
        """The record at `index`, as its part gives it."""
        source, index = self._find(index)
        return source.read(index)


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
    # None of that name; or one that cannot be read; or no name at all.
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
    """Makes sure that TFDS can read what describes the dataset `name`, as far as it is prepared.

    Raises:
      UserError: it cannot, in any version, since TFDS looks at all of them.
    """
    # There it finds the version that is meant where none is named.
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
