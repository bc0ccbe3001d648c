"""A meeting of the processes of a run, before JAX connects them, to check that they fit together.

If they do not, JAX waits forever or ends the program with a traceback: for example if the port is
taken, two processes have the same number, or one never comes. So the processes first meet at the
same address. Each sends one line that describes it, process 0 compares the lines, and all get the
same answer. They stay connected, and notice when one of them goes silent. JAX would notice this
too, but it would end the others with a traceback.
"""

import contextlib
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

from flax_alexnet.utils.errors import LOST, UserError, cause
from flax_alexnet.utils.inputs import parse_json
from flax_alexnet.utils.text import printable

NAME = "flax_alexnet"  # marks the messages of this program
LONGEST = 2**16  # bytes of a message or an answer
PAUSE = 0.2  # seconds between two checks, and between two attempts
BEAT = 1.0  # seconds between two heartbeats
LATE = 2.0  # seconds that the report of a problem waits for processes that start later
GRACE = 5.0  # seconds for an answer to arrive, and for a visitor to say who it is


def meet(
    coordinator: str,
    processes: int,
    process: int,
    seconds: float,
    heartbeat: float,
    about: Mapping[str, Any],
) -> None:
    """Waits until all processes of the run are there and fit together.

    Process 0 listens at the port, which is free again afterwards. From then on this process ends
    with a line and the exit code `LOST` if another process is silent for `heartbeat` seconds.

    Args:
      coordinator: "HOST:PORT" of process 0.
      processes: the number of processes of the run.
      process: the index of this process.
      seconds: the longest time to wait.
      heartbeat: seconds of silence after which a process counts as lost.
      about: values, as JSON has them, that must be the same on all processes.

    Raises:
      UserError: the port is taken, process 0 cannot be reached, a process does not come in time or
        comes twice, or the processes differ. All processes that have come raise it.
    """
    own = {
        "process": process,
        "seconds": seconds,
        "about": {"the number of processes": processes, **about},
    }
    deadline = time.monotonic() + seconds
    room = process == 0 and _Room(coordinator, processes, own, heartbeat)
    with room or contextlib.nullcontext():
        connection, answer = _ask(coordinator, own, deadline)
    if connection and process and not answer:

        def lost(reason: str) -> NoReturn:
            with contextlib.suppress(OSError):
                _tell(connection, lost=reason)  # it may only have been stopped for long
            _end(reason)

        watched = (connection, "process 0", heartbeat, lost)
        threading.Thread(target=_watch, args=watched, daemon=True).start()
    elif connection:
        connection.close()
    if answer:
        raise UserError(answer)


