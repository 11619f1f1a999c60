"""The few calls made on cgroup files. Everything else in this package reaches cgroupfs through a Files.

Tests hand over another one, which keeps a fake tree and notes each write."""

from __future__ import annotations

import errno
import os

# A figure that a kernel or layout lacks, that was turned off (psi=0), or whose directory is gone.
_ABSENT = frozenset({errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP})
_CHUNK = 4096


class Files:
    """Plain system calls; `dir_fd` makes `path` relative, which spares the kernel the walk from the root.

    Each method raises OSError as the kernel gives it; callers add what was attempted."""

    def mkdir(self, path: str, dir_fd: int | None = None) -> None:
        """Make one cgroup."""
        os.mkdir(path, 0o755, dir_fd=dir_fd)

    def rmdir(self, path: str, dir_fd: int | None = None) -> None:
        """Remove one cgroup; its files go with it. EBUSY while processes or children are in it."""
        os.rmdir(path, dir_fd=dir_fd)

    def open_dir(self, path: str, dir_fd: int | None = None) -> int:
        """An O_PATH descriptor of a directory, enough for *at() calls and for CLONE_INTO_CGROUP."""
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)

    def open_write(self, path: str, dir_fd: int | None = None) -> int:
        """A write-only descriptor of one file."""
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dir_fd)

    def write(self, path: str, value: bytes, dir_fd: int | None = None) -> None:
        """Write `value` in one call: cgroup files take each write as one whole request."""
        fd = self.open_write(path, dir_fd)
        try:
            os.write(fd, value)
        finally:
            os.close(fd)

    def read(self, path: str, dir_fd: int | None = None) -> bytes | None:
        """The content of one file, None where there is no such figure."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
            try:
                return _read_all(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise


def _read_all(fd: int) -> bytes:
    text = os.pread(fd, _CHUNK, 0)
    if len(text) < _CHUNK - 64:  # the kernel ends a read early only before a line that does not fit
        return text
    while more := os.pread(fd, _CHUNK, len(text)):
        text += more
    return text
