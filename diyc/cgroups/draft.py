"""A run's limits on their way to cgroup files: which file gets which value, and what cannot be enforced.

v1.py and v2.py fill a Draft in their own terms; base.py carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diyc.cgroups.machine import Machine
from diyc.jobs import Limits
from diyc.units import format_cpuset, parse_cpuset

Read = Callable[[str], bytes | None]
Figures = dict[str, Any]

# The limits each controller enforces.
KEYS: dict[str, tuple[str, ...]] = {
    "memory": ("memory", "swap"),
    "cpu": ("cpus", "cpu_weight"),
    "cpuset": ("cpuset",),
    "pids": ("pids",),
    "io": ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops", "io_weight"),
    "hugetlb": ("hugetlb",),
}
IO_KINDS = ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops")

DEFAULT_WEIGHT = 100
PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class Setting:
    """One write: `value` into `file` of the run's directory in the hierarchy of `controller`."""

    controller: str
    file: str
    value: str


@dataclass(slots=True)
class Draft:
    """What the limits come to. `present` tells whether a controller's directories have a file;
    `usable_cpus` gives the kernel's list of CPUs that a run could get, None where unknown; `has_iocost` tells
    whether any disk has io.cost's weights. Both read files, so they are asked only when a limit needs it."""

    machine: Machine
    present: Callable[[str, str], bool]
    usable_cpus: Callable[[], str | None]
    has_iocost: Callable[[], bool]
    settings: list[Setting] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def put(self, key: str, controller: str, file: str, value: object) -> None:
        """Note a write, or a problem where this kernel has no such file."""
        if self.present(controller, file):
            self.settings.append(Setting(controller, file, str(value)))
        else:
            self.refuse(key, f"this kernel's {controller} controller has no {file}")

    def refuse(self, key: str, why: str) -> None:
        """Note that a limit cannot be enforced here."""
        self.problems.append(f"limits.{key}: {why}")

    def cpuset(self, limits: Limits) -> str | None:
        """The CPUs to ask for. v2 would take CPUs that do not exist and then use all: so they are checked here."""
        if limits.cpuset is None:
            return None
        asked = parse_cpuset(limits.cpuset)
        usable = self.usable_cpus()
        if usable and (missing := set(asked) - set(parse_cpuset(usable))):
            self.refuse("cpuset", f"CPU {format_cpuset(missing)} is not among {usable}, which diyc may use")
            return None
        return format_cpuset(asked)

    def quota(self, cpus: float) -> tuple[int, int] | None:
        """(quota, period) in microseconds. The kernel takes no quota below 1 ms, nor a period above 1 s."""
        period = PERIOD_US if cpus * PERIOD_US >= 1000 else 1_000_000
        if cpus * period < 1000:
            self.refuse("cpus", f"{cpus:g} is less than the kernel's smallest share of a CPU, 0.001")
            return None
        return round(cpus * period), period

    def disks(self, limits: Limits) -> Mapping[str, Mapping[str, int]]:
        """{"major:minor": {kind: value}}. Two paths of one disk share its limit: the smaller one holds."""
        found: dict[str, dict[str, int]] = {}
        for kind, device, value in _io_limits(limits):
            key = f'{kind}."{device}"'
            if value < 1:  # v1 reads 0 as "no limit", v2 refuses it
                self.refuse(key, f"the kernel knows no limit of {value} (the smallest is 1)")
                continue
            try:
                disk = found.setdefault(self.machine.disk(device), {})
            except ValueError as error:
                self.refuse(key, str(error))
                continue
            disk[kind] = min(value, disk.get(kind, value))
        return found

    def weight(self, limits: Limits, files: Mapping[str, tuple[str, object]]) -> None:
        """Note the io weight for each scheduler in use; `files` maps a scheduler to (file, value)."""
        if limits.io_weight in (None, DEFAULT_WEIGHT):
            return
        using = self.machine.schedulers() | ({"iocost"} if self.has_iocost() else set())
        for scheduler in sorted(using & files.keys()):
            self.put("io_weight", "io", *files[scheduler])
        if not using & files.keys():
            self.refuse(
                "io_weight",
                "no disk here has a scheduler that knows weights, so it would have no effect "
                "(try `echo bfq > /sys/block/DISK/queue/scheduler`)",
            )

    def pages(self, limits: Limits) -> Iterator[tuple[str, int]]:
        """The huge page limits whose page size this kernel has."""
        known = self.machine.page_sizes()
        for size, value in limits.hugetlb:
            if size in known:
                yield size, value
            else:
                here = f"huge pages of {', '.join(known)} only" if known else "no huge pages"
                self.refuse(f"hugetlb.{size}", f"this machine has {here}")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one cgroup version spells limits and figures, by controller.

    A reader of figures returns only what it found, under the names of CgroupFigures."""

    settings: Mapping[str, Callable[[Limits, Draft], None]]
    figures: Mapping[str, Callable[[Read], Figures]]


def asked_for(limits: Limits, controller: str) -> list[str]:
    """The keys of `controller` that a run sets."""
    return [key for key in KEYS[controller] if getattr(limits, key) not in (None, ())]


def bfq_weight(weight: int) -> int:
    """BFQ knows 1..1000 where io.weight knows 1..10000; both have 100 in the middle, so each side is scaled."""
    return weight if weight <= DEFAULT_WEIGHT else round(100 + (weight - 100) * 900 / 9900)


def value_of(text: bytes | None, key: bytes) -> int | None:
    """The number after `key` in a file of "key value" lines; None without such a line."""
    if text is None:
        return None
    start = (b"\n" + text).find(b"\n" + key + b" ")
    return None if start < 0 else int(text[start + len(key) + 1 :].split(None, 1)[0])


def number(text: bytes | None) -> int | None:
    """The only number in a file."""
    return None if text is None else int(text)


def found(**figures: float | None) -> Figures:
    """The figures that are there."""
    return {name: value for name, value in figures.items() if value is not None}


def scaled(value: int | None, per_second: int) -> float | None:
    """A count of ticks, microseconds or nanoseconds in seconds."""
    return None if value is None else value / per_second


def working_set(usage: int | None, inactive_file: int | None) -> int | None:
    """What could not be reclaimed at once: usage less the cold page cache (as cAdvisor and kubelet count)."""
    return None if usage is None or inactive_file is None else max(0, usage - inactive_file)


def _io_limits(limits: Limits) -> Iterator[tuple[str, str, int]]:
    for kind in IO_KINDS:
        for device, value in getattr(limits, kind):
            yield kind, device, value
