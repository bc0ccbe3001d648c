"""Several processes of one run: how they find each other, agree, and add up.

In a run of one process, each function does nothing or returns the trivial result.
"""

import contextlib
import glob
import importlib.util
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_alexnet.config.cli import check_flag
from flax_alexnet.parallel.meeting import meet, place
from flax_alexnet.parallel.program import program
from flax_alexnet.utils.errors import LOST, UserError, exit_code, first_line

PATIENCE = 5.0  # seconds of waiting for other processes before a line says so


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
    join_timeout: int = 300,
) -> None:
    """Joins the other processes of the run, if there are any; JAX leaves them when this one ends.

    There are others if `coordinator` says where to meet, or if a launcher that JAX knows started
    this process as one of several (`detected`). With `num_processes=1` this process stays alone in
    any case. This function must be called before the first use of a device.

    Args:
      coordinator: "HOST:PORT" of process 0, which all can reach.
      num_processes: the number of processes of the run; None: the launcher's.
      process_id: the index of this process, from 0; None: the launcher's.
      heartbeat_timeout: seconds of silence after which a process counts as lost; the others then
        end with a code that is not zero.
      join_timeout: seconds to wait for the others to come.

    Raises:
      UserError: flags are missing or wrong, the others cannot be reached, or they run another
        program.
    """
    cluster = detected(os.environ)
    flags = {
        "coordinator": coordinator,
        "num-processes": num_processes,
        "process-id": process_id,
    }
    missing = [f"--parallel.{name}" for name, value in flags.items() if value is None]
    asked = len(missing) < len(flags)
    if num_processes == 1 or not (asked or cluster):
        return
    if missing and not cluster:
        raise UserError(f"a run of several processes also needs {' and '.join(missing)}")
    if coordinator is not None:
        place(coordinator)
    if num_processes is not None:
        check_flag("parallel.num-processes", num_processes, num_processes >= 1, "1 or more")
        last = num_processes - 1
        if process_id is not None:
            check_flag("parallel.process-id", process_id, 0 <= process_id <= last, f"0 to {last}")
    # This service of JAX would catch SIGTERM, and report it only on request.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        where, number, own = coordinator, num_processes, process_id
        if missing:
            where, number, own = _by_launcher(coordinator, num_processes, process_id, join_timeout)
        if where is None or number is None or own is None:
            raise RuntimeError(
                "the launcher does not give the coordinator, the number of processes and the rank"
            )
        with say_if_slow(f"process {own} of {number} waits for the others at {where}"):
            meet(where, number, own, join_timeout, heartbeat_timeout, program())
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=join_timeout,
                # `meet` notices a loss earlier; JAX would abort the process with a traceback.
                heartbeat_timeout_seconds=2 * heartbeat_timeout + 10,
                cluster_detection_method=None if missing else "deactivate",
            )
    except UserError:
        raise
    except Exception as error:  # of a dozen kinds, those of the cluster's own packages among them
        raise UserError(
            f"cannot join the other processes ({cluster or 'by flags'}): {first_line(error)}; give "
            "--parallel.coordinator, --parallel.num-processes and --parallel.process-id, or "
            "--parallel.num-processes 1 to run alone"
        ) from None


def _by_launcher(
    coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int
) -> tuple[str | None, int | None, int | None]:
    """Replaces each None by the launcher's value, as `jax.distributed.initialize` would."""
    from jax._src.clusters import ClusterEnv

    coordinator, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        num_processes,
        process_id,
        None,
        None,
        seconds,
    )
    return coordinator, num_processes, process_id


def detected(environment: Mapping[str, str]) -> str | None:
    """The name of the cluster whose launcher started this process as one of several, if any."""

    def several(variable: str) -> bool:
        return environment.get(variable, "").isdecimal() and int(environment[variable]) > 1

    if several("SLURM_STEP_NUM_TASKS"):
        return "SLURM"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    # The number of hosts of a TPU slice is known only to its metadata, which JAX asks.
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if importlib.util.find_spec("libtpu") and chips:
        return "Cloud TPU"
    return None


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends this process at once after an error, if the run has other processes.

    An orderly exit would wait for the others, and they wait for this one. The exit code is 2 for a
    UserError, 130 for Ctrl-C, `LOST` if the error is that another process is gone, and 1 otherwise.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = 1
        # The loss of a process raises ValueError if JAX runs a step while it dispatches it, and
        # UserError if a checkpoint cannot be saved, since for that the processes use JAX's service.
        of_loss = _SERVICE if isinstance(error, UserError) else _LOSS
        kinds = (jax.errors.JaxRuntimeError, ValueError)
        lost = isinstance(error, kinds) and of_loss.search(str(error))
        if isinstance(error, UserError | KeyboardInterrupt) and not lost:
            code = exit_code(error)
        elif lost:
            print(f"error: another process was lost: {first_line(error)}", file=sys.stderr)
            code = LOST
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# What JAX's coordination service and the collectives report about a process that is gone.
_SERVICE = re.compile("coordination service")
_LOSS = re.compile("gloo|nccl|unavailable|aborted|deadline|coordination|connection", re.IGNORECASE)


def is_main() -> bool:
    """Whether this is process 0, which writes files and prints for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def say_if_slow(what: str) -> Iterator[None]:
    """Says `what` on standard error if its block is not over after `PATIENCE` seconds."""
    timer = threading.Timer(PATIENCE, print, [what], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def gather(text: str, purpose: str = "agree") -> list[str]:
    """The texts of all processes, in the order of processes; all must call it.

    Args:
      text: the text of this process.
      purpose: why the processes meet; a process that waits for long prints it.
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = _all(np.int32(len(data)), purpose)
    padded = np.pad(data, (0, int(lengths.max()) - len(data)))
    rows = _all(padded, purpose)
    return [
        bytes(row[:length]).decode() for row, length in zip(rows, lengths.tolist(), strict=True)
    ]


def total(values: np.ndarray, purpose: str = "add up their sums") -> np.ndarray:
    """The sum of an int32 array over all processes; all must call it; `purpose` as of `gather`."""
    if jax.process_count() == 1:
        return values
    return _all(values, purpose).sum(axis=0)


def _all(values: Any, purpose: str) -> np.ndarray:
    """An array of each process, stacked."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    with say_if_slow(f"{who} waits for the others to {purpose}"):
        return multihost_utils.process_allgather(values)
