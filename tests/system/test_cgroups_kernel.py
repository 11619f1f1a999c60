"""Real cgroups on whatever layout this host has: limits that bite, figures that count, kills and removal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import uvloop

from diyc.cgroups import CgroupHost, Cgroups, RunCgroup, detect, open_cgroups, remove_leftovers
from diyc.errors import HostError
from diyc.jobs import Limits
from needs import require

if TYPE_CHECKING:
    from conftest import LoopKind

pytestmark = pytest.mark.privileged

MIB = 1024**2
Start = Callable[..., "subprocess.Popen[bytes]"]

FORK_UNTIL_REFUSED = """
import os, signal
children = []
try:
    while True:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        children.append(pid)
except BlockingIOError:
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""
BURN_UNTIL_THROTTLED = """
import sys, time
start = time.process_time()
while "nr_throttled 0\\n" in open(sys.argv[1]).read():
    sum(range(100_000))
print(time.process_time() - start)
"""
# A tree of eight processes, two sessions deep, that ignores whatever it can.
TREE = """
import os, signal, sys
for number in range(1, 64):
    if number != signal.SIGKILL and number != signal.SIGSTOP and number not in (32, 33):
        signal.signal(number, signal.SIG_IGN)
for _ in range(3):
    os.fork()
os.setsid() if os.getpid() != os.getpgid(0) else None
os.write(1, b".")
while True:
    signal.pause()
"""


@pytest.fixture(scope="module", autouse=True)
def libuv_is_loaded() -> None:
    """libuv opens a pipe at its first loop and keeps it, which is no leak of a test."""
    uvloop.new_event_loop().close()


@pytest.fixture(scope="module")
def host() -> CgroupHost:
    return detect()


@pytest.fixture
def cgroups(host: CgroupHost) -> Iterator[Cgroups]:
    opened = open_cgroups(host, parent="diyc-test", instance=f"kernel-{os.getpid()}")
    try:
        opened.prepare()
    except HostError as error:
        pytest.skip(f"needs a cgroup subtree of its own: {error}")
    yield opened
    remove_leftovers(opened.instance_dirs)
    opened.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program inside a run's cgroups, as the C core does it: the child joins, then executes."""
    with contextlib.ExitStack() as stack:

        def spawn(run: RunCgroup, program: str, *args: str) -> subprocess.Popen[bytes]:
            def join() -> None:
                if run.into_fd is not None:
                    procs = os.open("cgroup.procs", os.O_WRONLY, dir_fd=run.into_fd)
                    os.write(procs, b"0")
                    os.close(procs)
                for fd in run.join_fds:
                    os.write(fd, b"0")

            child = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", program, *args], stdout=subprocess.PIPE, preexec_fn=join
            )
            stack.callback(finish, child)
            run.close_join_fds()
            return child

        yield spawn


