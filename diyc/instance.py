"""One running supervisor's mark on the host, so that the next one can clean up after a killed one.

Each supervisor holds a lock on runtime_dir/instances/ID.json for as long as it lives; the file names the cgroup
directories and files it made. A file nobody has locked belongs to a supervisor that was killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diyc.errors import HostError


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a killed supervisor left and this one removed."""

    instance: str
    pid: int
    cgroups: int
    paths: int


class Instance:
    """This supervisor's file and lock below `runtime_dir`. Raises HostError where that cannot be written."""

    def __init__(self, runtime_dir: str, instance_id: str) -> None:
        self.id = instance_id
        self.unreadable: list[str] = []
        self._runtime_dir = os.path.realpath(runtime_dir)
        self._dir = Path(runtime_dir) / "instances"
        self._path = self._dir / f"{instance_id}.json"
        scratch = self._dir / f"{instance_id}.new"
        try:
            self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self.record(cgroups=(), paths=())
            os.rename(scratch, self._path)  # seen by others only once it is locked
        except OSError as error:
            raise HostError("runtime_dir", f"cannot write {self._dir}: {error.strerror}") from error

    def record(self, *, cgroups: Iterable[str], paths: Iterable[str]) -> None:
        """Say what this supervisor makes, before it makes it."""
        entry = json.dumps({"pid": os.getpid(), "cgroups": list(cgroups), "paths": list(paths)}).encode()
        os.pwrite(self._fd, entry, 0)
        os.ftruncate(self._fd, len(entry))

    def recover(self, remove_cgroups: Callable[[Iterable[str]], int]) -> list[Leftover]:
        """Remove what supervisors left that no longer live. `remove_cgroups` kills what runs there and counts.

        The directory must be ours alone: what its files name is removed. A file that is no such record is kept
        and named in `unreadable`."""
        others = (path for path in sorted(self._dir.glob("*.json")) if path != self._path)
        found = (self._recover_one(path, remove_cgroups) for path in others)
        return [leftover for leftover in found if leftover is not None]

    def _recover_one(self, path: Path, remove_cgroups: Callable[[Iterable[str]], int]) -> Leftover | None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None  # its supervisor ended just now
        except OSError as error:
            self.unreadable.append(f"{path}: {error.strerror}")
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry = self._entry(fd)
            if entry is None:
                self.unreadable.append(f"{path} is not the record of a supervisor: look into it and remove it")
                return None
            pid, cgroups, paths = entry
            removed = remove_cgroups(cgroups)
            for name in paths:
                shutil.rmtree(name)
            path.unlink(missing_ok=True)
            return Leftover(path.stem, pid, removed, len(paths))
        except BlockingIOError:
            return None  # it lives
        finally:
            os.close(fd)

    def _entry(self, fd: int) -> tuple[int, list[str], list[str]] | None:
        """(pid, cgroup directories, existing paths below runtime_dir) of a record, None if it is none."""
        try:
            text = os.read(fd, 1 << 20)
            entry: dict[str, Any] = json.loads(text) if text else {"pid": 0, "cgroups": [], "paths": []}
            pid, cgroups, paths = int(entry["pid"]), list(map(str, entry["cgroups"])), list(map(str, entry["paths"]))
        except (ValueError, KeyError, TypeError):
            return None
        if any(os.path.commonpath([self._runtime_dir, os.path.realpath(name)]) != self._runtime_dir for name in paths):
            return None
        return pid, cgroups, [name for name in paths if os.path.lexists(name)]

    def close(self) -> None:
        """Forget this supervisor: everything it made is gone."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
