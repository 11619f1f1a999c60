"""Processes of jobs: the only importer of the C core.

A Launcher hands compiled plans to the spawner threads and tells, on the event loop, which started or failed.
A started process is a pid and a pidfd; its end is waited for by the pidfd being readable, never by signals."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from diyc import _core
from diyc.errors import HostError, SetupError
from diyc.plan import (
    ATTR_NODEV,
    ATTR_NOSUID,
    ATTR_RDONLY,
    LABEL_FD,
    MARK_CLONED,
    MARK_EXEC,
    MARK_JOINED,
    MARK_MOUNTED,
    SUPERVISOR_FD,
    Plan,
)

_WALL = 0x40000000  # __WALL of wait(2): also children whose exit signal is not SIGCHLD
_KINDS = {name: number for number, name in enumerate(_core.STEP_NAMES)}


@dataclass(frozen=True, slots=True)
class Started:
    """A job's process from execve on, which was at time.monotonic() `at`; perhaps it has ended already.

    The caller owns `pidfd`. `steps_s` are seconds spent in set-up."""

    pid: int
    pidfd: int
    at: float
    steps_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: an exit code or a signal number, the other one None."""

    code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Launch:
    """The parameters of one run of a plan; `descriptors` fill the plan's given registers by name."""

    plan: Plan
    descriptors: dict[str, int]
    argv: Sequence[str]
    env: Sequence[str]
    paths: Sequence[str]
    id_map: str
    oom_score_adj: int
    cgroup_fd: int | None


Report = Callable[[Started | SetupError], None]


class Launcher:
    """Spawner threads and the runs they are setting up, on one event loop.

    `scratch` is any directory: the threads build their own root on it, in mount namespaces of their own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, threads: int, scratch: str) -> None:
        try:
            self._spawner = _core.Spawner(threads, scratch)
        except OSError as error:
            raise HostError("spawner", f"cannot {error.args[1]}: {os.strerror(error.args[0])}") from error
        self._loop = loop
        self._waiting: dict[int, tuple[Plan, Report]] = {}
        self._token = 0
        self._compile = lru_cache(maxsize=256)(_compile)
        loop.add_reader(self._spawner.fileno(), self._drain)

    def start(self, launch: Launch, report: Report) -> int:
        """Queue a run; `report` is called once, later, with what became of it. The token serves kill().

        The descriptors must stay open until then. Raises ValueError for strings with NUL."""
        self._token += 1
        given = {**launch.descriptors, "supervisor_kept": SUPERVISOR_FD, "label_kept": LABEL_FD}
        self._spawner.submit(
            self._compile(launch.plan),
            self._token,
            [given[name] for name in launch.plan.given],
            launch.argv,
            launch.env,
            launch.paths,
            launch.id_map,
            str(launch.oom_score_adj),
            -1 if launch.cgroup_fd is None else launch.cgroup_fd,
        )
        self._waiting[self._token] = (launch.plan, report)
        return self._token

    def kill(self, token: int) -> bool:
        """SIGKILL a run that is still being set up; whether there was one."""
        return self._spawner.kill(token)

    def close(self) -> None:
        """Stop the threads. Jobs that still run are killed by their parent-death signal."""
        self._loop.remove_reader(self._spawner.fileno())
        self._spawner.close()

    def _drain(self) -> None:
        for token, pid, pidfd, failed, number, index, dequeued, started, marks in self._spawner.completions():
            plan, report = self._waiting.pop(token)
            if not failed:
                report(Started(pid, pidfd, marks[MARK_EXEC] / 1e9, _steps(dequeued, started, marks)))
            elif index < 0:
                report(SetupError("clone", None, number, None))
            else:
                step = plan.steps[index]
                report(SetupError(step.kind, index, number, step.target))


def _compile(plan: Plan) -> _core.Plan:
    return _core.Plan(plan.rows(_KINDS), plan.clone_flags, len(plan.registers), plan.spawner_steps)


def _steps(dequeued: int, started: int, marks: tuple[int, ...]) -> dict[str, float]:
    moments = (dequeued, marks[MARK_CLONED], marks[MARK_JOINED], marks[MARK_MOUNTED], marks[MARK_EXEC], started)
    clone, cgroup, mounts, confine, execve = (round((after - before) / 1e9, 7) for before, after in pairwise(moments))
    return {"cgroup": cgroup, "clone": clone, "mounts": mounts, "exec": round(confine + execve, 7)}


def reap(pidfd: int) -> Exit:
    """The end of a process whose pidfd is readable; frees its pid. The caller still closes the pidfd."""
    info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | _WALL)
    if info is None:
        raise ChildProcessError("the process has not ended yet")
    if info.si_code == os.CLD_EXITED:
        return Exit(info.si_status, None)
    return Exit(None, info.si_status)


def send_signal(pidfd: int, number: int) -> None:
    """Signal a process by its pidfd; one that has ended meanwhile is no error."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def heeds_signal(pid: int, number: int, proc: str = "/proc") -> bool:
    """Whether a PID 1 would notice the signal: it catches, ignores or blocks it.

    The kernel never applies a default action to PID 1 of a PID namespace (pid_namespaces(7)), so a signal
    it does not handle would be lost without a trace."""
    bit = 1 << (number - 1)
    try:
        with open(f"{proc}/{pid}/status", encoding="ascii", errors="replace") as status:
            masks = (line.split() for line in status if line.startswith(("SigBlk:", "SigIgn:", "SigCgt:")))
            return any(int(mask, 16) & bit for _, mask in masks)
    except FileNotFoundError:
        return False


