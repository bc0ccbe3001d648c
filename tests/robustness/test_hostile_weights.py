"""Weight files made to do harm: each is refused in one line, before memory is taken as it says.

The bombs are small files that claim, or unpack to, gigabytes. A right file of the same kind may be
of any size up to 2 GiB, so a limit on the size of the file alone would not help.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights import name_maps, pickles, safetensors_files
from flax_alexnet.weights.labels import read_labels
from flax_alexnet.weights.load import load, read
from flax_alexnet.weights.pickles import NUMPY, PickleError, dictionary, read_pickle
from tests.foreign_files import varint

MB = 2**20
PROTOCOL_4 = b"\x80\x04"


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor(shape, kind="F32", end=0):
    return {"features.0.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, end]}}


def of_ours(metadata):
    return safetensors({"__metadata__": {"flax_alexnet": metadata}})


def npy_header(descr, shape):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def zipped(*members, kind=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        for name, data in members:
            file.writestr(name, data)
    return buffer.getvalue()


def zeros(megabytes):
    """So many, deflated: each megabyte on its own, to the same bytes."""
    deflate = zlib.compressobj(9, wbits=-15)
    piece = deflate.compress(bytes(MB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return piece * megabytes + zlib.compressobj(9, wbits=-15).flush()


def lying_zip(name, claimed, megabytes, start=b""):
    """A member that unpacks to many times of what the directory says."""
    first = zlib.compressobj(9, wbits=-15)
    data = first.compress(start) + first.flush(zlib.Z_FULL_FLUSH) + zeros(megabytes)
    sizes = struct.pack("<IIIHH", 0, len(data), claimed, len(name), 0)
    head = struct.pack("<IHHHHH", 0x04034B50, 20, 0, 8, 0, 0) + sizes + name + data
    entry = struct.pack("<IHHHHHH", 0x02014B50, 20, 20, 0, 8, 0, 0) + sizes
    entry += struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return head + entry + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(entry), len(head), 0)


def many_members(count, ending):
    """So many empty files within, of which only the directory is written."""
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, *[0] * 7, 10, *[0] * 6)
    names = [f"{number:06}{ending}".encode() for number in range(count)]
    directory = b"".join(entry + name for name in names)
    counts = struct.pack("<HHII", min(count, 65535), min(count, 65535), len(directory), 4)
    return b"PK\x03\x04" + directory + struct.pack("<IHH", 0x06054B50, 0, 0) + counts + b"\0\0"


def field(number, value):
    """A field of a protocol buffer, of a whole number or of bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def caffe(blob):
    return field(100, field(1, b"conv1") + b"".join(field(7, one) for one in blob))


def npy_pickle(data):
    return npy_header("|O", "()") + data


