"""Where pictures come from: the embedded dataset, TFDS names, folders of class folders.

Each is a `Source`: a length, encoded pictures with their labels by index, and label names.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError as DecodeProtoError
from tensorflow_datasets.proto import tf_example_pb2

from flax_alexnet.data import shapes
from flax_alexnet.data.decode import read_file
from flax_alexnet.errors import UserError, first_line, printable, unknown

FOLDER = "folder:"
PREPARED_FOLDER = "prepared_folder"  # what TFDS calls folders once they are prepared
# The entries of `features.json` whose values are imported.
CLASS_KEYS = frozenset({"pythonClassName", "python_class_name", "type"})
# What TFDS raises for a prepared dataset whose description is damaged.
UNREADABLE = (ParseError, tfds.core.dataset_info.DatasetInfoFileError)


class Record(NamedTuple):
    """One encoded picture, as it lies on the disk."""

    image: bytes
    label: int
    name: str  # for messages: a path, or a split and an index


class Pictures(Protocol):
    """Encoded pictures by index, any of which may turn out to be none."""

    label_names: Sequence[str]

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def read(self, index: int, /) -> Record:
        """The picture at `index`.

        Raises:
          DecodeError: why there is none.
          UserError: the prepared dataset is damaged.
        """
        ...


class Source(Pictures, Protocol):
    """What any dataset is to the rest of the program."""

    prepared: bool  # whether every picture was decoded once before, when it was prepared


class Dataset(NamedTuple):
    """A training and an evaluation source with the same label names."""

    name: str
    train: Source
    eval: Source
    label_names: Sequence[str]


def default_data_dir() -> Path:
    """Where TFDS keeps its datasets: `TFDS_DATA_DIR`, or `tensorflow_datasets` in the home."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def open_dataset(
    name: str,
    data_dir: Path | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> Dataset:
    """The dataset called `name`: "shapes_and_textures", a TFDS name, or "folder:PATH".

    The embedded dataset is prepared here if it is not yet; others must have been.

    Args:
      name: a TFDS name may carry a configuration and a version, such as "cifar10:3.0.2".
      data_dir: where prepared datasets lie; None for `default_data_dir()`.
      train_split: of TFDS, slices such as "train[:90%]" included; a folder has its own rule.
      eval_split: likewise; None is "validation" where there is one, else "test".

    Raises:
      UserError: no such dataset, not prepared, of a form that cannot be read, or without labels.
    """
    if name.startswith(FOLDER):
        train_files, test_files = open_folder(Path(os.path.expanduser(name.removeprefix(FOLDER))))
        return Dataset(name, train_files, test_files, train_files.label_names)
    data_dir = data_dir or default_data_dir()
    if name == shapes.NAME:
        try:
            shapes.builder(data_dir).download_and_prepare()
        except OSError as error:
            # Of several processes that prepare it at the same time the first one has its way.
            if not shapes.builder(data_dir).is_prepared():
                raise UserError(
                    f"cannot prepare {name!r} in {data_dir} ({first_line(error)}); take another "
                    "--data.data-dir"
                ) from None
        except (AssertionError, *UNREADABLE) as error:
            raise damaged(data_dir / name, error) from None
    builder = _open_builder(name, data_dir)
    splits = builder.info.splits
    if eval_split is None:
        eval_split = next((split for split in ("validation", "test") if split in splits), None)
    if eval_split is None:
        raise UserError(
            f"dataset {name!r} has no validation or test split, only {', '.join(splits)}: "
            "split one, such as --data.train-split 'train[:90%]' --data.eval-split 'train[90%:]'"
        )
    train, held_out = TfdsSource(builder, train_split), TfdsSource(builder, eval_split)
    return Dataset(name, train, held_out, train.label_names)


