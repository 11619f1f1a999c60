"""Limits measured from inside and from outside, and accounting against known work."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from diyc.cgroups import detect
from diyc.errors import HostError
from diyc.results import Result
from needs import require
from system.helpers import KIB, MIB, Facts, Jobs, Live, on_uvloop, start

pytestmark = pytest.mark.privileged

T = TypeVar("T")


def limited(jobs: Jobs, *command: str, mounts: list[dict[str, Any]] | None = None, **limits: Any) -> Result:
    return jobs.run(jobs.probe(*command, limits=limits, mounts=mounts or []))


def while_waiting(jobs: Jobs, look: Callable[[Live], T], **limits: Any) -> T:
    """What `look` sees of a run that waits."""

    async def main() -> T:
        async with jobs.supervisor() as supervisor:
            run = await start(supervisor, jobs.probe("wait", limits=limits))
            seen = look(run)
            await run.end()
            return seen

    return on_uvloop(main())


def shared(jobs: Jobs) -> dict[str, Any]:
    """A writable directory of the host at /shared."""
    directory = jobs.path / "shared"
    directory.mkdir(exist_ok=True)
    return {"type": "bind", "source": str(directory), "target": "/shared"}


# ---- memory ----


def test_memory_just_under_the_limit_is_given_and_its_peak_is_told(jobs: Jobs) -> None:
    result = limited(jobs, "eat", str(30 * MIB), memory="32MiB")
    assert (result.verdict, result.stdout) == ("ok", b"ate\n")
    assert result.memory_peak_bytes is not None
    assert 30 * MIB <= result.memory_peak_bytes <= 32 * MIB


def test_memory_just_over_the_limit_is_not(jobs: Jobs) -> None:
    result = limited(jobs, "eat", str(33 * MIB), memory="32MiB")
    assert (result.verdict, result.stdout) == ("oom", b"")
    assert 31 * MIB <= (result.memory_peak_bytes or 0) <= 32 * MIB


def test_memory_limit_holds_for_files_in_memory_too(jobs: Jobs) -> None:
    result = limited(jobs, "write", "/dev/shm/file", str(48 * MIB), memory="32MiB")
    assert result.verdict == "oom"


def test_memory_none_is_no_limit(jobs: Jobs) -> None:
    result = limited(jobs, "eat", str(300 * MIB), memory="none", swap="none")
    assert result.verdict == "ok"
    assert (result.memory_peak_bytes or 0) >= 300 * MIB


def test_swap_0_leaves_memory_only(jobs: Jobs) -> None:
    def look(run: Live) -> tuple[str, int] | None:
        try:
            file = run.cgroup_file("memory.swap.max", "memory.memsw.limit_in_bytes")
        except AssertionError:
            return None
        return file.name, int(file.read_text())

    found = while_waiting(jobs, look, memory="32MiB", swap="0")
    if found is None:
        pytest.skip("this kernel does not account swap")
    assert found in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", 32 * MIB))


# ---- cpu ----


def idle_seconds() -> float:
    """CPU time that nobody wanted since boot, all CPUs together."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[4]) / os.sysconf("SC_CLK_TCK")


def test_cpus_half_holds_a_busy_loop_to_half_a_cpu(jobs: Jobs) -> None:
    before = idle_seconds()
    result = limited(jobs, "burn", "3", cpus=0.5)
    idle = idle_seconds() - before
    facts = Facts.of(result)
    assert result.wall_s is not None
    assert result.cpu_user_s is not None
    assert result.cpu_system_s is not None
    inside = facts.number("cpu") / facts.number("wall")
    outside = (result.cpu_user_s + result.cpu_system_s) / result.wall_s
    assert inside <= 0.55
    assert outside <= 0.55
    assert (result.throttled_s or 0) > 0
    if idle > 1.0:  # otherwise others may have had the CPU
        assert inside >= 0.45
        assert outside >= 0.45


def test_cpus_none_does_not_hold_a_busy_loop(jobs: Jobs) -> None:
    before = idle_seconds()
    result = limited(jobs, "burn", "0.5")
    if idle_seconds() - before > 0.3:
        assert Facts.of(result).number("cpu") >= 0.4
    assert not result.throttled_s


