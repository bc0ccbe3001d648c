"""Input that nobody would write: what comes of it is a result or one line, never a traceback.

Hypothesis makes the same examples each time, as many as a few seconds allow, so that a change fails
by itself alone and not by chance. So CI never sees new input; to look for more, by hand:

    FUZZ=50 pytest -n 0 tests/robustness/test_fuzz.py
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flax_alexnet.checkpoint.manager import Checkpoints
from flax_alexnet.commands.evaluate import EvaluateConfig
from flax_alexnet.commands.features import FeaturesConfig
from flax_alexnet.commands.lpips import LpipsConfig
from flax_alexnet.commands.plot import PlotConfig
from flax_alexnet.commands.predict import PredictConfig
from flax_alexnet.commands.prepare import PrepareConfig
from flax_alexnet.config.cli import known_flags, parse
from flax_alexnet.config.recipes import QUICKSTART, parse_config
from flax_alexnet.config.schema import FREE_TO_CHANGE, Config, flatten
from flax_alexnet.data.dataset import open_examples
from flax_alexnet.data.decode import DecodeError, decode
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.training.run_directory import claim
from flax_alexnet.utils.errors import UserError, exit_code
from flax_alexnet.weights.finetuning import adapt
from flax_alexnet.weights.load import load

MORE = int(os.environ.get("FUZZ", "0"))
SECONDS = 5  # in which the slowest image of a few kilobytes must have its outcome
REFUSED = object()


def examples(count):
    """Settings: so many examples, always the same; or many times more, each time others."""
    return settings(
        max_examples=count * max(1, MORE), derandomize=not MORE, database=None, deadline=None
    )


def outcome(function, *arguments):
    """What the function gives, having printed nothing, or `REFUSED` with a reason in one line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            result = function(*arguments)
        except UserError as error:
            result = REFUSED
            exit_code(error)
    said = output.getvalue()
    if result is REFUSED:
        assert said.startswith("error: ")
        assert said.endswith("\n")
        assert said[:-1].isprintable(), repr(said)
    else:
        assert said == ""
    return result


@st.composite
def damaged(draw, originals):
    """The bytes of one of `originals`, with a few mutations."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((1, 1, 1, 2, 4, 16, 256))))
        how = draw(st.sampled_from(("bit", "bytes", "bytes", "insert", "remove", "repeat", "cut")))
        if how == "bit" and start < end:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "bytes":
            data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
        elif how == "insert":
            data[start:start] = draw(st.binary(max_size=16))
        elif how == "remove":
            del data[start:end]
        elif how == "repeat":
            data[start:start] = data[start:end]
        elif how == "cut":
            del data[start:]
    return bytes(data)


# What a command line may hold: values that are out of range, of another type, or no text at all.
ODD = (
    *("", "0", "-1", "1", "0.5", "1e400", "-inf", "nan", "9" * 5000, "0x10", "1_000", "٣", "½"),
    *("None", "True", "false", "null", "~", "~nobody-there/x", "/", ".", "/dev/null", "a=b", "="),
    *("-", "--", "---", "-x", "--=", "--no-", "\ud800", "\x1b[31m", "a\nb", "\u2028", "[", "(*"),
    *("conv1", "conv.*=0.1", "fc8=nan", "paper", "folder:", "shapes_and_textures", "x" * 300),
)
values = st.sampled_from(ODD) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)


def words(flags):
    """A command line: flags with values as two words or as one, and stray words."""
    flag = st.sampled_from(flags)
    pair = st.tuples(flag, values)
    joined = pair.map(lambda pair: ("=".join(pair),))
    chunk = pair | pair | joined | values.map(lambda value: (value,)) | flag.map(lambda f: (f,))
    chunks = st.lists(chunk, max_size=5)
    argv = chunks.map(lambda chunks: [word for chunk in chunks for word in chunk])
    return argv.filter(lambda argv: not {"-h", "--help"} & set(argv))


@examples(60)
@given(argv=words(known_flags(QUICKSTART)))
def test_the_command_line_of_training(argv):
    result = outcome(parse_config, argv, "flax_alexnet.train", adapt)
    assert result is REFUSED or isinstance(result, Config)


SCHEMAS = (PredictConfig, EvaluateConfig, FeaturesConfig, LpipsConfig, PlotConfig)


@st.composite
def commands(draw):
    default = draw(st.sampled_from((PrepareConfig(), *SCHEMAS)))
    return default, draw(words(known_flags(default)))


@examples(60)
@given(command=commands())
def test_the_command_lines_of_others(command):
    default, argv = command
    schema, default = (default, None) if isinstance(default, type) else (type(default), default)
    result = outcome(parse, schema, argv, default, "flax_alexnet.command")
    assert result is REFUSED or isinstance(result, schema)


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    """A run with a checkpoint, and what its configuration was."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    size = pretrained.preprocessing.image_size
    config = dataclasses.replace(
        QUICKSTART,
        workdir=workdir,
        model=pretrained.config,
        data=dataclasses.replace(QUICKSTART.data, image_size=size),
    )
    identity = flatten(config) | {"dataset.label_names": list(pretrained.label_names)}
    claim(workdir, identity)
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = {"params": pretrained.params, "mean": np.zeros((size, size, 3), np.float32)}
    checkpoints.save(3, state, {"eval_top1": 0.5})
    checkpoints.close()
    return workdir, {"config": identity, "versions": {"jax": "0"}}