class TfdsSource:
    """A split of a prepared TFDS dataset of labelled pictures, still encoded."""

    prepared = True

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        name, info = builder.name, builder.info
        keys = info.supervised_keys
        features = [info.features[key] for key in keys] if keys and len(keys) == 2 else []
        if [type(feature).__name__ for feature in features] != ["Image", "ClassLabel"]:
            raise UserError(f"dataset {name!r} does not consist of pictures with one label each")
        self._image, self._label = keys
        self._split, self._folder = split, Path(builder.data_path)
        self.label_names: Sequence[str] = features[1].names
        try:
            length = info.splits[split].num_examples
        except (ValueError, KeyError) as error:
            raise UserError(
                f"dataset {name!r} has no split {split!r}: {first_line(error)}"
            ) from None
        if length <= 0:
            raise UserError(f"split {split!r} of dataset {name!r} is empty; choose another")
        try:
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
        """What messages call the picture."""
        return f"{self._split}[{index}]"

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
    """Picture files with the label of the folder each lies in."""

    prepared = False

    def __init__(self, files: Sequence[tuple[str | Path, int]], label_names: Sequence[str]):
        self._files = files
        self.label_names = label_names

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [Path(path) for path, _ in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The picture's path, printable."""
        return printable(str(self._files[index][0]))

    def read(self, index: int) -> Record:
        """The record at `index`; DecodeError says why its file cannot be read."""
        path, label = self._files[index]
        return Record(read_file(Path(path)), label, self.name(index))


class Joined:
    """The pictures of two sources with the same label names, one after the other."""

    def __init__(self, first: Source, second: Source):
        self._parts = first, second
        self.label_names = first.label_names
        self.prepared = first.prepared and second.prepared

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _find(self, index: int) -> tuple[Source, int]:
        first, second = self._parts
        return (first, index) if index < len(first) else (second, index - len(first))

    def name(self, index: int) -> str:
        """What its part calls the picture."""
        source, index = self._find(index)
        return source.name(index)

    def read(self, index: int) -> Record:
        """The record at `index`, as its part gives it."""
        source, index = self._find(index)
        return source.read(index)


def prepare_command(name: str, data_dir: Path | None = None) -> str:
    """What a user types to prepare `name`."""
    where = f" --data.data-dir {data_dir}" if data_dir else ""
    name = f"{FOLDER}PATH" if _base(name) == PREPARED_FOLDER else name
    return f"python -m flax_alexnet.prepare --data.name {name}{where}"


def need_known(name: str, data_dir: Path) -> None:
    """Raises UserError with the nearest name where no dataset is called `name`."""
    if os.path.isdir(name):
        raise UserError(f"unknown dataset {name!r}: did you mean folder:{name}?")
    public = tfds.list_builders(with_community_datasets=False)
    own = {shapes.NAME, *(_base(folder) for folder in _prepared(data_dir))}
    known = {*own, *public, PREPARED_FOLDER}
    if _base(name) not in known:
        said = unknown("dataset", name, known, shown=sorted(own))
        raise UserError(f"{said} (or folder:PATH, or a name of TFDS)")


def damaged(folder: Path, error: Exception) -> UserError:
    """What to say where a prepared dataset cannot be read."""
    return UserError(
        f"the dataset in {folder} is damaged ({first_line(error)}): remove that folder and "
        "prepare it once more"
    )


def class_folders(path: Path) -> list[str]:
    """Names of the folders in `path`, hidden ones left out, in sorted order."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_pictures(path: Path, label_names: Sequence[str]) -> list[tuple[str, int]]:
    """All files below the class folders of `path`, with labels, sorted by class and name.

    What is inside counts, not what a file's name says: whatever is no folder and not hidden is
    taken, so that it has an outcome where it turns out to be no picture. Links to folders are not
    followed.

    Raises:
      UserError: a class folder without a file.
      OSError: a folder that cannot be read.
    """
    result = []
    for label, name in enumerate(label_names):
        files = _files_below(os.path.join(path, name))
        if not files:
            raise UserError(f"class folder {path / name} has no pictures: add some or remove it")
        result += [(file, label) for file in files]
    return result


def _files_below(folder: str) -> list[str]:
    """Paths as text: they take a third of the memory of `Path`s, which counts with a million."""
    files: list[str] = []
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    is_folder = entry.is_dir(follow_symlinks=False)
                    (folders if is_folder else files).append(entry.path)
    return sorted(files, key=lambda path: path.split(os.sep))


def list_left_out(path: Path, taken: Sequence[FolderSource]) -> list[tuple[str, str]]:
    """(name, why) of all files below `path` that `taken` do not have, sorted by name."""
    pictures = {str(picture) for source in taken for picture in source.paths}
    parents = (Path(folder, "_").parents for folder in set(map(os.path.dirname, pictures)))
    inside = {str(parent) for several in parents for parent in several}
    result, folders = [], [str(path)]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:  # of somebody else's, say
            result.append((printable(folder), error.strerror or first_line(error)))
            continue
        for entry in entries:
            # A class folder may be a link; no other link is followed, as it may lead back.
            if entry.is_dir(follow_symlinks=entry.path in inside):
                folders.append(entry.path)
            elif entry.path not in pictures:
                hidden = "/." in entry.path.removeprefix(str(path))
                why = "it is hidden" if hidden else "it is in no class folder that is read"
                result.append((printable(entry.path), why))
    return sorted(result)


def open_folder(path: Path) -> tuple[FolderSource, FolderSource]:
    """Pictures to train on and to test on, in class folders.

    These are PATH/train and PATH/validation (or val, test), or PATH with a tenth of it held out:
    every tenth picture in the order of classes and names, so that each class gives its share and
    the same picture is held out every time.

    Raises:
      UserError: no folder, one that cannot be read, too few classes or pictures.
    """
    try:
        return _split_folder(path)
    except OSError as error:
        raise UserError(
            f"cannot read {printable(str(error.filename))}: {error.strerror}; take another folder"
        ) from None


def _split_folder(path: Path) -> tuple[FolderSource, FolderSource]:
    if not path.is_dir() or path == Path():
        raise UserError(
            f"no folder {path}: --data.name folder:PATH needs one with a folder per class"
        )
    names = class_folders(path)
    eval_name = next((name for name in ("validation", "val", "test") if name in names), None)
    if "train" in names and eval_name:
        label_names = class_folders(path / "train")
        others = class_folders(path / eval_name)
        if others != label_names:
            differ = ", ".join(sorted(set(others) ^ set(label_names)))
            raise UserError(
                f"{path}/train and {path}/{eval_name} must hold the same classes: {differ}"
            )
        _need_classes(path / "train", label_names)
        train_files = list_pictures(path / "train", label_names)
        held_out = list_pictures(path / eval_name, label_names)
    else:
        label_names = names
        _need_classes(path, label_names)
        files = list_pictures(path, label_names)
        held_out = files[9::10]
        train_files = [file for index, file in enumerate(files) if index % 10 != 9]
        if not held_out:
            raise UserError(
                f"{path} has {len(files)} pictures; at least 10 are needed to test on one"
            )
    return FolderSource(train_files, label_names), FolderSource(held_out, label_names)


def _need_classes(path: Path, label_names: Sequence[str]) -> None:
    if len(label_names) < 2:
        raise UserError(
            f"{path} has {len(label_names)} class folders; expected two or more, each with the "
            "pictures of one class"
        )


def _open_builder(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """The newest version of `name` on the disk, read without the code that prepared it."""
    for prepared, folder in _prepared(data_dir).items():
        if _base(prepared) == _base(name):
            _need_features_of_tfds(folder)
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=str(data_dir))
    # None of that name; or one that cannot be read; or no name at all.
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, *UNREADABLE) as error:
        reason = error
    others = []
    for prepared, folder in _prepared(data_dir).items():
        if f"{prepared}:".startswith((f"{name}:", f"{name}/")):
            raise damaged(folder, reason)
        if _base(prepared) == _base(name):
            others.append(prepared)
    need_known(name, data_dir)
    instead = f", which has {', '.join(others)}" if others else ""
    raise UserError(
        f"dataset {name!r} is not prepared in {data_dir}{instead}; run: "
        + prepare_command(name, data_dir)
    )


def _need_features_of_tfds(folder: Path) -> None:
    """Raises UserError where a dataset names classes that are not TFDS's.

    TFDS imports the classes that `features.json` names, and what is imported is run.
    """
    named: list[str] = []

    def note(pairs: list[tuple[str, object]]) -> None:
        named.extend(str(value) for key, value in pairs if key in CLASS_KEYS)

    try:
        json.loads((folder / "features.json").read_text(), object_pairs_hook=note)
    except (OSError, ValueError, RecursionError):
        return  # TFDS says it
    for value in named:
        if not value.startswith(("tensorflow_datasets.", "tfds.")):
            raise UserError(
                f"the dataset in {folder} would run {printable(value)}, which is not of TFDS: "
                "prepare it once more from its source"
            )


def _prepared(data_dir: Path) -> dict[str, Path]:
    """Names with versions of what is prepared in `data_dir`, such as "cifar10:3.0.2"."""
    described = [*data_dir.glob("*/*/*.json"), *data_dir.glob("*/*/*/*.json")]
    folders = sorted({p.parent for p in described if tfds.core.Version.is_valid(p.parent.name)})
    return {f"{p.parent.relative_to(data_dir).as_posix()}:{p.name}": p for p in folders}


def _base(name: str) -> str:
    """A dataset's name without configuration and version."""
    return name.partition(":")[0].partition("/")[0]
