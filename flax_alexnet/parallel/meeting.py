"""Where the processes of a run meet before JAX lets them, and find out whether they fit together.

Where they do not, JAX waits for ever or ends the program with a trace of its own: the port is
taken, a number is given twice, one never comes. So they meet at the same place once before. Each
says in one line who it is, process 0 compares, and all get the same answer. They stay connected,
and notice when nothing is heard of one any more, which JAX would end them for with a trace as well.
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

NAME = "flax_alexnet"  # which no other program says
LONGEST = 2**16  # bytes of what one says, or is answered
PAUSE = 0.2  # seconds between two looks, and two attempts
BEAT = 1.0  # seconds between two signs of life
LATE = 2.0  # seconds that those who start together may come after one another
GRACE = 5.0  # seconds for an answer to arrive, and for one that knocks to say who it is


def meet(
    coordinator: str,
    processes: int,
    process: int,
    seconds: float,
    heartbeat: float,
    about: Mapping[str, Any],
) -> None:
    """Waits until all processes of the run are there and fit together.

    Process 0 waits at the port, which is free again afterwards. From then on the process ends with
    `LOST` and a line when nothing is heard of another for long.

    Args:
      coordinator: "HOST:PORT" of process 0.
      processes: of the run.
      process: which of them this one is.
      seconds: to wait at most.
      heartbeat: seconds of silence after which a process counts as lost.
      about: what must be the same on all, as JSON has it.

    Raises:
      UserError: the port is taken, process 0 cannot be reached, one has not come in time or has
        come twice, or they differ. All that have come raise it.
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
    """What first differs between what processes say of themselves; "" where nothing does.

    Such as "seed is 0 on process 0 and 1 on process 2".
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
    reason = "nobody is there"
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection(place(coordinator), left)
            # Process 0 keeps to this time, and can say more than that it has passed.
            connection.settimeout(left + GRACE)
            _tell(connection, **own, left=left)
            answer = _parse(_line(connection)).get("answer")
            if isinstance(answer, str):
                return connection, printable(answer)
            reason = "another program is there, another version of this one, or a run that goes on"
        except TimeoutError:
            reason = "what is there does not answer"
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
    """The next line, or what there is of one; what comes after it is left to be read."""
    line = bytearray()
    while len(line) < LONGEST and not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            break
        line += byte
    return bytes(line)


def _parse(line: bytes) -> dict[str, Any]:
    """What one of us has said; {} of anybody else."""
    with contextlib.suppress(ValueError):
        message = parse_json(line)
        if isinstance(message, dict) and message.get("name") == NAME:
            return message
    return {}


def _watch(
    connection: socket.socket, who: str, seconds: float, lost: Callable[[str], object]
) -> None:
    """Sends signs of life and waits for those of `who`; calls `lost` where none come.

    Only seconds in which this process was awake itself are counted, so that one that was stopped
    does not take the others for lost. One that has ended is no matter here: those that need it
    notice at once.
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
    """Process 0's part: it listens at the port and gives all who come the same answer.

    Raises:
      UserError: the port cannot be listened at.
    """

    # What is left of ended connections keeps nobody from the port; who listens there does, and
    # with whom JAX would share it: any other run of the same user.
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, coordinator: str, processes: int, own: Mapping[str, Any], heartbeat: float):
        _, port = place(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator))
        self.where, self.processes, self.own = coordinator, processes, own
        self.heartbeat = heartbeat
        self.connections: list[socket.socket] = []  # to those who are told of a loss
        self.there: set[int] = set()  # who has come
        self.visitors = 0  # who have not been answered
        self.answer: str | None = None  # none yet
        self.problem, self.known_at = "", 0.0  # which all hear of, those too that come a bit later
        self.changed = threading.Condition()
        both = socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both else socket.AF_INET
        try:
            super().__init__(("", port), _Visitor)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at port {port} of this machine "
                f"({cause(error)}): end what does, take another port in "
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
        self.decide(f"process 0, which was to be at {self.where}, has ended: see what it said")
        with self.changed:
            self.changed.wait_for(lambda: not self.visitors, GRACE)
        self.shutdown()
        self.server_close()

    def decide(self, answer: str) -> None:
        """Answers all who wait, and who is still to come, unless that was done."""
        with self.changed:
            if self.answer is None:
                self.answer = answer
            self.changed.notify_all()

    def come(self, process: int, about: Mapping[str, Any]) -> None:
        """Notes that a process has come, and decides where that settles it."""
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
        """Decides that those who have waited so long need not wait any longer."""
        missing = sorted(set(range(self.processes)) - self.there)
        who = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        self.decide(
            f"of {self.processes} processes {who} did not come to {self.where} within "
            f"{seconds:g} s: start all, or give more --parallel.join-timeout"
        )

    def lost(self, reason: str) -> NoReturn:
        """Ends all processes that can be told, and this one."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                _tell(connection, lost=reason)
        time.sleep(BEAT)  # in which they end, before JAX there misses this one
        _end(reason)


class _Visitor(socketserver.BaseRequestHandler):
    """One that has come, which may be anybody."""

    server: _Room
    request: socket.socket

    def handle(self) -> None:
        """Hears who it is, waits with it for the answer, and stays with it."""
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
