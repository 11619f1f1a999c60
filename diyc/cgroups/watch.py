"""Learning that a cgroup has become empty, as a descriptor for an event loop: nothing polls."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Iterable

from diyc.cgroups.kill import open_pidfd


class EmptyWatch:
    """A descriptor that becomes readable when a cgroup may have become empty. Close it after use.

    Event loops cannot watch cgroup.events itself: it is always readable, and news are POLLPRI (cgroup-v2.rst).
    So an epoll set that asks for just that stands between."""

    def __init__(self, fds: Iterable[int], mask: int) -> None:
        """Takes over `fds`."""
        self._fds = list(fds)
        self._epoll = select.epoll()
        for fd in self._fds:
            self._epoll.register(fd, mask)

    @classmethod
    def of_events(cls, path: str) -> EmptyWatch | None:
        """Watch a v2 cgroup's cgroup.events; None if it is empty already. Reading the file arms the event,
        so nothing that happens later is missed."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if b"populated 1" in os.pread(fd, 256, 0):
            return cls([fd], select.EPOLLPRI)
        os.close(fd)
        return None

    @classmethod
    def of_processes(cls, pids: Iterable[int]) -> EmptyWatch | None:
        """Watch the end of any of these processes (v1 has no event for its cgroups); None if all are gone."""
        pidfds = [fd for pid in pids if (fd := open_pidfd(pid)) is not None]
        return cls(pidfds, select.EPOLLIN) if pidfds else None

    def fileno(self) -> int:
        """For loop.add_reader()."""
        return self._epoll.fileno()

    async def wait(self) -> None:
        """Return at the first event."""
        loop = asyncio.get_running_loop()
        happened = asyncio.Event()
        loop.add_reader(self.fileno(), happened.set)
        try:
            await happened.wait()
        finally:
            loop.remove_reader(self.fileno())

    def close(self) -> None:
        """Close every descriptor."""
        self._epoll.close()
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> EmptyWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
