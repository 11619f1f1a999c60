"""cgroup v1: one hierarchy a controller. Its files for limits and figures.

Source: Documentation/admin-guide/cgroup-v1/, Documentation/scheduler/sched-bwc.rst."""

from __future__ import annotations

import os

from diyc.cgroups.draft import (
    DEFAULT_WEIGHT,
    IO_KINDS,
    PERIOD_US,
    Dialect,
    Draft,
    Figures,
    Read,
    bfq_weight,
    found,
    number,
    scaled,
    value_of,
    working_set,
)
from diyc.jobs import Limits

_MEMSW = "memory.memsw.limit_in_bytes"
_LARGEST_CHARGE = 2 * 1024**2  # a transparent huge page
_TICKS = os.sysconf("SC_CLK_TCK")


def _memory(limits: Limits, draft: Draft) -> None:
    if limits.memory is not None:
        draft.put("memory", "memory", "memory.limit_in_bytes", limits.memory)
    if limits.swap is not None:
        _swap(limits.memory, limits.swap, draft)


def _swap(memory: int | None, swap: int, draft: Draft) -> None:
    """v1 limits the sum of memory and swap. (memory.swappiness = 0 is no way out: it stops swapping at the
    run's own limit, but not when the whole machine runs short.)"""
    if memory is not None and draft.present("memory", _MEMSW):
        draft.put("swap", "memory", _MEMSW, memory + swap)
    elif not draft.machine.has_swap():
        return  # nothing to limit
    elif memory is None:
        draft.refuse("swap", "cgroup v1 limits swap only together with memory (set limits.memory too)")
    else:
        draft.refuse(
            "swap",
            "this kernel does not account swap (boot with swapaccount=1, turn swap off with `swapoff -a`, "
            "or allow any swap by leaving the limit out)",
        )


def _cpu(limits: Limits, draft: Draft) -> None:
    if limits.cpus is not None and (bandwidth := draft.quota(limits.cpus)):
        quota, period = bandwidth
        if period != PERIOD_US:
            draft.put("cpus", "cpu", "cpu.cfs_period_us", period)
        draft.put("cpus", "cpu", "cpu.cfs_quota_us", quota)
    if limits.cpu_weight not in (None, DEFAULT_WEIGHT):
        draft.put("cpu_weight", "cpu", "cpu.shares", _shares(limits.cpu_weight or DEFAULT_WEIGHT))


def _shares(weight: int) -> int:
    """cpu.shares has 1024 where cpu.weight has 100, and ends at 2 and 262144 (kernel/sched/sched.h)."""
    return min(max(round(weight * 1024 / DEFAULT_WEIGHT), 2), 262144)


def _cpuset(limits: Limits, draft: Draft) -> None:
    # cpuset.mems comes from the instance directory, by cgroup.clone_children.
    if (cpus := draft.cpuset(limits)) is not None:
        draft.put("cpuset", "cpuset", "cpuset.cpus", cpus)


def _pids(limits: Limits, draft: Draft) -> None:
    if limits.pids is not None:
        draft.put("pids", "pids", "pids.max", limits.pids)


def _io(limits: Limits, draft: Draft) -> None:
    for disk, values in draft.disks(limits).items():
        for kind in (kind for kind in IO_KINDS if kind in values):
            draft.put(kind, "io", f"blkio.throttle.{kind[3:]}_device", f"{disk} {values[kind]}")
    weight = limits.io_weight or DEFAULT_WEIGHT
    # CFQ (before Linux 5.0) has 500 in the middle of 10..1000.
    files = {
        "bfq": ("blkio.bfq.weight", bfq_weight(weight)),
        "cfq": ("blkio.weight", min(max(weight * 5, 10), 1000)),
    }
    draft.weight(limits, files)


def _hugetlb(limits: Limits, draft: Draft) -> None:
    for size, value in draft.pages(limits):
        draft.put(f"hugetlb.{size}", "hugetlb", f"hugetlb.{size}.limit_in_bytes", value)


def _memory_figures(read: Read) -> Figures:
    usage, peak = number(read("memory.usage_in_bytes")), number(read("memory.max_usage_in_bytes"))
    stat = read("memory.stat")
    return found(
        memory_current_bytes=usage,
        memory_working_set_bytes=working_set(usage, value_of(stat, b"total_inactive_file")),
        memory_peak_bytes=peak,
        memory_limit_hits=_limit_hits(read, peak, value_of(stat, b"hierarchical_memory_limit")),
        oom_kills=value_of(read("memory.oom_control"), b"oom_kill"),
    )


def _limit_hits(read: Read, peak: int | None, limit: int | None) -> int | None:
    """How often a limit refused memory. The kernel asks the limit of memory and swap together first, and counts a
    refusal only there; some kernels (6.18, by experiment) do not count that one at all. With swap = 0 the two limits
    are the same, so no refusals with the peak at the limit means: unknown."""
    counts = [number(read(file)) for file in ("memory.failcnt", "memory.memsw.failcnt")]
    hits = sum(count or 0 for count in counts)
    if counts[0] is None or (hits == 0 and peak is not None and limit is not None and peak > limit - _LARGEST_CHARGE):
        return None
    return hits


def _pids_figures(read: Read) -> Figures:
    return found(
        pids_current=number(read("pids.current")),
        pids_peak=number(read("pids.peak")),
        pids_limit_hits=value_of(read("pids.events"), b"max"),
    )


def _cpu_figures(read: Read) -> Figures:
    text = read("cpu.stat")
    return found(
        throttled_periods=value_of(text, b"nr_throttled"),
        throttled_s=scaled(value_of(text, b"throttled_time"), 10**9),
    )


def _cpuacct_figures(read: Read) -> Figures:
    text = read("cpuacct.stat")
    return found(
        cpu_usage_s=scaled(number(read("cpuacct.usage")), 10**9),
        cpu_user_s=scaled(value_of(text, b"user"), _TICKS),
        cpu_system_s=scaled(value_of(text, b"system"), _TICKS),
    )


def _io_figures(read: Read) -> Figures:
    """Lines are "major:minor Read bytes". Writes that the page cache delays are not charged to a v1 cgroup."""
    text = read("blkio.throttle.io_service_bytes_recursive")
    if text is None:  # before Linux 5.1; a run has no children, so both say the same
        text = read("blkio.throttle.io_service_bytes")
    if text is None:
        return {}
    lines = [line.split() for line in text.splitlines()]
    return {
        "io_read_bytes": sum(int(line[2]) for line in lines if line[1] == b"Read"),
        "io_write_bytes": sum(int(line[2]) for line in lines if line[1] == b"Write"),
    }


DIALECT = Dialect(
    settings={"memory": _memory, "cpu": _cpu, "cpuset": _cpuset, "pids": _pids, "io": _io, "hugetlb": _hugetlb},
    figures={
        "memory": _memory_figures,
        "pids": _pids_figures,
        "cpu": _cpu_figures,
        "cpuacct": _cpuacct_figures,
        "io": _io_figures,
    },
)
