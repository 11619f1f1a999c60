"""Writing for slow readers: in a thread, so that a pipe nobody reads stops neither timeouts nor signals."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable

PENDING = 1024**2  # bytes that wait to be written before more is asked for


class Relay:
    """Writes chunks to descriptors, in order. `on_error` is called on the loop, once, with the first OSError;
    after that everything is dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_error: Callable[[OSError], None]) -> None:
        self._loop = loop
        self._on_error = on_error
        self._queue: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._pending = 0
        self._waiting: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._write_all, name="relay", daemon=True)
        self._thread.start()

    def write(self, fd: int, chunk: bytes) -> bool:
        """Take a chunk; False if enough is waiting now: ask when_ready() before bringing more."""
        self._pending += len(chunk)
        self._queue.put((fd, chunk))
        return self._pending < PENDING

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call `call` on the loop when there is room again."""
        self._waiting.append(call)

    def close(self, patience: float | None = None) -> None:
        """Wait until all is written; at most `patience` seconds."""
        self._queue.put(None)
        self._thread.join(patience)

    def _write_all(self) -> None:
        failed = False
        while (item := self._queue.get()) is not None:
            fd, chunk = item
            try:
                if not failed:
                    _write(fd, chunk)
            except OSError as error:
                failed = True
                self._tell(self._on_error, error)
            self._tell(self._written, len(chunk))

    def _tell(self, call: Callable[..., None], *values: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *values)

    def _written(self, size: int) -> None:
        self._pending -= size
        if self._pending < PENDING // 2:
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                call()


def _write(fd: int, chunk: bytes) -> None:
    while chunk:
        try:
            chunk = chunk[os.write(fd, chunk) :]
        except BlockingIOError:
            os.set_blocking(fd, True)  # a job that shares the descriptor, a socket say, may have changed that
