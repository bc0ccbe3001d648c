"""Which checkpoints are kept, and what a digest depends on."""

import jax
import jax.numpy as jnp
import pytest

from flax_alexnet.checkpoint import Checkpoints, digest
from flax_alexnet.errors import UserError


def save(folder, accuracies, first):
    checkpoints = Checkpoints(folder)
    for step, top1 in enumerate(accuracies, start=first):
        metrics = None if top1 is None else {"eval_top1": top1}
        checkpoints.save(step, {"w": jnp.full((3,), float(step))}, metrics)
    checkpoints.close()


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_latest_two_and_the_best_are_kept_across_restarts(tmp_path):
    save(tmp_path, [0.1, 0.9, 0.5, 0.4], first=1)
    assert kept(tmp_path) == [2, 3, 4]
    save(tmp_path, [0.3, None, 0.2], first=5)
    assert kept(tmp_path) == [2, 6, 7]


def test_a_state_is_restored_as_it_was_and_another_shape_is_refused(tmp_path):
    save(tmp_path, [0.1], first=3)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 3
    template = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one_device())}
    assert checkpoints.restore(3, template)["w"].tolist() == [3.0, 3.0, 3.0]
    template = {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=one_device())}
    with pytest.raises(UserError, match=r"w was \(3,\), is now \(4,\)"):
        checkpoints.restore(3, template)
    checkpoints.close()


def one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_the_digest_is_of_bytes_in_the_order_of_paths():
    a = {"conv1": {"kernel": jnp.arange(4.0)}, "fc6": {"kernel": jnp.arange(2.0)}}
    b = {"fc6": {"kernel": jnp.arange(2.0)}, "conv1": {"kernel": jnp.arange(4.0)}}
    assert digest(a) == digest(b)
    b["fc6"]["kernel"] = b["fc6"]["kernel"].at[0].set(-0.0)
    assert digest(a) != digest(b)
