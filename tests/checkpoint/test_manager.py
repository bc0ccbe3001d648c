"""Which checkpoints are kept, that damage is never restored, and what a full disk does."""

import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flax_alexnet.checkpoint.manager import (
    Checkpoints,
    check_steps,
    digest,
    manifest,
    newest_intact,
    restore_model,
    set_aside_damaged,
)
from flax_alexnet.utils.errors import UserError

MANIFEST = manifest(2)


def state(step):
    """Values that compression cannot make smaller, and scalars as a training state has them."""
    draw = np.random.default_rng(step).normal
    return {
        "params": {"conv1": jnp.asarray(draw(size=(20, 30)), jnp.float32)},
        "mean": jnp.asarray(draw(size=(5,)), jnp.float32),
        "step": jnp.int32(step),
    }


def template():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state(0)
    )


def save(folder, accuracies, first):
    checkpoints = Checkpoints(folder)
    for step, top1 in enumerate(accuracies, start=first):
        metrics = None if top1 is None else {"eval_top1": top1}
        checkpoints.save(step, state(step), metrics)
    assert checkpoints.close()


def restore(folder):
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest_step()
    restored = checkpoints.restore(step, template())
    checkpoints.close()
    return step, restored


def assert_is(restored, step):
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_latest_two_and_the_best_are_kept_across_restarts(tmp_path):
    save(tmp_path, [0.1, 0.9, 0.5, 0.4], first=1)
    assert kept(tmp_path) == [2, 3, 4]
    save(tmp_path, [0.3, None, 0.2], first=5)
    assert kept(tmp_path) == [2, 6, 7]


def test_another_shape_is_refused(tmp_path):
    save(tmp_path, [0.1], first=3)
    checkpoints = Checkpoints(tmp_path)
    wanted = template()
    wanted["mean"] = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=wanted["mean"].sharding)
    with pytest.raises(UserError, match=r"mean was \(5,\), is now \(4,\)"):
        checkpoints.restore(3, wanted)
    checkpoints.close()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Two steps, 1 and 2."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    save(folder, [0.5, 0.4], first=1)
    return folder


