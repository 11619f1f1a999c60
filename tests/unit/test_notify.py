"""What the service manager is told, on sockets of the test's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from diyc.errors import HostError
from diyc.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket as a service manager has it, and what it would put into NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "path" else f"\0diyc-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        listener.settimeout(5)
        yield listener, name.replace("\0", "@")


def test_each_message_is_one_datagram_of_lines(manager: tuple[socket.socket, str]) -> None:
    listener, address = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    for tell in (notifier.ready, notifier.stopping, notifier.alive, notifier.reloading):
        tell()
    notifier.extend(1.5)
    assert [listener.recv(4096) for _ in range(3)] == [b"READY=1", b"STOPPING=1", b"WATCHDOG=1"]
    reloading, moment = listener.recv(4096).decode().split("\n")
    assert reloading == "RELOADING=1"
    assert moment.removeprefix("MONOTONIC_USEC=").isdigit()
    assert listener.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"
    notifier.close()


def test_a_status_is_one_line_that_systemd_does_not_refuse(manager: tuple[socket.socket, str]) -> None:
    listener, address = manager
    notifier = Notifier(address)
    notifier.status("two\nlines\nREADY=1 " + "é" * 5000)
    told = listener.recv(65536).decode()
    assert told.startswith("STATUS=two lines READY=1 é")
    assert "\n" not in told
    assert len(told.encode()) < 1024
    notifier.close()


def test_without_a_manager_nothing_is_sent_and_no_watchdog_is_due() -> None:
    notifier = Notifier.from_environment({"WATCHDOG_USEC": "1000000"})
    notifier.ready()
    assert not notifier.active
    assert notifier.watchdog is None


@pytest.mark.parametrize(
    "environment, seconds",
    [
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_if_its_pid_is(environment: dict[str, str], seconds: float | None) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": "/nowhere", **environment})
    assert notifier.watchdog == seconds
    notifier.close()


@pytest.mark.parametrize(
    "environment",
    [{"NOTIFY_SOCKET": "vsock:2:1234"}, {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "soon"}],
)
def test_what_cannot_be_honoured_is_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(HostError, match=next(reversed(environment))):
        Notifier.from_environment(environment)


def test_a_manager_that_is_gone_is_told_of_once() -> None:
    told: list[str] = []
    notifier = Notifier("/nowhere/at/all", on_failure=told.append)
    notifier.ready()
    notifier.alive()
    assert len(told) == 1
    assert "NOTIFY_SOCKET" in told[0]
    assert not notifier.active


def test_a_busy_manager_blocks_nobody_and_misses_no_state(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        notifier = Notifier(str(tmp_path / "notify"))
        for _ in range(30):  # more than the queue of a socket takes (net.unix.max_dgram_qlen)
            notifier.alive()
        notifier.ready()
        heard = []
        while heard[-1:] != [b"READY=1"]:
            heard.append(listener.recv(4096))
            notifier.flush()
        notifier.close()
    assert heard == [b"WATCHDOG=1"] * 30 + [b"READY=1"]
