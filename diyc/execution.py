"""One run from admission to result: take what it needs, start it, watch it, give everything back.

A chain of callbacks on the event loop: start -> launched -> (output, timers) -> exited -> finished. What is
taken is put on an ExitStack as it is taken and given back in reverse, whichever step failed."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from diyc import process
from diyc.cgroups import Cgroups, RunCgroup
from diyc.environment import candidates, default_hostname, environment
from diyc.errors import DiycError, SetupError
from diyc.images.store import RootTree
from diyc.jobs import JobSpec, Run
from diyc.plan import OOM_SCORE_ADJ, Box, Plan, build_plan
from diyc.process import Exit, Launch, Launcher, Started
from diyc.results import CgroupFigures, Ending, Result, Verdict, classify
from diyc.slots import SharedSlots, Slot, Slots

SETUP_TIMEOUT = 30.0
READ_SIZE = 65536
READS_PER_WAKE = 8  # then others have their turn


class Sink(Protocol):
    """Takes output as it comes. False asks for a pause, which ends with a call of what when_ready() was given."""

    def __call__(self, name: str, chunk: bytes, /) -> bool: ...

    def when_ready(self, call: Callable[[], None], /) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What executions share: the supervisor's kernel-facing parts."""

    loop: asyncio.AbstractEventLoop
    launcher: Launcher
    cgroups: Cgroups
    slots: Slots | SharedSlots
    bury: Callable[[RunCgroup], None]
    log_dir: str


class Prepared:
    """What all runs of a job share: its image, and its plan (built once for each host name).

    `box` is a run's but for its host name and the number of v1 cgroups it joins. The paths have no links in them:
    a job that may write there could have changed where they lead."""

    def __init__(self, spec: JobSpec, tree: RootTree, box: Box, stdin: str | None) -> None:
        self.spec = spec
        self.tree = tree
        self.box = box
        self.stdin = stdin
        self._plans: dict[tuple[str, int], Plan] = {}

    def plan(self, hostname: str, joins: int) -> Plan:
        """The steps for a run with this host name that enters so many v1 cgroups itself."""
        key = (hostname, joins)
        if key not in self._plans:
            if len(self._plans) >= 64:
                self._plans.clear()
            self._plans[key] = build_plan(self.spec, replace(self.box, hostname=hostname, joins=joins))
        return self._plans[key]


class Capture:
    """One output stream: kept up to `limit` bytes, or handed to `sink` as it comes."""

    def __init__(self, name: str, fd: int, limit: int, sink: Sink | None) -> None:
        self.name = name
        self.fd = fd
        self.data = bytearray()
        self.truncated = False
        self.ended = False
        self.paused = False
        self._limit = limit
        self._sink = sink

    def read(self) -> bool:
        """Read some of what is there; False when there is no more for now or for ever."""
        for _ in range(1 if self._sink else READS_PER_WAKE):
            try:
                chunk = os.read(self.fd, READ_SIZE)
            except BlockingIOError:
                return False
            if not chunk:
                self.ended = True
                return False
            self._keep(chunk)
        return True

    def _keep(self, chunk: bytes) -> None:
        if self._sink is not None:
            self.paused |= not self._sink(self.name, chunk)
            return
        room = self._limit - len(self.data)
        self.data += chunk[:room]
        self.truncated |= len(chunk) > room


