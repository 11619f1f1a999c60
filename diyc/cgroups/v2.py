"""cgroup v2: one hierarchy for all controllers. Its files for limits and figures.

Source: Documentation/admin-guide/cgroup-v2.rst, Documentation/accounting/psi.rst."""

from __future__ import annotations

import re

from diyc.cgroups.draft import (
    DEFAULT_WEIGHT,
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

_IO_WORDS = {"io_read_bps": "rbps", "io_write_bps": "wbps", "io_read_iops": "riops", "io_write_iops": "wiops"}
_USEC = 10**6


def _memory(limits: Limits, draft: Draft) -> None:
    if limits.memory is not None:
        draft.put("memory", "memory", "memory.max", limits.memory)
    if limits.swap is None:
        return
    if draft.present("memory", "memory.swap.max"):
        draft.put("swap", "memory", "memory.swap.max", limits.swap)
    elif draft.machine.has_swap():
        draft.refuse(
            "swap",
            "this kernel does not account swap (boot with swapaccount=1, turn swap off with `swapoff -a`, "
            "or allow any swap by leaving the limit out)",
        )


def _cpu(limits: Limits, draft: Draft) -> None:
    if limits.cpus is not None and (bandwidth := draft.quota(limits.cpus)):
        draft.put("cpus", "cpu", "cpu.max", f"{bandwidth[0]} {bandwidth[1]}")
    if limits.cpu_weight not in (None, DEFAULT_WEIGHT):
        draft.put("cpu_weight", "cpu", "cpu.weight", limits.cpu_weight)


def _cpuset(limits: Limits, draft: Draft) -> None:
    if (cpus := draft.cpuset(limits)) is not None:
        draft.put("cpuset", "cpuset", "cpuset.cpus", cpus)


def _pids(limits: Limits, draft: Draft) -> None:
    if limits.pids is not None:
        draft.put("pids", "pids", "pids.max", limits.pids)


def _io(limits: Limits, draft: Draft) -> None:
    for disk, values in draft.disks(limits).items():
        words = " ".join(f"{word}={values[kind]}" for kind, word in _IO_WORDS.items() if kind in values)
        draft.put(next(iter(values)), "io", "io.max", f"{disk} {words}")
    weight = limits.io_weight or DEFAULT_WEIGHT
    draft.weight(limits, {"bfq": ("io.bfq.weight", bfq_weight(weight)), "iocost": ("io.weight", f"default {weight}")})


def _hugetlb(limits: Limits, draft: Draft) -> None:
    for size, value in draft.pages(limits):
        draft.put(f"hugetlb.{size}", "hugetlb", f"hugetlb.{size}.max", value)


def _memory_figures(read: Read) -> Figures:
    usage, events = number(read("memory.current")), read("memory.events")
    return found(
        memory_current_bytes=usage,
        memory_working_set_bytes=working_set(usage, value_of(read("memory.stat"), b"inactive_file")),
        memory_peak_bytes=number(read("memory.peak")),
        memory_limit_hits=value_of(events, b"max"),
        oom_kills=value_of(events, b"oom_kill"),
    )


def _pids_figures(read: Read) -> Figures:
    return found(
        pids_current=number(read("pids.current")),
        pids_peak=number(read("pids.peak")),
        pids_limit_hits=value_of(read("pids.events"), b"max"),
    )


def _cpu_figures(read: Read) -> Figures:
    """Usage is there without any controller, on hybrid hosts too; the throttling only with the cpu controller."""
    text = read("cpu.stat")
    return found(
        cpu_usage_s=scaled(value_of(text, b"usage_usec"), _USEC),
        cpu_user_s=scaled(value_of(text, b"user_usec"), _USEC),
        cpu_system_s=scaled(value_of(text, b"system_usec"), _USEC),
        throttled_periods=value_of(text, b"nr_throttled"),
        throttled_s=scaled(value_of(text, b"throttled_usec"), _USEC),
    )


def _io_figures(read: Read) -> Figures:
    """A line a disk: "major:minor rbytes=N wbytes=N ..."; no line for a disk that was not used."""
    text = read("io.stat")
    if text is None:
        return {}
    return {
        "io_read_bytes": sum(map(int, re.findall(rb" rbytes=(\d+)", text))),
        "io_write_bytes": sum(map(int, re.findall(rb" wbytes=(\d+)", text))),
    }


def pressure(read: Read) -> dict[str, float] | None:
    """Seconds in which some task waited for cpu, memory, io; None where the kernel does not count them."""
    figures = {}
    for name in ("cpu", "memory", "io"):
        match = re.match(rb"some .*total=(\d+)", read(f"{name}.pressure") or b"")
        if match:
            figures[name] = int(match[1]) / _USEC
    return figures or None


DIALECT = Dialect(
    settings={"memory": _memory, "cpu": _cpu, "cpuset": _cpuset, "pids": _pids, "io": _io, "hugetlb": _hugetlb},
    figures={"memory": _memory_figures, "pids": _pids_figures, "unified": _cpu_figures, "io": _io_figures},
)
