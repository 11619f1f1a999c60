"""One hierarchy as a supervisor uses it: its instance directory, and the runs' directories in there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from diyc.cgroups import delegation
from diyc.cgroups.detect import Place
from diyc.cgroups.files import Files
from diyc.errors import CgroupError, HostError

_WRITABLE = "remount it read-write; in a container, ask for writable cgroups"


class Hierarchy:
    """<delegated root>/<parent>/<instance>/ in one hierarchy. Paths of runs are relative to it."""

    def __init__(self, place: Place, parent: str, instance: str, files: Files) -> None:
        self.place = place
        self.files = files
        self.levels = _levels(place.directory, f"{parent}/{instance}")
        self.path = self.levels[-1]
        self.fd = -1
        self._begun = False
        self.names: frozenset[str] = frozenset()  # the files that each cgroup here has
        self.enabled: frozenset[str] = frozenset()  # v2: the controllers that each run gets

    @property
    def join_file(self) -> str:
        """Where a process writes "0" to enter a cgroup: v1's `tasks` moves one thread, which is quicker."""
        return "tasks" if self.place.version == 1 else "cgroup.procs"

    @property
    def made(self) -> bool:
        """Whether the instance directory is there and open."""
        return self.fd >= 0

    def make(self) -> None:
        """Make the instance directory, unless this was done. HostError where the host does not let us."""
        if self.made:
            return
        if self.place.read_only:
            raise HostError("cgroup delegation", f"{self.place.mount} is mounted read-only: {_WRITABLE}")
        self._begun = True
        for level in self.levels[1:]:
            self._make_level(level)
            if self.place.version == 1:
                self._inherit_cpuset(level)
        self.fd = self.files.open_dir(self.path)
        if self.place.version == 1 and self.has("cpuset.cpus"):
            # A run's cpuset then starts as a copy of this one; an empty one takes no process.
            self._write_level(self.path, "cgroup.clone_children", b"1")
        self.names = frozenset(os.listdir(self.path))

    def enable(self, controllers: Iterable[str]) -> None:
        """v2: give each run's cgroup these controllers as well."""
        missing = frozenset(controllers) - self.enabled
        if missing:
            delegation.enable(self.levels, missing, self.files)
            self.enabled |= missing
            self.names = frozenset(os.listdir(self.path))

    def has(self, file: str) -> bool:
        """Whether the instance directory has such a file; before it is made, the directory it will be made in."""
        return os.path.exists(f"{self.path if self.made else self.place.directory}/{file}")

    def discard(self) -> None:
        """Remove the instance directory and what is empty above it. CgroupError while runs are in it."""
        if self.made:
            os.close(self.fd)
            self.fd = -1
        if not self._begun:
            return
        try:
            self.files.rmdir(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CgroupError("remove", self.path, error) from error
        self._begun = False
        self.enabled = frozenset()
        for level in reversed(self.levels[1:-1]):
            self._remove_shared(level)

    def mkdir(self, name: str) -> None:
        """Make a run's cgroup."""
        try:
            self.files.mkdir(name, self.fd)
        except OSError as error:
            raise CgroupError("make", f"{self.path}/{name}", error) from error

    def write(self, name: str, file: str, value: bytes) -> None:
        """Write one file of a run's cgroup."""
        try:
            self.files.write(f"{name}/{file}", value, self.fd)
        except OSError as error:
            raise CgroupError(f"write {value.decode()!r} to", f"{self.path}/{name}/{file}", error) from error

    def read(self, name: str, file: str) -> bytes | None:
        """One file of a run's cgroup, None where there is none."""
        try:
            return self.files.read(f"{name}/{file}", self.fd)
        except OSError as error:
            raise CgroupError("read", f"{self.path}/{name}/{file}", error) from error

    def open(self, name: str, file: str | None = None) -> int:
        """A descriptor: of a run's directory, or for writing one of its files."""
        path = name if file is None else f"{name}/{file}"
        try:
            return self.files.open_dir(path, self.fd) if file is None else self.files.open_write(path, self.fd)
        except OSError as error:
            raise CgroupError("open", f"{self.path}/{path}", error) from error

    def rmdir(self, name: str) -> bool:
        """Remove a run's cgroup; False while something is in it."""
        try:
            self.files.rmdir(name, self.fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise CgroupError("remove", f"{self.path}/{name}", error) from error
        return True

    def _make_level(self, level: str) -> None:
        try:
            self.files.mkdir(level)
        except FileExistsError:
            return
        except OSError as error:
            raise HostError("cgroup delegation", f"cannot make {level}: {error.strerror} ({_advice(error)})") from error

    def _inherit_cpuset(self, level: str) -> None:
        """A new v1 cpuset has no CPUs and no memory nodes: give it those of the cgroup above."""
        above = os.path.dirname(level)
        for name in ("cpus", "mems"):
            if self.files.read(f"{level}/cpuset.{name}") != b"\n":
                continue
            inherited = self.files.read(f"{above}/cpuset.effective_{name}")
            if inherited is None:
                inherited = self.files.read(f"{above}/cpuset.{name}") or b""
            self._write_level(level, f"cpuset.{name}", inherited.strip())

    def _write_level(self, level: str, file: str, value: bytes) -> None:
        try:
            self.files.write(f"{level}/{file}", value)
        except OSError as error:
            raise CgroupError(f"write {value.decode()!r} to", f"{level}/{file}", error) from error

    def _remove_shared(self, level: str) -> None:
        """Remove a directory that other supervisors may be using: then it stays."""
        try:
            self.files.rmdir(level)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT):
                raise CgroupError("remove", level, error) from error


def _levels(root: str, below: str) -> list[str]:
    """The delegated root and each directory from there to the instance's."""
    names = below.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise ValueError(f"{below!r} is not a path below the delegated cgroup")
    return ["/".join([root, *names[:count]]) for count in range(len(names) + 1)]


def _advice(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"run as root, or {delegation.HOW_TO_DELEGATE}"
    if error.errno == errno.EROFS:
        return _WRITABLE
    return "another supervisor may have just removed it: try again" if error.errno == errno.ENOENT else "see cgroups(7)"
