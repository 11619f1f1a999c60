"""Killing every process of a cgroup tree, and removing what a killed supervisor left."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator

from diyc.cgroups.delegation import processes
from diyc.cgroups.files import Files
from diyc.errors import CgroupError

_PASSES = 1000
_BATCH = 256


def kill_listed(path: str, listed: Callable[[], set[int]]) -> None:
    """SIGKILL all that `listed` names, until it names none that was not yet killed (kernels without cgroup.kill).

    A process with SIGKILL pending cannot fork, so each pass leaves fewer that can.
    CgroupError: they still fork faster after a thousand passes."""
    killed: set[int] = set()
    for _ in range(_PASSES):
        fresh = sorted(listed() - killed)
        if not fresh:
            return
        for start in range(0, len(fresh), _BATCH):
            _kill_batch(fresh[start : start + _BATCH], listed)
        killed.update(fresh)
    raise CgroupError("kill all processes of", path, OSError(errno.EBUSY, os.strerror(errno.EBUSY)))


def _kill_batch(pids: list[int], listed: Callable[[], set[int]]) -> None:
    """A pid read from a file may name another process by now. A pidfd does not change; if the pid is still
    listed after the pidfd was opened, the two are the same process, or the pidfd's is dead."""
    with contextlib.ExitStack() as stack:
        pidfds = {pid: fd for pid in pids if (fd := open_pidfd(pid)) is not None}
        for fd in pidfds.values():
            stack.callback(os.close, fd)
        for pid in listed() & pidfds.keys():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfds[pid], signal.SIGKILL)


def open_pidfd(pid: int) -> int | None:
    """A pidfd, None if the process is gone."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # EINVAL: pid 0, which stands for a process outside of our PID namespace: out of reach.
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return None
        raise


def remove_leftovers(paths: Iterable[str], patience: float = 10.0, files: Files | None = None) -> int:
    """Kill every process below the given instance directories and remove the directories.

    Returns how many cgroups were removed; a path that is gone counts none. Waits at most `patience` seconds in
    all for the killed to be gone. CgroupError names one that could not be removed; the others are, by then."""
    files = files or Files()
    trees: list[str] = []
    failures: list[CgroupError] = []
    for tree in (path for path in paths if os.path.isdir(path)):
        with _noted(failures):
            _kill_tree(tree, files)
            trees.append(tree)  # what is not a cgroup, or cannot be killed, is left as it is
    deadline = time.monotonic() + patience
    removed = 0
    for directory in (directory for tree in trees for directory in _bottom_up(tree)):
        with _noted(failures):
            removed += _remove(directory, deadline, files)
    for parent in {os.path.dirname(tree) for tree in trees}:
        _remove_if_empty(parent, files)
    if failures:
        raise failures[0]
    return removed


def _remove_if_empty(parent: str, files: Files) -> None:
    """The directory that supervisors share goes with the last of them, as it does at a supervisor's own end."""
    try:
        files.rmdir(parent)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT):
            raise CgroupError("remove", parent, error) from error


@contextlib.contextmanager
def _noted(failures: list[CgroupError]) -> Iterator[None]:
    try:
        yield
    except CgroupError as error:
        failures.append(error)


def _bottom_up(tree: str) -> Iterator[str]:
    return (directory for directory, _, _ in os.walk(tree, topdown=False))


def _kill_tree(tree: str, files: Files) -> None:
    if not os.path.exists(f"{tree}/cgroup.procs"):
        raise CgroupError("remove", tree, OSError(errno.EINVAL, "it is not a cgroup"))

    def listed() -> set[int]:
        return {pid for directory in _bottom_up(tree) for pid in processes(directory, files)}

    if os.getpid() in listed():
        raise CgroupError("remove", tree, OSError(errno.EBUSY, "this very process is in it"))
    try:
        files.write(f"{tree}/cgroup.kill", b"1")
    except FileNotFoundError:
        kill_listed(tree, listed)
    except OSError as error:
        raise CgroupError("kill the processes of", tree, error) from error


def _remove(directory: str, deadline: float, files: Files) -> int:
    while True:
        try:
            files.rmdir(directory)
            return 1
        except FileNotFoundError:
            return 0
        except OSError as error:
            left = deadline - time.monotonic()
            if error.errno != errno.EBUSY or left <= 0:
                raise CgroupError("remove", directory, error) from error
        _await_change(directory, left)


def _await_change(directory: str, seconds: float) -> None:
    """Wait until a v2 cgroup may have become empty. v1 tells nobody, so there it is a short pause: this is the
    start of a supervisor, nothing waits behind it."""
    try:
        fd = os.open(f"{directory}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        time.sleep(min(seconds, 0.005))
        return
    try:
        if b"populated 1" in os.pread(fd, 256, 0):
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            poll.poll(seconds * 1000)
    finally:
        os.close(fd)
