"""Files that are read: a regular file, of a size that fits what it is said to be."""

import os
import socket

import pytest

from flax_alexnet.utils.inputs import check_regular, open_regular, parse_json, read_bytes, read_json


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        for name in ("pipe", "folder", "link", "/dev/zero", "/dev/null", "socket", "loop", "none"):
            with pytest.raises(OSError, match=r".") as caught:
                check_regular(tmp_path / name)
            assert caught.value.strerror, name
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "good").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "good") as file:
        assert file.read() == b"123"


def test_sizes_are_limited(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes; at most 4 are read"):
        read_bytes(path, 4)
    with path.open("wb") as file:
        file.truncate(2**40)  # which takes no room on the disk
    with pytest.raises(OSError, match="at most"):
        read_json(path)
    with pytest.raises(OSError, match="at most 10 are read"):
        read_bytes("/proc/self/status", 10)  # which says that it has none


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "nothing", b"\xff\xfe\x00"])
def test_text_that_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