class Execution:
    """One run. `on_end` is called once with the result, after everything was given back."""

    def __init__(
        self,
        services: Services,
        prepared: Prepared,
        run: Run,
        queued_at: float,
        on_end: Callable[[Execution, Result], None],
        sink: Sink | None = None,
        stdin: int | None = None,
    ) -> None:
        self.run = run
        self.prepared = prepared
        self.started_at: float | None = None
        self._services = services
        self._queued_at = queued_at
        self._on_end = on_end
        self._sink = sink
        self._stdin = stdin
        self._held = ExitStack()
        self._until_started = ExitStack()
        self._captures: list[Capture] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._cgroup: RunCgroup | None = None
        self._token: int | None = None
        self._started: Started | None = None
        self._stopped_for: str | None = None
        self._exit: Exit | None = None
        self._error: Exception | None = None
        self._begun = 0.0
        self._cgroup_s = 0.0
        self._exec_at: float | None = None

    # -- start ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take a slot and cgroups, prepare mounts and pipes, and queue the run with the spawner threads."""
        self._begun = time.monotonic()
        try:
            self._launch()
        except Exception as error:  # whatever it is, the run must end with a result that says so
            self._error = error
            self._services.loop.call_soon(self._finish)

    def _launch(self) -> None:
        services, run = self._services, self.run
        slot = services.slots.take()
        self._held.callback(services.slots.give, slot)
        cgroup = services.cgroups.create(run.run_id, run.spec.limits)
        self._cgroup = cgroup
        self._held.callback(services.bury, cgroup)
        self._cgroup_s = time.monotonic() - self._begun
        self._until_started.callback(cgroup.close_join_fds)
        hostname = default_hostname(run)
        env = environment(run, hostname, self.prepared.box.user.home)
        argv = [run.expand(word) for word in run.spec.argv]
        launch = Launch(
            plan=self.prepared.plan(hostname, len(cgroup.join_fds)),
            descriptors=self._descriptors(slot, cgroup),
            argv=argv,
            env=[f"{key}={value}" for key, value in env.items()],
            paths=candidates(argv[0], env["PATH"]),
            id_map=slot.id_map,
            oom_score_adj=OOM_SCORE_ADJ,
            cgroup_fd=cgroup.into_fd,
        )
        self._token = services.launcher.start(launch, self._launched)
        self._timers.append(services.loop.call_later(SETUP_TIMEOUT, self._setup_timeout))

    def _descriptors(self, slot: Slot, cgroup: RunCgroup) -> dict[str, int]:
        fds = {f"tasks{i}": fd for i, fd in enumerate(cgroup.join_fds)}
        fds["layer"] = self._tree(self.prepared.tree.path, slot.userns, read_only=False)
        for i, bind in enumerate(self.prepared.box.binds):
            userns = slot.userns if bind.idmapped else None
            fds[f"bind{i}"] = self._tree(bind.source, userns, read_only=bind.read_only)
        fds["stdin"] = self._open_stdin() if self._stdin is None else self._stdin
        fds["stdout"] = self._pipe("stdout", slot)
        fds["stderr"] = self._pipe("stderr", slot)
        return fds

    def _tree(self, path: str, userns: int | None, *, read_only: bool) -> int:
        try:
            fd = process.mount_tree(path, userns=userns, read_only=read_only)
        except OSError as error:
            raise SetupError(error.args[1].split()[0], None, error.args[0], path) from error
        self._until_started.callback(os.close, fd)
        return fd

    def _open_stdin(self) -> int:
        """Only what can be read and nothing that leads elsewhere: a directory's descriptor would open the host."""
        path = self.prepared.stdin
        try:
            fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) if path is None else process.open_read_only(path)
        except OSError as error:
            raise SetupError("open", None, error.args[0], path) from error
        self._until_started.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if path is not None and not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise DiycError(f"stdin {path} is neither a file nor a FIFO")
        return fd

    def _pipe(self, name: str, slot: Slot) -> int:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self._held.callback(os.close, read_end)
        self._until_started.callback(os.close, write_end)
        user = self.prepared.box.user  # who may open /dev/stdout
        os.fchown(write_end, slot.first + user.uid, slot.first + user.gid)
        os.set_blocking(read_end, False)
        capture = Capture(name, read_end, self.run.spec.limits.output, self._sink)
        self._captures.append(capture)
        return write_end

    # -- while it runs ---------------------------------------------------------------------------------------

    def _launched(self, report: Started | SetupError) -> None:
        self._until_started.close()
        self._cancel_timers()
        if isinstance(report, SetupError):
            report = self._in_words(report)
            self._error = self._error or report
            self._finish()
            return
        self._started = report
        self._held.callback(os.close, report.pidfd)
        late = time.monotonic() - report.at  # the loop may have been busy meanwhile
        self._exec_at = report.at
        self.started_at = time.time() - late
        loop = self._services.loop
        for capture in self._captures:
            loop.add_reader(capture.fd, self._output, capture)
        loop.add_reader(report.pidfd, self._exited)
        if self._stopped_for is not None:
            self.kill()
        elif self.run.spec.timeout is not None:
            self._timers.append(loop.call_later(self.run.spec.timeout - late, self.stop, "timeout"))

    def _in_words(self, error: SetupError) -> SetupError:
        """The steps that fail by what the job asks for say what that was and what to do."""
        if error.step == "chdir":
            advice = "the image has no such directory: workdir must be there"
        elif error.step != "exec":
            return error if error.step != "exec_label" else self._label_in_words(error)
        else:
            error.target = command = self.run.expand(self.run.spec.argv[0])
            path = environment(self.run, "", "")["PATH"]
            missing = "the image has none, or not what its #! line or its loader names"
            advice = {
                errno.ENOENT: missing if "/" in command else f"not in {path}",
                errno.EACCES: "it may not be executed: chmod +x",
                errno.ENOEXEC: "it is neither a program nor begins with #!",
            }.get(error.errno, "")
            if error.errno in (errno.EACCES, errno.EPERM) and (self.run.spec.apparmor or self.run.spec.selinux):
                return self._label_in_words(error)
        return SetupError(error.step, error.index, error.errno, error.target, advice)

    def _label_in_words(self, error: SetupError) -> SetupError:
        spec = self.run.spec
        module = "AppArmor" if spec.apparmor else "SELinux"
        advice = f"{module} does not let this command be run as {spec.apparmor or spec.selinux}"
        if spec.selinux:  # Linux 4.14 has the two permissions and the policy capability that turns them on
            advice += ": its policy must allow the transition, also process2 { nnp_transition nosuid_transition }"
        return SetupError(error.step, error.index, error.errno, error.target, f"{advice} (or it may not be executed)")

    def _output(self, capture: Capture) -> None:
        capture.read()
        if capture.ended or capture.paused:
            self._services.loop.remove_reader(capture.fd)
        if capture.paused and self._sink is not None:
            self._sink.when_ready(partial(self._resume, capture))
        if capture.truncated:
            self.stop("output_limit")

    def _resume(self, capture: Capture) -> None:
        capture.paused = False
        if self._exit is None and not capture.ended:
            self._services.loop.add_reader(capture.fd, self._output, capture)

    def stop(self, reason: str) -> None:
        """End the run: stop_signal, then KILL after stop_timeout; KILL at once where the signal would be lost."""
        if self._stopped_for is not None or self._exit is not None:
            return
        self._stopped_for = reason
        spec = self.run.spec
        if (
            self._started is None
            or reason == "output_limit"
            or not process.heeds_signal(self._started.pid, spec.stop_signal)
        ):
            self.kill()
            return
        process.send_signal(self._started.pidfd, spec.stop_signal)
        self._timers.append(self._services.loop.call_later(spec.stop_timeout, self.kill))

    def kill(self) -> None:
        """SIGKILL: PID 1's death takes its whole PID namespace along (pid_namespaces(7))."""
        if self._started is not None and self._exit is None:
            process.send_signal(self._started.pidfd, 9)
        elif self._token is not None:
            self._services.launcher.kill(self._token)

    def _setup_timeout(self) -> None:
        """A set-up that hangs (a dead network file system, say) must not hold its slot for ever."""
        if self._token is not None and self._services.launcher.kill(self._token):
            self._error = DiycError(f"set-up took longer than {SETUP_TIMEOUT:g} s")
        self._timers.append(self._services.loop.call_later(SETUP_TIMEOUT, self._setup_timeout))

    def figures(self) -> CgroupFigures:
        """The run's counters now, for a scrape."""
        return self._cgroup.figures() if self._cgroup is not None else CgroupFigures()

    # -- the end -----------------------------------------------------------------------------------------------

    def _exited(self) -> None:
        """PID 1 was reaped by nobody yet, but the kernel ends it last: its whole PID namespace is dead by now."""
        assert self._started is not None
        self._services.loop.remove_reader(self._started.pidfd)
        self._exit = process.reap(self._started.pidfd)
        for capture in self._captures:
            self._services.loop.remove_reader(capture.fd)
            while capture.read():
                pass
        self._finish()

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _finish(self) -> None:
        exited_at = time.monotonic()
        self._cancel_timers()
        self._until_started.close()
        figures = self._final_figures()
        stopped_for = self._stopped_for
        if stopped_for is None and any(capture.truncated for capture in self._captures):
            stopped_for = "output_limit"
        result = self._result(figures, stopped_for, exited_at)
        try:
            self._store_output(result)
        except OSError as error:  # a full disk, say: the run is over, its record must not be lost with it
            result.verdict, result.reason = Verdict.INFRA, f"cannot store its output: {error}"
            result.error = _error_record(error)
        self._held.close()
        result.steps_s["teardown"] = round(time.monotonic() - exited_at, 7)
        self._on_end(self, result)

    def _final_figures(self) -> CgroupFigures:
        try:
            return self.figures()
        except DiycError as error:
            self._error = self._error or error
            return CgroupFigures()

    def _result(self, figures: CgroupFigures, stopped_for: str | None, exited_at: float) -> Result:
        spec, exit_ = self.run.spec, self._exit
        flooded = next((capture.name for capture in self._captures if capture.truncated), None)
        verdict, reason = classify(
            Ending(
                exit_code=exit_.code if exit_ else None,
                signal=exit_.signal if exit_ else None,
                stopped_for=stopped_for,
                setup_error=None if self._error is None else str(self._error),
                oom_kills=figures.oom_kills,
                memory_limit_hits=figures.memory_limit_hits,
                memory_limit=spec.limits.memory,
                timeout=spec.timeout,
                output_limit=spec.limits.output,
                output_stream=flooded,
            )
        )
        return Result(
            run_id=self.run.run_id,
            job=spec.name,
            index=self.run.index,
            attempt=self.run.attempt,
            verdict=verdict,
            reason=reason,
            exit_code=exit_.code if exit_ else None,
            signal=exit_.signal if exit_ else None,
            queued_s=round(self._begun - self._queued_at, 6),
            setup_s=None if self._exec_at is None else round(self._exec_at - self._begun, 6),
            wall_s=None if self._exec_at is None else round(exited_at - self._exec_at, 6),
            cpu_user_s=figures.cpu_user_s,
            cpu_system_s=figures.cpu_system_s,
            memory_peak_bytes=figures.memory_peak_bytes,
            pids_peak=figures.pids_peak,
            oom_kills=figures.oom_kills,
            pids_limit_hits=figures.pids_limit_hits,
            throttled_s=figures.throttled_s,
            io_read_bytes=figures.io_read_bytes,
            io_write_bytes=figures.io_write_bytes,
            pressure_s=figures.pressure_s,
            started_at=self.started_at,
            finished_at=time.time(),
            steps_s=self._steps(),
            labels=dict(spec.labels),
            error=_error_record(self._error),
        )

    def _steps(self) -> dict[str, float]:
        steps = {"queue": round(self._begun - self._queued_at, 7), **(self._started.steps_s if self._started else {})}
        steps["network"] = 0.0  # a new namespace, made by clone; links and addresses come with bridges
        steps["cgroup"] = round(steps.get("cgroup", 0.0) + self._cgroup_s, 7)
        return steps

    def _store_output(self, result: Result) -> None:
        """The first limits.inline bytes go into the record, the whole stream into a file if it is longer."""
        inline = self.run.spec.limits.inline
        for capture in self._captures:
            setattr(result, capture.name, bytes(capture.data[:inline]))
            setattr(result, f"{capture.name}_truncated", capture.truncated)
            if len(capture.data) > inline:
                path = os.path.join(self._services.log_dir, f"{self.run.run_id}.{capture.name}")
                with open(path, "xb") as log:
                    log.write(capture.data)
                setattr(result, f"{capture.name}_path", path)


def _error_record(error: Exception | None) -> dict[str, object] | None:
    if error is None:
        return None
    if isinstance(error, SetupError):
        return {
            "step": error.step,
            "index": error.index,
            "errno": error.errno,
            "target": error.target,
            "message": str(error),
        }
    return {"step": None, "index": None, "errno": getattr(error, "errno", None), "target": None, "message": str(error)}
