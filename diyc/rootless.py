"""Without root: an ordinary user becomes root of a user namespace of their own, and the supervisor runs in it.

There it may mount, and make the namespaces of jobs, which are nested in this one. newuidmap(1) lends the user's
subordinate ids (subuid(5)); without them only one id exists: root inside, the user outside. All jobs share these
ids, since the kernel gives an ordinary user no idmapped mounts to keep them apart with (mount_setattr(2))."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from diyc.errors import HostError

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MARK = "DIYC_ROOTLESS"  # in the environment of what enter() started: the user's own uid
WHOLE = 2**32 - 1  # ids in the first user namespace

_RESTRICTION = "sys/kernel/apparmor_restrict_unprivileged_userns"
_OBSTACLES = (
    # file below /proc, value that forbids, what the administrator must do
    ("sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
)


@dataclass(frozen=True, slots=True)
class Subordinate:
    """The ids that newuidmap or newgidmap may lend: host ids `first`..`first + count - 1`."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class MappedIds:
    """The ids of a user namespace other than the first: 0 to `count - 1`, in pieces that begin at `pieces`.

    A map of a namespace inside may have no line that spans two lines of this one's (user_namespaces(7))."""

    count: int
    pieces: tuple[int, ...]

    def id_map(self, most: int) -> str:
        """The text for uid_map and gid_map that gives a namespace inside the first `most` of these ids as they are."""
        end = min(self.count, most)
        starts = [start for start in self.pieces if start < end]
        return "".join(f"{a} {a} {b - a}\n" for a, b in pairwise([*starts, end]))


def mapped_ids(proc: Path = Path("/proc")) -> MappedIds | None:
    """The ids that both users and groups have here, from 0 on without a gap; None in the host's first namespace."""
    maps = [_extents(proc / "self" / name) for name in ("uid_map", "gid_map")]
    if any(extents == [(0, WHOLE)] for extents in maps):
        return None
    ends = []
    for extents in maps:
        end = 0
        for start, count in extents:
            end = start + count if start == end else end
        ends.append(end)
    return MappedIds(min(ends), tuple(sorted({start for extents in maps for start, _ in extents})))


def _extents(path: Path) -> list[tuple[int, int]]:
    """(first id inside, count) of each line of a map, sorted; all ids for a kernel without user namespaces."""
    lines = (line.split() for line in (_text(path) or f"0 0 {WHOLE}").splitlines())
    return sorted((int(inside), int(count)) for inside, _, count in lines)


def owner() -> int:
    """The user that diyc works for: the one who called enter(), seen from outside, else the effective uid."""
    return int(os.environ[MARK]) if MARK in os.environ and mapped_ids() is not None else os.geteuid()


def may_set_groups(proc: Path = Path("/proc")) -> bool:
    """False in a namespace whose gid map was written without newgidmap (user_namespaces(7), /proc/PID/setgroups)."""
    return (proc / "self/setgroups").read_text().strip() == "allow"


def obstacle(proc: Path = Path("/proc")) -> tuple[str, str] | None:
    """Why an ordinary user cannot make a user namespace here, and what the administrator must do; None: nothing
    is known to be in the way."""
    for name, forbidding, remedy in _OBSTACLES:
        if _text(proc / name) == forbidding:
            return f"{proc / name} is {forbidding}", f"as root: {remedy}"
    if _text(proc / _RESTRICTION) == "1" and _text(proc / "self/attr/current").startswith("unconfined"):
        remedy = (
            f"as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or give {sys.executable} an AppArmor "
            'profile in /etc/apparmor.d with "flags=(unconfined) { userns, }"'
        )
        return "AppArmor lets no unconfined program of an ordinary user use user namespaces (Ubuntu 23.10 on)", remedy
    return None


