"""Every verdict forced DIYC_REPEAT times on each event loop, with the evidence that it must carry and no other."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diyc.cgroups.machine import Machine
from diyc.jobs import JobSpec
from diyc.results import Result
from system.helpers import KIB, MIB, PATIENCE, REPEAT, Jobs, on_uvloop, start, until

if TYPE_CHECKING:
    from conftest import LoopKind

pytestmark = pytest.mark.privileged

KILLED = (None, 9)


@dataclass(frozen=True)
class Case:
    """A command of the probe, keys of its job, and how each of its runs must end: one of `ends` as
    (exit_code, signal), and a reason that matches all of it."""

    command: tuple[str, ...]
    ends: tuple[tuple[int | None, int | None], ...]
    reason: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


def limited(**limits: Any) -> dict[str, Any]:
    return {"limits": limits}


def check(result: Result, verdict: str, case: Case) -> None:
    """The verdict with its evidence, and no evidence of any other."""
    said = (result.verdict, result.reason, result.exit_code, result.signal, result.error)
    assert result.verdict == verdict, said
    assert (result.exit_code, result.signal) in case.ends, said
    if case.reason is None:
        assert result.reason is None
    else:
        assert re.fullmatch(case.reason, result.reason or ""), said
    assert (result.oom_kills or 0) > 0 if verdict == "oom" else not result.oom_kills
    assert (result.stdout_truncated or result.stderr_truncated) == (verdict == "output_limit")
    assert (result.error is not None) == (verdict == "infra")
    assert (result.wall_s is None) == (result.setup_s is None) == (verdict == "infra")


def check_all(loop_kind: LoopKind, jobs: Jobs, verdict: str, case: Case) -> list[Result]:
    results = loop_kind(jobs.repeated(jobs.probe(*case.command, **case.keys)))
    for result in results:
        check(result, verdict, case)
    assert len({result.run_id for result in results}) == REPEAT
    assert sorted(result.index for result in results) == list(range(REPEAT))
    return results


# ---- ok, exit, signal ----


def test_ok_is_exit_status_0(loop_kind: LoopKind, jobs: Jobs) -> None:
    check_all(loop_kind, jobs, "ok", Case(("exit", "0"), ((0, None),)))


@pytest.mark.parametrize("code", [1, 137, 255])
def test_exit_is_any_other_status_also_one_that_looks_like_a_signal(loop_kind: LoopKind, jobs: Jobs, code: int) -> None:
    check_all(loop_kind, jobs, "exit", Case(("exit", str(code)), ((code, None),), f"exit status {code}"))


def test_signal_is_a_crash(loop_kind: LoopKind, jobs: Jobs) -> None:
    results = check_all(loop_kind, jobs, "signal", Case(("crash",), ((None, 11),), "killed by SIGSEGV"))
    assert {result.stdout for result in results} == {b"crashing\n"}


def test_signal_is_a_kill_from_outside(loop_kind: LoopKind, jobs: Jobs) -> None:
    async def main() -> list[Result]:
        async with jobs.supervisor() as supervisor:
            return [await killed(await start(supervisor, jobs.probe("wait"))) for _ in range(REPEAT)]

    async def killed(run: Any) -> Result:
        os.kill(run.pid, signal.SIGKILL)
        return await asyncio.wait_for(run.ended, PATIENCE)

    for result in loop_kind(main()):
        check(result, "signal", Case((), (KILLED,), "killed by SIGKILL"))


def test_exit_is_kept_where_the_job_signals_itself_in_vain(jobs: Jobs) -> None:
    """A job is PID 1: the kernel drops what it sends itself and does not handle (pid_namespaces(7))."""
    result = jobs.run(jobs.of("host", "sh", "-c", "kill -TERM $$; kill -KILL $$; exit 3"))
    check(result, "exit", Case((), ((3, None),), "exit status 3"))


def test_exit_is_the_shells_when_a_child_of_it_was_killed(jobs: Jobs) -> None:
    result = jobs.run(jobs.of("host", "sh", "-c", "sleep 9 & kill -KILL $!; wait $!"))
    check(result, "exit", Case((), ((137, None),), "exit status 137"))


def test_exit_is_told_of_a_job_that_closed_its_output(loop_kind: LoopKind, jobs: Jobs) -> None:
    script = "echo last; exec >&- 2>&-; sleep 0.1; exit 4"
    for result in loop_kind(jobs.repeated(jobs.of("host", "sh", "-c", script))):
        check(result, "exit", Case((), ((4, None),), "exit status 4"))
        assert result.stdout == b"last\n"


def test_ok_does_not_wait_for_processes_that_the_command_leaves(loop_kind: LoopKind, jobs: Jobs) -> None:
    for result in loop_kind(jobs.repeated(jobs.of("host", "sh", "-c", "setsid sleep 25 & echo done"))):
        check(result, "ok", Case((), ((0, None),)))
        assert result.stdout == b"done\n"
        assert (result.wall_s or 0) < 20


# ---- timeout ----

TIMEOUT = {"timeout": "500ms", "stop_timeout": "250ms"}
TIMED_OUT = "timeout of 500 ?ms reached"


@pytest.mark.parametrize(
    "command, end, least",
    [("handle", (0, None), 0.5), ("wait", KILLED, 0.5), ("ignore", KILLED, 0.75)],
    ids=["job-ends-well-on-stop-signal", "job-without-handler", "job-ignoring-stop-signal"],
)
def test_timeout_is_never_told_as_exit_or_signal(
    loop_kind: LoopKind, jobs: Jobs, command: str, end: tuple[int | None, int | None], least: float
) -> None:
    results = check_all(loop_kind, jobs, "timeout", Case((command,), (end,), TIMED_OUT, TIMEOUT))
    times = sorted(result.wall_s or 0 for result in results)
    tick = 0.001  # uvloop's clock has milliseconds, cut off
    assert least - tick <= times[0] <= times[-1] < least + 2


def test_timeout_ends_the_whole_tree(jobs: Jobs) -> None:
    script = "trap '' TERM; for i in 1 2 3; do (trap '' TERM; setsid sleep 77 & sleep 77) & done; echo started; wait"
    result = jobs.run(jobs.of("host", "sh", "-c", script, **TIMEOUT))
    check(result, "timeout", Case((), (KILLED,), TIMED_OUT))
    assert result.stdout == b"started\n"


def test_timeout_ends_a_job_that_is_stopped(jobs: Jobs) -> None:
    async def main() -> Result:
        async with jobs.supervisor() as supervisor:
            run = await start(supervisor, jobs.probe("handle", **TIMEOUT))
            os.kill(run.pid, signal.SIGSTOP)
            return await asyncio.wait_for(run.ended, PATIENCE)

    check(on_uvloop(main()), "timeout", Case((), (KILLED,), TIMED_OUT))


def test_timeout_asks_with_the_jobs_stop_signal(jobs: Jobs) -> None:
    script = "trap 'echo asked; exit 5' USR1; sleep 30 & wait"
    result = jobs.run(jobs.of("host", "sh", "-c", script, **TIMEOUT, stop_signal="USR1"))
    check(result, "timeout", Case((), ((5, None),), TIMED_OUT))
    assert result.stdout == b"asked\n"


# ---- oom ----

EATEN = str(64 * MIB)
LIMIT_REACHED = r"memory limit 16 ?MiB reached \(\d+ kills?\)"


@pytest.mark.parametrize("swap", ["0", "none"])
@pytest.mark.parametrize(
    "command, end",
    [("eat", KILLED), ("feed", (0, None))],
    ids=["command-killed", "grandchild-killed-and-command-ends-well"],
)
def test_oom_is_known_from_the_cgroups_own_count(
    loop_kind: LoopKind, jobs: Jobs, command: str, end: tuple[int | None, int | None], swap: str
) -> None:
    if swap == "none" and Machine().has_swap():
        pytest.skip("with swap a job goes on beyond its memory limit")
    case = Case((command, EATEN), (end,), LIMIT_REACHED, limited(memory="16MiB", swap=swap))
    for result in check_all(loop_kind, jobs, "oom", case):
        assert result.stdout == (b"went on\n" if command == "feed" else b"")
        assert 15 * MIB < (result.memory_peak_bytes or 0) <= 16 * MIB


def test_oom_while_the_container_is_made_spares_the_supervisor(loop_kind: LoopKind, jobs: Jobs) -> None:
    """Until execve the child has the supervisor's memory: the kernel must not kill both for it."""
    spec = jobs.probe("wait", **limited(memory="1MiB", swap="0"), timeout="100ms")
    for result in loop_kind(jobs.repeated(spec)):
        assert result.verdict in ("oom", "timeout"), (result.verdict, result.reason)