def test_the_average_of_the_parameters_is_the_model(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    average = {"conv1": jnp.ones((20, 30))}
    checkpoints.save(2, state(2) | {"average": average}, {"eval_top1": 0.5})
    checkpoints.close()
    params, _ = restore_model(tmp_path / "2")
    np.testing.assert_array_equal(params["conv1"], average["conv1"])


@pytest.fixture
def two(pristine, tmp_path):
    """A copy of them."""
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def test_the_manifest_is_one_that_sha256sum_checks(two):
    step = two / "2"
    listed = {line.split("  ")[1] for line in (step / MANIFEST).read_text().splitlines()}
    there = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert there - listed == {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}
    check = ["sha256sum", "--check", "--strict", "--quiet", MANIFEST]
    assert subprocess.run(check, cwd=step, check=False).returncode == 0


def test_what_is_whole_stays_and_is_restored(two, tmp_path):
    assert set_aside_damaged(two, tmp_path / "aside") == []
    step, restored = restore(two)
    assert step == 2
    assert_is(restored, 2)
    params, mean = restore_model(two / "2")
    assert_is({"params": params, "mean": mean, "step": jnp.int32(2)}, 2)


@pytest.mark.parametrize("spelling", ["two", "./two", "aside/../two", "link", "../{here}/two"])
def test_a_relative_path_is_as_good_as_any(pristine, tmp_path, monkeypatch, spelling):
    """Orbax itself refuses them."""
    shutil.copytree(pristine, tmp_path / "two")
    (tmp_path / "aside").mkdir()
    (tmp_path / "link").symlink_to("two")
    monkeypatch.chdir(tmp_path)
    folder = Path(spelling.format(here=tmp_path.name))
    assert newest_intact(folder) == (2, [])
    params, mean = restore_model(folder / "2")
    assert_is({"params": params, "mean": mean, "step": jnp.int32(2)}, 2)
    assert set_aside_damaged(folder, Path("aside")) == []
    step, restored = restore(folder)
    assert step == 2
    assert_is(restored, 2)


def test_what_cannot_be_read_says_why(two, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .* does not exist"):
        restore_model(tmp_path / "nothing")
    other = ocp.StandardCheckpointer()
    other.save(two / "3" / "default", {"weights": jnp.ones(3)})
    other.close()
    with pytest.raises(UserError, match="it has no parameters, or no mean image"):
        restore_model(two / "3")
    (two / "2" / "default" / "manifest.ocdbt").write_bytes(b"other")
    with pytest.raises(UserError, match="OCDBT"):
        restore_model(two / "2")


@pytest.mark.slow
def test_two_hundred_flipped_bits_and_no_wrong_restore(two, tmp_path):
    """Orbax restores what a flipped bit left: 40 of 40 times where the bit was in its data."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in (two / "2").rglob("*") if path.is_file())
    seen = 0
    for number in range(200):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        step, said = newest_intact(two)
        if step == 1:
            assert len(said) == 1
            seen += 1
            # It stays so once it is set aside; that takes longer, so not each time.
            if seen % 20 == 0:
                folder = shutil.copytree(two, tmp_path / f"{number}" / "checkpoints")
                assert len(set_aside_damaged(folder, tmp_path / f"{number}")) == 1
                assert_is(restore(folder)[1], 1)
        else:  # in a file that says nothing of the state, such as the time of saving
            assert path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
            assert_is(restore(two)[1], 2)
        path.write_bytes(whole)
    assert seen > 100
    assert newest_intact(two) == (2, [])


def data(step):
    """The largest file of a step, which holds the parameters."""
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def replace(path, make):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def half_written(step):
    for path in sorted(path for path in step.rglob("*") if path.is_file())[::2]:
        path.unlink()


DAMAGE = {
    "a truncated file": lambda step: cut(data(step), 100),
    "an empty file": lambda step: cut(data(step), 0),
    "a missing file": lambda step: data(step).unlink(),
    "a link in a file's place": lambda step: replace(
        data(step), lambda p: p.symlink_to(os.devnull)
    ),
    "a pipe in a file's place": lambda step: replace(data(step), os.mkfifo),
    "a folder in a file's place": lambda step: replace(data(step), os.mkdir),
    "an exchanged file": lambda step: data(step).write_bytes(data(step.parent / "1").read_bytes()),
    "a missing folder": lambda step: shutil.rmtree(step / "default"),
    "an empty folder": lambda step: replace(step, os.mkdir),
    "a file in the folder's place": lambda step: replace(step, lambda p: p.write_text("x")),
    "a broken link in the folder's place": lambda step: replace(
        step, lambda p: p.symlink_to("gone")
    ),
    "a link to another step": lambda step: replace(step, lambda p: p.symlink_to("1")),
    "half of the files": half_written,
    "a foreign file": lambda step: (step / "default" / "notes.txt").write_text("hello"),
    "a foreign link": lambda step: (step / "away").symlink_to("/"),
    "no metrics": lambda step: shutil.rmtree(step / "metrics"),
    "metrics that do not parse": lambda step: (step / "metrics" / "metrics").write_text("{"),
    "metrics of another kind": lambda step: (step / "metrics" / "metrics").write_text("[1]"),
    "no manifest": lambda step: (step / MANIFEST).unlink(),
    "an empty manifest": lambda step: cut(step / MANIFEST, 0),
    "a manifest cut off": lambda step: cut(step / MANIFEST, 200),
    "a manifest cut off after a line": lambda step: (step / MANIFEST).write_text(
        "\n".join((step / MANIFEST).read_text().splitlines()[:3])
    ),
    "a manifest that does not parse": lambda step: (step / MANIFEST).write_bytes(b"\xff\x00"),
    "a manifest of another step": lambda step: shutil.copy(
        step.parent / "1" / manifest(1), step / MANIFEST
    ),
    "no times": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "times of another kind": lambda step: (step / "_CHECKPOINT_METADATA").write_text("[1, 2]"),
    "times that are nothing": lambda step: (step / "_CHECKPOINT_METADATA").write_text("null"),
    "times nested deep": lambda step: (step / "_CHECKPOINT_METADATA").write_text("[" * 100_000),
    "a pipe in the place of times": lambda step: replace(step / "_CHECKPOINT_METADATA", os.mkfifo),
}


@pytest.mark.parametrize("name", ["007", "9" * 30, "٣"])
def test_a_folder_that_orbax_takes_for_a_step_is_damage(two, tmp_path, name):
    shutil.copytree(two / "1", two / name)
    assert len(set_aside_damaged(two, tmp_path / "aside")) == 1
    assert_is(restore(two)[1], 2)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_set_aside_and_the_step_before_used(two, tmp_path, kind):
    DAMAGE[kind](two / "2")
    assert newest_intact(two)[0] == 1
    (said,) = set_aside_damaged(two, tmp_path / "aside")
    assert said.startswith("checkpoint 2 is damaged (")
    assert "\n" not in said
    assert str(tmp_path / "aside" / "2") in said
    assert os.path.lexists(tmp_path / "aside" / "2")
    step, restored = restore(two)
    assert step == 1
    assert_is(restored, 1)


def test_damage_that_comes_after_the_start_is_not_restored_either(two):
    checkpoints = Checkpoints(two)
    cut(data(two / "2"), 100)
    with pytest.raises(UserError, match=r"is damaged .*: the same command sets it aside"):
        checkpoints.restore(2, template())
    checkpoints.close()


def test_of_steps_set_aside_none_takes_anothers_place(two, tmp_path):
    (tmp_path / "aside" / "2").mkdir(parents=True)
    (tmp_path / "aside" / "2" / "mine").write_text("")
    cut(data(two / "2"), 5)
    set_aside_damaged(two, tmp_path / "aside")
    assert sorted(path.name for path in (tmp_path / "aside").iterdir()) == ["2", "2.1"]
    assert (tmp_path / "aside" / "2" / "mine").exists()


def test_with_none_that_is_whole_nothing_is_touched(two, tmp_path):
    cut(data(two / "1"), 5)
    (two / "2" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(2: it has no 2\.sha256"):
        set_aside_damaged(two, tmp_path / "aside")
    assert kept(two) == [1, 2]
    assert not (tmp_path / "aside").exists()


def test_what_is_no_step_is_left_alone(two, tmp_path):
    (two / "notes.txt").write_text("hello")
    (two / "best").mkdir()
    assert set_aside_damaged(two, tmp_path / "aside") == []
    assert_is(restore(two)[1], 2)
    assert (two / "notes.txt").read_text() == "hello"


@pytest.mark.parametrize("steps", [0, 2])
def test_what_a_kill_in_the_middle_of_a_save_leaves_is_set_aside(two, tmp_path, steps):
    if not steps:
        shutil.rmtree(two)
    (two / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    (two / "3.orbax-checkpoint-tmp" / "default" / "half").write_text("a")
    (said,) = set_aside_damaged(two, tmp_path / "aside")
    aside = tmp_path / "aside" / "3.orbax-checkpoint-tmp"
    assert said == (
        f"checkpoint 3.orbax-checkpoint-tmp is damaged (its saving was cut off) and was moved to "
        f"{aside}"
    )
    assert (aside / "default" / "half").read_text() == "a"
    assert not (two / "3.orbax-checkpoint-tmp").exists()
    if steps:
        assert_is(restore(two)[1], 2)


def test_steps_that_were_saved_and_are_gone_are_missed(tmp_path, monkeypatch):
    folder, marker = tmp_path / "checkpoints", tmp_path / "saved"

    def save_one(step):
        checkpoints = Checkpoints(folder, 1000, marker=marker, say=lambda _: None)
        checkpoints.save(step, state(step))
        checkpoints.close()

    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError(5, "Input/output error")

        patch.setattr("flax_alexnet.checkpoint.manager.write_manifest", fail)
        save_one(1)
    check_steps(folder, marker)  # a run that never could save starts again
    save_one(2)
    check_steps(folder, marker)
    marker.unlink()  # as with a run of an older version, or a kill right after the save
    Checkpoints(folder, marker=marker).close()
    shutil.rmtree(folder / "2")
    for _ in range(2):
        with pytest.raises(UserError, match="has no checkpoint, though this run has saved some"):
            check_steps(folder, marker)
        shutil.rmtree(folder, ignore_errors=True)


class TestFullDisk:
    @pytest.fixture
    def full(self, monkeypatch):
        """Makes the disk full, or not."""
        usage, free = shutil.disk_usage, {"free": None}
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda path: usage(path)._replace(free=10) if free["free"] == 0 else usage(path),
        )
        return lambda yes: free.update(free=0 if yes else None)

    def test_the_step_before_stays_and_the_next_save_is_another_attempt(self, two, full):
        said = []
        checkpoints = Checkpoints(two, patience=1000, say=said.append)
        full(True)
        checkpoints.save(3, state(3))
        assert not checkpoints.saved()
        assert "checkpoints/3 could not be saved: No space left on device; step 2 is" in said[0]
        assert kept(two) == [1, 2]
        full(False)
        checkpoints.save(4, state(4))
        assert checkpoints.close()
        assert len(said) == 1
        assert_is(restore(two)[1], 4)

    def test_a_save_that_fails_in_its_middle_leaves_nothing(self, two, monkeypatch):
        said = []
        checkpoints = Checkpoints(two, patience=1000, say=said.append)
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(5, "Input/output error")

            patch.setattr("flax_alexnet.checkpoint.manager.write_manifest", fail)
            checkpoints.save(3, state(3))
            assert not checkpoints.saved()
        assert "could not be saved: [Errno 5] Input/output error; step 2 is intact" in said[0]
        assert kept(two) == [1, 2]
        checkpoints.save(4, state(4))
        assert checkpoints.close()
        assert_is(restore(two)[1], 4)

    def test_a_step_is_not_saved_before_its_metrics(self, two):
        def fail():
            raise OSError(28, "No space left on device")

        checkpoints = Checkpoints(two, patience=1000, say=lambda _: None)
        checkpoints.save(3, state(3), first=fail)
        assert not checkpoints.close()
        assert kept(two) == [1, 2]

    def test_patience_has_an_end(self, two, full):
        checkpoints = Checkpoints(two, patience=0)
        full(True)
        with pytest.raises(UserError, match="could not be saved: No space left on device"):
            checkpoints.save(3, state(3))
        assert kept(two) == [1, 2]


def test_the_digest_is_of_bytes_in_the_order_of_paths():
    a = {"conv1": {"kernel": jnp.arange(4.0)}, "fc6": {"kernel": jnp.arange(2.0)}}
    b = {"fc6": {"kernel": jnp.arange(2.0)}, "conv1": {"kernel": jnp.arange(4.0)}}
    assert digest(a) == digest(b)
    b["fc6"]["kernel"] = b["fc6"]["kernel"].at[0].set(-0.0)
    assert digest(a) != digest(b)


def test_a_path_that_is_not_utf8_is_refused_before_the_training(tmp_path):
    """As names of other scripts are read under LC_ALL=C without UTF-8."""
    folder = tmp_path / "l\udcc3ufe"
    with pytest.raises(UserError, match="set PYTHONUTF8=1, or take another --workdir"):
        Checkpoints(folder)
    with pytest.raises(UserError, match="set PYTHONUTF8=1, or take another --workdir"):
        restore_model(folder / "2")
