"""`predict`: each image with its probabilities or its problem."""

import csv
import json
import os

import numpy as np
import pytest

from flax_alexnet.commands import predict
from tests.images import image_files
from tests.small_models import by_hand


@pytest.mark.parametrize("crops", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_predict_gives_each_image_its_probabilities(
    pretrained, weights, photographs, tmp_path, crops
):
    output = tmp_path / "out" / "predictions.json"
    flags = ["--crops", str(crops), "--top", "4", "--batch-size", "8", "--output", str(output)]
    assert predict.main([str(weights), str(photographs), *flags]) == 0
    rows = json.loads(output.read_text())
    files = image_files(photographs)
    assert [row["name"] for row in rows] == [str(file) for file in files]
    for row, expected in zip(rows, by_hand(pretrained, files, crops), strict=True):
        said = {best["label"]: best["probability"] for best in row["predictions"]}
        assert list(said.values()) == sorted(said.values(), reverse=True)
        np.testing.assert_allclose([said[i] for i in range(4)], expected, rtol=1e-4)
        assert row["predictions"][0]["name"] == pretrained.label_names[int(np.argmax(expected))]


def test_bad_images_are_named_and_stop_no_other(weights, photographs, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = (photographs / "class a" / "0.png").read_bytes()
    (folder / "a.png").write_bytes(good)
    (folder / "b.jpg").write_bytes(b"")
    (folder / "c.png").write_bytes(good[:99])
    (folder / "d.txt").write_text("words")
    (folder / "e.jpg").symlink_to(folder / "nowhere")
    (folder / "f.jpg").mkdir()
    (folder / "f.jpg" / "g.jpg").write_bytes(good)  # a PNG by its bytes
    (folder / ".hidden").write_text("passed over")
    os.mkfifo(folder / "h.jpg")
    output = tmp_path / "predictions.csv"
    assert predict.main([str(weights), str(folder), "--top", "1", "--output", str(output)]) == 0
    with output.open() as file:
        rows = {row["name"].removeprefix(f"{folder}/"): row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if not row["problem"]} == {"a.png", "f.jpg/g.jpg"}
    assert rows["b.jpg"]["problem"] == "it is empty"
    assert "no image in a known format" in rows["d.txt"]["problem"]
    assert "No such file" in rows["e.jpg"]["problem"]
    assert "no regular file" in rows["h.jpg"]["problem"]
    assert len(rows) == 7
    said = capsys.readouterr().out
    assert "2 of 7 images read; 5 not:" in said
    assert predict.main([str(weights), str(folder / "b.jpg")]) == 2
