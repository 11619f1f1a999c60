"""Directories of our own: made private, checked before use, locked between processes, removed whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from diyc.errors import HostError


def private_directory(path: str, feature: str) -> str:
    """Make `path` (mode 0700) if it is not there; refuse one that others own or may write to.

    Whoever could write here could swap an image under running jobs. Existing directories may be readable by
    others. Raises HostError named `feature`."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise HostError(feature, f"cannot use {path}: {error.strerror}; choose another directory") from error
    if found.st_uid != os.geteuid():
        raise HostError(feature, f"{path} belongs to user {found.st_uid}, not to us ({os.geteuid()}); choose another")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise HostError(feature, f"{path} may be written to by others (mode {mode:04o}); run chmod go-w on it")
    return path


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock file `path` (flock(2)), waiting for it. The kernel lets go of it when we die."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove_tree(path: str) -> None:
    """Remove a directory of ours with all that is in it; links in it are not followed. Raises OSError.

    Where we are not root, a directory from an archive may lack the permission to empty it: it is given first."""
    if os.geteuid() != 0:
        for _, names, _, fd in os.fwalk(path, onerror=_raise):
            for name in names:
                _open_up(name, fd)
    shutil.rmtree(path)


def _open_up(name: str, parent: int) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.chmod(name, 0o700, dir_fd=parent)


def _raise(error: OSError) -> None:
    raise error
