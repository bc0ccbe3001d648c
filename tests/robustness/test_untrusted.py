"""Files and names from others: what they may decide, and what is said of what does not fit."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import jax
import pytest
from PIL import Image

from flax_alexnet.commands.prepare import prepare
from flax_alexnet.config.recipes import QUICKSTART, RECIPES
from flax_alexnet.config.schema import FREE_TO_CHANGE, JAX_SETTINGS, flatten, misfit
from flax_alexnet.data.examples import find_images, read_examples
from flax_alexnet.data.sources import open_dataset, open_splits
from flax_alexnet.training.logger import Clock, RunLog, read_metrics
from flax_alexnet.training.run_directory import FILES, claim, locked, record
from flax_alexnet.training.setup import recorded_parts
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.outputs import check_room
from flax_alexnet.utils.text import printable, read_table
from flax_alexnet.weights import safetensors_files
from flax_alexnet.weights.load import load
from tests.small_models import make_pretrained

CONFIG = flatten(QUICKSTART) | {"dataset.label_names": ["a", "b"]}


def write(workdir, config):
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"config": config, "versions": {}}))


class TestConfigurationFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"optimizer.lerning_rate": 0.1}, "did you mean 'optimizer.learning_rate'?"),
            ({"modle.width": 1}, "did you mean 'model.width'?"),
            ({"zzz": 1}, "unknown key 'zzz': choose one of: those of --help"),
            ({"a\nb": 1}, r"unknown key 'a\\nb'"),
            ({"seed": "0"}, "seed '0', where int is expected"),
            ({"seed": [0]}, "seed [0], where int is expected"),
            ({"seed": False}, "seed False, where int is expected"),
            ({"seed": 0.0}, "seed 0.0, where int is expected"),
            ({"batch_sizes": [[0]]}, "batch_sizes [[0]], where tuple[tuple[int, int]"),
            ({"model.width": None}, "model.width None, where float is expected"),
            ({"optimizer.momentum": "0.9"}, "optimizer.momentum '0.9', where float is expected"),
            ({"optimizer.drop_epochs": [True]}, "optimizer.drop_epochs [True], where tuple[float"),
            ({"augment.scale": [1, 2]}, "augment.scale [1, 2], where float | tuple[float, float"),
            ({"model.dtype": "float16"}, "model.dtype 'float16', where Literal['float32'"),
            ({"dataset.label_names": "ab"}, "dataset.label_names 'ab', where tuple[str, ...] is"),
            ({"data.threads": "2"}, "data.threads '2', where int is expected"),  # free to change
            ({"data.data_dir": 7}, "data.data_dir 7, where Path | None is expected"),
        ],
    )
    def test_a_run_refuses_keys_and_values_that_it_did_not_write(self, tmp_path, change, message):
        write(tmp_path, CONFIG | change)
        with pytest.raises(UserError) as error:
            claim(tmp_path, CONFIG, free_to_change=FREE_TO_CHANGE)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError) as error:
            load(tmp_path)
        assert "no working directory of a run: no config.json that says so (" in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        claim(tmp_path, CONFIG, allow_changes=True)  # the new configuration takes its place

    @pytest.mark.parametrize(
        "record",
        [{"batch_size": 0}, *({"batch_sizes": s} for s in ([[0, 0]], [[5, 8]], [[0, 8], [0, 9]]))],
    )
    def test_batch_sizes_that_no_run_had_are_one_line(self, record):
        with pytest.raises(UserError, match=r"config\.json has batch_sizes \[\["):
            recorded_parts(record, QUICKSTART)

    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
    def test_what_a_run_writes_fits(self, recipe):
        assert misfit(flatten(recipe)) == ""
        scaled = dataclasses.replace(recipe.augment, scale=(0.1, 0.2, 0.3))
        values = flatten(dataclasses.replace(recipe, augment=scaled, init_from=Path("model")))
        assert misfit(values | {"dataset.train": 64, "init_from.sha256": "0"}) == ""

    def test_a_difference_is_shown_with_its_type(self, tmp_path):
        write(tmp_path, CONFIG | {"data.name": "7", "epochs": 24.0})  # 24 is as good as 24.0
        with pytest.raises(
            UserError, match=r"\(data\.name was '7', is now 'shapes_and_textures'\)"
        ):
            claim(tmp_path, CONFIG)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"config": []}', '{"config": 5}', "\x00", '{"config": {}}']
    )
    def test_what_is_no_configuration_is_one_line(self, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError):
            claim(tmp_path, CONFIG)
        with pytest.raises(UserError, match="no working directory of a run"):
            load(tmp_path)

    def test_one_that_is_too_large_is_not_read(self, tmp_path):
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(10**9)
        with pytest.raises(UserError, match=r"cannot read .*: it has 1,000,000,000 bytes; at most"):
            claim(tmp_path, CONFIG)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model.variant": "paper2"}, "no working directory of a run"),
            ({"model.width": "wide"}, "no working directory of a run"),
            ({"data.image_size": 10**9}, "no working directory of a run"),
            ({"dataset.label_names": 7}, "no working directory of a run"),
        ],
    )
    def test_values_of_another_type_are_one_line_where_a_run_is_read(
        self, tmp_path, change, message
    ):
        write(tmp_path, CONFIG | change)
        with pytest.raises(UserError, match=message):
            load(tmp_path)


NESTED = "[" * 100_000
METRICS = [
    {"step": 1, "epoch": 0.5, "train_loss": 2.3, "train_top1": 0.1, "images_per_second": 9.0},
    {"step": 2, "epoch": 1, "eval_loss": 2.2, "eval_top1": 0.1, "eval_top5": 0.5},
]


class TestMetrics:
    """All lines are looked at before a run goes on, and not only where it draws them at its end."""

    @pytest.mark.parametrize(
        "line",
        [
            *("null", "{}", "[]", "7", "{broken", "", NESTED, "\u2028", "\ufeff{}"),
            *('{"step": 1}', '{"step": "1", "epoch": 1}', '{"step": 1.5, "epoch": 1}'),
            *('{"step": NaN, "epoch": 1}', '{"step": 1, "epoch": null}'),
            '{"step": 1, "epoch": ' + "9" * 5000 + "}",
            '{"step": 1, "epoch": ' + "9" * 4000 + "}",
            *(
                '{"step": 1, "epoch": 1, "eval_top1": 0, "train_top1": 0, ' + wrong
                for wrong in (
                    *('"train_loss": null, "eval_loss": 1}', '"eval_loss": NaN, "train_loss": 1}'),
                    *('"train_loss": [1], "eval_loss": 1}', '"eval_loss": true, "train_loss": 1}'),
                    *('"train_loss": 1}', '"eval_loss": 1, "train_loss": 1, "learning_rate": ""}'),
                    '"eval_loss": 1, "train_loss": 1, "images_per_second": 0}',
                )
            ),
        ],
        ids=lambda line: line[:60].encode().decode("ascii", "backslashreplace"),
    )
    def test_a_line_that_no_run_writes_is_one_line(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        path.write_text("\n".join([*map(json.dumps, METRICS), line, *map(json.dumps, METRICS), ""]))
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged \(line 3\): remove it or"):
            read_metrics(path)

    def test_bytes_are_one_line_and_what_a_kill_cut_off_is_left_out(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        whole = "".join(json.dumps(line) + "\n" for line in METRICS)
        for last in ("", '{"step": 3, "ep', NESTED, "{"):
            path.write_text(whole + last)
            assert read_metrics(path) == METRICS
        path.write_bytes(whole.encode() + b"\xff\x00\n")
        with pytest.raises(UserError, match=r"is damaged \(it is not a text file\)"):
            read_metrics(path)

    @pytest.mark.parametrize("text", ["nan", "-1", "1e999", "x", NESTED, ""])
    def test_seconds_that_are_none_are_counted_anew(self, tmp_path, capsys, text):
        (tmp_path / "seconds").write_text(text)
        assert 0 <= Clock(tmp_path / "seconds", time.monotonic()).seconds() < 60
        assert "has no number of seconds; they are counted from 0" in capsys.readouterr().out


class TestSettingsOfJax:
    OURS = CONFIG | {"jax.enable_x64": False, "jax.threefry_partitionable": True}

    def test_others_are_refused_when_a_run_goes_on(self, tmp_path):
        write(tmp_path, self.OURS)
        with pytest.raises(UserError, match=r"\(jax\.enable_x64 was False, is now True\): take an"):
            claim(tmp_path, self.OURS | {"jax.enable_x64": True}, free_to_change=FREE_TO_CHANGE)
        changed = claim(tmp_path, self.OURS | {"jax.enable_x64": True}, allow_changes=True)[1]
        assert changed == ["jax.enable_x64 was False, is now True"]

    def test_a_run_that_did_not_keep_them_goes_on(self, tmp_path):
        write(tmp_path, CONFIG)
        assert claim(tmp_path, self.OURS)[1] == []

    def test_all_that_change_numbers_are_there(self):
        """Of the names of JAX as it is here, with values of the types that are expected of them."""
        values = {f"jax.{name}": getattr(jax.config, f"jax_{name}") for name in JAX_SETTINGS}
        assert misfit(values) == ""


class TestWorkingDirectories:
    def test_one_that_is_gone_is_one_line(self, tmp_path, monkeypatch):
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(UserError, match="cannot write run: No such file or directory"):
            check_room(Path("run"), 1)

    def test_metrics_that_are_removed_while_a_run_goes_on_are_written_anew(self, tmp_path):
        log = RunLog(tmp_path, 0, 9, Clock(tmp_path / "seconds", 0.0))
        log.write(METRICS[0])
        (tmp_path / "metrics.jsonl").unlink()
        log.write(METRICS[1])
        log.close()
        assert read_metrics(tmp_path / "metrics.jsonl") == METRICS

    @pytest.mark.parametrize("again", [False, True], ids=["moved", "another in its place"])
    def test_one_that_is_moved_while_a_run_goes_on_is_one_line(self, tmp_path, again):
        workdir = tmp_path / "run"
        workdir.mkdir()
        log = RunLog(workdir, 0, 9, Clock(workdir / "seconds", 0.0))
        log.write(METRICS[0])
        workdir.rename(tmp_path / "moved")
        if again:
            workdir.mkdir()
        with pytest.raises(UserError, match="run was moved or removed while the run went on: move"):
            log.write(METRICS[1])
        log.close()
        if not again:
            assert not workdir.exists()
        assert read_metrics(tmp_path / "moved" / "metrics.jsonl") == METRICS[:1]

    def test_a_link_elsewhere_is_followed_and_both_names_are_one_directory(self, tmp_path):
        (tmp_path / "real").mkdir()
        link = tmp_path / "link"
        link.symlink_to("real")
        claim(link, CONFIG)
        record(link, CONFIG)
        assert (tmp_path / "real" / "config.json").is_file()
        assert link.is_symlink()
        with pytest.raises(UserError, match="seed was 0, is now 1"):
            claim(tmp_path / "real", CONFIG | {"seed": 1})
        second = locked(tmp_path / "real")
        with locked(link), pytest.raises(UserError, match="is in use by process"):
            second.__enter__()

    @pytest.mark.parametrize("name", FILES)
    def test_a_link_in_the_place_of_a_file_of_ours_is_refused(self, tmp_path, name):
        workdir = tmp_path / "run"
        workdir.mkdir()
        (tmp_path / "mine").write_text("mine")
        (workdir / name).symlink_to(tmp_path / "mine")
        with pytest.raises(UserError, match=f"{name} is not what a run left there"):
            claim(workdir, CONFIG)
        assert (tmp_path / "mine").read_text() == "mine"

    def test_a_link_in_the_place_of_a_half_written_file_is_not_followed(self, tmp_path):
        mine = tmp_path / "mine"
        mine.write_text("mine")
        names = ("config", ".json"), ("metrics", ".jsonl")
        for link in (f".{stem}.partial{end}" for stem, end in names):
            (tmp_path / link).symlink_to(mine)
        for link in (f"{stem}{end}.partial" for stem, end in names):
            (tmp_path / link).symlink_to(mine)
        record(tmp_path, CONFIG)
        RunLog(tmp_path, 0, 1, Clock(tmp_path / "seconds", 0.0)).close()
        assert mine.read_text() == "mine"
        assert not (tmp_path / "config.json").is_symlink()

    def test_a_link_to_nowhere_is_one_line(self, tmp_path):
        link = tmp_path / "link"
        link.symlink_to("gone")
        with pytest.raises(UserError, match="cannot write to"):
            claim(link, CONFIG)
        assert not (tmp_path / "gone").exists()

    def test_a_link_to_a_file_is_one_line(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("file")
        with pytest.raises(UserError, match="cannot write to"):
            claim(tmp_path / "link", CONFIG)
        assert (tmp_path / "file").read_text() == "mine"


# What a weight file may call its classes, and itself.
LABELS = (
    "\x1b[2J\x1b[31mHACKED\x1b[0m",
    '=HYPERLINK("http://evil","x")',
    "+1+1",
    "-2+3",
    "@SUM(1)",
    'a,b"c',
    "line\nbreak",
    "\t=1",
    "<script>alert(1)</script>",
    "\u202ertl\u2028x\0",
    "\ud800",
    "$\\frac{$ ![x](http://evil)",
)
SOURCE = {
    "file": "x\x1b]0;owned\x07\nerror: a line of its own",
    "format": "<img src=x onerror=alert(1)>\n\n## Injected",
    "sha256": "`\n```\n[click](http://evil) www.evil.com me@evil.com \ud800",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The file; written past `save`, with the raw texts."""
    pretrained = make_pretrained(num_classes=len(LABELS))
    path = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    safetensors_files.save(dataclasses.replace(pretrained, label_names=LABELS, source=SOURCE), path)
    assert b"u001b[2J" in path.read_bytes()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image for each of as many classes."""
    folder = tmp_path_factory.mktemp("folder")
    for number in range(len(LABELS)):
        (folder / f"{number:02} class").mkdir()
        image = Image.new("RGB", (80, 80), (20 * number, 90, 0))
        image.save(folder / f"{number:02} class" / "a.png")
    return folder


class TestLabelNamesAndSource:
    """They reach the terminal, tables, JSON, Markdown and images; each in a form that is safe."""

    @pytest.fixture
    def run(self, hostile, capfd):
        """Runs a command on the file; what it prints are lines that any terminal shows."""

        def run(command, *arguments):
            main = importlib.import_module(f"flax_alexnet.commands.{command[0]}").main
            code = main([*command[1:], str(hostile), *map(str, arguments)])
            said, errors = capfd.readouterr()
            assert code == 0, errors
            assert all(line.isprintable() for line in (said + errors).split("\n"))
            return said

        return run

    SHOWN = tuple(map(printable, LABELS))

    def test_they_are_printable_as_soon_as_they_are_read(self, hostile):
        pretrained = load(hostile)
        assert pretrained.label_names == self.SHOWN
        assert pretrained.label_names[0] == r"\x1b[2J\x1b[31mHACKED\x1b[0m"
        assert pretrained.source == {key: printable(value) for key, value in SOURCE.items()}

    def test_convert(self, run, tmp_path):
        said = run(["convert"], tmp_path / "out.safetensors")
        assert r"source x\x1b]0;owned\x07\nerror: a line of its own (<img" in said
        assert load(tmp_path / "out.safetensors").label_names == self.SHOWN

    def test_predict(self, run, folder, tmp_path):
        table, file, plot = (tmp_path / f"p.{ending}" for ending in ("csv", "json", "png"))
        image, every = folder / "00 class" / "a.png", ["--top", str(len(LABELS))]
        run(["predict"], image, *every, "--output", table, "--plot", plot)
        run(["predict"], image, *every, "--output", file)
        rows = json.loads(file.read_text(encoding="utf-8"))
        assert {best["name"] for row in rows for best in row["predictions"]} == set(self.SHOWN)
        with table.open(newline="", encoding="utf-8") as lines:
            assert {row[4] for row in read_table(lines)} == {"class", *self.SHOWN}
        harmless(table)
        with Image.open(plot) as drawn:
            assert drawn.width < 5000

    def test_evaluate(self, run, folder, tmp_path):
        flags = ["--data.name", f"folder:{folder}", "--data.split", "all", "--match-by-order"]
        run(["evaluate"], *flags, "--output", tmp_path)
        report = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
        assert report["weights"][0]["file"] == printable(SOURCE["file"])
        with (tmp_path / "classes.csv").open(newline="", encoding="utf-8") as lines:
            assert [row[0] for row in read_table(lines)] == ["class", *self.SHOWN]
        with (tmp_path / "confusion.csv").open(newline="", encoding="utf-8") as lines:
            head, *rows = read_table(lines)
        assert head[1:] == [row[0] for row in rows] == list(self.SHOWN)
        for name in ("classes.csv", "confusion.csv"):
            harmless(tmp_path / name)
        with Image.open(tmp_path / "confusion.png") as image:
            assert image.width < 5000

    @pytest.mark.slow
    def test_plot(self, run, folder, tmp_path):
        image = folder / "00 class" / "a.png"
        run(["plot"], image, "--output", tmp_path, "--layers", "conv1")
        with Image.open(tmp_path / "a_grad_cam.png") as drawn:
            assert drawn.width < 5000

    def test_the_card_of_the_hub(self, run, tmp_path):
        run(["hub", "push"], "me/model", "--folder", tmp_path / "card")
        card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
        (line,) = (line for line in card.split("\n") if line.startswith("- **Source:**"))
        assert line.isprintable()
        shown = re.sub(r"\\.", "", line.partition("** ")[2])  # without what is escaped
        assert not re.search(r"[<>\[\]`#:@.]", shown)
        headings = [line for line in card.split("\n") if line.startswith("#")]
        assert headings == ["# model", "## Use"]
        assert load(tmp_path / "card" / "model.safetensors").label_names == self.SHOWN


def harmless(table):
    """No cell is one that a spreadsheet would compute, and each line is one."""
    with table.open(newline="", encoding="utf-8") as lines:
        for row in csv.reader(lines):
            for cell in row:
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")), cell
                assert cell.isprintable()


def test_a_dataset_runs_no_code_of_its_own(tmp_path, monkeypatch):
    """TFDS imports the class that `features.json` names; the current folder is on Python's path."""
    source = make_images(tmp_path / "pets")
    prepare(f"folder:{source}", tmp_path / "data", image_size=16)
    (path,) = (tmp_path / "data").rglob("features.json")
    (tmp_path / "evil.py").write_text("open('done', 'w')")
    text = path.read_text()
    path.write_text(
        text.replace(
            "tensorflow_datasets.core.features.features_dict.FeaturesDict", "evil.Features"
        )
    )
    assert path.read_text() != text
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"would run evil\.Features, which is not of TFDS"):
        open_dataset("prepared_folder/pets", tmp_path / "data")
    assert not (tmp_path / "done").exists()


