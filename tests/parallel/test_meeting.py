"""Processes meet before JAX lets them: what does not fit together is one line on each, in time."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flax_alexnet.parallel import meeting
from flax_alexnet.utils.errors import UserError

SHORT = 0.6  # seconds to wait, where nobody comes


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short times, and nobody watches anybody afterwards."""
    monkeypatch.setattr(meeting, "PAUSE", 0.02)
    monkeypatch.setattr(meeting, "GRACE", 0.5)
    monkeypatch.setattr(meeting, "_watch", lambda connection, *_: connection.close())


def come(port, process, processes=2, about=(), after=0.0, host="localhost", seconds=30.0):
    """What a process is told: "" where it may go on."""
    time.sleep(after)
    try:
        meeting.meet(f"{host}:{port}", processes, process, seconds, 100, dict(about))
    except UserError as error:
        return str(error)
    return ""


def all_come(port, *arguments):
    """Of each process that comes, with arguments of its own."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        told = [pool.submit(come, port, **own) for own in arguments]
        return [one.result(30) for one in told]


def test_all_that_fit_go_on_in_any_order(port):
    late = [{"process": p, "processes": 3, "after": a} for p, a in ((0, 0.3), (1, 0), (2, 0.1))]
    assert all_come(port, *late) == ["", "", ""]
    with socket.create_server(("", port)):
        pass  # it is free for JAX


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ([{"process": 1}, {"process": 1}], "say that they are process 1: give each another"),
        ([{"process": 1, "processes": 4}, {"process": 2}], "number of processes is 3 on process 0"),
        ([{"process": 1, "about": {"x": 1}}, {"process": 2}], "x is None on process 0 and 1 on"),
        ([{"process": 5, "processes": 9}], "number of processes is 3 on process 0 and 9 on"),
        ([{"process": 2}], "3 processes were expected, and 1 did not come to localhost:"),
        ([], "3 processes were expected, and 1, 2 did not come to localhost:"),
    ],
)
def test_what_does_not_fit_is_the_same_line_on_all(port, others, line):
    began = time.monotonic()
    common = {"processes": 3, "seconds": SHORT if "did not come" in line else 30.0}
    told = all_come(port, {"process": 0, **common}, *(common | other for other in others))
    assert set(told) == {told[0]}
    assert "\n" not in told[0]
    assert line in told[0]
    assert time.monotonic() < began + 20


def test_a_line_from_elsewhere_is_printable(port):
    told = all_come(port, {"process": 0}, {"process": 1, "about": {"code": "\x1b[2J\nnew"}})
    assert told[0] == told[1]
    assert r"\x1b[2J\nnew" in told[0]


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_a_port_that_is_taken_is_a_line(port, host):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as JAX has it
        other.bind((host, port))
        other.listen()
        told = all_come(port, {"process": 0}, {"process": 1, "seconds": SHORT})
    assert told[0].startswith(f"process 0 cannot listen at port {port} of this machine (Address")
    assert told[1].startswith(f"process 1 does not reach process 0 at localhost:{port} within 0.6")
    assert "(the program that listens there does not answer): start process 0 there" in told[1]


def test_a_second_process_0_ends_and_the_run_goes_on(port):
    first, second, other = all_come(
        port, {"process": 0}, {"process": 0, "after": 0.2}, {"process": 1, "after": 0.5}
    )
    assert (first, other) == ("", "")
    assert second.startswith("process 0 cannot listen")


def test_a_process_0_on_another_machine_is_found(port, monkeypatch):
    with meeting._Room(f"localhost:{port}", 2, {"about": {}}, 100) as room:
        room.come(0, {})
        # It listens at its own machine, and asks at this one.
        monkeypatch.setattr(meeting, "_Room", lambda *_: contextlib.nullcontext())
        assert "say that they are process 0: give each another" in come(port, 0)


def test_who_cannot_reach_process_0_says_so_in_time(port, monkeypatch):
    told = come(port, 1, seconds=SHORT)
    assert told.startswith("process 1 does not reach process 0 ")
    assert f"at localhost:{port} within 0.6 s (Connection refused)" in told

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    told = [come(port, process, host="gone", seconds=SHORT) for process in (0, 1)]
    assert told[0].startswith("process 0 does not reach itself at gone")
    assert told[1].startswith("process 1 does not reach process 0 at gone")
    assert all("within 0.6 s (Name or service not known): start process 0" in line for line in told)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"x" * 2**17,
        b"[" * 5000 + b"\n",
        b'{"name": "flax_alexnet"}\n',
        b'{"name": "flax_alexnet", "process": "1", "about": [], "left": 1, "seconds": 1}\n',
        b'{"name": "another", "process": 1, "about": {}, "left": 1, "seconds": 1}\n',
    ],
)
def test_strangers_keep_nobody_from_meeting(port, said):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(come, port, 0)
        time.sleep(0.1)
        with socket.create_connection(("localhost", port)) as stranger:
            with contextlib.suppress(OSError):  # it hung up
                stranger.sendall(said)
            assert come(port, 1) == ""
            assert first.result() == ""


def test_who_leaves_while_it_waits_may_come_again(port):
    own = {"process": 1, "seconds": 5, "left": 5, "about": {"the number of processes": 3}}
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(come, port, process, 3, after=process / 4) for process in (0, 2)]
        time.sleep(0.1)
        with socket.create_connection(("localhost", port)) as killed:
            killed.sendall(json.dumps({"name": meeting.NAME, **own}).encode() + b"\n")
        time.sleep(0.2)
        assert come(port, 1, 3) == ""
        assert [other.result() for other in others] == ["", ""]
