"""Slots: what a running job borrows and gives back clean, here its range of host user ids.

Concurrent runs never share a range, those of other supervisors included, so files, keys and per-user limits of one
mean nothing to another. A slot also keeps a user namespace with that map, which mount_setattr(2) takes to show an
image's files under these ids."""

from __future__ import annotations

import fcntl
import heapq
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

from diyc.errors import HostError

RANGE = 65536
_F_OFD_SETLK = 37


@dataclass(frozen=True, slots=True)
class Slot:
    """Container ids are host ids from `first` on, by `id_map`, the text for uid_map and gid_map (user_namespaces(7)).
    `userns` is a descriptor of such a namespace, None where mounts cannot be idmapped and ids need no shift."""

    index: int
    first: int
    userns: int | None
    id_map: str


class RangeLocks:
    """Locks on id ranges that all supervisors of a host respect: byte N of `path` is for the ids from N * RANGE on.

    They are open file description locks (F_OFD_SETLK of fcntl_locking(2)): the kernel drops them with the descriptor,
    whatever becomes of its holder, and two supervisors in one process are kept apart too."""

    def __init__(self, path: str = "/run/diyc.ids") -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError("id ranges", f"cannot open {path}: {error.strerror}") from error

    def take(self, first: int) -> bool:
        """Lock the range that begins at host id `first`, until close(); whether it was free."""
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first // RANGE, 1 + bool(first % RANGE), 0)
        try:
            fcntl.fcntl(self._fd, _F_OFD_SETLK, request)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give all ranges back."""
        os.close(self._fd)


class Slots:
    """Hands out the lowest free slot of `ids` (first host id, count). `reuse` keeps namespaces between runs.

    `lock` is asked once for each range: False passes over one that another supervisor uses."""

    def __init__(
        self,
        ids: tuple[int, int],
        make_userns: Callable[[str], int],
        *,
        reuse: bool = True,
        lock: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._first, count = ids
        self._size = count // RANGE
        self._make = make_userns
        self._reuse = reuse
        self._lock = lock
        self._kept: dict[int, Slot] = {}
        self._free: list[int] = []
        self._next = 0

    @property
    def size(self) -> int:
        """How many slots the id range holds: an upper bound of parallel runs."""
        return self._size

    def take(self) -> Slot:
        """A slot that nobody else has. Raises OSError where the kernel makes no user namespace."""
        index = heapq.heappop(self._free) if self._free else self._new_index()
        kept = self._kept.pop(index, None)
        if kept is not None:
            return kept
        first = self._first + index * RANGE
        try:
            id_map = f"0 {first} {RANGE}\n"
            return Slot(index, first, self._make(id_map), id_map)
        except OSError:
            heapq.heappush(self._free, index)
            raise

    def _new_index(self) -> int:
        while self._next < self._size:
            index = self._next
            self._next += 1
            if self._lock(self._first + index * RANGE):
                return index
        raise ValueError(f"id_range holds {self._size} slots, all taken: raise its count or lower max_parallel")

    def give(self, slot: Slot) -> None:
        """Take a slot back. Its namespace holds no process any more and cannot be soiled."""
        if self._reuse:
            self._kept[slot.index] = slot
        else:
            _drop(slot)
        heapq.heappush(self._free, slot.index)

    def close(self) -> None:
        """Drop the kept namespaces."""
        for slot in self._kept.values():
            _drop(slot)
        self._kept.clear()


class SharedSlots:
    """The same face without root: every run has the ids of the user namespace that the supervisor is in."""

    size = sys.maxsize

    def __init__(self, id_map: str) -> None:
        self._slot = Slot(0, 0, None, id_map)

    def take(self) -> Slot:
        """The one slot."""
        return self._slot

    def give(self, slot: Slot) -> None:
        """Nothing was taken from anybody."""

    def close(self) -> None:
        """Nothing is kept."""


def _drop(slot: Slot) -> None:
    if slot.userns is not None:
        os.close(slot.userns)
