"""v2's two house rules: write only in the subtree that is yours, and keep processes in its leaves.

A cgroup that hands controllers to children may hold no process ("no internal processes"); so a supervisor
that sits in its delegated root first moves into a leaf of it. The top of a hierarchy is exempt."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from diyc.cgroups.detect import LEAF, CgroupHost
from diyc.cgroups.files import Files
from diyc.errors import HostError

HOW_TO_DELEGATE = (
    "start diyc in a cgroup of its own: `systemd-run --scope -p Delegate=yes diyc-supervisor ...`, "
    "or as a service with Delegate=yes; for an ordinary user `systemd-run --user --scope ...`, and the administrator "
    'hands controllers to users with `systemctl edit user@.service`: [Service] Delegate="cpu cpuset io memory pids"'
)


def enable(levels: Sequence[str], wanted: Iterable[str], files: Files) -> None:
    """Hand the controllers `wanted` down from the delegated root `levels[0]` to the children of `levels[-1]`.

    HostError: other processes are in the way, or the kernel refuses."""
    controllers = frozenset(wanted)
    if controllers - _enabled(levels[0], files):
        _vacate(levels[0], files)
    for level in levels:
        if missing := controllers - _enabled(level, files):
            _write(f"{level}/cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(missing)), files)


def obstacle(directory: str, wanted: Iterable[str], files: Files) -> str | None:
    """Why enable() could not hand out `wanted` from the delegated root `directory`; None if nothing is in the way."""
    if _is_top(directory) or not frozenset(wanted) - _enabled(directory, files):
        return None
    others = processes(directory, files) - {os.getpid()}
    if not others:
        return None
    return (
        f"other processes than diyc are in {directory} (pid {min(others)}, {len(others)} in all), so the kernel "
        f"lets no controller be used below it: {HOW_TO_DELEGATE}"
    )


def needs_systemd_scope(host: CgroupHost, systemd: str = "/run/systemd/system", files: Files | None = None) -> bool:
    """Whether the command line should start itself again through systemd-run, to get a subtree of its own:
    on pure v2, where systemd runs, has delegated nothing to us, and others share our cgroup."""
    place = host.unified
    if host.layout != "v2" or place is None or place.marked or not os.path.isdir(systemd):
        return False
    if os.geteuid() != 0 and not os.access(place.directory, os.W_OK):
        return True
    if _is_top(place.directory):
        return False
    return bool(processes(place.directory, files or Files()) - {os.getpid()})


def processes(directory: str, files: Files) -> set[int]:
    """The processes in one cgroup; 0 stands for any from outside of our PID namespace."""
    return {int(pid) for pid in (files.read(f"{directory}/cgroup.procs") or b"").split()}


def _is_top(directory: str) -> bool:
    """The top of the whole hierarchy, not merely of our cgroup namespace, has no cgroup.events."""
    return not os.path.exists(f"{directory}/cgroup.events")


def _enabled(directory: str, files: Files) -> frozenset[str]:
    return frozenset((files.read(f"{directory}/cgroup.subtree_control") or b"").decode().split())


def _vacate(directory: str, files: Files) -> None:
    """Move this process, if it is in `directory`, into the leaf."""
    if why := obstacle(directory, ["any"], files):
        raise HostError("cgroup delegation", why)
    if _is_top(directory) or os.getpid() not in processes(directory, files):
        return
    leaf = f"{directory}/{LEAF}"
    try:
        files.mkdir(leaf)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError("cgroup delegation", f"cannot make {leaf}: {error.strerror}; {HOW_TO_DELEGATE}") from error
    _write(f"{leaf}/cgroup.procs", "0", files)


def _write(path: str, value: str, files: Files) -> None:
    try:
        files.write(path, value.encode())
    except OSError as error:
        raise HostError(
            "cgroup delegation", f"cannot write {value!r} to {path}: {error.strerror}; {HOW_TO_DELEGATE}"
        ) from error
