"""Processes of a run: who waits, who is lost, and how they are started."""

import json
import socket
import sys
import threading
import time

import numpy as np
import pytest

from flax_alexnet.parallel import meeting
from flax_alexnet.parallel.distributed import (
    detected,
    exit_on_error,
    join,
    total,
)
from flax_alexnet.utils.errors import UserError


def watched(heartbeat):
    """Both ends of a connection, one of which is watched, and what is said when it is lost."""
    here, there = socket.socketpair()
    said = []

    def lost(reason):
        said.append(reason)
        here.shutdown(socket.SHUT_RDWR)

    watch = threading.Thread(target=WATCH, args=(here, "process 1", heartbeat, lost))
    watch.start()
    return watch, there, said


WATCH = meeting._watch


def test_who_is_silent_for_long_is_lost():
    watch, there, said = watched(0.2)
    with there:
        for _ in range(20):  # half a second of signs of life
            there.sendall(b"\n")
            time.sleep(0.03)
        assert not said
        watch.join(2)
    assert said == ["nothing was heard of process 1 for 0.2 s"]


def test_who_has_ended_is_not_and_a_loss_elsewhere_is_heard():
    watch, there, said = watched(100)
    there.close()
    watch.join(5)
    assert not watch.is_alive()
    assert not said
    watch, there, said = watched(100)
    with there:
        there.sendall(b"\n\n" + json.dumps({"name": meeting.NAME, "lost": "it"}).encode() + b"\n")
        watch.join(5)
    assert said == ["it"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("there:8476", 2, 2), "--parallel.process-id is 2; expected 0 to 1"),
        (("there:8476", 2, -1), "--parallel.process-id is -1; expected 0 to 1"),
        (("there:8476", 0, 0), "--parallel.num-processes is 0; expected 1 or more"),
        (("there", 2, 0), "--parallel.coordinator is 'there'; expected HOST:PORT"),
        ((":8476", 2, 0), "--parallel.coordinator is ':8476'; expected HOST:PORT"),
        (("there:0", 2, 0), "--parallel.coordinator is 'there:0'; expected HOST:PORT"),
        (("there:65536", 2, 0), "--parallel.coordinator is 'there:65536'; expected HOST:PORT"),
    ],
)
def test_flags_that_cannot_be_right_are_a_line(flags, line):
    with pytest.raises(UserError, match=line):
        join(*flags)


def test_who_waits_for_long_says_for_what_and_where(monkeypatch, capsys):
    monkeypatch.setattr("flax_alexnet.parallel.distributed.PATIENCE", 0.05)
    monkeypatch.setattr("flax_alexnet.parallel.distributed.meet", lambda *_: None)
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: time.sleep(0.5))
    join("there:1234", 3, 2)
    assert capsys.readouterr().err == "process 2 of 3 waits for the others at there:1234\n"
    monkeypatch.setattr("flax_alexnet.parallel.distributed.PATIENCE", 30)
    join("there:1234", 3, 2)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("flax_alexnet.parallel.distributed.PATIENCE", 0.05)
    slow = lambda values: time.sleep(0.5) or np.stack([values, values])  # noqa: E731
    monkeypatch.setattr("flax_alexnet.parallel.distributed.multihost_utils.process_allgather", slow)
    assert total(np.arange(3)).tolist() == [0, 2, 4]
    assert capsys.readouterr().err == "process 0 of 2 waits for the others to add up their sums\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("checkpoint 20 could not be saved: no RPC to coordination service"), 3),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), 3),
        (UserError("no connection to the disk; make room"), 2),
        (KeyboardInterrupt(), 130),
        (ValueError("a bug"), 1),
    ],
)
def test_how_a_process_ends_says_whether_another_was_lost(monkeypatch, capsys, error, code):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise error
    assert ended.value.code == code
    assert ("another process was lost" in capsys.readouterr().err) == (code == 3)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}, "SLURM"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"}, None),  # an interactive shell
        ({"SLURM_NTASKS": "16"}, None),  # the batch script itself
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod by itself
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_clusters_are_known_by_what_their_launchers_set(environment, name):
    assert detected(environment) == name
