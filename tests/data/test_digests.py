"""Digests of files by their names, sizes and ends."""

import os

from flax_alexnet.data.digests import digest_files


def test_names_sizes_and_ends_count_and_times_apart(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"begin" + bytes(100) + b"end..")
    first = digest_files([("a", path)], end=5)

    os.utime(path, ns=(0, 0))
    later = digest_files([("a", path)], end=5)
    assert (later.content, later.times != first.times) == (first.content, True)

    assert digest_files([("b", path)], end=5).content != first.content
    for content in (b"begin" + bytes(101) + b"end..", b"begin" + bytes(100) + b"END.."):
        path.write_bytes(content)
        assert digest_files([("a", path)], end=5).content != first.content


def test_a_file_that_cannot_be_read_counts_as_such(tmp_path):
    path = tmp_path / "a.png"
    missing = digest_files([("a", path)], end=5)
    path.write_bytes(b"")
    assert digest_files([("a", path)], end=5).content != missing.content


def test_the_number_of_threads_does_not_show_and_the_order_does(tmp_path):
    files = []
    for number in range(200):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]))
        files.append((str(number), path))
    digest = digest_files(files, end=5)
    assert digest == digest_files(files, end=5)
    assert digest.content != digest_files(files[::-1], end=5).content
