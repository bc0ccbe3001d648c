"""Pickles are read without running anything: what a weight file needs, and nothing else."""

import argparse
import collections
import contextlib
import functools
import io
import os
import pathlib
import pickle
import pickletools

import numpy as np
import pytest

from flax_alexnet.weights import pickles
from flax_alexnet.weights.pickles import NUMPY, PickleError, Skipped, dictionary, read_pickle


def read(data):
    return read_pickle(io.BytesIO(data), {**NUMPY, "collections.OrderedDict": dictionary})


class Calls:
    """What pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def canary(tmp_path):
    """A file that appears if a pickle gets its way."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values(protocol):
    shared = ["twice"]
    value = {
        "numbers": [0, 1, 255, 65_535, 2**31, -(2**40), 2**80, 1.5, True, False, None],
        "words": ["", "plain", "größer", "line\nbreak", b"", b"\x00\xff", "x" * 300, b"x" * 300],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": {"a": {1: []}, "b": shared, "c": shared},
        "ordered": collections.OrderedDict(z=1, a=[2]),
    }
    result = read(pickle.dumps(value, protocol))
    assert result == value
    assert result["nested"]["b"] is result["nested"]["c"]


def test_ordered_dictionary_of_python_2():
    data = pickle.dumps(Calls(collections.OrderedDict, [["b", 1], ["a", (2,)]]), 2)
    assert list(read(data).items()) == [("b", 1), ("a", (2,))]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "|b1"])