def finish(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def removed(run: RunCgroup) -> None:
    asyncio.run(asyncio.wait_for(run.wait_removed(), 60))


def test_every_limit_is_taken_by_the_kernel(cgroups: Cgroups) -> None:
    limits = Limits(memory=32 * MIB, swap=0, cpus=0.5, cpu_weight=50, cpuset="0", pids=5)
    assert cgroups.unsupported(limits) == []
    run = cgroups.create("all", limits)
    texts = {name: read_values(path) for name, path in run.dirs.items()}
    removed(run)
    memory, cpu = texts["memory"], texts["cpu"]
    assert str(32 * MIB) in (memory.get("memory.max"), memory.get("memory.limit_in_bytes"))
    assert "50000 100000" in (cpu.get("cpu.max"), f"{cpu.get('cpu.cfs_quota_us')} {cpu.get('cpu.cfs_period_us')}")
    assert cpu.get("cpu.weight") == "50" or cpu.get("cpu.shares") == "512"
    assert texts["cpuset"]["cpuset.cpus"] == "0"
    assert texts["pids"]["pids.max"] == "5"


def read_values(path: str) -> dict[str, str]:
    names = ("memory.", "cpu.max", "cpu.weight", "cpu.shares", "cpu.cfs", "cpuset.cpus", "pids.max")
    found = {}
    for name in os.listdir(path):
        if name.startswith(names) and os.access(f"{path}/{name}", os.R_OK):
            with contextlib.suppress(OSError), open(f"{path}/{name}") as file:
                found[name] = file.read().strip()
    return found


def test_memory_over_the_limit_is_an_oom_kill_and_counted(cgroups: Cgroups, start: Start) -> None:
    require("cgroup.memory")
    run = cgroups.create("memory", Limits(memory=32 * MIB))
    child = start(run, f"x = bytearray({128 * MIB}); print(len(x))")
    assert child.wait() == -9
    figures = run.figures()
    removed(run)
    assert figures.oom_kills == 1
    assert figures.memory_limit_hits != 0  # None where the kernel does not count them
    assert figures.memory_peak_bytes is None or 16 * MIB < figures.memory_peak_bytes <= 32 * MIB


def test_an_oom_kill_of_a_grandchild_is_counted_though_the_command_ends_well(cgroups: Cgroups, start: Start) -> None:
    require("cgroup.memory")
    run = cgroups.create("grandchild", Limits(memory=32 * MIB))
    hog = f"import os\nif os.fork() == 0:\n    bytearray({128 * MIB})\nos.wait()"
    assert start(run, hog).wait() == 0
    figures = run.figures()
    removed(run)
    assert figures.oom_kills == 1


def test_a_run_within_its_limits_has_no_kills_and_no_hits(cgroups: Cgroups, start: Start) -> None:
    run = cgroups.create("fine", Limits())
    assert start(run, "pass").wait() == 0
    figures = run.figures()
    removed(run)
    assert (figures.oom_kills, figures.memory_limit_hits, figures.pids_limit_hits) == (0, 0, 0)
    assert figures.pids_current == 0
    assert figures.io_read_bytes is not None


def test_cpu_time_is_measured_and_the_quota_throttles(cgroups: Cgroups, start: Start) -> None:
    require("cgroup.cpu")
    run = cgroups.create("cpu", Limits(cpus=0.1))
    child = start(run, BURN_UNTIL_THROTTLED, f"{run.dirs['cpu']}/cpu.stat")
    output, _ = child.communicate()
    figures = run.figures()
    removed(run)
    assert figures.cpu_usage_s is not None
    assert figures.cpu_user_s is not None
    assert figures.cpu_usage_s >= float(output) > 0
    assert figures.throttled_periods is not None
    assert figures.throttled_periods > 0
    assert figures.throttled_s is not None
    assert figures.throttled_s > 0


def test_the_pids_limit_stops_forks_and_counts_them(cgroups: Cgroups, start: Start) -> None:
    require("cgroup.pids")
    run = cgroups.create("pids", Limits(pids=4))
    assert start(run, FORK_UNTIL_REFUSED).wait() == 0
    figures = run.figures()
    removed(run)
    assert figures.pids_limit_hits == 1
    assert figures.pids_peak in (4, None)


def test_a_cpuset_binds_the_child(cgroups: Cgroups, start: Start) -> None:
    require("cgroup.cpuset")
    run = cgroups.create("cpuset", Limits(cpuset="0"))
    child = start(run, "import os; print(os.sched_getaffinity(0))")
    output, _ = child.communicate()
    removed(run)
    assert output == b"{0}\n"


def test_bytes_read_from_and_written_to_a_disk_are_counted(cgroups: Cgroups, start: Start) -> None:
    require("cgroup.io")
    run = cgroups.create("io", Limits(memory=None, swap=None))
    assert start(run, "pass").wait() == 0
    figures = run.figures()
    removed(run)
    assert figures.io_read_bytes is not None
    assert figures.io_write_bytes is not None


def test_kill_ends_a_whole_tree(cgroups: Cgroups, start: Start) -> None:
    run = cgroups.create("tree", Limits())
    child = start(run, TREE)
    assert child.stdout is not None
    for _ in range(8):
        assert child.stdout.read(1) == b"."
    assert run.figures().pids_current == 8
    assert not run.remove()
    run.kill()
    assert child.wait() == -9
    assert child.stdout.read() == b""  # every process that held the pipe is gone
    removed(run)
    assert not any(os.path.exists(path) for path in run.dirs.values())


def test_a_fork_bomb_cannot_outrun_kill(cgroups: Cgroups, start: Start) -> None:
    run = cgroups.create("bomb", Limits(pids=50))
    bomb = "import os\nos.write(1, b'.')\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    child = start(run, bomb)
    assert child.stdout is not None
    assert child.stdout.read(1) == b"."
    run.kill()
    child.wait()
    removed(run)


def test_waiting_for_removal_wakes_when_the_last_process_ends(
    cgroups: Cgroups, start: Start, loop_kind: LoopKind
) -> None:
    run = cgroups.create("wait", Limits())
    child = start(run, "import signal\nprint('up', flush=True)\nsignal.pause()")
    assert child.stdout is not None
    child.stdout.read(3)

    async def main() -> None:
        waiting = asyncio.create_task(run.wait_removed())
        await asyncio.sleep(0)
        assert not waiting.done()
        run.kill()
        await asyncio.get_running_loop().run_in_executor(None, child.wait)
        await asyncio.wait_for(waiting, 60)

    loop_kind(main())
    assert not any(os.path.exists(path) for path in run.dirs.values())


def test_leftovers_with_live_processes_are_killed_and_removed(cgroups: Cgroups, start: Start) -> None:
    runs = [cgroups.create(f"left-{number}", Limits(cpuset="0")) for number in range(3)]
    children = [start(run, TREE) for run in runs]
    for child in children:
        assert child.stdout is not None
        child.stdout.read(1)
    directories = {path for run in runs for path in run.dirs.values()}
    present = [path for path in cgroups.instance_dirs if os.path.exists(path)]
    assert remove_leftovers(cgroups.instance_dirs) == len(directories) + len(present)
    assert [child.wait() for child in children] == [-9, -9, -9]
    assert not any(os.path.exists(path) for path in [*directories, *present])
    assert remove_leftovers(cgroups.instance_dirs) == 0


def test_many_runs_leave_nothing(cgroups: Cgroups) -> None:
    names = [set(os.listdir(path)) for path in cgroups.instance_dirs if os.path.exists(path)]
    for number in range(100):
        run = cgroups.create(f"run-{number}", Limits(cpus=1.0))
        run.figures()
        assert run.remove()
    assert [set(os.listdir(path)) for path in cgroups.instance_dirs if os.path.exists(path)] == names