# ---- output_limit ----

CAP = 100_003
PATTERN = (b"0123456789" * (CAP // 10 + 1))[: CAP + 1]
FLOODED = "{} passed its limit of .*"


@pytest.mark.parametrize("name, fd", [("stdout", "1"), ("stderr", "2")])
def test_output_up_to_the_cap_is_ok_and_whole(loop_kind: LoopKind, jobs: Jobs, name: str, fd: str) -> None:
    case = Case(("flood", fd, str(CAP)), ((0, None),), None, limited(output=CAP))
    for result in check_all(loop_kind, jobs, "ok", case):
        assert getattr(result, name) == PATTERN[:CAP]


@pytest.mark.parametrize("name, fd", [("stdout", "1"), ("stderr", "2")])
def test_output_limit_is_one_byte_over_the_cap(loop_kind: LoopKind, jobs: Jobs, name: str, fd: str) -> None:
    reason = FLOODED.format(name)
    case = Case(("flood", fd, str(CAP + 1)), ((0, None), KILLED), reason, limited(output=CAP))
    for result in check_all(loop_kind, jobs, "output_limit", case):
        assert getattr(result, name) == PATTERN[:CAP]
        assert getattr(result, f"{name}_truncated")
        assert not getattr(result, "stderr_truncated" if name == "stdout" else "stdout_truncated")


def test_output_limit_ends_an_endless_flood(loop_kind: LoopKind, jobs: Jobs) -> None:
    case = Case(("flood", "1", str(10**12)), (KILLED,), FLOODED.format("stdout"), limited(output="64KiB"))
    for result in check_all(loop_kind, jobs, "output_limit", case):
        assert result.stdout == PATTERN[: 64 * KIB]


def test_output_beyond_inline_is_kept_in_a_file(jobs: Jobs) -> None:
    result = jobs.run(jobs.probe("flood", "1", str(CAP), **limited(output=CAP, inline=10)))
    assert (result.verdict, result.stdout, result.stdout_truncated) == ("ok", PATTERN[:10], False)
    assert result.stdout_path is not None
    assert Path(result.stdout_path).read_bytes() == PATTERN[:CAP]
    assert result.stderr_path is None


# ---- cancelled ----


@pytest.mark.parametrize("command, end", [("handle", (0, None)), ("wait", KILLED), ("ignore", KILLED)])
def test_cancelled_is_what_the_supervisor_was_asked_for(
    loop_kind: LoopKind, jobs: Jobs, command: str, end: tuple[int | None, int | None]
) -> None:
    async def main() -> list[Result]:
        async with jobs.supervisor() as supervisor:
            spec = jobs.probe(command, stop_timeout="100ms")
            runs = [await start(supervisor, spec) for _ in range(min(REPEAT, 16))]
            return [await run.end() for run in runs]

    for result in loop_kind(main()):
        check(result, "cancelled", Case((), (end,), "cancelled"))


def test_cancelling_the_awaiting_task_ends_the_run_at_whatever_moment(loop_kind: LoopKind, jobs: Jobs) -> None:
    admitted = asyncio.Event()

    async def main() -> None:
        async with jobs.supervisor(on_start=lambda _: admitted.set()) as supervisor:
            for moment in range(REPEAT):
                admitted.clear()
                task = asyncio.create_task(supervisor.run(jobs.probe("wait")))
                await asyncio.wait_for(admitted.wait(), PATIENCE)
                await asyncio.sleep(0.002 * (moment % 10))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await asyncio.wait_for(supervisor.wait(), PATIENCE)
                assert (supervisor.running, supervisor.queued) == (0, 0)

    loop_kind(main())


def test_cancelling_a_run_that_waits_for_its_turn_starts_nothing(loop_kind: LoopKind, jobs: Jobs) -> None:
    started: list[str] = []

    async def main() -> None:
        async with jobs.supervisor(max_parallel=1, on_start=lambda run: started.append(run.run_id)) as supervisor:
            first = await start(supervisor, jobs.probe("wait"))
            waiting = asyncio.create_task(supervisor.run(jobs.probe("exit", "0")))
            await until(lambda: supervisor.queued == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await first.end()
            await asyncio.wait_for(supervisor.wait(), PATIENCE)
            assert started == [first.run_id]

    loop_kind(main())


CONFIG = """
[supervisor]
state_dir = "state"
runtime_dir = "run"
max_parallel = 2
[images.box]
dir = "{image}"
[jobs.waits]
image = "box"
command = ["/probe", "{command}"]
stop_timeout = "200ms"
count = 3
mounts = [{{ type = "bind", source = "shared", target = "/shared" }}]
"""


def supervise(jobs: Jobs, text: str) -> subprocess.Popen[str]:
    """diyc-supervisor with this jobs.toml, writing JSON to its stdout."""
    jobs.path.joinpath("shared").mkdir(exist_ok=True)
    jobs.path.joinpath("jobs.toml").write_text(text)
    script = "from diyc.cli.supervisor import main; main()"
    command = [sys.executable, "-c", script, "--config", str(jobs.path / "jobs.toml"), "--json", "-v"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command, end", [("handle", (0, None)), ("ignore", KILLED)])
def test_a_signal_to_the_supervisor_cancels_what_runs(
    jobs: Jobs, command: str, end: tuple[int | None, int | None], number: signal.Signals
) -> None:
    process = supervise(jobs, CONFIG.format(image=jobs.image, command=command))
    wait_for_processes(process, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    *results, summary = map(json.loads, out.splitlines())
    assert process.returncode == 128 + number, err
    assert [(run["verdict"], run["exit_code"], run["signal"]) for run in results] == [("cancelled", *end)] * 2
    assert (summary["not_started"], summary["stopped_by"]) == (1, number)


def wait_for_processes(supervisor: subprocess.Popen[str], count: int) -> None:
    """Wait until that many jobs of a supervisor have come to wait in their command."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if supervisor.poll() is not None:
            pytest.fail(f"the supervisor ended: {supervisor.communicate()}")
        children = Path(f"/proc/{supervisor.pid}/task").glob("*/children")
        pids = [pid for file in children for pid in file.read_text().split()]
        if sum(is_waiting(pid) for pid in pids) == count:
            return
        time.sleep(0.02)
    pytest.fail(f"no {count} jobs came to run")


def is_waiting(pid: str) -> bool:
    """Whether a job has said what it does with SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn:", "SigCgt:"))]
    return "Name:\tprobe" in lines and any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


# ---- infra ----


def failed(results: list[Result], step: str, number: int, target: str) -> None:
    for result in results:
        check(result, "infra", Case((), ((None, None),), ".+"))
        assert result.error is not None
        evidence = (result.error["step"], result.error["errno"], result.error["target"])
        assert evidence == (step, number, target), result.error
        assert result.stdout == result.stderr == b""


@pytest.mark.parametrize(
    "command, number",
    [
        ("nosuch", errno.ENOENT),
        ("/nosuch", errno.ENOENT),
        ("/probe/x", errno.ENOENT),
        ("/etc/passwd", errno.EACCES),
        ("/etc", errno.EACCES),
        ("/text", errno.ENOEXEC),
        ("/script", errno.ENOENT),
    ],
    ids=["not-on-path", "no-such-file", "below-a-file", "not-executable", "directory", "no-program", "no-interpreter"],
)
def test_infra_names_the_command_that_cannot_be_run(
    loop_kind: LoopKind, jobs: Jobs, tmp_path: Path, command: str, number: int
) -> None:
    image = shutil.copytree(jobs.image, tmp_path / "image")
    for name, text in (("text", "no program"), ("script", "#!/no/interpreter\n")):
        image.joinpath(name).write_text(text)
        image.joinpath(name).chmod(0o755)
    failed(loop_kind(jobs.repeated(jobs.of(image, command))), "exec", number, command)


@pytest.mark.parametrize(
    "keys, step, number, target",
    [
        ({"workdir": "/nowhere"}, "chdir", errno.ENOENT, "/nowhere"),
        ({"workdir": "/probe"}, "chdir", errno.ENOTDIR, "/probe"),
        ({"workdir": "/proc/self/fd/0"}, "chdir", errno.ENOTDIR, "/proc/self/fd/0"),
        (limited(disk="4KiB"), "write_file", errno.ENOSPC, "/etc/hosts"),
        ({"env": {f"LONG{i}": "x" * 100_000 for i in range(70)}}, "exec", errno.E2BIG, "/probe"),
        ({"mounts": [{"type": "tmpfs", "target": "/probe/x"}]}, "mkdir", errno.ENOTDIR, "/probe/x"),
        ({"mounts": [{"type": "tmpfs", "target": "/probe"}]}, "mount", errno.ENOTDIR, "/probe"),
    ],
    ids=[
        "no-workdir",
        "workdir-is-a-file",
        "workdir-is-a-descriptor",
        "disk",
        "environment",
        "below-a-file",
        "upon-a-file",
    ],
)
def test_infra_names_the_step_that_failed(
    loop_kind: LoopKind, jobs: Jobs, keys: dict[str, Any], step: str, number: int, target: str
) -> None:
    failed(loop_kind(jobs.repeated(jobs.probe("exit", "0", **keys))), step, number, target)


def vanished(jobs: Jobs, spec: JobSpec, path: Path) -> list[Result]:
    """The results of a job whose file went after it was accepted."""

    async def main() -> list[Result]:
        async with jobs.supervisor() as supervisor:
            prepared = await supervisor.prepare(replace(spec, count=REPEAT))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            results: list[Result] = []
            supervisor.submit(prepared, results.append)
            await asyncio.wait_for(supervisor.wait(), PATIENCE)
            return results

    return on_uvloop(main())


def test_infra_names_the_image_directory_that_went_away(jobs: Jobs, tmp_path: Path) -> None:
    image = shutil.copytree(jobs.image, tmp_path / "image")
    failed(vanished(jobs, jobs.of(image, "/probe"), image), "open_tree", errno.ENOENT, str(image))


def test_infra_names_the_mount_source_that_went_away(jobs: Jobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    spec = jobs.probe("exit", "0", mounts=[{"type": "bind", "source": str(source), "target": "/in"}])
    failed(vanished(jobs, spec, source), "open_tree", errno.ENOENT, str(source))


def test_infra_names_the_input_that_went_away(jobs: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.touch()
    failed(vanished(jobs, jobs.probe("copy", stdin=str(file)), file), "open", errno.ENOENT, str(file))


def test_missing_image_directory_is_refused_before_anything_runs(jobs: Jobs) -> None:
    text = CONFIG.format(image=jobs.path / "nowhere", command="wait")
    process = supervise(jobs, text)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert "images.box.dir" in err
    assert str(jobs.path / "nowhere") in err


# ---- what diyc run makes of them ----


@pytest.mark.parametrize(
    "command, flags, status",
    [
        (["exit", "0"], [], 0),
        (["exit", "7"], [], 7),
        (["crash"], [], 128 + signal.SIGSEGV),
        (["wait"], ["--timeout", "200ms"], 124),
        (["eat", EATEN], ["--memory", "16MiB"], 128 + signal.SIGKILL),
        (["exit", "0"], ["--workdir", "/nowhere"], 125),
    ],
    ids=["ok", "exit", "signal", "timeout", "oom", "infra"],
)
def test_diyc_run_exits_with_the_commands_status(jobs: Jobs, command: list[str], flags: list[str], status: int) -> None:
    assert diyc_run(jobs, [*flags, str(jobs.image), "/probe", *command]) == status


def test_diyc_run_tells_not_found_from_not_executable(jobs: Jobs) -> None:
    assert diyc_run(jobs, [str(jobs.image), "nosuch"]) == 127
    assert diyc_run(jobs, [str(jobs.image), "/etc/passwd"]) == 126


def diyc_run(jobs: Jobs, arguments: list[str]) -> int:
    script = "from diyc.cli.main import main; main()"
    command = [sys.executable, "-c", script, "run", "--state-dir", str(jobs.path / "state"), *arguments]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL).returncode
