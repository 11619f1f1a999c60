"""diyc-supervisor as a service: keeps the service manager informed while the event loop turns.

The watchdog is answered from the loop itself, so a loop that hangs is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from diyc.notify import Notifier

STATUS_EVERY = 1.0  # seconds
EXTEND_EVERY, EXTEND_BY = 5.0, 30.0  # while images are unpacked, which has no time limit


class Service:
    """Tells `notifier` what goes on; `describe` is the status line."""

    def __init__(self, notifier: Notifier, describe: Callable[[], str], loop: asyncio.AbstractEventLoop) -> None:
        self._notifier = notifier
        self._describe = describe
        self._loop = loop
        self._shown: str | None = None
        self._starting = True
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self) -> None:
        """Begin; close() ends it. Without a service manager nothing is set up."""
        if not self._notifier.active:
            return
        self._every("extend", EXTEND_EVERY, self._extend)
        self._every("status", STATUS_EVERY, self._tell_status)
        if self._notifier.watchdog is not None:
            self._every("watchdog", self._notifier.watchdog / 2, self._notifier.alive)

    def ready(self) -> None:
        """All jobs are prepared, at the start or by a reload."""
        self._starting = False
        self._tell_status()
        self._notifier.ready()

    def reloading(self) -> None:
        """A reload begins."""
        self._notifier.reloading()

    def stopping(self, within: float) -> None:
        """The end has begun and takes `within` seconds at most; then there is some time for giving things back."""
        self._starting = False
        self._notifier.stopping()
        self._notifier.extend(within + EXTEND_BY)

    def close(self) -> None:
        """The last status, and silence: the loop is about to end."""
        for timer in self._timers.values():
            timer.cancel()
        if self._timers:
            self._tell_status()
        self._timers.clear()

    def _every(self, name: str, seconds: float, tell: Callable[[], None]) -> None:
        self._timers[name] = self._loop.call_later(seconds, self._every, name, seconds, tell)
        tell()

    def _tell_status(self) -> None:
        self._notifier.flush()
        status = self._describe()
        if status != self._shown:
            self._shown = status
            self._notifier.status(status)

    def _extend(self) -> None:
        if self._starting:
            self._notifier.extend(EXTEND_BY)
