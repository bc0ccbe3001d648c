"""The description of a prepared dataset, checked before TFDS relies on it.

TFDS reads `dataset_info.json`, `features.json` and `KEY.labels.txt`, and believes them: it opens
whatever has these names, imports the classes that are named, and takes the numbers of classes and
images for true.
"""

import os
from collections import Counter
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.utils.errors import UserError, cause, first_line
from flax_alexnet.utils.inputs import MB, check_regular, parse_json, read_bytes, read_text
from flax_alexnet.utils.text import printable

LARGEST = 4 * MB  # bytes of a description; ImageNet's has 20 kB
MOST_CLASSES = 1_000_000
INFO = "dataset_info.json"
READER_OPTIONS = "readahead_buffer_size:0"
# The entries of `features.json` whose values are imported.
CLASS_KEYS = frozenset({"pythonClassName", "python_class_name", "type"})


def damaged(folder: Path, reason: Exception | str) -> UserError:
    """What to say where a prepared dataset cannot be read."""
    why = reason if isinstance(reason, str) else first_line(reason)
    return UserError(
        f"the dataset in {folder} is damaged ({why}): remove that folder and prepare it once more"
    )


def check_description(folder: Path) -> None:
    """Makes sure that TFDS can read what describes the dataset in `folder`.

    Raises:
      UserError: a file of it is none, is too large, is nested too deep, or names a class that is
        not TFDS's: TFDS imports these, and what is imported is run.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt"):
            try:
                check_regular(path, LARGEST)
                if path.suffix == ".json":
                    value = parse_json(read_bytes(path, LARGEST))
                    if path.name == "features.json":
                        _check_classes_of_tfds(folder, value)
            except UserError:
                raise
            except (OSError, ValueError) as error:
                reason = cause(error)
                raise damaged(folder, f"{path.name}: {reason}") from None


def _check_classes_of_tfds(folder: Path, features: object) -> None:
    todo = [features]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            if isinstance(value.get("content"), str):  # as in old files, it is JSON once more
                todo.append(parse_json(value["content"]))
            for key in CLASS_KEYS & value.keys():
                named = str(value[key])
                if not named.startswith(("tensorflow_datasets.", "tfds.")):
                    raise UserError(
                        f"the dataset in {folder} would run {printable(named)}, which is not of "
                        "TFDS: prepare it once more from its source"
                    )


def read_label_names(folder: Path, key: str, classes: int | None) -> list[str]:
    """The names of a dataset's classes, printable; their numbers where it has no names.

    Args:
      folder: the dataset's.
      key: the feature with the labels.
      classes: how many `features.json` says that there are.

    Raises:
      UserError: there are too many or none, or the names are not as many or are not text.
    """
    path = folder / f"{key}.labels.txt"
    if not os.path.lexists(path):
        if classes is None or not 0 < classes <= MOST_CLASSES:
            expected = f"features.json says {classes} classes"
            raise damaged(folder, f"{expected}; 1 to {MOST_CLASSES:,} are read")
        return [str(label) for label in range(classes)]
    try:
        lines = [line.strip() for line in read_text(path, LARGEST).split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(folder, f"{path.name}: {first_line(error)}") from None
    names = [printable(line) for line in lines if line]
    if not names or classes not in (0, None, len(names)):
        raise damaged(
            folder, f"{path.name} names {len(names)} classes, where there are {classes or 'some'}"
        )
    often, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise damaged(folder, f"{path.name} names the class {often} twice")
    return names


def shards_of(folder: Path, splits: tfds.core.splits.SplitDict, split: str) -> list[Path]:
    """The files of all splits that `split`, such as "train[:90%]+test", takes images from.

    Raises:
      UserError: they are not as the description says: one that is none, is not there, lies
        elsewhere, or does not hold as many images, so that some would be left out silently.
      NotImplementedError: they are of another format than ArrayRecord.
    """
    used = [info for name, info in splits.items() if _names(split, name)]
    there = len(os.listdir(folder))
    result: list[Path] = []
    for info in used:
        if info.filename_template.filetype_suffix != "array_record":
            raise NotImplementedError
        # Millions of names would take minutes to make.
        if len(info.shard_lengths) > there:
            raise damaged(
                folder, f"{INFO} says that {info.name} has {len(info.shard_lengths):,} files"
            )
        paths = [Path(os.path.normpath(path)) for path in info.filepaths]
        inside = Path(os.path.normpath(folder))
        if outside := next((path for path in paths if path.parent != inside), None):
            raise damaged(folder, f"{INFO} says that {outside} is a part of it")
        for path, expected, actual in zip(
            paths, info.shard_lengths, map_threads(_count_records, paths), strict=True
        ):
            if actual != expected:
                raise damaged(
                    folder, f"{path.name} holds {actual:,} images, where {INFO} says {expected:,}"
                )
        result += paths
    return result


def _names(expression: str, split: str) -> bool:
    """Whether an expression of TFDS, which may join several splits, names a split."""
    parts = [part.partition("[")[0].strip() for part in expression.split("+")]
    return split in parts or "all" in parts


def _count_records(path: Path) -> int:
    try:
        check_regular(path)
        reader = ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=2**15)
        count = int(reader.num_records())
        reader.close()  # says what was wrong before
    except OSError as error:
        raise damaged(path.parent, f"{path.name}: {error.strerror}") from None
    except RuntimeError as error:
        raise damaged(path.parent, error) from None
    return min(count, path.stat().st_size)  # the file's own word for it may be a lie, too
