"""`prepare`: every picture has an outcome, and what was interrupted goes on."""

import contextlib
import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image
from test_data import encoded, make_folder, picture

from flax_alexnet.commands.prepare import main as prepare_main
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data import imagenet, synthetic, writer
from flax_alexnet.data.decode import decode
from flax_alexnet.data.sources import open_dataset
from flax_alexnet.utils.errors import UserError
from flax_alexnet.utils.text import read_table


def outcomes(dataset):
    """{(split, name): outcome} as the dataset's table has it."""
    with (dataset / "outcomes.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = read_table(file)
        assert header == ["split", "name", "outcome"]
        return {(split, name): outcome for split, name, outcome in rows}


def contents(folder):
    """{path: bytes} of all files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def stored(dataset, split):
    """Records of a dataset with all that is in them, read without this project's code."""
    builder = tfds.core.read_only_builder.builder_from_directory(dataset)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return list(builder.as_data_source(split, decoders=decoders))


class TestPrepare:
    def test_a_folder_becomes_squares_that_train_reads(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13}, size=40)
        said = prepare(f"folder:{folder}", tmp_path / "data", image_size=16).splitlines()
        written = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"
        size = sum(path.stat().st_size for path in written.glob("*.array_record-*"))
        beginning = f"prepared_folder/pets: 23 train, 2 test pictures in {written}, "
        rate = re.fullmatch(rf"{re.escape(beginning)}{size / 1e6:,.1f} MB, (\S+) images/s", said[0])
        assert int(rate[1].replace(",", "")) > 0
        assert said[1:] == [
            "25 of 25 pictures read",
            f"what became of each: {written}/outcomes.csv",
        ]
        dataset = open_dataset("prepared_folder/pets", tmp_path / "data")
        assert dataset.label_names == ["cat", "dog"]
        assert (len(dataset.train), len(dataset.eval)) == (23, 2)
        assert not list(tmp_path.rglob("*.incomplete"))

    def test_records_hold_the_pictures_of_their_names(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13}, size=40)
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        dataset = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"
        records = stored(dataset, "train") + stored(dataset, "test")
        names = [record["name"].decode() for record in records]
        assert sorted(names) == sorted(map(str, folder.rglob("*.png")))
        for name, record in zip(names, records, strict=True):
            assert record["label"] == ["cat", "dog"].index(Path(name).parent.name)
            with Image.open(io.BytesIO(record["image"])) as image:
                assert (image.format, image.size) == ("JPEG", (16, 16))
                expected = decode(Path(name).read_bytes(), 16).astype(int)
                assert np.abs(np.asarray(image) - expected).mean() < 40  # noise, and lossy

    def test_any_part_of_a_split_has_all_classes(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 40, "dog": 40})
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        for part in ("train[:30%]", "train[70%:]"):
            pets = open_dataset("prepared_folder/pets", tmp_path / "data", part).train
            assert {pets.read(index).label for index in range(len(pets))} == {0, 1}

    def test_the_embedded_dataset_is_rendered_the_same_each_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 40, "test": 20})
        assert prepare_main(["--data.data-dir", str(tmp_path)]) == 0
        dataset = open_dataset(synthetic.NAME, tmp_path)
        assert tuple(dataset.label_names) == synthetic.CLASSES
        assert (len(dataset.train), len(dataset.eval)) == (40, 20)
        counts = np.bincount([dataset.train.read(index).label for index in range(40)])
        assert counts.tolist() == [4] * 10
        np.testing.assert_array_equal(synthetic.render("train", 7), synthetic.render("train", 7))
        assert (synthetic.render("train", 7) != synthetic.render("test", 7)).any()

    def test_processes_that_prepare_at_the_same_time_all_find_it(self, tmp_path):
        code = (
            "import sys; from pathlib import Path; from flax_alexnet.data import synthetic; "
            "from flax_alexnet.data.sources import open_dataset; "
            "synthetic.EXAMPLES.update(train=40, test=20); "
            "print(len(open_dataset(synthetic.NAME, Path(sys.argv[1])).train))"
        )
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        assert [process.communicate()[0].split()[-1] for process in started] == ["40"] * 3

    def test_a_dataset_among_its_own_pictures_is_refused(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "pets", {"cat": 10, "dog": 10})
        for place in (folder, folder / "prepared"):
            flags = ["--data.name", f"folder:{folder}", "--data.data-dir", str(place)]
            assert prepare_main(flags) == 2
            assert "take a folder beside it" in capsys.readouterr().err
        assert sorted(os.listdir(folder)) == ["cat", "dog"]

    def test_mistakes_are_one_line(self, tmp_path, capsys):
        for argv, message in (
            (["--data.name", "cifar1O"], "unknown dataset 'cifar1O': did you mean 'cifar10'?"),
            (["--data.nam", "x"], "unknown flag --data.nam: did you mean --data.name?"),
            (["--data.name", f"folder:{tmp_path}/none"], "no folder"),
            (["--data.name", str(tmp_path)], f"did you mean folder:{tmp_path}?"),
            (["--data.name", ""], "choose one of: shapes_and_textures (or folder:PATH"),
            (["--data.name", "cifar10:9.9.9"], "only: 3.0.2"),
            (["--data.name", "imagenet2012"], "You need to register on https://image-net.org"),
            (["--data.name", "folder:"], "expected folder:PATH"),
            (["--data.image-size", "0"], "expected 1 to 8192"),
            (["--name", "x"], "--name is x; expected no value: it is for folders"),
            (["--data.name", "folder:x", "--name", "a/b"], "expected letters of ASCII, digits"),
        ):
            assert prepare_main([*argv, "--data.data-dir", str(tmp_path / "data")]) == 2
            said = capsys.readouterr().err
            assert message in said
            assert said.count("\n") == 1

    def test_a_folder_is_not_prepared_over_an_older_one(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        with pytest.raises(UserError, match=r"pets/1\.0\.0 is there already; remove it"):
            prepare(f"folder:{folder}", tmp_path / "data", image_size=16)


class TestPreparedDatasets:
    @pytest.fixture
    def data_dir(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})
        prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        return tmp_path / "data"

    @pytest.mark.parametrize("damage", ["cut off", "empty", "missing"])
    @pytest.mark.parametrize("kind", ["dataset_info.json", "features.json", "*-train.*"])
    def test_damage_names_the_folder(self, data_dir, kind, damage):
        (path,) = data_dir.rglob(kind)
        contents = path.read_bytes()
        path.write_bytes(contents[: 100 if damage == "cut off" else 0])
        if damage == "missing":
            path.unlink()
        with pytest.raises(UserError, match=r"pets/1\.0\.0 is damaged \("):
            open_dataset("prepared_folder/pets", data_dir).train.read(0)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("prepared_folder/pets:2.0.0", "which has prepared_folder/pets:1.0.0; run"),
            ("prepared_folder/cars", "--data.name folder:PATH"),
            ("cifar10", "--data.name cifar10 "),
        ],
    )
    def test_what_is_not_there_is_named_with_what_is(self, data_dir, name, message):
        with pytest.raises(UserError, match="is not prepared in") as error:
            open_dataset(name, data_dir)
        assert message in str(error.value)

    @pytest.mark.parametrize("split", ["train[:0]", "train[50%:20%]"])
    def test_an_empty_split_is_refused(self, data_dir, split):
        with pytest.raises(UserError, match="is empty; choose another"):
            open_dataset("prepared_folder/pets", data_dir, split)


