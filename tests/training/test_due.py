"""What is due after a step."""

from flax_alexnet.training.due import Schedule
from flax_alexnet.training.epochs import Epochs, Part


def test_what_is_due_after_each_step():
    """Ten steps an epoch, of which the last is cut short."""
    epochs = Epochs(100, (Part(0, 10),))
    due = [Schedule(epochs, 35, log_every=4, eval_epochs=0.5).due(step) for step in range(1, 36)]
    lines, evaluations, last = (
        [step for step, of_step in enumerate(due, 1) if of_step[place]] for place in range(3)
    )
    assert lines == [1, 4, 8, 12, 16, 20, 24, 28, 32, 35]
    assert evaluations == [5, 10, 15, 20, 25, 30, 35]
    assert last == [35]
    due = [Schedule(epochs, 35, log_every=20, eval_epochs=9).due(step) for step in range(1, 36)]
    assert [step for step, of_step in enumerate(due, 1) if of_step.line] == [1, 10, 20, 30, 35]
    assert not any(of_step.evaluation for of_step in due)
