"""What both commands share: exit statuses, errors as one line each, the event loop, the process's own limits."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from diyc import rootless
from diyc.errors import ConfigError, DiycError, HostError, ImageError

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

OK, NOT_OK, CONFIG, HOST, INTERNAL = range(5)
OOM_SCORE_ADJ = -900


def exit_status(error: DiycError) -> int:
    """2 for a mistake in what was asked, 3 for what this host cannot do, 4 for everything else."""
    if isinstance(error, (ConfigError, ImageError)):
        return CONFIG
    return HOST if isinstance(error, HostError) else INTERNAL


def fail(program: str, error: DiycError, status: int | None = None) -> NoReturn:
    """Print each problem on a line of its own to stderr and exit."""
    for line in str(error).splitlines():
        print(line if isinstance(error, ConfigError) else f"{program}: {line}", file=sys.stderr)
    raise SystemExit(exit_status(error) if status is None else status)


def reader_gone() -> NoReturn:
    """Whoever read our output has had enough, as `head` does: end as SIGPIPE would, without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
    raise SystemExit(128 + signal.SIGPIPE)


def run_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on uvloop, or on plain asyncio where uvloop is not installed or DIYC_EVENT_LOOP=asyncio."""
    import asyncio

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    choice = os.environ.get("DIYC_EVENT_LOOP", "uvloop")
    if choice not in ("uvloop", "asyncio"):
        raise HostError("event loop", f"DIYC_EVENT_LOOP is {choice!r}; it can be uvloop or asyncio")
    if choice == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def settle_process() -> None:
    """Make this process fit to supervise: SIGCHLD at its default (ignored, the kernel would reap the jobs), as
    many descriptors as it may have, and the last choice of the OOM killer. HostError: it can start no thread."""
    from diyc.host import require_threads
    from diyc.process import system_calls

    require_threads(system_calls())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _lower_oom_score()


def _lower_oom_score() -> None:
    """Lowering takes CAP_SYS_RESOURCE, which root in a container may lack: the jobs' own score is raised anyhow."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    except PermissionError:
        return


def open_standard_streams() -> None:
    """Descriptors 0-2 open, or a job's pipe would get their numbers; streams that Python found closed lead nowhere."""
    for fd in range(3):
        _ensure_open(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _ensure_open(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != fd:
            os.dup2(opened, fd)
            os.close(opened)


def enter_host() -> None:
    """Start anew where jobs can be run: in a cgroup that is ours, and without root in a user namespace.

    Returns where neither is needed, or both are done."""
    _enter_systemd_scope()
    if os.geteuid() != 0:
        rootless.enter([sys.executable, *sys.orig_argv[1:]])


def _enter_systemd_scope() -> None:
    """Under systemd on pure cgroup v2, start anew in a scope whose cgroup is ours (Delegate=yes): the cgroup of a login
    session belongs to systemd and holds other processes. An ordinary user asks their own systemd, where one runs."""
    from diyc.cgroups import detect, needs_systemd_scope

    user = os.geteuid() != 0
    if rootless.MARK in os.environ or os.environ.get("DIYC_SCOPE") or not needs_systemd_scope(detect()):
        return
    if user and not os.path.exists(f"{os.environ.get('XDG_RUNTIME_DIR', '')}/systemd/private"):
        return  # no systemd of this user's: what cannot be enforced without it is refused by name later
    os.environ["DIYC_SCOPE"] = "1"  # once: should the scope not help, the supervisor says why
    scope = ["systemd-run", *(["--user"] if user else []), "--scope", "--quiet", "--collect"]
    try:
        os.execvp(scope[0], [*scope, "--property=Delegate=yes", "--", sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        raise HostError("cgroup delegation", f"cannot run systemd-run: {error.strerror}") from error
