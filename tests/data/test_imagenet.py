"""ImageNet's archives, read without unpacking them."""

import io
import os
import re
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from flax_alexnet.commands.prepare import main as prepare_main
from flax_alexnet.commands.prepare import prepare
from flax_alexnet.data import imagenet
from flax_alexnet.data.decode import decode
from flax_alexnet.data.sources import open_dataset
from tests.datasets import contents, outcomes, stored


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
    """A smooth image, which survives JPEG."""
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
    STRANGE = "by its name it is no image of this archive"

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
        assert said.startswith("imagenet2012: 5 train, 2 validation images in ")
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
        # What TFDS says of the first and the third image of the validation set.
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