numbers = st.integers() | st.floats() | st.sampled_from((2**31, 2**63, 10**30, -(10**400), 1e308))
texts = st.text(max_size=5) | st.sampled_from(("\ud800", "\x1b[2J", "a\nb", "../x"))
scalars = st.none() | st.booleans() | numbers | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
TEXTS = (b"", b"null", b"NaN", b'{"config": 1e999}', b"\xff\xfe", b"[" * 10**5)


@st.composite
def odd_configs(draw, document):
    """A configuration with some values, names or bytes that it should not have."""
    kind = draw(st.sampled_from(("values", "values", "names", "bytes", "other", "text")))
    if kind == "text":
        return draw(st.sampled_from(TEXTS))
    if kind == "other":
        return json.dumps(draw(json_values)).encode()
    whole = json.dumps(document)
    if kind == "bytes":
        return draw(damaged((whole.encode(), whole.encode("utf-16"), whole.encode("utf-8-sig"))))
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        config = document["config"]
        name = draw(st.sampled_from(sorted(config)))
        if kind == "values":
            config[name] = draw(json_values)
        else:
            value = config.pop(name)
            if draw(st.booleans()):
                config[draw(st.just(name + "s") | texts)] = value
    return json.dumps(document).encode()


class TestConfigurationsOfRuns:
    def test_the_right_one_is_read(self, run, pretrained):
        workdir, document = run
        (workdir / "config.json").write_text(json.dumps(document))
        claim(workdir, document["config"])
        assert load(workdir).label_names == pretrained.label_names

    def test_memory_is_not_taken_as_a_file_says(self, run):
        workdir, document = run
        config = document["config"] | {"model.num_classes": 10**12}
        (workdir / "config.json").write_text(json.dumps({"config": config}))
        assert outcome(load, workdir) is REFUSED

    @examples(40)
    @given(data=st.data())
    def test_others(self, run, data):
        workdir, document = run
        (workdir / "config.json").write_bytes(data.draw(odd_configs(document)))
        for allow in (False, True):
            claims = functools.partial(claim, free_to_change=FREE_TO_CHANGE, allow_changes=allow)
            outcome(claims, workdir, document["config"])
        outcome(load, workdir)


