"""The leak check: what the kernel and this process hold before a test and after it, by name.

A snapshot counts mounts, cgroups, network namespaces, mount namespaces of our own threads, links, descriptors,
children and files. Whatever is there more often afterwards, once the kernel had time to clean up, is a leak."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Snapshot = dict[str, Counter[str]]

# What a state directory is for; anything else below it belongs to a run and goes with the run.
KEPT = ("images", "logs", "record")


def snapshot(places: Iterable[Path] = (), proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Snapshot:
    """Count every object of each kind. `places` are the state and runtime directories to look for files in."""
    me = proc / "self"
    kinds: dict[str, Iterable[str]] = {
        "mount": mounts(me),
        "cgroup": cgroups(me),
        "network namespace": {link(path) for path in proc.glob("[0-9]*/ns/net")} - {""},
        "mount namespace": {link(path) for path in me.glob("task/*/ns/mnt")} - {""},
        "link": names(sys / "class/net"),
        "descriptor": filter(None, (link(path) for path in me.glob("fd/*"))),
        "child": children(proc),
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
    """Every cgroup below our own, in every hierarchy that is mounted."""
    for own in own_cgroups(me):
        for directory, below, _ in os.walk(own):
            yield from (os.path.join(directory, name) for name in below)


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
            found.append(Path(os.path.normpath(os.path.join(point, inside))))
    return found


def children(proc: Path) -> Iterator[str]:
    """Our children, dead ones that nobody waited for too, as `PID (COMMAND)`."""
    for task in (proc / "self").glob("task/*/children"):
        for pid in text(task).split():
            yield f"{pid} ({text(proc / pid / 'comm').strip()})"


def files(places: Iterable[Path]) -> Iterator[str]:
    for place in places:
        for directory, below, plain in os.walk(place):
            if Path(directory) == place:
                below[:] = [name for name in below if not name.startswith(KEPT)]
                plain = [name for name in plain if not name.startswith(KEPT)]
            yield from (os.path.join(directory, name) for name in plain + below)


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