def place(coordinator: str) -> tuple[str, int]:
    """The host and the port of "HOST:PORT"; UserError where it is none."""
    host, _, port = coordinator.rpartition(":")
    if not (host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise UserError(
            f"--parallel.coordinator is {coordinator!r}; expected HOST:PORT, with a port of 1 to "
            "65535"
        )
    return host.strip("[]"), int(port)


def difference(reports: Mapping[int, Mapping[str, Any]]) -> str:
    """The first difference between the descriptions of processes; "" if there is none.

    An example is "seed is 0 on process 0 and 1 on process 2".
    """
    (first, own), *others = sorted(reports.items())
    for process, other in others:
        for name in sorted(own.keys() | other.keys()):
            if own.get(name) != other.get(name):
                return (
                    f"{name} is {own.get(name)} on process {first} and {other.get(name)} on "
                    f"process {process}"
                )
    return ""


def disagreement(difference: str) -> str:
    """The line for a `difference`."""
    return (
        f"the processes disagree: {difference}; start all with the same flags, program, packages, "
        "data and settings of JAX, and a --workdir that all share"
    )


def _ask(
    coordinator: str, own: Mapping[str, Any], deadline: float
) -> tuple[socket.socket | None, str]:
    """The connection to process 0, and its answer: "", or why the run cannot begin."""
    reason = "no process listens there"
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection(place(coordinator), left)
            # Process 0 knows this deadline, and after it sends more than a timeout could tell.
            connection.settimeout(left + GRACE)
            _tell(connection, **own, left=left)
            answer = _parse(_line(connection)).get("answer")
            if isinstance(answer, str):
                return connection, printable(answer)
            reason = (
                "another program, another version of this program, or another run listens there"
            )
        except TimeoutError:
            reason = "the program that listens there does not answer"
        except OSError as error:
            reason = cause(error)
        if connection:
            connection.close()
        time.sleep(PAUSE)
    other = "process 0" if own["process"] else "itself"
    return None, (
        f"process {own['process']} does not reach {other} at {coordinator} within "
        f"{own['seconds']:g} s ({reason}): start process 0 there, mend --parallel.coordinator, or "
        "give more --parallel.join-timeout"
    )


def _tell(connection: socket.socket, **message: Any) -> None:
    connection.sendall(json.dumps({"name": NAME, **message}).encode() + b"\n")


def _line(connection: socket.socket) -> bytes:
    """Reads the next line, or the part of it that arrives, but nothing after it."""
    line = bytearray()
    while len(line) < LONGEST and not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            break
        line += byte
    return bytes(line)


def _parse(line: bytes) -> dict[str, Any]:
    """The message of a process of this program; {} for any other bytes."""
    with contextlib.suppress(ValueError):
        message = parse_json(line)
        if isinstance(message, dict) and message.get("name") == NAME:
            return message
    return {}


def _watch(
    connection: socket.socket, who: str, seconds: float, lost: Callable[[str], object]
) -> None:
    """Sends heartbeats and waits for those of `who`; calls `lost` if none come.

    Only the seconds in which this process itself runs are counted, so that a process that was
    stopped does not take the others for lost. A process that has ended is not handled here, since
    those that need it notice at once.
    """
    beat = min(BEAT, seconds / 4)
    silent = 0.0
    with contextlib.suppress(OSError), connection:
        while True:
            with contextlib.suppress(OSError):  # it has ended, and may have said why before
                connection.sendall(b"\n")
            heard, until = False, time.monotonic() + beat
            while (left := until - time.monotonic()) > 0:
                connection.settimeout(left)
                try:
                    data = connection.recv(LONGEST)
                except TimeoutError:
                    break
                if not data:
                    return
                if loss := _parse(data.strip().rpartition(b"\n")[2]).get("lost"):
                    lost(str(loss))
                heard = True
            silent = 0.0 if heard else silent + beat
            if silent >= seconds:
                lost(f"nothing was heard of {who} for {seconds:g} s")


def _end(reason: str) -> NoReturn:
    """Ends this process, since another one was lost."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: another process was lost: {printable(reason)}\n".encode())
    # The main thread may hold standard output for as long as it waits for the lost one.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(PAUSE)
    os._exit(LOST)


class _Room(socketserver.ThreadingTCPServer):
    """The server of process 0: it listens at the port and gives all processes the same answer.

    Raises:
      UserError: it cannot listen at the port.
    """

    # Closed connections do not block the port, but another listener does. JAX would share the port
    # with such a listener if it belongs to another run of the same user.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, coordinator: str, processes: int, own: Mapping[str, Any], heartbeat: float):
        _, port = place(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator))
        self.where, self.processes, self.own = coordinator, processes, own
        self.heartbeat = heartbeat
        self.connections: list[socket.socket] = []  # to the processes that are told of a loss
        self.there: set[int] = set()  # the processes that have come
        self.visitors = 0  # the number of visitors that wait for an answer
        self.answer: str | None = None  # None: not decided yet
        self.problem, self.known_at = "", 0.0  # for all, including those that come a bit later
        self.changed = threading.Condition()
        both = socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both else socket.AF_INET
        try:
            super().__init__(("", port), _Visitor)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at port {port} of this machine "
                f"({cause(error)}): end the program that listens there, take another port in "
                "--parallel.coordinator, or see whether process 0 was started twice"
            ) from None

    def server_bind(self) -> None:
        """Takes the port for IPv4 as well, as JAX does."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a visitor has left."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(PAUSE,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.decide(f"process 0, expected at {self.where}, has ended: see its output")
        with self.changed:
            self.changed.wait_for(lambda: not self.visitors, GRACE)
        self.shutdown()
        self.server_close()

    def decide(self, answer: str) -> None:
        """Sets the answer for all processes, including later ones, unless it is set already."""
        with self.changed:
            if self.answer is None:
                self.answer = answer
            self.changed.notify_all()

    def come(self, process: int, about: Mapping[str, Any]) -> None:
        """Notes that a process has come, and decides the answer if it is the last one."""
        with self.changed:
            problem = ""
            if process in self.there:
                problem = (
                    f"two processes that came to {self.where} say that they are process {process}: "
                    "give each another --parallel.process-id, and each run another port"
                )
            elif differs := difference({0: self.own["about"], process: about}):
                problem = disagreement(differs)
            if problem and not self.problem:
                self.problem, self.known_at = problem, time.monotonic()
            self.there.add(process)
            if len(self.there) == self.processes:
                self.decide(self.problem)

    def give_up(self, seconds: float) -> None:
        """Ends the waiting with an answer that names the missing processes."""
        missing = sorted(set(range(self.processes)) - self.there)
        who = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        self.decide(
            f"{self.processes} processes were expected, and {who} did not come to {self.where} "
            f"within {seconds:g} s: start all, or give a longer --parallel.join-timeout"
        )

    def lost(self, reason: str) -> NoReturn:
        """Ends all processes that can be reached, and this one."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                _tell(connection, lost=reason)
        time.sleep(BEAT)  # the others end in this time, before their JAX misses this process
        _end(reason)


class _Visitor(socketserver.BaseRequestHandler):
    """A connection to the port, which may come from any program."""

    server: _Room
    request: socket.socket

    def handle(self) -> None:
        """Reads who the visitor is, sends it the answer, and then watches its heartbeats."""
        room = self.server
        self.request.settimeout(GRACE)
        message = _parse(_line(self.request))
        process, about = message.get("process"), message.get("about")
        seconds, left = message.get("seconds"), message.get("left")
        if not (
            type(process) is int
            and isinstance(about, dict)
            and isinstance(seconds, int | float)
            and isinstance(left, int | float)
        ):
            return
        with room.changed:
            room.visitors += 1
        try:
            self._answer(process, about, seconds, time.monotonic() + left)
        finally:
            with room.changed:
                room.visitors -= 1
                room.changed.notify_all()
        if room.answer == "" and process:
            room.connections.append(self.request)
            _watch(self.request, f"process {process}", room.heartbeat, room.lost)

    def _answer(
        self, process: int, about: Mapping[str, Any], seconds: float, deadline: float
    ) -> None:
        room = self.server
        room.come(process, about)
        while room.answer is None:
            with room.changed:
                room.changed.wait_for(lambda: room.answer is not None, PAUSE)
            if self._has_left():
                room.there.discard(process)
                return
            if room.problem and time.monotonic() > room.known_at + LATE:
                room.decide(room.problem)
            if time.monotonic() > deadline:
                room.give_up(seconds)
        self.request.settimeout(GRACE)
        _tell(self.request, answer=room.answer)

    def _has_left(self) -> bool:
        self.request.setblocking(False)
        try:
            return not self.request.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
