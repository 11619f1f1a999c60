"""What a service manager is told: the datagrams of sd_notify(3), and what it asks in return (sd_watchdog_enabled(3)).

Without NOTIFY_SOCKET every call does nothing, so nobody has to ask whether there is a service manager."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

from diyc.errors import HostError

_STATUS_BYTES = 1000  # systemd drops a datagram of more than 4096
_WAITING = 64  # messages kept for a manager that is busy; it reads thousands a second


class Notifier:
    """Sends to the manager at `address`: a path, or @NAME for an abstract socket; None for nobody.

    `watchdog` is the interval, in seconds, within which the manager wants to hear of us, or None. `on_failure` is
    told once why nothing more can be sent: a supervisor outlives its manager's socket."""

    def __init__(
        self,
        address: str | None = None,
        watchdog: float | None = None,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.watchdog = watchdog if address else None
        self.on_failure = on_failure
        self._address = _socket_name(address) if address else None
        self._socket = _open() if address else None
        self._waiting: deque[bytes] = deque(maxlen=_WAITING)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Notifier:
        """The manager that started this process. Raises HostError for a socket that we cannot speak to."""
        return cls(environ.get("NOTIFY_SOCKET") or None, _watchdog(environ))

    @property
    def active(self) -> bool:
        """Whether anybody is listening, as far as we know."""
        return self._socket is not None

    def ready(self) -> None:
        """Started, or done with a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; ready() ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """What the watchdog waits for."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        line = " ".join(text.split()).encode("utf-8", "replace")[:_STATUS_BYTES]
        self._send("STATUS=" + line.decode("utf-8", "ignore"))

    def extend(self, seconds: float) -> None:
        """Starting or stopping takes that much longer from now on, whatever the unit's timeout says."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *fields: str) -> None:
        if self._socket is not None:
            self._waiting.append("\n".join(fields).encode())
            self.flush()

    def flush(self) -> None:
        """Send what waits because the manager was busy. Never blocks; call it now and then."""
        try:
            while self._socket is not None and self._waiting:
                self._socket.sendto(self._waiting[0], self._address or "")
                self._waiting.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self.close()
            self.on_failure(f"the service manager cannot be told anything more (NOTIFY_SOCKET): {error.strerror}")


def _open() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def _socket_name(address: str) -> str:
    """The address as bind(2) takes it: an abstract name begins with a NUL (unix(7))."""
    if address.startswith("@"):
        return "\0" + address[1:]
    if not address.startswith("/"):
        raise HostError("NOTIFY_SOCKET", f"{address!r} is neither a path nor @NAME: unset it, or start diyc by systemd")
    return address


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """The interval in seconds; None where there is none, or it is meant for another process than this one."""
    text, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID") or str(os.getpid())
    if not text or pid != str(os.getpid()):
        return None
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise HostError("WATCHDOG_USEC", f"{text!r} is not a number of microseconds: unset it")
    return int(text) / 1e6
