"""Writes images of one size as a TFDS dataset, for `prepare`.

A dataset is made in a folder beside its place, `1.0.0.incomplete` for `1.0.0`, and put there by one
renaming when it is whole. Its images, in an order that follows from their number alone, are cut
into shards. With each shard goes a list of what became of its images, which is written last: a
shard that has its list is whole, and a run that is started again leaves it as it is.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.prefetch import map_threads
from flax_alexnet.data.sources import Record, Records
from flax_alexnet.utils.errors import UserError, cause, first_line
from flax_alexnet.utils.inputs import read_json, read_text
from flax_alexnet.utils.outputs import lock, replacing
from flax_alexnet.utils.text import printable, write_table

SHARD = 8192  # images of a shard at most: what a kill can cost, so a small split as a whole
FEW = 8  # images that a thread is given at once, so that threads seldom wait for one another
QUALITY = 90  # of the JPEGs
OK = "ok"  # the outcome of an image that was taken; any other says why it was not
DATASET, LOCK, PLAN = "dataset", "lock", "plan"  # what lies in an unfinished folder
OUTCOMES = "outcomes.csv"


class Prepared(NamedTuple):
    """A dataset that is whole, and what became of its images."""

    folder: Path
    counts: dict[str, int]  # images taken, by split
    problems: list[tuple[str, str]]  # (name, why) of those that were not
    size: int  # bytes of all shards
    throughput: float  # images a second, of this run


class Shard(NamedTuple):
    """Images of a split that go into one file."""

    split: str
    file: str
    indices: np.ndarray


class Result(NamedTuple):
    """What is noted of a shard that is whole."""

    size: int  # bytes of its file
    outcomes: list[str]  # of its images


def write_dataset(
    splits: Mapping[str, Records],
    folder: Path,
    name: str,
    size: int,
    name_feature: str = "name",
    left_out: Sequence[tuple[str, str]] = (),
) -> Prepared:
    """Brings all images to `size` × `size` by the paper's rule and stores them as JPEG.

    All cores decode, and a progress bar shows the time left; without a terminal a line does after
    each shard. A run that was stopped at any moment and is started again ends with the same bytes.
    `outcomes.csv` lists every image.

    Args:
      splits: images of each split; all have the same label names.
      folder: the dataset's, named by its version.
      name: the dataset's, which begins the names of its files.
      size: pixels a side.
      name_feature: under which an image's name stands in its record.
      left_out: (name, why) of files that are in no split, to be listed too.

    Raises:
      UserError: the dataset is there already, another process prepares it, a split has no image
        that can be read, or the folder cannot be written to, such as on a full disk.
    """
    check_new(folder)
    label_names = next(iter(splits.values())).label_names
    features, serialize = _format(label_names, size, name_feature)
    shards = [shard for split in splits for shard in _shards(name, split, len(splits[split]))]
    work = _unfinished(folder)
    try:
        with _alone(work) as check_own:
            check_new(folder)  # another process may just have made it
            _begin(work, _plan(splits, shards, size))
            results = {s.file: result for s in shards if (result := _result(work, s))}
            done = sum(len(result.outcomes) for result in results.values())
            total = sum(len(records) for records in splits.values())
            start = time.perf_counter()
            with tqdm(total=total, initial=done, unit=" images", disable=None) as bar:
                for shard in shards:
                    if shard.file not in results:
                        check_own()
                        example = _example(splits[shard.split], size, serialize)
                        results[shard.file] = _write(work, shard, _examples(example, shard), bar)
                        if bar.disable:
                            tried = sum(len(result.outcomes) for result in results.values())
                            seconds = time.perf_counter() - start
                            text = tqdm.format_meter(
                                tried, total, seconds, ncols=0, unit=" images", initial=done
                            )
                            print(text, flush=True)
            throughput = (total - done) / (time.perf_counter() - start)
            problems = _list_outcomes(work, splits, shards, results, left_out)
            infos = [_split_info(split, shards, results) for split in splits]
            tfds.folder_dataset.write_metadata(
                data_dir=work / DATASET,
                features=features,
                split_infos=infos,
                version=folder.name,
                check_data=False,  # which would need TensorFlow
                supervised_keys=("image", "label"),
                description=f"Images brought to {size} × {size} by the rule of the 2012 paper.",
            )
            check_own()
            check_new(folder)
            _publish(work, folder)
    except OSError as error:
        reason = cause(error)
        raise UserError(
            f"cannot write to {work}: {reason}; when that is mended, the same command goes on "
            "where it stopped"
        ) from None
    counts = {info.name: info.num_examples for info in infos}
    return Prepared(folder, counts, problems, sum(r.size for r in results.values()), throughput)


def check_new(folder: Path, instead: str = "--data.data-dir") -> None:
    """Raises UserError if there is a dataset in `folder`; the flags of `instead` take another."""
    if os.path.lexists(folder):
        work = _unfinished(folder)
        if not os.path.lexists(work / DATASET):  # what a kill has left once all was done
            shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"{folder} exists already; remove it to prepare it once more, or take another {instead}"
        )


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.incomplete")


def _format(
    label_names: Sequence[str], size: int, name_feature: str
) -> tuple[tfds.features.FeaturesDict, Callable[[Record], bytes]]:
    """What a record holds, and the function that makes its bytes."""
    names = [printable(name) for name in label_names]
    for name in names:
        if name != name.strip():  # TFDS keeps them as the lines of a file
            raise UserError(f"class folder {name!r} has a space at an end; rename it")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=names),
            name_feature: tfds.features.Text(),
        }
    )

    # As TFDS does, ten times as fast: a hundredth of the time that an image takes.
    def serialize(record: Record) -> bytes:
        example = tf_example_pb2.Example()
        values = example.features.feature
        values["image"].bytes_list.value.append(record.image)
        values["label"].int64_list.value.append(int(record.label))
        values[name_feature].bytes_list.value.append(record.name.encode())
        return example.SerializeToString(deterministic=True)  # in one order in all processes

    return features, serialize


def _shards(name: str, split: str, records: int) -> list[Shard]:
    """The images of a split in a random order, so that slices of it hold all classes."""
    order = np.random.default_rng(records).permutation(records)
    count = max(1, -(-records // SHARD))
    return [
        Shard(split, f"{name}-{split}.array_record-{number:05}-of-{count:05}", indices)
        for number, indices in enumerate(np.array_split(order, count))
    ]


def _plan(splits: Mapping[str, Records], shards: Sequence[Shard], size: int) -> str:
    """A digest of what decides which image goes where, and how it is stored."""
    label_names = next(iter(splits.values())).label_names
    digest = hashlib.sha256(json.dumps([size, QUALITY, *label_names]).encode())
    for shard in shards:
        names = map(splits[shard.split].name, shard.indices.tolist())
        digest.update(json.dumps([shard.file, *names]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[Callable[[], None]]:
    """Makes the folder and keeps other processes out of it; when one dies, it lets go.

    Gives a function that raises OSError where the folder is not the one that it was: another
    process may be at work in one of the same name.
    """
    work.mkdir(parents=True, exist_ok=True)
    # What a link of that name points to is not ours, and a pipe would be waited for.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(work / LOCK, flags, 0o666)
    with open(descriptor, "w") as file:
        try:
            lock(file.fileno(), work / LOCK)
        except BlockingIOError:
            raise UserError(f"another process is at work in {work}; wait until it ends") from None

        def check_own() -> None:
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(work / LOCK)):
                raise OSError(errno.ESTALE, "it was moved or removed, and made once more")

        yield check_own


def _begin(work: Path, plan: str) -> None:
    """Makes the folder ready for a plan; what was done by another one is removed."""
    path = work / PLAN
    if path.exists() and read_text(path) != plan:
        print(f"{work} was begun with other images or another size; it is begun again")
        path.unlink()
    if not path.exists():
        for left in work.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()
        with replacing(path) as partial:
            partial.write_text(plan)
    (work / DATASET).mkdir(exist_ok=True)


def _result(work: Path, shard: Shard) -> Result | None:
    """What is noted of a shard, if it is whole; one without any image is tried again."""
    try:
        result = Result(*read_json(work / shard.file))
        whole = (work / DATASET / shard.file).stat().st_size == result.size
        whole = whole and len(result.outcomes) == len(shard.indices)
    # Not there, cut off when the machine lost its power, or not ours.
    except (OSError, ValueError, TypeError):
        return None
    return result if whole and OK in result.outcomes else None


def _example(
    records: Records, size: int, serialize: Callable[[Record], bytes]
) -> Callable[[int], tuple[bytes | None, str]]:
    """The function from an image's index to the record to store, if any, and the outcome."""

    def example(index: int) -> tuple[bytes | None, str]:
        try:
            record = records.read(index)
            pixels = decode(record.image, size)
        except DecodeError as error:
            return None, str(error)
        encoded = simplejpeg.encode_jpeg(pixels, QUALITY, colorsubsampling="420")
        return serialize(record._replace(image=encoded)), OK

    return example


