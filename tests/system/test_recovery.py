"""A supervisor killed by SIGKILL leaves no process, and the next start removes what else is left and says so."""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import subprocess
import time
from pathlib import Path

import pytest

from system.commands import MARK, SOAK, Place, finish, killed_at_the_end, marked, our_cgroups, wait_until

pytestmark = pytest.mark.privileged

SMALL = 'limits = { memory = "16MiB", pids = 16, disk = "1MiB" }'
# Five processes: two in another session, all deaf to what can be ignored.
STUBBORN = (
    "trap '' TERM HUP INT QUIT; (sleep 1000 & exec sleep 1000) & setsid sh -c 'sleep 1000 & wait' & exec sleep 1000"
)
PROCESSES = 5
QUICK = '[jobs.quick]\ncommand = ["true"]\n'


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def mark() -> str:
    return secrets.token_hex(8)


def stubborn(mark: str, count: int, name: str = "stubborn") -> str:
    shell = STUBBORN.replace('"', '\\"')
    return f'[jobs.{name}]\nshell = "{shell}"\ncount = {count}\nenv = {{ {MARK} = "{mark}" }}\n{SMALL}\n'


def all_running(mark: str, count: int) -> bool:
    return len(marked(mark)) >= PROCESSES * count


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert finish(process).status == -signal.SIGKILL


def removed(stderr: str) -> list[int]:
    """How many cgroups each killed supervisor had left, as a start tells it."""
    told = re.findall(r"removed what supervisor \w{26} \(pid \d+\) left when it was killed: (\d+) cgroups", stderr)
    return [int(number) for number in told]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_no_process_of_fifty_jobs_survives_a_killed_supervisor_and_the_next_start_cleans_up(
    loop: str, place: Place, mark: str
) -> None:
    before = our_cgroups()
    place.environment["DIYC_EVENT_LOOP"] = loop
    place.write(stubborn(mark, 50), "max_parallel = 50")
    with killed_at_the_end(place.start("-q")) as supervisor:
        wait_until(lambda: all_running(mark, 50), "50 jobs with all their processes")
        kill(supervisor)
    wait_until(lambda: not marked(mark), "the death of all processes", 10)
    left = our_cgroups() - before
    assert len(left) >= 50
    place.write(QUICK)
    done = place.supervise("--json")
    assert done.status == 0
    (count,) = removed(done.stderr)
    assert count >= 50
    assert our_cgroups() == before
    again = place.supervise("--json")
    assert removed(again.stderr) == []


def test_cleanup_removes_what_a_killed_supervisor_left(place: Place, mark: str) -> None:
    before = our_cgroups()
    place.write(stubborn(mark, 5))
    with killed_at_the_end(place.start("-q")) as supervisor:
        wait_until(lambda: all_running(mark, 5), "5 jobs")
        pid = supervisor.pid
        kill(supervisor)
    wait_until(lambda: not marked(mark), "the death of all processes", 10)
    assert our_cgroups() != before
    done = place.diyc("cleanup", "--runtime-dir", f"{place.root}/run")
    assert done.status == 0, done.stderr
    assert re.match(rf"removed \d+ cgroups and \d+ directories of supervisor \w{{26}} \(pid {pid}\)\n", done.stdout)
    assert our_cgroups() == before
    assert place.diyc("cleanup", "--runtime-dir", f"{place.root}/run").stdout == "nothing was left behind\n"
    assert [path.name for path in (place.root / "run").iterdir() if path.is_dir()] == ["instances"]


def test_a_killed_supervisors_processes_in_other_cgroups_die_too(place: Place, mark: str) -> None:
    """With every defence of the PID namespace in place the kernel does it; nothing depends on the next start."""
    place.write(stubborn(mark, 3))
    with killed_at_the_end(place.start("-q")) as supervisor:
        wait_until(lambda: all_running(mark, 3), "3 jobs")
        os.kill(supervisor.pid, signal.SIGSTOP)  # it cannot help them any more
        kill(supervisor)
    wait_until(lambda: not marked(mark), "the death of all processes", 10)
    place.write(QUICK)
    assert place.supervise("-q").status == 0