def test_cpu_weight_is_in_the_runs_cgroup(jobs: Jobs) -> None:
    def look(run: Live) -> tuple[str, int]:
        file = run.cgroup_file("cpu.weight", "cpu.shares")
        return file.name, int(file.read_text())

    assert while_waiting(jobs, look, cpu_weight=250) in (("cpu.weight", 250), ("cpu.shares", 2560))
    assert while_waiting(jobs, look) in (("cpu.weight", 100), ("cpu.shares", 1024))


def test_cpuset_is_all_that_the_job_may_run_on(jobs: Jobs) -> None:
    require("cgroup.cpuset")
    usable = sorted(os.sched_getaffinity(0))
    assert jobs.report(limits={"cpuset": str(usable[-1])})["cpu"] == [str(usable[-1])]
    assert [int(cpu) for cpu in jobs.report()["cpu"]] == usable


# ---- pids, descriptors, core files ----


@pytest.mark.parametrize("limit", [1, 2, 10])
def test_pids_is_the_exact_number_of_processes(jobs: Jobs, limit: int) -> None:
    result = limited(jobs, "crowd", pids=limit)
    facts = Facts.of(result)
    assert (facts.number("processes"), facts.number("errno")) == (limit, errno.EAGAIN)
    assert result.pids_peak in (limit, None)
    assert result.pids_limit_hits in (1, None)


def test_nofile_is_the_exact_number_of_descriptors(jobs: Jobs) -> None:
    facts = Facts.of(limited(jobs, "descriptors", nofile=64))
    assert (facts.number("descriptors"), facts.number("errno")) == (64, errno.EMFILE)
    assert jobs.report(limits={"nofile": 64}).one("rlimit.nofile") == "64 64"


def test_nofile_above_what_the_supervisor_may_have_is_refused(jobs: Jobs) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard >= 1_048_576:
        pytest.skip("this process may have as many descriptors as a job may ask for")
    with pytest.raises(HostError, match=r"limits\.nofile"):
        jobs.report(limits={"nofile": hard + 1})


def test_core_files_are_not_written_unless_allowed(jobs: Jobs) -> None:
    if 0 <= resource.getrlimit(resource.RLIMIT_CORE)[1] < 16 * 1024**2:
        pytest.skip("this process itself may write no core files (ulimit -Hc)")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if pattern.startswith(("|", "/")):
        pytest.skip("core_pattern sends core files elsewhere")
    spec = {"mounts": [shared(jobs)], "workdir": "/shared"}
    for core, written in (("0", 0), ("16MiB", 1)):
        result = jobs.run(jobs.probe("crash", limits={"core": core}, **spec))
        assert result.verdict == "signal"
        assert len(os.listdir(jobs.path / "shared")) == written


# ---- disk ----


def test_disk_is_all_that_can_be_written_to_the_root(jobs: Jobs) -> None:
    facts = Facts.of(limited(jobs, "write", "/file", str(2 * MIB), disk="1MiB"))
    assert facts.number("errno") == errno.ENOSPC
    assert MIB - 64 * KIB <= facts.number("written") <= MIB


def test_disk_none_is_no_limit_but_memory(jobs: Jobs) -> None:
    facts = Facts.of(limited(jobs, "write", "/file", str(100 * MIB), disk="none", memory="200MiB"))
    assert (facts.number("errno"), facts.number("written")) == (0, 100 * MIB)


# ---- io ----


def disk_of(path: Path) -> str:
    """The device that holds a path; skips where that is none with a block queue of its own."""
    device = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if os.major(device) == 0 or not entry.exists():
        pytest.skip(f"{path} lies on no disk: set TMPDIR to another place")
    return f"/dev/{entry.resolve().name}"


