"""Steps, images and epochs, where batches keep their size and where they do not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_alexnet.training.epochs import Epochs, Part


def test_epochs_of_one_batch_size():
    epochs = Epochs(180, (Part(0, 32),))
    assert epochs.steps(10) == 57, "5.625 steps each"
    assert epochs.steps(1e-9) == 1
    assert epochs.first_step == 0
    assert [step for step in range(1, 13) if epochs.ends(step)] == [6, 12]
    # Step 6 sees the last of the 180 images, and the first twelve of the second epoch.
    assert [epochs.epoch(step) for step in (0, 5, 6, 7)] == [0, 160 / 180, 1, 224 / 180]
    assert epochs.epoch(57) == 10
    assert epochs.fraction(57) == 57 * 32 / 180


def test_epochs_go_on_where_the_batch_size_changes():
    whole = Epochs(144, (Part(0, 16),))
    double = whole.going_on(18, 32)
    assert double.parts == ((0, 16), (18, 32))
    assert [double.seen(step) for step in (17, 18, 19)] == [272, 288, 320]
    assert [double.steps(epochs) for epochs in (1, 2, 4, 6)] == [9, 18, 27, 36]
    assert double.first_step == 9, "two epochs of double batches"
    thrice = double.going_on(27, 8)
    assert thrice.steps(6) == 27 + 36
    assert thrice.epoch(27 + 18) == 5


def test_an_older_checkpoint_undoes_later_changes():
    epochs = Epochs(144, (Part(0, 16), Part(18, 32)))
    assert epochs.going_on(18, 16).parts == ((0, 16),), "killed before a step was saved"
    assert epochs.going_on(10, 32).parts == ((0, 16), (10, 32))
    assert epochs.going_on(20, 32) == epochs
    assert epochs.going_on(0, 8).parts == ((0, 8),)


@given(
    images=st.integers(1, 300),
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 64)), min_size=1, max_size=4),
    wanted=st.integers(1, 20),
)
def test_steps_and_images_agree(images, sizes, wanted):
    epochs = Epochs(images, ())
    step = 0
    for length, size in sizes:
        epochs, step = epochs.going_on(step, size), step + length
    last = epochs.steps(wanted)
    assert epochs.seen(last - 1) < wanted * images <= epochs.seen(last)
    assert epochs.ends(last)
    assert math.floor(epochs.epoch(last)) == epochs.epoch(last) >= wanted


@pytest.mark.parametrize(("epochs", "images", "steps"), [(0.1, 30, 3), (0.3, 10, 3), (2.5, 5, 13)])
def test_rounding_adds_no_step(epochs, images, steps):
    assert Epochs(images, (Part(0, 1),)).steps(epochs) == steps