def test_a_running_supervisor_is_not_touched_by_the_start_of_another(place: Place, mark: str) -> None:
    gate = place.root / "gate"
    gate.mkdir()
    shell = "until [ -e /gate/open ]; do sleep 0.05; done"
    mounts = f'mounts = [{{ type = "bind", source = "{gate}", target = "/gate", read_only = true }}]'
    place.write(f'[jobs.long]\nshell = "{shell}"\ncount = 5\nenv = {{ {MARK} = "{mark}" }}\n{SMALL}\n{mounts}\n')
    with killed_at_the_end(place.start("--json")) as first:
        wait_until(lambda: len(marked(mark)) >= 5, "5 jobs")
        mine = our_cgroups()
        place.write(QUICK)
        second = place.supervise("--json")
        assert (second.status, removed(second.stderr)) == (0, [])
        cleanup = place.diyc("cleanup", "--runtime-dir", f"{place.root}/run")
        assert cleanup.stdout == "nothing was left behind\n"
        assert mine <= our_cgroups()
        (gate / "open").touch()
        done = finish(first)
    assert done.status == 0, done.stderr
    assert [result["verdict"] for result in done.results] == ["ok"] * 5


def test_what_several_killed_supervisors_left_is_removed_while_a_living_one_goes_on(place: Place, mark: str) -> None:
    before = our_cgroups()
    marks = [f"{mark}-{number}" for number in range(3)]
    supervisors = []
    try:
        for one in marks:
            place.write(stubborn(one, 2))
            supervisors.append(place.start("--json"))
            wait_until(lambda one=one: all_running(one, 2), "2 jobs")  # type: ignore[misc]
        for supervisor in supervisors[:2]:
            kill(supervisor)
        place.write(QUICK)
        assert len(removed(place.supervise("--json").stderr)) == 2
        assert len(marked(marks[2])) == 2 * PROCESSES
        supervisors[2].send_signal(signal.SIGTERM)
        assert finish(supervisors[2]).status == 128 + signal.SIGTERM
    finally:
        for supervisor in supervisors:
            with killed_at_the_end(supervisor):
                pass
    assert our_cgroups() == before


def test_a_supervisor_killed_at_any_moment_leaves_no_process_and_the_next_start_cleans_up(
    place: Place, mark: str
) -> None:
    """A child between two changes of its credentials must notice a parent that is dying and not yet dead."""
    before = our_cgroups()
    chance = random.Random(20)
    place.environment[MARK] = mark  # the supervisor's children before execve have its environment
    jobs = f'[jobs.many]\nshell = "sleep 1000 & wait"\ncount = 3000\nenv = {{ {MARK} = "{mark}" }}\n{SMALL}\n'
    place.write(jobs, "max_parallel = 400")
    for attempt in range(300 if SOAK else 20):
        with killed_at_the_end(place.start("-v")) as supervisor:
            assert supervisor.stderr is not None
            for line in supervisor.stderr:
                if line.startswith("start"):
                    break
            time.sleep(chance.uniform(0, 0.08))
            supervisor.kill()
            supervisor.wait()
        wait_until(lambda: not marked(mark), f"the death of all processes (attempt {attempt})", 10)
    place.write(QUICK)
    done = place.supervise("--json")
    assert done.status == 0, done.stderr
    assert our_cgroups() == before


def test_a_supervisor_killed_while_it_starts_leaves_nothing_that_the_next_cannot_remove(
    place: Place, mark: str
) -> None:
    before = our_cgroups()
    chance = random.Random(7)
    place.environment[MARK] = mark
    place.write(f"[jobs.short]\ncommand = ['true']\ncount = 50\n{SMALL}\n")
    run = place.root / "run"
    for _ in range(8):
        with killed_at_the_end(place.start()) as supervisor:
            wait_until(lambda: run.is_dir() or supervisor.poll() is not None, "its first step")
            time.sleep(chance.uniform(0, 0.03))
        wait_until(lambda: not marked(mark), "the death of all processes", 10)
    place.write(QUICK)
    assert place.supervise("--json").status == 0
    assert our_cgroups() == before