@pytest.mark.parametrize("key, value", [("io_write_bps", "4MiB"), ("io_write_iops", 4)])
def test_io_write_limits_slow_a_job_down(jobs: Jobs, key: str, value: Any) -> None:
    """4 MiB in four writes, past the page cache, at 4 MiB or four writes a second: about a second."""
    require("cgroup.io")
    disk = disk_of(jobs.path)
    write = ("write", "/shared/file", str(4 * MIB), "direct")
    free = Facts.of(limited(jobs, *write, mounts=[shared(jobs)]))
    held = Facts.of(limited(jobs, *write, mounts=[shared(jobs)], **{key: {disk: value}}))
    assert free.number("written") == held.number("written") == 4 * MIB
    assert held.number("wall") >= 0.6
    assert held.number("wall") <= free.number("wall") + 5


def test_io_read_limits_slow_a_job_down(jobs: Jobs) -> None:
    require("cgroup.io")
    disk = disk_of(jobs.path)
    mount = shared(jobs)
    Path(mount["source"], "file").write_bytes(os.urandom(4 * MIB))
    os.sync()
    held = limited(jobs, "read", "/shared/file", mounts=[mount], io_read_bps={disk: "4MiB"})
    assert Facts.of(held).number("read") == 4 * MIB
    assert (held.wall_s or 0) >= 0.6


# ---- accounting ----


def test_cpu_time_is_what_the_job_used(jobs: Jobs) -> None:
    result = limited(jobs, "burn", "0.5")
    facts = Facts.of(result)
    assert result.cpu_user_s is not None
    assert result.cpu_system_s is not None
    used = result.cpu_user_s + result.cpu_system_s
    # The container's making is the run's too; v1 alone counts user and system time in ticks of 10 ms.
    assert facts.number("cpu") - 0.02 <= used <= facts.number("cpu") + 0.05
    assert result.cpu_user_s <= used
    assert result.cpu_user_s > 0


def test_memory_peak_is_what_the_job_took(jobs: Jobs) -> None:
    small, large = (limited(jobs, "eat", str(size * MIB)).memory_peak_bytes for size in (8, 72))
    assert small is not None
    assert large is not None
    assert 64 * MIB - 2 * MIB <= large - small <= 64 * MIB + 4 * MIB


def test_pids_peak_is_the_largest_number_of_processes(jobs: Jobs) -> None:
    assert limited(jobs, "exit", "0").pids_peak in (1, None)
    assert limited(jobs, "crowd", pids=7).pids_peak in (7, None)


@pytest.mark.parametrize("how", ["direct", "fsync"])
def test_written_bytes_are_what_reached_the_disk(jobs: Jobs, how: str) -> None:
    require("cgroup.io")
    disk_of(jobs.path)
    result = limited(jobs, "write", "/shared/file", str(8 * MIB), how, mounts=[shared(jobs)])
    assert Facts.of(result).number("written") == 8 * MIB
    assert result.io_write_bytes is not None
    if how == "fsync" and result.io_write_bytes < 8 * MIB and detect().controllers["io"].version == 1:
        pytest.skip("this cgroup layout does not charge delayed writes to who made them (v1)")
    assert 8 * MIB <= result.io_write_bytes <= 9 * MIB


def test_read_bytes_are_what_came_from_the_disk(jobs: Jobs) -> None:
    require("cgroup.io")
    mount = shared(jobs)
    disk_of(jobs.path)
    Path(mount["source"], "file").write_bytes(os.urandom(8 * MIB))
    os.sync()
    result = limited(jobs, "read", "/shared/file", mounts=[mount])
    assert Facts.of(result).number("read") == 8 * MIB
    assert result.io_read_bytes is not None
    assert 8 * MIB <= result.io_read_bytes <= 9 * MIB


def test_figures_of_one_run_are_not_those_of_another(jobs: Jobs) -> None:
    async def main() -> list[Result]:
        async with jobs.supervisor(max_parallel=2) as supervisor:
            await supervisor.run(jobs.probe("eat", str(64 * MIB)))
            return [await supervisor.run(jobs.probe("exit", "0")) for _ in range(3)]

    for result in on_uvloop(main()):
        assert (result.memory_peak_bytes or 0) < 8 * MIB
        assert (result.cpu_user_s or 0) < 0.2
        assert result.pids_peak in (1, None)
