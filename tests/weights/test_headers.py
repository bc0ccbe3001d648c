"""Headers of safetensors files, read before their library reads them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights.headers import LARGEST_HEADER, read_header


def test_metadata_and_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.int8)}
    save_file(values, path, metadata={"format": "1"})
    metadata, tensors = read_header(path)
    assert metadata == {"format": "1"}
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        "a": ((2, 3), np.dtype(np.float32)),
        "b": ((2,), np.dtype(np.int8)),
    }
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), values[name])


def file_of(header, size=None):
    encoded = json.dumps(header).encode()
    return (len(encoded) if size is None else size).to_bytes(8, "little") + encoded


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends too early"),
        (file_of({}, LARGEST_HEADER + 1), "more than 8,388,608 bytes"),
        (file_of({}, 100), "ends too early"),
        (file_of({str(n): {} for n in range(10_001)}), "more than 10,000 tensors"),
    ],
)
def test_what_is_none_is_one_line(tmp_path, content, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.safetensors is no safetensors file .*{says}"):
        read_header(path)


def test_types_that_are_not_read_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    path.write_bytes(file_of({"w": entry}) + b"\0\0")
    with pytest.raises(UserError, match="its w is of the type F8_E4M3, which is not read"):
        read_header(path)
