"""Small runs of the training, and what they leave."""

import json

from flax_alexnet.train import main

SMALL = [
    *("--model.width", "0.05", "--batch-size", "8", "--steps", "12", "--epochs", "100"),
    *("--log-every", "4", "--eval-epochs", "0.75", "--no-compilation-cache"),
]


def arguments(workdir, data_dir, *more):
    return ["--workdir", str(workdir), "--data.data-dir", str(data_dir), *SMALL, *more]


def read(workdir, name):
    return json.loads((workdir / name).read_text())


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, argv):
    """The one line that a command says when it refuses."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "Summary" not in said.out, "something was compiled or traced before the mistake was said"
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err
