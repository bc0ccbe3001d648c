"""What lies in a prepared dataset."""

import tensorflow_datasets as tfds

from flax_alexnet.utils.text import read_table


def outcomes(dataset):
    """{(split, name): outcome} as the dataset's table has it."""
    with (dataset / "outcomes.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = read_table(file)
        assert header == ["split", "name", "outcome"]
        return {(split, name): outcome for split, name, outcome in rows}


def contents(folder):
    """{path: bytes} of all files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def stored(dataset, split):
    """Records of a dataset with all that is in them, read without this project's code."""
    builder = tfds.core.read_only_builder.builder_from_directory(dataset)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return list(builder.as_data_source(split, decoders=decoders))