def subordinate_ids(uid: int, path: str) -> Subordinate | None:
    """The largest range that `path` (/etc/subuid, /etc/subgid) gives the user, by name or number; None: none."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    found = []
    for line in _text(Path(path)).splitlines():
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in (name, str(uid)) and fields[1].isdigit() and fields[2].isdigit():
            found.append(Subordinate(int(fields[1]), int(fields[2])))
    return max(found, key=lambda ids: ids.count, default=None)


def lent_ids(uid: int, etc: str = "/etc") -> tuple[Subordinate, Subordinate] | str:
    """Subordinate users and groups that can be mapped, or why there are none."""
    missing = [name for name in ("newuidmap", "newgidmap") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)}: install the package uidmap (shadow-utils)"
    users, groups = (subordinate_ids(uid, f"{etc}/{name}") for name in ("subuid", "subgid"))
    if users is None or groups is None:
        which = " and ".join(f"{etc}/{n}" for n, ids in (("subuid", users), ("subgid", groups)) if ids is None)
        return f"no ids for you in {which}; as root: usermod --add-subuids FIRST-LAST --add-subgids FIRST-LAST USER"
    return users, groups


def id_maps(own: int, lent: Subordinate | None) -> list[tuple[int, int, int]]:
    """(inside, outside, count): 0 is the user, 1 and up the lent ids."""
    return [(0, own, 1)] + ([(1, lent.first, lent.count)] if lent else [])


def enter(argv: Sequence[str]) -> NoReturn:
    """Replace this process by `argv` as root of a new user and mount namespace. Call it with one thread only.

    Raises HostError naming what is in the way and what the administrator must do."""
    if found := obstacle():
        raise HostError("user namespaces without root", "; ".join(found))
    uid, gid = os.getuid(), os.getgid()
    lent = lent_ids(uid)
    finish = _map_from_outside(uid, gid, *lent) if not isinstance(lent, str) else None
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        error = ctypes.get_errno()
        advice = {errno.ENOSPC: "sysctl user.max_user_namespaces is too low", errno.EPERM: "a seccomp filter or an LSM"}
        raise HostError("user namespaces without root", f"{os.strerror(error)}: {advice.get(error, 'unshare(2)')}")
    if finish is not None:
        finish()
    else:
        _map_own_id(uid, gid)
    os.environ[MARK] = str(uid)
    os.execv(argv[0], list(argv))


def _map_own_id(uid: int, gid: int) -> None:
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1\n"), ("gid_map", f"0 {gid} 1\n")):
            Path(f"/proc/self/{name}").write_text(text)
    except OSError as error:
        raise HostError("user namespaces without root", f"cannot write {error.filename}: {error.strerror}") from error


def _map_from_outside(uid: int, gid: int, users: Subordinate, groups: Subordinate) -> Callable[[], None]:
    """Start a process that stays outside; the returned function, called inside, has it write the maps.

    newuidmap is setuid root and must run where that means something: outside."""
    target = os.getpid()
    ready_read, ready_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(ready_write)
        status = 1
        if os.read(ready_read, 1):
            commands = (("newuidmap", id_maps(uid, users)), ("newgidmap", id_maps(gid, groups)))
            status = max(_run_mapper(name, target, maps) for name, maps in commands)
        os._exit(status)
    os.close(ready_read)

    def finish() -> None:
        os.write(ready_write, b"1")
        os.close(ready_write)
        _, status = os.waitpid(helper, 0)
        if status:
            raise HostError(
                "subordinate ids", "newuidmap or newgidmap refused (see above): check /etc/subuid and /etc/subgid"
            )

    return finish


def _run_mapper(name: str, pid: int, maps: list[tuple[int, int, int]]) -> int:
    words = [str(number) for extent in maps for number in extent]
    try:
        return subprocess.run([name, str(pid), *words], check=False, stdin=subprocess.DEVNULL).returncode
    except OSError as error:
        print(f"{name}: {error.strerror}", file=sys.stderr)
        return 1


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""  # not there, or not for us to read: the fact that was asked for