def test_arrays(protocol, dtype):
    plain = np.arange(24).reshape(2, 3, 4).astype(dtype)
    value = [plain, plain.T, plain[:, :0], plain[0, 0, 0], np.array(3, dtype)]
    for ours, theirs in zip(read(pickle.dumps(value, protocol)), value, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype.newbyteorder("=")


def attacks(canary):
    run = f"open({str(canary)!r}, 'w').close()"
    touch = f"touch {canary}"
    yield "system", pickle.dumps(Calls(os.system, touch))
    yield "eval", pickle.dumps(Calls(eval, run))
    yield "exec in protocol 0", pickle.dumps(Calls(exec, run), 0)
    yield "open", pickle.dumps(Calls(open, str(canary), "w"))
    yield "an argument", pickle.dumps(Calls(dict, Calls(os.system, touch)))
    yield "getattr", pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system"))
    yield "a dotted name", b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93."
    # numpy's own helpers that evaluate or load.
    for name in (b"testing._private.utils\nrunstring", b"f2py.crackfortran\nmyeval"):
        yield name.decode(), b"cnumpy." + name + b"\n(V" + run.encode() + b"\n}tR."
    yield "another codec", pickle.dumps(Calls(__import__("_codecs").encode, "00", "hex"), 2)
    yield "PyTorch's loader", b"ctorch\nload\n(V/tmp/x\ntR."
    # The instructions that make instances, set attributes and look into registries.
    yield "INST", b"(V" + touch.encode() + b"\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nV" + touch.encode() + b"\no."
    yield "NEWOBJ", b"\x80\x02cnumpy\nndarray\n)\x81."
    yield "EXT", b"\x80\x02\x82\x01."
    yield "BUILD of a name", b"cnumpy\nndarray\n}V__reduce__\nNsb."
    yield "BUILD of a number", b"\x80\x02K\x01}b."
    yield "BUILD of a list", b"]}b."
    yield "a call of a class that is never called", b"cnumpy\nndarray\n(K\x01tR."
    yield "a call of a number", b"K\x01)R."
    yield "a persistent id", b"Vid\nQ."
    yield "out-of-band buffers", b"\x80\x05\x97."


def test_nothing_runs(canary):
    for name, data in attacks(canary):
        with pytest.raises(PickleError) as refused:
            read(data)
        assert "\n" not in str(refused.value), name
        if name in ("system", "eval", "a dotted name"):
            assert "only arrays and plain containers are read" in str(refused.value)
        assert not canary.exists(), name


def test_attacks_are_real(canary):
    """The first of them do their work where nobody holds them back."""
    harm = dict(attacks(canary))
    for name in ("system", "eval", "INST"):
        pickle.loads(harm[name])
        canary.unlink()


class Thing:
    """An object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Things(list):
    """An object with items."""


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_beside_what_is_plain_are_skipped(protocol, canary):
    touch = Calls(os.system, f"touch {canary}")
    objects = {
        "call": touch,
        "argument": Calls(dict, touch),
        "instance": Thing(state=touch, more=[touch]),
        "list": Things([touch, touch]),
        "counts": collections.Counter({"a": 1}),
        "default": collections.defaultdict(list, {"a": [touch]}),
        "namespace": argparse.Namespace(rate=0.1, path=pathlib.PurePath("a"), more=touch),
        "set": {1, 2},
        "frozen": frozenset({1}),
        "class": Thing,
        "keywords": functools.partial(print, touch, end=""),
    }
    before, after = {"a": [1, 2.5]}, ["b", None]
    data = pickle.dumps({"before": before, **objects, "after": after}, protocol)
    result = read(data)
    assert (result.pop("before"), result.pop("after")) == (before, after)
    assert result.keys() == objects.keys()
    assert {type(value) for value in result.values()} == {Skipped}
    assert result["namespace"].name == "argparse.Namespace"
    assert result["call"].name.endswith(".system")


def test_other_keys_than_names_and_numbers_are_left_out():
    value = {"name": 1, 2: 2, 0.5: 3, None: 4, (1, 2): 5, Thing: 6, b"bytes": 7}
    keys = list(read(pickle.dumps(value)))
    assert keys[:4] == ["name", 2, 0.5, None]
    assert [key.name for key in keys[4:]] == ["tuple", f"{__name__}.Thing", "bytes"]
    # A key that would be hashed for ever.
    assert len(read(b"K\x01q\x000" + b"h\x00h\x00\x86q\x000" * 60 + b"}h\x00Ns.")) == 1


def array_pickle(shape, data, dtype="f4"):
    """As `ndarray.__reduce__` has it, with any shape and data."""
    array = np.zeros(1, np.float32)
    reconstruct, arguments, (version, _, _, fortran, _) = array.__reduce__()

    class Array:
        def __reduce__(self):
            return reconstruct, arguments, (version, shape, np.dtype(dtype), fortran, data)

    return pickle.dumps(Array())


@pytest.mark.parametrize(
    "data",
    [
        array_pickle((2**60,), b"1234"),
        array_pickle((2**31, 2**31, 4), b""),
        array_pickle((-1,), b"1234"),
        array_pickle((1,) * 40, b"1234"),
        array_pickle((2.0,), b"12345678"),
        array_pickle((2,), [1.0, 2.0]),
        array_pickle((2,), [object, "x"], "O"),
        array_pickle((), ["x", "y"], "O"),
        array_pickle((1,), b"12345678", "V8"),
        array_pickle((1,), b"12345678", "M8[s]"),
        array_pickle((), [1], "O").replace(b"O8", b"O8,(2000,)O"),
        array_pickle((1, 2), [[1, 2]], "i4,O"),
        pickle.dumps(np.array(["text"])),
        pickle.dumps(np.array([{}, {}], object)),
        pickle.dumps(np.zeros(2, [("field", "f4")])),
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",  # BINBYTES8 of 2⁶³ − 1 bytes
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",  # BINUNICODE8
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fx.",  # BYTEARRAY8
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # LONG4
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # FRAME, and no value
        b"Nr\xff\xff\xff\xff0.",  # a memo of 2³² entries, then no value
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02K\x01" + b"\x86".join([b"2"] * 50) + b".",  # DUP
    ],
)
def test_bombs(data):
    with pytest.raises(PickleError) as refused:
        read(data)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_too_many_instructions(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 1000)
    assert read(b"]" * 999 + b".") == []
    with pytest.raises(PickleError, match="more than 1,000 instructions"):
        read(b"]" * 1000 + b".")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cut_off_or_changed(protocol):
    """Every prefix is refused; of a changed byte comes a `PickleError` or nothing."""
    data = pickle.dumps({"conv1": [np.ones((2, 2), np.float32), None], "x": (1, 2.5)}, protocol)
    for end in range(len(data)):
        with pytest.raises(PickleError):
            read(data[:end])
    rng = np.random.default_rng(0)
    for _ in range(3000):
        changed = bytearray(data)
        changed[rng.integers(len(data))] = rng.integers(256)
        with contextlib.suppress(PickleError):
            read(bytes(changed))


def test_every_instruction_is_known():
    """Each of Python's opcodes alone is read or refused, never a crash."""
    for opcode in pickletools.opcodes:
        for tail in (b".", b"\x00.", b"\x01\x00\x00\x00\x00\x00\x00\x00.", b"1\n.", b"a\nb\n."):
            for head in (b"", b"(", b"N", b"](", b"})", b"(]NN"):
                with contextlib.suppress(PickleError):
                    read(head + opcode.code.encode("latin-1") + tail)


def test_stops_at_the_end():
    stream = io.BytesIO(pickle.dumps(1) + pickle.dumps("two") + b"rest")
    assert [read_pickle(stream, {}), read_pickle(stream, {}), stream.read()] == [1, "two", b"rest"]