# A name: the ending, the bytes, and a part of what is said.
FILES = {
    "a header of 2⁶³ bytes": ("safetensors", struct.pack("<Q", 2**63) + b"{}", "not known as"),
    "a header of 9 MB": ("safetensors", safetensors(b"{" + b" " * 9 * MB + b"}"), "its header has"),
    "many tensors": (
        "safetensors",
        safetensors({f"t{i}": {"dtype": "F32"} for i in range(12_000)}),
        "more than 10,000 tensors",
    ),
    "a header that is a list": ("safetensors", safetensors(b"{}  [1]"), "Extra data"),
    "a header nested deep": (
        "safetensors",
        safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "nested too deep",
    ),
    "a side of 0": (
        "safetensors",
        safetensors(tensor([0, 2**62, 2**62])),
        "features.0.weight is 0×4611686018427387904×4611686018427387904, expected 64×3×11×11",
    ),
    "a side beyond 64 bits": ("safetensors", safetensors(tensor([10**30])), "safetensors file"),
    "sides that are none": ("safetensors", safetensors(tensor([1.5, True])), "safetensors file"),
    "a type that is not read": (
        "safetensors",
        safetensors(tensor([4], "F8_E4M3", 4), bytes(4)),
        "its features.0.weight is of the type F8_E4M3, which is not read",
    ),
    "a type that is a list": ("safetensors", safetensors(tensor([4], ["F32"])), "safetensors file"),
    "metadata nested deep": ("safetensors", of_ours("[" * 200_000), "nested too deep"),
    "metadata in NaN": ("safetensors", of_ours('{"format": NaN}'), "the format nan; expected 1"),
    "metadata in 5,000 digits": (
        "safetensors",
        of_ours('{"format": 1, "model": {"num_classes": ' + "9" * 5000 + "}}"),
        "is damaged (its metadata: Exceeds the limit",
    ),
    "metadata in a list": ("safetensors", of_ours("[1, 2]"), "is damaged (its metadata"),
    "metadata in a text": ("safetensors", of_ours('"x"'), "is damaged (its metadata"),
    "metadata in nothing": ("safetensors", of_ours("null"), "is damaged (its metadata"),
    "arrays that unpack": (
        "npz",
        zipped(
            ("conv1/kernel.npy", npy_header("<f4", (60 * MB // 4,)) + bytes(60 * MB)),
            kind=zipfile.ZIP_DEFLATED,
        ),
        "conv1/kernel is 15728640, expected 11×11×3×64",
    ),
    "a size that lies": (
        "npz",
        lying_zip(b"conv1/kernel.npy", 64, 200, npy_header("<f4", (0,))),
        "cannot read",
    ),
    "a header that unpacks": (
        "npz",
        lying_zip(b"a.npy", 200 * MB, 200, b"\x93NUMPY\x02\x00" + struct.pack("<I", 199 * MB)),
        "cannot read",
    ),
    "many arrays": ("npz", many_members(12_000, ".npy"), "more than 10,000 files within"),
    "a long directory": ("npz", many_members(60_000, ".npy"), "its directory has"),
    "bzip2": ("npz", zipped(("a.npy", b"x"), kind=zipfile.ZIP_BZIP2), "a method that is not read"),
    "an absurd shape": ("npz", zipped(("a.npy", npy_header("<f4", (10**20,)))), "a shape that no"),
    "a negative shape": ("npz", zipped(("a.npy", npy_header("<f4", (-1, -4)))), "a shape that no"),
    "long texts": ("npz", zipped(("a.npy", npy_header("S2000000000", (0,)))), "no array of numb"),
    "a deflated pickle": (
        "pth",
        zipped(("a/data.pkl", bytes(60 * MB)), kind=zipfile.ZIP_DEFLATED),
        "compressed, which torch.save never does",
    ),
    "a pickle's size that lies": ("pth", lying_zip(b"a/data.pkl", 100, 200), "compressed"),
    "many storages": ("pth", many_members(60_000, ""), "its directory has"),
    "a header of 2 GB": (
        "npy",
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 1000,
        "cannot read",
    ),
    "many blobs": ("caffemodel", caffe([b""] * 12_000), "more than 10,000 blobs"),
    "many blobs of one axis": (
        "caffemodel",
        caffe([field(7, field(1, 0))] * 25_000),
        "more than 10,000 blobs",
    ),
    "many fields": ("caffemodel", field(5, b"") * 60_000, "more than 50,000 fields"),
    "many axes": ("caffemodel", caffe([field(7, field(1, b"\1" * MB))]), "more than 8 axes"),
    "many axes, one by one": (
        "caffemodel",
        caffe([field(7, field(1, 1) * 40_000)]),
        "more than 8 axes",
    ),
    "many pieces of numbers": (
        "caffemodel",
        caffe([field(5, b"") * 60_000]),
        "more than 50,000 fields",
    ),
    "groups": ("caffemodel", b"\xa3\x06" * 1000, "a kind that Caffe does not write"),
    "a number without an end": ("caffemodel", b"\x08" + b"\xff" * 100, "a number does not end"),
    "a length beyond the file": (
        "caffemodel",
        b"\xa2\x06" + varint(2**31 - 1) + b"x",
        "reaches beyond its end",
    ),
    "a negative side": (
        "caffemodel",
        caffe([field(7, field(1, varint(2**64 - 1))) + field(5, bytes(4))]),
        "a blob of -1 has 1 numbers",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_each_is_refused_in_a_line_and_takes_no_memory(name, tmp_path):
    ending, data, says = FILES[name]
    path = tmp_path / f"model.{ending}"
    path.write_bytes(data)
    assert len(data) < 10 * MB, "it costs its maker little"
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 5000
    assert peak < 40 * MB
    assert time.monotonic() - start < 10


def test_numbers_are_read_after_all_shapes_are_known_to_be_right(tmp_path, monkeypatch):
    """A right file but for one bias, whose error costs nothing though all else is right."""
    shapes, _ = name_maps._shapes("torchvision", 1000)
    arrays = {path: np.zeros(shape, np.float32) for path, shape in shapes.items() if "conv" in path}
    np.savez_compressed(
        tmp_path / "model.npz", **arrays | {"conv5/bias": np.zeros(255, np.float32)}
    )
    asked = []
    monkeypatch.setattr(
        "flax_alexnet.weights.numpy_files.read_member", lambda *args: asked.append(args)
    )
    with pytest.raises(UserError, match="conv5/bias is 255, expected 256"):
        load(tmp_path / "model.npz")
    assert asked == []


def test_errors_list_a_hundred_tensors_at_most(tmp_path):
    save_file({f"t{i}": np.zeros(1, np.float32) for i in range(5000)}, tmp_path / "n.safetensors")
    with pytest.raises(UserError, match=r"; and 4,\d{3} more$"):
        load(tmp_path / "n.safetensors")


def test_sizes_of_other_files(tmp_path):
    """A mean image and label names: what is no regular file, or too large, is not read."""
    (tmp_path / "model.caffemodel").write_bytes(caffe([field(7, field(1, 1)) + field(5, bytes(4))]))
    for name in ("mean", "labels"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
    for bad in (tmp_path / "labels", "/dev/zero"):
        with pytest.raises(UserError, match="cannot read labels"):
            read_labels(Path(bad), 3)
    for bad in (tmp_path / "mean", "/dev/zero"):
        with pytest.raises(UserError, match=r"cannot read .* as a mean image"):
            read(tmp_path / "model.caffemodel", variant="caffe", mean=Path(bad))


VALUES = [
    *(1e400, -1e400, float("nan"), 10**400, -1, 0, 2**63, True, None, "x", "", [], {}, [[]]),
    *([1e400] * 3, ["\ud800"] * 4, {"a": 1e400}, ["x" * 5000] * 4),
]
PLACES = [
    ("format",),
    *(("model", key) for key in safetensors_files.MODEL_FIELDS),
    *(("preprocessing", k) for k in ("image_size", "resize", "crop_size", "scale")),
    *(("label_names",), ("source",), ("source", "file"), ("model",), ("preprocessing",)),
]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_any_value_at_any_place_of_the_metadata_is_read_or_one_line(place, weights, tmp_path):
    tensors = load_file(weights)
    for value in VALUES:
        metadata = read_metadata(weights)
        inner = metadata
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, {safetensors_files.KEY: json.dumps(metadata)})
        said = said_of(path)
        assert len(said) < 30_000
        assert said.isprintable(), value


def said_of(path):
    """The texts of a model, or the line with which it is refused."""
    try:
        pretrained = load(path)
    except UserError as error:
        return str(error)
    return " ".join([*pretrained.label_names, *pretrained.source.values()])


def read_metadata(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(
        json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"][safetensors_files.KEY]
    )


# Pickles that make much of little: instructions, and how often they come.


def text(data):
    return b"X" + struct.pack("<I", len(data)) + data


def name(word):
    return b"\x8c" + bytes([len(word)]) + word


def array(kind=b"f4"):
    """What makes an empty array; its parts are kept as 0, 1 and 2."""
    dtype = b"cnumpy\ndtype\n" + name(kind) + b"K\0K\1\x87Rq\2"
    return b"cnumpy.core.multiarray\n_reconstruct\nq\0cnumpy\nndarray\nq\1" + dtype + b"0"


EMPTY = b"h\0h\1K\0\x85C\1b\x87R"  # another one
PAIRS = b"](" + b"(K\1Nt" * 50_000 + b"eq\x010"
LONG_NUMBER = b"\x8b" + struct.pack("<i", MB) + b"\x7f" * MB
PICKLES = {
    "a text that is encoded again and again": (
        b"c_codecs\nencode\nq\0" + text(b"x" * MB) + b"q\1(",
        b"h\0h\1" + name(b"latin1") + b"\x86R",
    ),
    "a list that becomes a dictionary again and again": (
        b"ccollections\nOrderedDict\nq\0" + PAIRS + b"(",
        b"h\0h\1\x85R",
    ),
    "a name of two long texts": (
        text(b"m" * MB) + b"q\0" + text(b"n" * MB) + b"q\1(",
        b"h\0h\1\x93",
    ),
    "many arguments": (
        b"ccollections\nOrderedDict\nq\0(" + b"N" * 100_000 + b"tq\1(",
        b"h\0h\1R",
    ),
    "the state of an array in a text": (
        array()
        + b"(K\1J"
        + struct.pack("<i", MB // 4)
        + b"\x85h\2K\0"
        + text(b"x" * MB)
        + b"tq\3(",
        EMPTY + b"h\3b",
    ),
    "the state of an array in another order of bytes": (
        array()
        + b"h\2(K\3"
        + name(b">")
        + b"tb(K\1J"
        + struct.pack("<i", MB // 4)
        + b"\x85h\2K\0B"
        + struct.pack("<I", MB)
        + bytes(MB)
        + b"tq\3(",
        EMPTY + b"h\3b",
    ),
    "a shape of long numbers": (
        array() + LONG_NUMBER + b"q\4(",
        EMPTY + b"(K\1(" + b"h\4" * 8 + b"th\2K\0C\4abcdtb",
    ),
    "texts whose letters take four bytes": (b"(", text(b"x" * MB + "😀".encode())),
    "long lines": (b"(", b"V" + b"x" * 2 * MB + b"\n"),
    "a line without an end": (b"(V" + b"x" * 20 * MB, b"x"),
    "a value of 4 GB": (b"(B\xff\xff\xff\xff", b"x"),
    "a text of 250 MB": (b"(X" + struct.pack("<I", 250 * 10**6), b"x"),
}


@pytest.mark.parametrize("attack", PICKLES)
def test_pickles_that_make_much_of_little(attack, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 30_000)
    monkeypatch.setattr(pickles, "LARGEST_PICKLE", 0)  # what is given below counts
    start, again = PICKLES[attack]
    data = PROTOCOL_4 + start + again * (2000 if len(again) < 1000 else 100) + b"l."
    if attack == "many arguments":
        monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 300_000)
    admitted = {**NUMPY, "collections.OrderedDict": dictionary}
    limit = 64 * 10**6
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(PickleError) as refused:
            read_pickle(io.BytesIO(data), admitted, largest=limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert "instructions," not in str(refused.value), "it was not stopped for what it does"
    assert peak < 2 * limit
    assert time.monotonic() - begun < 10


def test_a_dictionary_of_layers_is_no_way_round(tmp_path):
    """Layers that share one list of arrays, and arrays of more rows than can be counted."""
    row = np.zeros(0, np.float32)
    shared = [row] * 200
    for value, says in (
        ({f"l{i}": shared for i in range(200)}, "more than 10,000 arrays"),
        ({"conv1": np.zeros((10**15, 0), np.float32)}, "something else than a list of arrays"),
    ):
        np.save(tmp_path / "model.npy", np.array(value, object), allow_pickle=True)
        with pytest.raises(UserError, match=says):
            load(tmp_path / "model.npy")


def test_keys_of_storages_are_not_hashed_for_ever(tmp_path):
    """A tuple of tuples of tuples, each twice the same, in the old format's list of keys."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}]
    tuples = PROTOCOL_4 + b"K\1q\0" + b"h\0h\0\x86q\x000" * 60 + b"]h\0a."
    tensor_of_one = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text(b"storage")
        + b"ctorch\nFloatStorage\n"
        + text(b"k")
        + text(b"cpu")
        + b"K\1NtQK\0K\1\x85K\1\x85\x89}tR"
    )
    value = PROTOCOL_4 + b"}" + text(b"a") + tensor_of_one + b"s."
    data = b"".join(pickle.dumps(part, 2) for part in parts[:3]) + value + tuples
    (tmp_path / "model.pth").write_bytes(data)
    with pytest.raises(UserError, match="a storage that makes no sense"):
        load(tmp_path / "model.pth")


MEASURE = """
import pathlib, re, sys
from flax_alexnet.commands import convert
code = convert.main([sys.argv[1], sys.argv[2], "--overwrite"])
# Not the rusage, to which the process that started this one adds its own.
status = pathlib.Path("/proc/self/status").read_text()
print(code, int(re.search(r"VmHWM:\\s+([0-9]+)", status)[1]) // 1024)
"""


def measured(path, tmp_path):
    """The exit code of convert, its standard error, and the most memory it had, in MB."""
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, out], capture_output=True, text=True, check=True
    )
    code, megabytes = done.stdout.splitlines()[-1].split()
    return int(code), done.stderr, int(megabytes)


def giants():
    """Files that claim or unpack to 2 GB, as makers with time on their hands have them."""
    yield "unpacks.npz", zip_of_zeros
    yield "lies.npz", lying_zip(b"conv1/kernel.npy", 64, 2000, npy_header("<f4", (0,)))
    yield "lies.pth", lying_zip(b"a/data.pkl", 100, 2000)
    yield "blobs.caffemodel", caffe([field(7, field(1, 0))] * 3_000_000)
    yield "pieces.caffemodel", caffe([field(5, b"") * 30_000_000])
    yield "axes.caffemodel", caffe([field(7, field(1, b"\1" * 40 * MB))])
    keys = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}
    yield "keys.safetensors", safetensors(keys)
    yield "members.pth", many_members(10**6, "")
    yield (
        "encode.npy",
        npy_pickle(
            PROTOCOL_4
            + b"c_codecs\nencode\nq\0"
            + text(b"x" * 10 * MB)
            + b"q\1("
            + (b"h\0h\1" + name(b"latin1") + b"\x86R") * 100_000
            + b"l."
        ),
    )
    yield "letters.npy", npy_pickle(PROTOCOL_4 + b"(" + text(b"x" * 16 * MB + "😀".encode()) * 30)
    yield "texts.npy", npy_pickle(PROTOCOL_4 + b"(" + text(b"x" * 230 * MB) * 3)


def zip_of_zeros(path):
    file = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with file, file.open("conv1/kernel.npy", "w") as member:
        member.write(npy_header("<f4", (500 * MB,)))
        for _ in range(2000):
            member.write(bytes(MB))


@pytest.mark.slow
def test_no_file_takes_300_megabytes_more_than_a_right_one(tmp_path, weights):
    """Right files of a whole model are read beside, as NumPy, PyTorch and Caffe write them."""
    shapes, _ = name_maps._shapes("torchvision", 1000)
    arrays = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    np.savez(tmp_path / "right.npz", **arrays)
    code, _, least = measured(tmp_path / "right.npz", tmp_path)
    assert code == 0
    idle = measured(weights, tmp_path)[2]
    assert least - idle < 700, "a right file takes its numbers twice, and little beside"
    for title, data in giants():
        path = tmp_path / title
        if callable(data):
            data(path)
        else:
            path.write_bytes(data)
        start = time.monotonic()
        code, said, megabytes = measured(path, tmp_path)
        assert time.monotonic() - start < 30, title
        assert code == 2, title
        assert said.startswith("error: "), title
        assert said.count("\n") == 1, title
        # Where Python 3 wrote a pickle for Python 2, a right file has texts beside its bytes.
        assert megabytes < least + 300 + 250 * (path.suffix == ".npy"), title
        path.unlink()
