"""Keeps what is expensive to make, by a digest of all that went into it: $DIYC_VM_CACHE or /var/cache/diyc-vm.

An entry appears under its name whole (rename(2)) or not at all, and two builders wait for each other (flock(2))."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KEPT = 3  # of each kind, beside those in use
FRESH = 3600.0  # seconds since its last use in which an entry may be in use


def default_cache() -> Path:
    return Path(os.environ.get("DIYC_VM_CACHE") or "/var/cache/diyc-vm")


def digest(*parts: object) -> str:
    """A short name for inputs: their texts, each apart from the next."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        total.update(b"%d:" % len(data) + data)
    return total.hexdigest()[:20]


def tree_digest(root: Path, names: Iterable[str]) -> str:
    """A digest of files below `root`: names, permissions, contents."""
    return digest(*(part for name in sorted(names) for part in _identity(root, name)))


def _identity(root: Path, name: str) -> tuple[object, ...]:
    path = root / name
    content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    return name, path.lstat().st_mode, content


@dataclass(frozen=True, slots=True)
class Cache:
    """Entries are directories named KIND-DIGEST below `root`."""

    root: Path

    def entry(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The entry for `key`; `make` fills an empty directory with it where there is none yet."""
        path = self.root / f"{kind}-{key}"
        with self._lock(kind):
            if not path.exists():
                self._make(path, make)
            os.utime(path)
            self._prune(kind)
        return path

    def newest(self, kind: str) -> Path | None:
        """The entry of a kind that was used last."""
        return max(self._entries(kind), key=lambda path: path.stat().st_mtime, default=None)

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        draft = Path(tempfile.mkdtemp(prefix=f"draft-{path.name}-", dir=self.root))
        try:
            draft.chmod(0o755)
            make(draft)
            draft.rename(path)
        except BaseException:
            shutil.rmtree(draft)
            raise

    def _prune(self, kind: str) -> None:
        """Remove old entries, and drafts whose builder died: whoever holds the lock is the only builder of the kind."""
        old = sorted(self._entries(kind), key=lambda path: path.stat().st_mtime)[:-KEPT]
        stale = [path for path in old if time.time() - path.stat().st_mtime > FRESH]
        for path in [*stale, *self.root.glob(f"draft-{kind}-*")]:
            shutil.rmtree(path)

    def _entries(self, kind: str) -> list[Path]:
        return list(self.root.glob(f"{kind}-*"))

    @contextmanager
    def _lock(self, kind: str) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / f".lock-{kind}", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
