"""Slots: what a running job borrows and gives back clean, here its range of host user ids.

Concurrent runs never share a range, so files, keys and per-user limits of one mean nothing to another. A slot also
keeps a user namespace with that map, which mount_setattr(2) takes to show an image's files under these ids."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable
from dataclasses import dataclass

RANGE = 65536


@dataclass(frozen=True, slots=True)
class Slot:
    """Container ids 0..65535 are host ids `first`..`first + 65535`; `userns` is a descriptor of such a namespace."""

    index: int
    first: int
    userns: int

    @property
    def id_map(self) -> str:
        """The line for uid_map and gid_map (user_namespaces(7))."""
        return f"0 {self.first} {RANGE}\n"


class Slots:
    """Hands out the lowest free slot of `ids` (first host id, count). `reuse` keeps namespaces between runs."""

    def __init__(self, ids: tuple[int, int], make_userns: Callable[[str], int], *, reuse: bool = True) -> None:
        self._first, count = ids
        self._size = count // RANGE
        self._make = make_userns
        self._reuse = reuse
        self._kept: dict[int, Slot] = {}
        self._free: list[int] = []
        self._next = 0

    @property
    def size(self) -> int:
        """How many slots the id range holds: an upper bound of parallel runs."""
        return self._size

    def take(self) -> Slot:
        """A slot that nobody else has. Raises OSError where the kernel makes no user namespace."""
        index = heapq.heappop(self._free) if self._free else self._next
        if index >= self._size:
            raise ValueError(f"id_range holds {self._size} slots, all taken: raise its count or lower max_parallel")
        self._next = max(self._next, index + 1)
        kept = self._kept.pop(index, None)
        if kept is not None:
            return kept
        first = self._first + index * RANGE
        try:
            return Slot(index, first, self._make(f"0 {first} {RANGE}\n"))
        except OSError:
            heapq.heappush(self._free, index)
            raise

    def give(self, slot: Slot) -> None:
        """Take a slot back. Its namespace holds no process any more and cannot be soiled."""
        if self._reuse:
            self._kept[slot.index] = slot
        else:
            os.close(slot.userns)
        heapq.heappush(self._free, slot.index)

    def close(self) -> None:
        """Drop the kept namespaces."""
        for slot in self._kept.values():
            os.close(slot.userns)
        self._kept.clear()
