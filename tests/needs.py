"""What a test needs of the host: `require("overlay")` skips the test, with the reason, where it is not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from diyc.host import tmpfs_keeps_user_attributes


def controller(name: str) -> bool:
    """A cgroup controller: mounted as v1, or offered by a v2 tree."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup" and name in options.split(","):
            return True
        listed = Path(left.split()[4], "cgroup.controllers")
        if kind == "cgroup2" and name in listed.read_text().split():
            return True
    return False


def filesystem(name: str) -> bool:
    return name in Path("/proc/filesystems").read_text().split()


def user_namespaces() -> bool:
    limit = Path("/proc/sys/user/max_user_namespaces")
    return limit.exists() and int(limit.read_text()) > 0


def program(name: str) -> bool:
    return shutil.which(name) is not None


def unified() -> bool:
    """A cgroup v2 mount, beside v1 hierarchies or alone."""
    return any(" - cgroup2 " in line for line in Path("/proc/self/mountinfo").read_text().splitlines())


CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "hugetlb")
PROGRAMS = ("bwrap", "busybox", "crun", "gcc", "newuidmap", "secilc", "strace", "unshare")
FEATURES: dict[str, tuple[Callable[[], bool], str]] = {
    "root": (lambda: os.geteuid() == 0, "needs root"),
    "systemd": (lambda: Path("/run/systemd/system").is_dir(), "needs systemd as PID 1"),
    "overlay": (partial(filesystem, "overlay"), "needs the overlay filesystem"),
    "overlay.rootless": (tmpfs_keeps_user_attributes, "needs Linux 6.6 (user.* attributes on a tmpfs)"),
    "user_namespaces": (user_namespaces, "needs user namespaces (sysctl user.max_user_namespaces)"),
    **{f"cgroup.{name}": (partial(controller, name), f"needs the cgroup controller {name}") for name in CONTROLLERS},
    "cgroup.v2": (unified, "needs a cgroup v2 mount"),
    "cgroup.io": (lambda: controller("io") or controller("blkio"), "needs the cgroup controller io (v1: blkio)"),
    **{f"program.{name}": (partial(program, name), f"needs the program {name}") for name in PROGRAMS},
}


def require(*features: str) -> None:
    """Skip the running test unless the host has every one of `features` (the keys of FEATURES)."""
    for feature in features:
        present, reason = FEATURES[feature]
        if not present():
            pytest.skip(reason)