def encoded_images():
    """A small image in every format, and in the odd forms of some."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode, more in (
        *(
            ("JPEG", "RGB", {}),
            ("JPEG", "L", {}),
            ("JPEG", "CMYK", {}),
            ("JPEG", "RGB", {"exif": exif}),
        ),
        *(("JPEG", "RGB", {"progressive": True}), ("PNG", "RGB", {}), ("PNG", "P", {})),
        *(("PNG", "RGBA", {"exif": exif}), ("GIF", "P", {}), ("WEBP", "RGB", {})),
        *(("WEBP", "RGBA", {"lossless": True}), ("TIFF", "RGB", {}), ("TIFF", "L", {})),
        *(("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "RGB", {"compression": "jpeg"})),
        *(("BMP", "RGB", {}), ("BMP", "P", {}), ("PPM", "RGB", {}), ("PPM", "L", {})),
    ):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind, **more)
        yield buffer.getvalue()


IMAGES = (*encoded_images(), b"P3\n2 1\n255\n1 2 3 4 5 6\n")


# As in a program: a warning of Pillow's is none of the caller's business.
@pytest.mark.filterwarnings("ignore")
class TestImages:
    @pytest.mark.parametrize("image", IMAGES)
    def test_whole_ones_are_read(self, image):
        assert decode(image, 8).shape == (8, 8, 3)

    @examples(400)
    @given(data=damaged(IMAGES))
    def test_damaged_ones(self, data):
        began = time.monotonic()
        with contextlib.suppress(DecodeError):
            pixels = decode(data, 8)
            assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
        assert time.monotonic() - began < SECONDS


TRAIN = "own-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def prepared(data_dir, tmp_path_factory):
    """A dataset that was prepared once: its data directory, its folder and its files' bytes."""
    folder = tmp_path_factory.mktemp("tfds")
    source = data_dir / "shapes_and_textures" / "1.0.0"
    target = folder / "own" / "1.0.0"
    target.mkdir(parents=True)
    for path in source.iterdir():
        name = path.name.replace("shapes_and_textures", "own")
        content = path.read_bytes()
        if path.suffix == ".json":
            content = content.replace(b'"shapes_and_textures"', b'"own"')
        (target / name).write_bytes(content)
    return folder, target, {path.name: path.read_bytes() for path in target.iterdir()}


def put(prepared, name=None, content=b""):
    """The dataset, perhaps with other bytes in one of its files."""
    data_dir, folder, files = prepared
    for other, before in files.items():
        (folder / other).write_bytes(content if other == name else before)
    return data_dir


def labels(data_dir):
    """The labels of all images, each of which was decoded, or None where there are too many."""
    dataset = open_dataset("own", data_dir)
    if len(dataset.train) > 1000:
        return None
    images = open_examples(dataset.train, 8)
    return images.take(range(len(images)))["label"].tolist()


@pytest.fixture(scope="module")
def whole(prepared):
    """The labels of the dataset as it was prepared."""
    return labels(put(prepared))


@pytest.mark.filterwarnings("ignore")
class TestRecords:
    def test_whole_ones_are_read(self, whole):
        assert sorted(whole) == sorted(index % 10 for index in range(64))

    @examples(15)
    @given(data=st.data())
    def test_damaged_files_of_records(self, prepared, whole, data):
        """They have checksums, so that what is read is what was written."""
        content = data.draw(damaged((prepared[2][TRAIN],)))
        assert outcome(labels, put(prepared, TRAIN, content)) in (REFUSED, whole)

    @examples(15)
    @given(data=st.data())
    def test_damaged_records(self, prepared, data):
        """Records whose checksums are right, and what is in them is not."""
        data_dir = put(prepared)
        path = prepared[1] / TRAIN
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:
            records = reader.read([0, 1, 2])
        records[1] = data.draw(damaged((records[1],)))
        with contextlib.closing(ArrayRecordWriter(str(path), "group_size:1")) as writer:
            for record in records + 61 * records[:1]:
                writer.write(record)
        result = outcome(labels, data_dir)
        assert result is REFUSED or len(result) == 64

    @pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "label.labels.txt"])
    @examples(15)
    @given(data=st.data())
    def test_damaged_descriptions(self, prepared, name, data):
        content = data.draw(damaged((prepared[2][name],)))
        outcome(labels, put(prepared, name, content))
