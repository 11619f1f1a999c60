"""Finds out how cgroups are mounted here, and which subtree is ours to write in.

Rules: cgroups(7), Documentation/admin-guide/cgroup-v2.rst, and systemd's CGROUP_DELEGATION document."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from diyc.errors import HostError

# Our name for each controller, from the kernel's v1 name. What is not here is not used.
_V1_NAMES = {
    "memory": "memory",
    "pids": "pids",
    "cpu": "cpu",
    "cpuacct": "cpuacct",
    "cpuset": "cpuset",
    "blkio": "io",
    "hugetlb": "hugetlb",
    "devices": "devices",
}
_V2_NAMES = frozenset({"memory", "pids", "cpu", "cpuset", "io", "hugetlb"})

_USER_MANAGER = re.compile(r"/user@\d+\.service$")

# The child of the delegated root that the supervisor moves into, see delegation.py.
LEAF = "diyc-supervisor"


@dataclass(frozen=True, slots=True)
class Place:
    """One mounted hierarchy. `own` is this process's cgroup and `root` the delegated root, both below `mount`."""

    version: int
    mount: str
    own: str
    root: str
    read_only: bool = False
    marked: bool = False

    @property
    def directory(self) -> str:
        """The delegated root: nothing is ever written outside it."""
        return self.mount + self.root.rstrip("/")


@dataclass(frozen=True, slots=True)
class CgroupHost:
    """What detect() found: layout "v1", "hybrid" or "v2"; where each controller is; the v2 mount, if any.

    Controllers have their v2 names (v1's blkio is "io"), and v1's cpuacct beside them; devices only where all is v1."""

    layout: str
    controllers: Mapping[str, Place]
    unified: Place | None


@dataclass(frozen=True, slots=True)
class _Mount:
    root: str
    point: str
    kind: str
    options: frozenset[str]
    read_only: bool


def detect(
    mountinfo: str = "/proc/self/mountinfo",
    self_cgroup: str = "/proc/self/cgroup",
    root: str = "",
    is_marked: Callable[[str], bool] | None = None,
) -> CgroupHost:
    """Read the layout of this host. `root` is put before every mount point (for a fake tree).

    HostError: a hierarchy is mounted, but our own cgroup lies outside of what we can see of it."""
    mounts = [mount for mount in _mounts(_text(mountinfo)) if _is_visible(root + mount.point)]
    own = dict(_memberships(_text(self_cgroup)))
    controllers: dict[str, Place] = {}
    for name, ours in _V1_NAMES.items():
        candidates = [mount for mount in mounts if mount.kind == "cgroup" and name in mount.options]
        if name in own and candidates:
            controllers[ours] = _place(1, name, candidates, own[name], root)
    unified = None
    if candidates := [mount for mount in mounts if mount.kind == "cgroup2"]:
        unified = _delegated(_place(2, "v2", candidates, own.get("", "/"), root), is_marked or has_delegate_mark)
    layout = ("hybrid" if controllers else "v2") if unified else "v1"
    if unified:
        controllers.pop("devices", None)  # on the v2 mount a program does it for all runs at once
        controllers |= {name: unified for name in _offered(unified) if name in _V2_NAMES}
    return CgroupHost(layout, controllers, unified)


def has_delegate_mark(directory: str) -> bool:
    """Whether systemd says that this subtree is ours: an extended attribute on the directory."""
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.ENOENT):
                raise HostError("cgroup delegation", f"cannot read {name} of {directory}: {error.strerror}") from error
    return False


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        raise HostError("cgroups", f"cannot read {path}: {error.strerror} (is /proc mounted?)") from error


def _is_visible(point: str) -> bool:
    """False for a mount that another one covers: its path then leads elsewhere."""
    return os.path.exists(f"{point}/cgroup.procs")


def _mounts(text: str) -> Iterator[_Mount]:
    """The cgroup mounts in mountinfo (proc_pid_mountinfo(5)); one mounted over another of them replaces it."""
    found: dict[str, _Mount] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, super_options) = left.split(" "), right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            point, options = _unescape(fields[4]), frozenset(super_options.split(","))
            read_only = "ro" in options or "ro" in fields[5].split(",")
            found[point] = _Mount(_unescape(fields[3]), point, kind, options, read_only)
    yield from found.values()


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes (space is \\040)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _memberships(text: str) -> Iterator[tuple[str, str]]:
    """(controller, own path) for each v1 controller in /proc/self/cgroup; the v2 line's controller is ""."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _place(version: int, name: str, candidates: list[_Mount], own: str, prefix: str) -> Place:
    """The best mount of one hierarchy: our own cgroup is below it, and it is writable."""
    visible = [(mount, path) for mount in candidates if (path := _below(mount.root, own)) is not None]
    if not visible:
        raise HostError(
            "cgroup mount",
            f"this process is in {own} of the {name} hierarchy, which is outside of what is mounted at "
            f"{candidates[0].point} ({candidates[0].root}): mount cgroups anew inside this cgroup namespace, "
            "or start diyc outside of it",
        )
    mount, path = min(visible, key=lambda candidate: candidate[0].read_only)
    return Place(version, prefix + mount.point, path, path, mount.read_only)


def _below(mount_root: str, own: str) -> str | None:
    """`own` as seen from a mount whose top is `mount_root`; None where it lies outside of it.

    A path with /.. leads out of our cgroup namespace (cgroup_namespaces(7)) and names nothing we can reach."""
    if ".." in (*mount_root.split("/"), *own.split("/")):
        return None
    top = mount_root.rstrip("/")
    if own != mount_root and not own.startswith(f"{top}/"):
        return None
    return own[len(top) :] or "/"


def _delegated(place: Place, is_marked: Callable[[str], bool]) -> Place:
    """`place` with its delegated root: the nearest cgroup that systemd marked, from our own upwards, else our own.

    The mark of user@UID.service is for that user's systemd, which marks nothing further down (before version 254)."""
    own = place.own.removesuffix(f"/{LEAF}") or "/"  # an earlier prepare() moved this process there
    path = own
    while path != "/":
        if is_marked(place.mount + path) and not _USER_MANAGER.search(path):
            return Place(2, place.mount, place.own, path, place.read_only, marked=True)
        path = os.path.dirname(path)
    return Place(2, place.mount, place.own, own, place.read_only, marked=is_marked(place.mount))


def _offered(unified: Place) -> list[str]:
    """The controllers that the delegated root may hand to its children."""
    path = f"{unified.directory}/cgroup.controllers"
    return _text(path).split() if os.path.exists(path) else []