def make_images(folder):
    """Ten small images of two classes."""
    for letter in "ab":
        (folder / letter).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (20, 20), (12 * number, 0, 0)).save(folder / letter / f"{number}.png")
    return folder


class TestNamesOfDatasets:
    @pytest.mark.parametrize(
        "name",
        ["../secret", "../../etc", "/etc", "a/../../secret", "..", ".", "secret/../../x:1.0"],
    )
    def test_no_name_leads_out_of_the_data(self, tmp_path, name):
        """Even where there is a dataset to be found."""
        data_dir = tmp_path / "data"
        data_dir.mkdir()
        folder = tmp_path / "secret" / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
        with pytest.raises(UserError, match=r"unknown dataset|is not prepared|did you mean folder"):
            open_dataset(name, data_dir)
        with pytest.raises(UserError):
            prepare(name, data_dir)
        assert list(data_dir.iterdir()) == []

    def test_links_in_a_folder_are_read_as_any_path_and_nothing_is_written_there(
        self, tmp_path, photographs
    ):
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(photographs, elsewhere)
        for letter in "ab":
            (tmp_path / "linked" / letter).mkdir(parents=True)
            for source in ("class a", "class b", "class c"):
                for number in range(3):
                    link = tmp_path / "linked" / letter / f"{source} {number}.png"
                    link.symlink_to(elsewhere / source / f"{number}.png")
        before = sorted(os.walk(elsewhere))
        said = prepare(f"folder:{tmp_path / 'linked'}", tmp_path / "data", image_size=16)
        assert "18 of 18" in said
        assert sorted(os.walk(elsewhere)) == before

    def test_names_of_any_bytes_are_shown_printable(self, tmp_path, capsys):
        source = make_images(tmp_path / "pets")
        for letter, name in (("a", b"=1+1"), ("b", b"\x1b[31mred\n\xff")):
            (source / letter).rename(source / os.fsdecode(name))
        classes = [r"\x1b[31mred\n\xff", "=1+1"]
        (source / "=1+1" / "0.png").rename(source / "=1+1" / "\udcff\n\x1b[2J.png")
        (source / "=1+1" / "note.\udcff\n").write_text("Hello.")
        (source / "stray \udcff\n").write_text("Hello.")
        dataset = open_dataset(f"folder:{source}")
        assert dataset.label_names == classes
        assert dataset.eval.name(1) == rf"{source}/=1+1/\xff\n\x1b[2J.png"
        assert dataset.note.count("\n") == 0
        other = open_dataset(f"folder:{source}", label_order=["=1+1", "\x1b[31mred\n\udcff"])
        assert other.label_names == classes[::-1], "so of a run that kept them as they are"
        assert [other.train.read(0).label, dataset.train.read(0).label] == [1, 0]
        print(prepare(f"folder:{source}", tmp_path / "data", image_size=16))
        said = capsys.readouterr().out
        said.encode("ascii")
        assert "\x1b" not in said
        assert list(open_dataset("prepared_folder/pets", tmp_path / "data").label_names) == classes
        (source / r"\x1b[31mred\n\xff").mkdir()
        with pytest.raises(UserError, match="two classes that both show as"):
            open_dataset(f"folder:{source}")

    def test_links_that_lead_back_are_passed_over(self, tmp_path):
        source = make_images(tmp_path / "pets")
        for number in range(3):  # 3 ** 40 ways
            (source / "a" / f"link {number}").symlink_to(source)
        for folder in (source, source / "a"):
            (folder / "loop").symlink_to("loop")
        assert len(open_dataset(f"folder:{source}").train) == 19  # with the loop, as a bad image
        said = prepare(f"folder:{source}", tmp_path / "data", image_size=16)
        assert "20 of 21 images read" in said
        assert "loop: Too many levels of symbolic links" in said
        assert "3 other files: it is a link to a folder, such as" in said

    def test_pipes_sockets_and_devices_are_not_waited_for(self, tmp_path, monkeypatch):
        source = make_images(tmp_path / "pets")
        odd = ["device.png", "pipe.png", "socket.png"]
        monkeypatch.chdir(source / "a")  # the path of a socket is short
        os.mkfifo("pipe.png")
        (source / "a" / "device.png").symlink_to("/dev/zero")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
        named = find_images([str(source / "a")])
        opened = open_splits(f"folder:{source}").open("all")
        for images in (named, opened):
            problems = {
                Path(image.name).name: image.problem
                for image in read_examples(images, 16)
                if image.image is None
            }
            assert sorted(problems) == odd
            assert problems["pipe.png"] == problems["device.png"] == "it is no regular file"
            assert problems["socket.png"] == "No such device or address"
        assert opened.digest() == opened.digest()
        assert "20 of 23 images read" in prepare(f"folder:{source}", tmp_path / "data", 16)
        for path in (source / "a" / "pipe.png", tmp_path / "nothing"):
            with pytest.raises(UserError, match="no folder "):
                open_dataset(f"folder:{path}")

    def test_messages_are_one_line_whatever_a_name_holds(self):
        assert printable("a\nb\x1b[31m\udcff") == r"a\nb\x1b[31m\xff"
        assert printable("Zoë 猫") == "Zoë 猫"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--workdir", "{}"]),
        ("prepare", ["--data.data-dir", "{}"]),
        ("convert", ["{}", "out.safetensors"]),
        ("evaluate", ["model.safetensors", "{}"]),
        ("predict", ["model.safetensors", "a.png", "--output", "{}.csv"]),
        ("features", ["{}", "a.png"]),
        ("lpips", ["model.safetensors", "{}", "{}"]),
        ("plot", ["model.safetensors", "{}"]),
        ("export", ["model.safetensors", "{}"]),
    ],
)
def test_a_path_that_is_too_long_is_one_line(command, arguments, capsys):
    module = importlib.import_module(f"flax_alexnet.commands.{command}")
    assert module.main([word.replace("{}", "a" * 5000) for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: the path {'a' * 40}… is too long for this system: shorten it"