class TestOutcomes:
    def test_every_picture_has_one_and_none_stops_the_others(self, tmp_path, capsys):
        folder = make_folder(tmp_path / "pets", {"cat": 20, "dog": 20})
        whole = encoded(picture(1, 40, 50))
        expected = {
            "cut.png": (whole[:1000], "image file is truncated"),
            "empty.png": (b"", "it is empty"),
            "notes.txt": (b"Buy a cat.", "it is no picture in a known format"),
            "named wrongly.txt": (whole, "ok"),
            os.fsdecode(b"caf\xe9.png"): (whole, "ok"),
            "x.jpg/inside.png": (whole, "ok"),
        }
        (folder / "cat" / "x.jpg").mkdir()
        for name, (data, _) in expected.items():
            (folder / "cat" / name).write_bytes(data)
        os.mkfifo(folder / "cat" / "pipe.png")
        (folder / "cat" / "link").symlink_to("nowhere")
        (folder / "cat" / "all dogs").symlink_to("../dog")
        with (folder / "cat" / "huge.png").open("wb") as file:
            file.truncate(10**12)
        flags = ["--data.image-size", "16", "--data.data-dir", str(tmp_path / "data")]
        assert prepare_main(["--data.name", f"folder:{folder}", *flags]) == 0
        dataset = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"
        found = {name.split("/pets/")[1]: why for (_, name), why in outcomes(dataset).items()}
        assert len(found) == 50
        for name, (_, outcome) in expected.items():
            name = name.replace(os.fsdecode(b"\xe9"), r"\xe9")
            assert found.pop(f"cat/{name}").startswith(outcome)
        assert found.pop("cat/pipe.png") == "it is no regular file"
        assert found.pop("cat/huge.png") == "it is no picture in a known format"  # but zeros
        assert found.pop("cat/all dogs") == "it is a link to a folder"
        assert found.pop("cat/link") == "No such file or directory"
        assert set(found.values()) == {"ok"}
        pets = open_dataset("prepared_folder/pets", tmp_path / "data")
        assert len(pets.train) + len(pets.eval) == 43
        said = capsys.readouterr().out
        assert "43 of 47 pictures read; 4 not:" in said
        assert "\n2 other files: it is no picture in a known format, such as" in said
        assert f"{folder}/cat/empty.png: it is empty" in said

    @pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
    def test_what_is_in_no_split_is_named(self, tmp_path, splits):
        """What is hidden, or beside the class folders or the splits."""
        folder = tmp_path / "pets"
        folder.mkdir()
        for split in splits:
            make_folder(tmp_path / "elsewhere" / split, {"cat": 12, "dog": 13})
        for link in (tmp_path / "elsewhere").iterdir():  # what is read may be links
            (folder / link.name).symlink_to(link)
        reasons = {
            "README.txt": "it is in no class folder that is read",
            ".DS_Store": "it is hidden",
            ".thumbnails/cat/000.png": "it is hidden",
            f"{splits[-1]}cat/.000.png": "it is hidden",
            f"{splits[-1]}loose.png": "it is in no class folder that is read",
        }
        if len(splits) > 1:
            reasons["more/cat/000.png"] = "it is in no class folder that is read"
            (folder / "loop").symlink_to(".")
            reasons["loop"] = "it is a link to a folder"
        for name in reasons.keys() - {"loop"}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        said = prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        table = outcomes(tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0")
        assert list(table.values()).count("ok") == 25 * len(splits)
        left_out = {name: why for (split, name), why in table.items() if not split}
        assert left_out == {f"{folder}/{name}": why for name, why in reasons.items()}
        assert len(table) == 25 * len(splits) + len(reasons)
        for why, count in Counter(reasons.values()).items():
            first = min(name for name, other in left_out.items() if other == why)
            assert f"\n{count} other files: {why}, such as {first}\n" in said

    def test_all_splits_of_a_folder_are_kept(self, tmp_path):
        for count, split in enumerate(("Train", "valid", "test"), start=1):
            make_folder(tmp_path / "pets" / split, {"cat": count, "dog": 2})
        prepare(f"folder:{tmp_path}/pets", tmp_path / "data", image_size=16)
        for count, split in enumerate(("train", "validation", "test"), start=1):
            pets = open_dataset("prepared_folder/pets", tmp_path / "data", split).train
            assert len(pets) == count + 2
        assert len(open_dataset("prepared_folder/pets", tmp_path / "data").eval) == 4

    @pytest.mark.parametrize(
        ("folder", "name"),
        [
            ("Bilder-2024 neu", "Bilder_2024_neu"),
            ("chien d'été", "chien_d_ete"),
            ("_pets", "_pets"),
            ("猫", "folder_a810bf84"),
        ],
    )
    def test_a_folder_of_any_name_is_prepared(self, tmp_path, folder, name, capsys):
        path = make_folder(tmp_path / folder, {"it's": 12, "$x_1$ 猫": 13})
        flags = ["--data.name", f"folder:{path}", "--data.data-dir", str(tmp_path / "data")]
        assert prepare_main(flags) == 0
        said = f"{path} is prepared as prepared_folder/{name}"
        assert (said in capsys.readouterr().out) == (folder != name)
        dataset = open_dataset(f"prepared_folder/{name}", tmp_path / "data")
        assert dataset.label_names == ["$x_1$ 猫", "it's"]
        assert prepare_main(flags) == 2
        assert "take another --name or --data.data-dir" in capsys.readouterr().err
        assert prepare_main([*flags, "--name", "mine"]) == 0
        assert len(open_dataset("prepared_folder/mine", tmp_path / "data").train) == 23

    def test_a_split_without_a_picture_is_a_mistake_that_can_be_mended(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat": 12, "dog": 13})
        pictures = contents(folder)
        for name in pictures:
            (folder / name).write_bytes(b"")
        with pytest.raises(UserError, match=r"no picture of the split 'train' .*: it is empty"):
            prepare(f"folder:{folder}", tmp_path / "data", image_size=16)
        for name, data in pictures.items():
            (folder / name).write_bytes(data)
        assert "25 of 25" in prepare(f"folder:{folder}", tmp_path / "data", image_size=16)

    def test_a_class_that_tfds_cannot_name_is_a_mistake(self, tmp_path):
        folder = make_folder(tmp_path / "pets", {"cat ": 12, "dog": 13})
        with pytest.raises(UserError, match=r"class folder 'cat ' has .* rename it"):
            prepare(f"folder:{folder}", tmp_path / "data", image_size=16)


KILLS = """
import os, signal, sys
from pathlib import Path
from flax_alexnet.data import writer
from flax_alexnet.utils.errors import UserError
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.utils.text import read_table

name, out, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
writer.SHARD = 4


def run(data_dir, last_line=None):  # counts the lines of writer.py, and dies at one of them
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename != writer.__file__:
            return None
        seen += event == "line"
        if seen == last_line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        prepare(name, data_dir, image_size=16)
    finally:
        sys.settrace(None)
    return seen


lines = run(out / "reference")
for kill in range(kills):
    data_dir, last_line = out / str(kill), 1 + kill * (lines - 1) // (kills - 1)
    pid = os.fork()
    if not pid:
        run(data_dir, last_line)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended")
    try:
        run(data_dir)
    except UserError as error:  # it was killed when all was done
        print(error)
print("tensorflow" in sys.modules)
"""


@contextlib.contextmanager
def full_disk(shards):
    """The disk is full after so many shards."""
    original = writer.ArrayRecordWriter
    room = [None] * shards

    def write(path, options):
        return original(path if room and not room.pop() else "/dev/full", options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ArrayRecordWriter", write)
        yield


class TestInterruption:
    @pytest.fixture
    def pets(self, tmp_path, monkeypatch):
        """A folder of 9 shards, with one picture that cannot be read."""
        monkeypatch.setattr(writer, "SHARD", 4)
        folder = make_folder(tmp_path / "pets", {"cat": 17, "dog": 18})
        (folder / "cat" / "003.png").write_bytes(b"")
        return folder

    def test_killed_anywhere_it_ends_with_the_same_bytes(self, tmp_path, pets):
        """Kills at lines evenly spaced over the whole run, each followed by a second start."""
        kills = 16
        arguments = [f"folder:{pets}", str(tmp_path), str(kills)]
        said = subprocess.run(
            [sys.executable, "-u", "-c", KILLS, *arguments],  # unbuffered: a fork writes it twice
            env=os.environ | {"JAX_PLATFORMS": "none"},  # no device is asked for
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert said.count("9") == kills
        assert said[-1] == "False"  # TensorFlow was not needed
        whole = contents(tmp_path / "reference")
        assert sum("array_record" in name for name in whole) == 9
        for kill in range(kills):
            assert contents(tmp_path / str(kill) / "prepared_folder" / "pets" / "1.0.0") == {
                name.removeprefix("prepared_folder/pets/1.0.0/"): data
                for name, data in whole.items()
            }

    def test_a_full_disk_is_one_line_and_whole_shards_stay(self, tmp_path, pets, capsys):
        flags = ["--data.data-dir", str(tmp_path / "data"), "--data.image-size", "16"]
        with full_disk(5):
            assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert said.count("\n") == 1
        with pytest.raises(UserError, match="is not prepared in"):  # nor is it damaged
            open_dataset("prepared_folder/pets", tmp_path / "data")
        with full_disk(4):  # of nine; the others are whole
            assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 0
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    def test_files_that_a_loss_of_power_cut_off_are_written_again(self, tmp_path, pets):
        with full_disk(5), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        shards = sorted(path.name for path in work.glob("*array_record*"))
        assert len(shards) == 5
        os.truncate(work / "dataset" / shards[1], 100_000)
        os.truncate(work / shards[2], 10)
        with full_disk(6):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    @pytest.mark.parametrize("change", ["other pictures", "another size"])
    def test_what_was_begun_otherwise_is_not_mixed_in(self, tmp_path, pets, capsys, change):
        with full_disk(5), pytest.raises(UserError, match="the same command goes on where it"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=12)
        size = 12
        if change == "another size":
            size = 16
        else:
            (pets / "dog" / "000.png").rename(pets / "dog" / "100.png")
        prepare(f"folder:{pets}", tmp_path / "data", image_size=size)
        said = capsys.readouterr().out
        assert said.count("was begun with other pictures or another size; it is begun anew") == 1
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=size)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    def test_two_at_the_same_time_are_one_too_many(self, tmp_path, pets):
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        work.mkdir(parents=True)
        with (work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UserError, match=r"another process is at work in .*\.incomplete"):
                prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)

    def test_a_link_in_the_place_of_the_lock_is_refused(self, tmp_path, pets):
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        work.mkdir(parents=True)
        (tmp_path / "precious").write_text("mine")
        (work / "lock").symlink_to(tmp_path / "precious")
        with pytest.raises(UserError, match=r"cannot write to .*: Too many levels of symbolic"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert (tmp_path / "precious").read_text() == "mine"

    @pytest.mark.parametrize("where", ["data", "data/prepared_folder/pets/1.0.0.incomplete"])
    @pytest.mark.parametrize("what", ["moved", "deleted", "made anew"])
    def test_a_place_that_is_gone_meanwhile_is_one_line(self, tmp_path, pets, where, what, capsys):
        """Nothing is written into what is there now, which may be another process's."""

        def attack():
            (tmp_path / where).rename(tmp_path / "elsewhere")
            if what == "deleted":
                shutil.rmtree(tmp_path / "elsewhere")
            elif what == "made anew":
                shutil.copytree(tmp_path / "elsewhere", tmp_path / where)

        flags = ["--data.data-dir", str(tmp_path / "data"), "--data.image-size", "16"]
        with meanwhile(attack):
            assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 2
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        said = capsys.readouterr().err
        assert said.startswith(f"error: cannot write to {work}: ")
        assert said.count("\n") == 1
        assert what != "made anew" or "it was moved or removed, and made once more" in said
        if what == "moved":
            assert not (tmp_path / where).exists()
        assert prepare_main(["--data.name", f"folder:{pets}", *flags]) == 0
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    @pytest.mark.parametrize("what", ["a file", "a folder", "a link"])
    def test_what_is_put_in_the_place_meanwhile_stays(self, tmp_path, pets, what):
        folder = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0"

        def attack():
            if what == "a link":
                folder.symlink_to("nowhere")
            elif what == "a folder":
                folder.mkdir()
            else:
                folder.write_text("mine")

        with meanwhile(attack), pytest.raises(UserError, match=r"1\.0\.0 is there already; remove"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert folder.is_symlink() == (what == "a link")
        folder.rmdir() if folder.is_dir() else folder.unlink()
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    @pytest.mark.parametrize("name", ["lock", "plan", "dataset", "a result"])
    def test_a_pipe_in_the_place_of_a_file_of_ours_is_not_waited_for(self, tmp_path, pets, name):
        with full_disk(2), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        path = min(work.glob("*array_record*")) if name == "a result" else work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.mkfifo(path)
        if name == "a result":  # it is made once more
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        else:
            with pytest.raises(UserError, match="cannot write to "):
                prepare(f"folder:{pets}", tmp_path / "data", image_size=16)

    def test_what_a_kill_left_does_not_keep_other_pictures_out(self, tmp_path, pets):
        with full_disk(2), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=12)
        work = tmp_path / "data" / "prepared_folder" / "pets" / "1.0.0.incomplete"
        (work / ".plan.partial").mkdir()  # as a kill within `replacing` does
        (work / ".plan.partial" / "plan").write_text("")
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        assert contents(tmp_path / "data") == contents(tmp_path / "reference")

    def test_what_a_kill_left_when_all_was_done_is_removed(self, tmp_path, pets):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        folder = tmp_path / "data" / "prepared_folder" / "pets"
        assert sorted(path.name for path in folder.iterdir()) == ["1.0.0", "1.0.0.incomplete"]
        with pytest.raises(UserError, match="is there already"):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        assert [path.name for path in folder.iterdir()] == ["1.0.0"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_a_signal_costs_nothing(self, tmp_path, pets, number):
        """One of them here, at a moment of its own; many in the slow test."""
        assert kill_and_go_on(pets, tmp_path, [number], shards=2) == 1

    @pytest.mark.slow
    def test_signals_at_random_moments_cost_nothing(self, tmp_path, pets):
        numbers = 5 * [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        assert kill_and_go_on(pets, tmp_path, numbers) > 10

    @pytest.mark.slow
    def test_disks_of_several_sizes_that_are_full(self, tmp_path, pets):
        """Each in a small file system of its own, which grows then; and a read-only one."""
        own = ["unshare", "--user", "--map-root-user", "--mount"]
        if subprocess.run([*own, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
            pytest.skip("the system permits no file systems of one's own")
        prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
        arguments = [sys.executable, "-c", DISKS, f"folder:{pets}", str(tmp_path)]
        done = subprocess.run([*own, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "9 disks"

    def test_leavings_of_a_render_that_was_killed_are_removed(self, tmp_path, monkeypatch):
        for split in ("train", "test"):
            monkeypatch.setitem(synthetic.EXAMPLES, split, 10)
        left = tmp_path / "shapes_and_textures" / "incomplete.ABC123_1.0.0"
        left.mkdir(parents=True)
        (left / "part").write_text("")
        assert len(open_dataset("shapes_and_textures", tmp_path).train) == 10
        assert [path.name for path in left.parent.iterdir()] == ["1.0.0"]


@contextlib.contextmanager
def meanwhile(attack):
    """Something happens when the third of the shards is written."""
    write = writer._write
    written = []

    def watched(*arguments):
        written.append(write(*arguments))
        if len(written) == 3:
            attack()
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write", watched)
        yield


COMMAND = """
from flax_alexnet.utils.process import end_on_signals, leave
end_on_signals()  # as `python -m` does while it imports
from flax_alexnet.data import writer
from flax_alexnet.commands.prepare import main

writer.SHARD = 4
leave(main)
"""
# Prepares into disks of so many kB, each full before the end; then again with more room.
DISKS = """
import contextlib, io, subprocess, sys
from pathlib import Path
from flax_alexnet.data import writer
from flax_alexnet.commands.prepare import main

name, where = sys.argv[1], Path(sys.argv[2])
writer.SHARD = 4
disk = where / "disk"
disk.mkdir()

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)

def run():
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(["--data.name", name, "--data.data-dir", str(disk), "--data.image-size", "16"])
    return code, error.getvalue()

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

whole = contents(where / "reference")
total = sum(map(len, whole.values())) // 1024
sizes = [4, 16, 36, 64, 100, 200, total // 2, total - 8]
for size in sizes:
    mount(f"size={size}k")
    code, error = run()
    lines = [line for line in error.splitlines() if "images/s" not in line]
    assert (code, len(lines)) == (2, 1), (size, code, error)
    assert "No space left on device" in lines[0], (size, error)
    mount("remount,size=100m")
    assert run()[0] == 0, size
    assert contents(disk) == whole, size
    subprocess.run(["umount", str(disk)], check=True)
mount("size=10m,ro")
code, error = run()
assert code == 2 and "Read-only file system" in error and error.count("\\n") == 1, error
subprocess.run(["umount", str(disk)], check=True)
print(len(sizes) + 1, "disks")
"""


def kill_and_go_on(pets, tmp_path, numbers, shards=None):
    """Sends signals to the command, each to one of its own, and starts it again undisturbed.

    Args:
      pets: the pictures.
      tmp_path: where datasets go.
      numbers: of the signals.
      shards: after how many of nine each is sent; None: within the time that it all takes.

    Returns:
      How many commands were not through yet.
    """

    def start(data_dir):
        flags = ["--data.name", f"folder:{pets}", "--data.data-dir", str(data_dir)]
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *flags, "--data.image-size", "16"],
            env=os.environ | {"JAX_PLATFORMS": "none"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    prepare(f"folder:{pets}", tmp_path / "reference", image_size=16)
    whole, rng, ended = contents(tmp_path / "reference"), np.random.default_rng(0), 0
    begun = time.perf_counter()
    if shards is None:
        start(tmp_path / "first").communicate()
    usual = time.perf_counter() - begun
    for turn, number in enumerate(numbers):
        data_dir = tmp_path / f"killed {turn}"
        command = start(data_dir)
        if shards is None:
            time.sleep(rng.uniform(0.3, 1) * usual)
        else:
            work = data_dir / "prepared_folder" / "pets" / "1.0.0.incomplete" / "dataset"
            while not (work.exists() and len(list(work.iterdir())) >= shards):
                time.sleep(0.001)
        with command:
            command.send_signal(number)
            said = command.communicate(timeout=60)[1]
        assert command.returncode in (0, -number, 128 + number)
        assert "Traceback" not in said
        if command.returncode:
            ended += 1
            with contextlib.suppress(UserError):  # all was done
                prepare(f"folder:{pets}", data_dir, image_size=16)
        assert contents(data_dir) == whole, "the same bytes, and nothing that was left behind"
    return ended


class TestProgress:
    """Pictures a second and the time left, at a terminal and in a log."""

    @pytest.fixture
    def pets(self, tmp_path, monkeypatch):
        """A folder of 5 shards."""
        monkeypatch.setattr(writer, "SHARD", 4)
        return make_folder(tmp_path / "pets", {"cat": 8, "dog": 8})

    @pytest.mark.parametrize("terminal", [True, False])
    def test_is_shown(self, tmp_path, pets, monkeypatch, capsys, terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        with full_disk(2), pytest.raises(UserError):
            prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        capsys.readouterr()
        prepare(f"folder:{pets}", tmp_path / "data", image_size=16)
        captured = capsys.readouterr()
        shown, silent = captured.out.splitlines(), captured.err
        if terminal:
            shown, silent = captured.err.split("\r"), captured.out
        assert silent == ""
        made = [int(re.search(r" (\d+)/16 \[", line)[1]) for line in shown if line.strip()]
        assert (made[0], made[-1]) == (8 if terminal else 12, 16)
        assert re.search(r"\[\d\d:\d\d<00:00, +[\d.]+ images/s\]", shown[-1])


def archive(members):
    """A tar of (name, bytes), or of (name, kind) for a member without any."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data in (tarfile.SYMTYPE, tarfile.CHRTYPE):
                member.type, member.linkname, data = data, "/etc/passwd", b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def photograph(seed, mode="RGB", kind="jpeg"):
    """A smooth picture, which survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((60, 45)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


class TestImageNet:
    FISH, SHARK = "n01440764", "n01484850"  # the first class and the third
    TRAIN = {  # noqa: RUF012
        f"{FISH}_1.JPEG": photograph(1),
        f"{FISH}_2.JPEG": photograph(2, "CMYK"),
        f"{FISH}_3.JPEG": photograph(3, kind="png"),
        f"{FISH}_4.JPEG": photograph(4, "L"),
        f"{SHARK}_5.JPEG": photograph(5),
    }
    STRANGE = "by its name it is no picture of this archive"

    @pytest.fixture
    def data_dir(self, tmp_path):
        """Archives with all that ImageNet's have, and with what they should not."""
        fish = [(name, data) for name, data in self.TRAIN.items() if self.FISH in name]
        fish += [
            (f"{self.FISH}_6.JPEG", photograph(6)[:500]),
            ("../../evil.JPEG", photograph(7)),
            ("/tmp/evil.JPEG", photograph(7)),
            (f"{self.SHARK}_8.JPEG", photograph(8)),
            (f"{self.FISH}_9.JPEG", tarfile.SYMTYPE),
            (f"{self.FISH}_10.JPEG", tarfile.CHRTYPE),
        ]
        shark = [(name, data) for name, data in self.TRAIN.items() if self.SHARK in name]
        train = [
            ("readme.txt", b"Hello."),
            ('=HYPERLINK("x")\n\x1b[2J\udcff.JPEG', photograph(7)),
            (f"{self.FISH}.tar", archive(fish)),
            (f"{self.SHARK}.tar", archive(shark)),
            ("n99999999.tar", archive(shark)),
            ("n02119789.tar", tarfile.SYMTYPE),
        ]
        validation = [
            (f"ILSVRC2012_val_{number:08}.JPEG", photograph(number)) for number in (3, 1, 50001)
        ]
        data_dir = tmp_path / "a" / "b" / "data"
        (data_dir / "downloads" / "manual").mkdir(parents=True)
        (data_dir / "downloads" / "manual" / imagenet.TRAIN).write_bytes(archive(train))
        (data_dir / "downloads" / "manual" / imagenet.VALIDATION).write_bytes(archive(validation))
        return data_dir

    def test_archives_become_the_dataset_of_that_name(self, tmp_path, data_dir):
        before = contents(tmp_path)
        said = prepare("imagenet2012", data_dir, image_size=32)
        assert said.startswith("imagenet2012: 5 train, 2 validation pictures in ")
        made = contents(tmp_path).keys() - before.keys()
        assert all(name.startswith("a/b/data/imagenet2012/5.1.0/") for name in made)
        dataset = open_dataset("imagenet2012", data_dir)
        assert (len(dataset.train), len(dataset.eval)) == (5, 2)
        assert len(dataset.label_names) == 1000
        assert [dataset.label_names[label] for label in (0, 2)] == [self.FISH, self.SHARK]
        train = stored(data_dir / "imagenet2012" / "5.1.0", "train")
        found = {record["file_name"].decode(): record for record in train}
        assert found.keys() == self.TRAIN.keys()
        for name, record in found.items():
            assert record["label"] == (0 if name.startswith(self.FISH) else 2)
            image = simplejpeg.decode_jpeg(record["image"]).astype(int)
            assert image.shape == (32, 32, 3)
            assert np.abs(image - decode(self.TRAIN[name], 32)).mean() < 4
        # What TFDS says of the first and the third picture of the validation set.
        labels = {
            record["file_name"].decode(): dataset.label_names[record["label"]]
            for record in stored(data_dir / "imagenet2012" / "5.1.0", "validation")
        }
        assert labels == {
            "ILSVRC2012_val_00000001.JPEG": "n01751748",
            "ILSVRC2012_val_00000003.JPEG": "n02105855",
        }

    def test_every_member_has_an_outcome(self, data_dir):
        prepare("imagenet2012", data_dir, image_size=32)
        table = (data_dir / "imagenet2012" / "5.1.0" / "outcomes.csv").read_text()
        assert "train,\"'=HYPERLINK" in table, "no spreadsheet computes it"
        assert not re.search(r"[^ -~\n]", table)
        found = outcomes(data_dir / "imagenet2012" / "5.1.0")
        taken = [*(("train", name) for name in self.TRAIN)]
        taken += [("validation", f"ILSVRC2012_val_0000000{number}.JPEG") for number in (1, 3)]
        assert [found.pop(key) for key in taken] == ["ok"] * 7
        cut = found.pop(("train", f"{self.FISH}_6.JPEG"))
        assert cut == "it ends before its pixels begin"
        assert found == {
            ("train", "readme.txt"): self.STRANGE,
            ("train", r'=HYPERLINK("x")\n\x1b[2J\xff.JPEG'): self.STRANGE,
            ("train", "../../evil.JPEG"): self.STRANGE,
            ("train", "/tmp/evil.JPEG"): self.STRANGE,
            ("train", f"{self.SHARK}_8.JPEG"): self.STRANGE,
            ("train", "n99999999.tar"): self.STRANGE,
            ("train", f"{self.FISH}_9.JPEG"): "it is no regular file",
            ("train", f"{self.FISH}_10.JPEG"): "it is no regular file",
            ("train", "n02119789.tar"): "it is no regular file",
            ("validation", "ILSVRC2012_val_00050001.JPEG"): self.STRANGE,
        }

    @pytest.mark.parametrize("name", [imagenet.TRAIN, imagenet.VALIDATION])
    def test_missing_or_damaged_archives_are_named(self, data_dir, name, capsys):
        path = data_dir / "downloads" / "manual" / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[whole.index(b"ustar", whole.index(b"ustar") + 1) + 20] ^= 1  # in a second header
        short = whole.rstrip(b"\0")
        damages = [whole[:0], whole[:700], short[: len(short) // 2], short, flipped]
        for damaged in (None, *damages, "a pipe"):
            if damaged is None:
                path.unlink()
            elif damaged == "a pipe":
                path.unlink()
                os.mkfifo(path)
            else:
                path.write_bytes(damaged)
            argv = ["--data.name", "imagenet2012", "--data.data-dir", str(data_dir)]
            assert prepare_main(argv) == 2
            said = capsys.readouterr().err
            assert name in said
            assert ("You need to register on" if damaged is None else "fetch it once more") in said
            assert said.count("\n") == 1
        assert not (data_dir / "imagenet2012").exists()
