"""The leak check: what the kernel and this process hold before a test and after it, by name.

A snapshot counts mounts, cgroups, namespaces, links, descriptors, children and files. Whatever is there more often
afterwards, once the kernel had time to clean up, is a leak. Other services of the machine come and go meanwhile, so
cgroups count if their path names diyc, and namespaces if a process of ours or in such a cgroup is in them."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Snapshot = dict[str, Counter[str]]

MARK = "diyc"
# What a state directory is for; anything else below it belongs to a run and goes with the run.
KEPT = ("images", "logs", "record")
# What stays in a runtime directory by itself; what lies in there belongs to a supervisor and goes with it.
STANDING = ("instances", "host-root-lock")


def snapshot(places: Iterable[Path] = (), proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Snapshot:
    """Count every object of each kind. `places` are the state and runtime directories to look for files in."""
    me = proc / "self"
    kinds: dict[str, Iterable[str]] = {
        "mount": mounts(me),
        "cgroup": cgroups(me),
        "network namespace": {link(process / "ns/net") for process in ours(proc)} - {""},
        "mount namespace": {link(thread / "ns/mnt") for thread in me.glob("task/*")} - {""},
        "link": names(sys / "class/net"),
        "descriptor": filter(None, (link(path) for path in me.glob("fd/*"))),
        "child": (f"{pid} ({text(proc / pid / 'comm').strip()})" for pid in children(proc, "self")),
        "file": files(places),
    }
    return {kind: Counter(found) for kind, found in kinds.items()}


def leaks(before: Snapshot, after: Snapshot) -> list[str]:
    """One line for each object that is there now and was not, such as `descriptor: /tmp/x`."""
    return [
        f"{kind}: {name}" + (f" ({count} times)" if count > 1 else "")
        for kind, found in after.items()
        for name, count in sorted((found - before[kind]).items())
    ]


def settled_leaks(before: Snapshot, look: Callable[[], Snapshot], patience: float = 3.0) -> list[str]:
    """The leaks that stay. Namespaces and their cgroups go a moment after their last process."""
    gc.collect()
    deadline = time.monotonic() + patience
    while (found := leaks(before, look())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def mounts(me: Path) -> Iterator[str]:
    """Every mount of our namespace as `ID POINT (TYPE)`."""
    for line in (me / "mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        yield f"{left.split()[0]} {left.split()[4]} ({right.split()[0]})"


def cgroups(me: Path) -> Iterator[str]:
    """Every cgroup of diyc's below our own, in every hierarchy that is mounted."""
    for own in own_cgroups(me):
        for directory, below, _ in os.walk(own):
            paths = (os.path.join(directory, name) for name in below)
            yield from (path for path in paths if MARK in os.path.relpath(path, own))


def own_cgroups(me: Path) -> list[Path]:
    """The directory of our own cgroup in each mounted hierarchy (cgroups(7), proc_pid_mountinfo(5))."""
    own: dict[str, str] = {}
    for line in (me / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.removeprefix("name=").split(","), path)
    found = []
    for line in (me / "mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        root, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        keys = [""] if kind == "cgroup2" else options.replace("name=", "").split(",") if kind == "cgroup" else []
        paths = [own[key] for key in keys if key in own]
        if paths:
            inside = os.path.relpath(paths[0], root) if paths[0].startswith(root) else "."
            found.append(delegated(Path(point), Path(os.path.normpath(os.path.join(point, inside)))))
    return found


def delegated(mount: Path, own: Path) -> Path:
    """Where diyc makes its cgroups if we are in `own`: the nearest directory that systemd marked as delegated, else
    `own` itself, which a supervisor in this process leaves for a leaf (diyc/cgroups/delegation.py)."""
    own = own.parent if own.name == "diyc-supervisor" else own
    for place in [own, *own.parents]:
        if place.is_relative_to(mount) and (marked(place, "user.delegate") or marked(place, "trusted.delegate")):
            return place
    return own


def marked(directory: Path, name: str) -> bool:
    """An extended attribute says yes. Without privilege those called trusted are not to be seen (xattr(7))."""
    try:
        return os.getxattr(directory, name) == b"1"
    except OSError:
        return False


def ours(proc: Path) -> Iterator[Path]:
    """/proc/PID of this process, of its descendants, and of whatever runs in a cgroup of diyc's."""
    family = {str(os.getpid()), *descendants(proc, "self")}
    for process in proc.glob("[0-9]*"):
        if process.name in family or MARK in text(process / "cgroup"):
            yield process


def descendants(proc: Path, pid: str) -> Iterator[str]:
    for child in children(proc, pid):
        yield child
        yield from descendants(proc, child)


def children(proc: Path, pid: str) -> Iterator[str]:
    """The PIDs of a process's children, dead ones that nobody waited for too."""
    for task in (proc / pid).glob("task/*/children"):
        yield from text(task).split()


def files(places: Iterable[Path]) -> Iterator[str]:
    for place in places:
        standing = {str(place / name) for name in STANDING}
        for directory, below, plain in os.walk(place):
            if Path(directory) == place:
                below[:] = [name for name in below if name not in KEPT]
            found = {os.path.join(directory, name) for name in plain + below}
            yield from found - standing


def names(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


def link(path: Path) -> str:
    """What a link of /proc points to; nothing if its process or descriptor went meanwhile."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def text(path: Path) -> str:
    """A file of /proc; nothing if its process went meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""
