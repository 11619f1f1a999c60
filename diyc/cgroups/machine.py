"""What a limit depends on beside cgroups: swap, disks and their schedulers, huge pages."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Reads /proc and /sys; both are parameters so that tests can describe another machine."""

    swaps: str = "/proc/swaps"
    sys: str = "/sys"
    stat: Callable[[str], os.stat_result] = os.stat

    def has_swap(self) -> bool:
        """Whether any swap is on: the first line of /proc/swaps is a heading."""
        if not os.path.exists(self.swaps):  # a kernel without CONFIG_SWAP
            return False
        with open(self.swaps, encoding="utf-8") as file:
            return len(file.read().splitlines()) > 1

    def disk(self, device: str) -> str:
        """The "major:minor" that io limits of `device` go to; a partition's are its whole disk's.

        ValueError says why a path cannot be limited."""
        try:
            found = self.stat(device)
        except OSError as error:
            raise ValueError(f"cannot look at it: {error.strerror}") from error
        if not stat.S_ISBLK(found.st_mode):
            raise ValueError("not a block device")
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        entry = os.path.realpath(f"{self.sys}/dev/block/{number}")
        if not os.path.exists(f"{entry}/partition"):
            return number
        with open(f"{os.path.dirname(entry)}/dev", encoding="ascii") as file:
            return file.read().strip()

    def schedulers(self) -> set[str]:
        """The I/O schedulers in use on this machine's disks, each the bracketed word of its file."""
        found = set()
        for path in glob.glob(f"{glob.escape(self.sys)}/block/*/queue/scheduler"):
            with open(path, encoding="ascii") as file:
                found |= {word.strip("[]") for word in file.read().split() if word.startswith("[")}
        return found

    def page_sizes(self) -> list[str]:
        """The huge page sizes as the hugetlb controller spells them: 2MB, 1GB."""
        kib = [int(name[10:-2]) for name in _listed(f"{self.sys}/kernel/mm/hugepages")]
        return [_page_size(size) for size in sorted(kib)]


def _listed(directory: str) -> list[str]:
    return os.listdir(directory) if os.path.isdir(directory) else []


def _page_size(kib: int) -> str:
    if kib >= 1024**2:
        return f"{kib // 1024**2}GB"
    return f"{kib // 1024}MB" if kib >= 1024 else f"{kib}KB"
