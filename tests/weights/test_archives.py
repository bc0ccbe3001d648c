"""Archives whose directory lies."""

import zipfile

import pytest

from flax_alexnet.utils.errors import UserError
from flax_alexnet.weights.labels import (
    read_labels,
)
from flax_alexnet.weights.load import load


def test_a_damaged_zip_is_said_in_a_line(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for place in range(directory, len(whole)):
        for value in (0, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with pytest.raises(UserError):
                load(path)
    (tmp_path / "labels").write_text("a\nb\na")
    with pytest.raises(UserError, match="the name 'a' twice"):
        read_labels(tmp_path / "labels", 3)
