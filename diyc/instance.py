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
        self._dir = Path(runtime_dir) / "instances"
        self._path = self._dir / f"{instance_id}.json"
        try:
            self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError("runtime_dir", f"cannot write {self._dir}: {error.strerror}") from error
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self.record(cgroups=(), paths=())

    def record(self, *, cgroups: Iterable[str], paths: Iterable[str]) -> None:
        """Say what this supervisor makes, before it makes it."""
        entry = json.dumps({"pid": os.getpid(), "cgroups": list(cgroups), "paths": list(paths)}).encode()
        os.pwrite(self._fd, entry, 0)
        os.ftruncate(self._fd, len(entry))

    def recover(self, remove_cgroups: Callable[[Iterable[str]], int]) -> list[Leftover]:
        """Remove what supervisors left that no longer live. `remove_cgroups` kills what runs there and counts."""
        found = (
            self._recover_one(path, remove_cgroups) for path in sorted(self._dir.glob("*.json")) if path != self._path
        )
        return [leftover for leftover in found if leftover is not None]

    def _recover_one(self, path: Path, remove_cgroups: Callable[[Iterable[str]], int]) -> Leftover | None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None  # its supervisor ended just now
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry = json.loads(os.read(fd, 1 << 20) or b"{}")
            cgroups = remove_cgroups(entry.get("cgroups", []))
            paths = [name for name in entry.get("paths", []) if os.path.lexists(name)]
            for name in paths:
                shutil.rmtree(name)
            path.unlink(missing_ok=True)
            return Leftover(path.stem, int(entry.get("pid", 0)), cgroups, len(paths))
        except BlockingIOError:
            return None  # it lives
        finally:
            os.close(fd)

    def close(self) -> None:
        """Forget this supervisor: everything it made is gone."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
