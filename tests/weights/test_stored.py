"""Tensors of files: shapes that can be, and numbers that are read once they are wanted."""

import io

import numpy as np
import pytest

from flax_alexnet.weights.stored import MOST_SHOWN, Stored, is_shape, listed, numbers, read_exactly


def test_numbers_are_read_when_they_are_wanted():
    read = []

    def values():
        read.append("now")
        return np.arange(6).reshape(2, 3)

    tensor = Stored((2, 3), np.dtype(int), values)
    assert (tensor.ndim, read) == (2, [])
    assert numbers(tensor).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read == ["now"]
    assert numbers(np.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(), (0,), (1, 2, 3, 4), (2**62,)])
def test_shapes(shape):
    assert is_shape(shape)


@pytest.mark.parametrize("shape", [[1], (-1,), (2**63,), (1.0,), ("1",), (1,) * 9, None])
def test_no_shapes(shape):
    assert not is_shape(shape)


def test_a_stream_is_read_to_the_byte_or_named_as_too_short():
    stream = io.BytesIO(b"12345")
    assert (read_exactly(stream, 3), read_exactly(stream, 0)) == (b"123", b"")
    with pytest.raises(EOFError, match="ends too early"):
        read_exactly(stream, 3)


def test_long_lists_are_cut_and_say_so():
    assert listed(["a", "b"], "; ") == "a; b"
    names = [str(number) for number in range(MOST_SHOWN + 20)]
    assert listed(names).endswith(f"{MOST_SHOWN - 1}, and 20 more")