def mount_tree(path: str, *, userns: int | None, read_only: bool = False, follow: bool = False) -> int:
    """A detached, nosuid, nodev clone of the mount at `path`, idmapped with `userns`: a descriptor. Raises OSError.

    What is mounted below `path` is left out, unless the kernel insists: in a user namespace, mounts that were
    inherited from outside stay together (mount_namespaces(7))."""
    attributes = ATTR_NOSUID | ATTR_NODEV | (ATTR_RDONLY if read_only else 0)
    try:
        return _core.tree(path, attributes, -1 if userns is None else userns, follow=follow)
    except OSError as error:
        if error.args[0] != errno.EINVAL or userns is not None:
            raise
    return _core.tree(path, attributes, recursive=True, follow=follow)


def open_read_only(path: str, *, follow: bool = False) -> int:
    """A descriptor that its holder cannot open again for writing by way of /proc/self/fd: it lies on a read-only
    clone of its mount. Raises OSError; opening never waits, reading does."""
    tree = mount_tree(path, userns=None, read_only=True, follow=follow)
    try:
        fd = os.open(f"/proc/self/fd/{tree}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    finally:
        os.close(tree)
    os.set_blocking(fd, True)
    return fd


def can_idmap(path: str, userns: int) -> bool:
    """Whether the file system of `path` takes part in idmapped mounts: most since Linux 5.12, tmpfs since 6.3."""
    try:
        os.close(mount_tree(path, userns=userns))
    except OSError as error:
        if error.args[0] not in (errno.EINVAL, errno.EPERM):
            raise
        return False
    return True


def user_namespace(id_map: str) -> int:
    """A user namespace with this map, kept alive by the returned descriptor. Raises OSError."""
    return _core.user_namespace(id_map)


def limit_devices(program: bytes, cgroup: int) -> None:
    """Bind a BPF program for devices to a cgroup v2 directory, an O_PATH descriptor will do. Raises OSError."""
    _core.limit_devices(program, cgroup)


def has_clone3() -> bool:
    """Whether children are made with clone3(2), and so into a v2 cgroup; where it is hidden, with clone(2)."""
    return -system_calls()["clone3"] not in (errno.ENOSYS, errno.EPERM)


def system_calls() -> dict[str, int]:
    """What each system call that may be missing answers to arguments it must refuse: {name: -errno}, see host.py."""
    return _core.system_calls()