def _examples(
    example: Callable[[int], tuple[bytes | None, str]], shard: Shard
) -> Iterator[tuple[bytes | None, str]]:
    """What `example` gives for each image of a shard, in order, computed by all cores."""
    rows = np.split(shard.indices, range(FEW, len(shard.indices), FEW))
    several = map_threads(lambda few: [example(index) for index in few.tolist()], rows)
    return itertools.chain.from_iterable(several)


def _write(
    work: Path, shard: Shard, examples: Iterable[tuple[bytes | None, str]], bar: tqdm
) -> Result:
    """Writes a shard, and then its result."""
    path, outcomes = work / DATASET / shard.file, []
    try:
        # As TFDS does, but JPEG does not become smaller by being compressed once more.
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for example, outcome in examples:
            if example is not None:
                writer.write(example)
            outcomes.append(outcome)
            bar.update()
        writer.close()
    except RuntimeError as error:  # how the writer says that the disk is full
        raise OSError(first_line(error)) from None
    result = Result(path.stat().st_size, outcomes)
    with replacing(work / shard.file) as partial:
        partial.write_text(json.dumps(result))
    return result


def _list_outcomes(
    work: Path,
    splits: Mapping[str, Records],
    shards: Sequence[Shard],
    results: Mapping[str, Result],
    left_out: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """Writes what became of each image, and returns (name, why) of those not taken.

    Those `left_out` follow, with no split.
    """
    rows, problems = [("split", "name", "outcome")], []
    for split, records in splits.items():
        outcomes = [""] * len(records)
        for shard in shards:
            if shard.split == split:
                of_shard = results[shard.file].outcomes
                for index, outcome in zip(shard.indices.tolist(), of_shard, strict=True):
                    outcomes[index] = outcome
        named = [(records.name(index), outcome) for index, outcome in enumerate(outcomes)]
        rows += [(split, *row) for row in named]
        problems += [row for row in named if row[1] != OK]
        if OK not in outcomes:
            why = f", such as {problems[-1][0]}: {problems[-1][1]}" if outcomes else ""
            raise UserError(f"no image of the split {split!r} can be read{why}")
    rows += [("", *row) for row in left_out]
    with (work / DATASET / OUTCOMES).open("w", newline="", encoding="utf-8") as file:
        write_table(file, rows)
    return problems


def _split_info(
    split: str, shards: Sequence[Shard], results: Mapping[str, Result]
) -> tfds.core.SplitInfo:
    of_split = [results[shard.file] for shard in shards if shard.split == split]
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[result.outcomes.count(OK) for result in of_split],
        num_bytes=sum(result.size for result in of_split),
    )


def _publish(work: Path, folder: Path) -> None:
    """Gives the dataset its place, once all of it is on the disk."""
    for path in (work / DATASET).iterdir():
        with path.open("rb") as file:
            os.fsync(file)
    (work / DATASET).rename(folder)
    shutil.rmtree(work, ignore_errors=True)
