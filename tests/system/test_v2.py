"""What cgroup v2 alone has: one tree, entered by clone itself, whose inner cgroups are empty, and its own evidence."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diyc.cgroups import CgroupHost, Cgroups, RunCgroup, detect, open_cgroups, remove_leftovers
from diyc.jobs import Limits
from leakcheck import own_cgroups
from system.helpers import MIB, Facts, Jobs, Live, on_uvloop, start

pytestmark = pytest.mark.privileged


@pytest.fixture
def host() -> CgroupHost:
    host = detect()
    if host.layout != "v2":
        pytest.skip(f"the cgroup layout is {host.layout}: controllers are v1's, or split between both")
    return host


@pytest.fixture
def cgroups(host: CgroupHost) -> Iterator[Cgroups]:
    opened = open_cgroups(host, parent="diyc-test", instance=f"v2-{os.getpid()}")
    opened.prepare()
    yield opened
    remove_leftovers(opened.instance_dirs)
    opened.close()


@pytest.fixture
def root(host: CgroupHost) -> Path:
    """The delegated root."""
    (found,) = own_cgroups(Path("/proc/self"))
    assert host.unified is not None
    assert host.unified.directory.rstrip("/") == str(found)
    return found


def words(path: Path) -> set[str]:
    return set(path.read_text().split())


def levels(top: Path, bottom: Path) -> list[Path]:
    """Every directory from the delegated root to `bottom`."""
    return [place for place in [bottom, *bottom.parents] if place.is_relative_to(top)][::-1]


def removed(run: RunCgroup) -> None:
    asyncio.run(asyncio.wait_for(run.wait_removed(), 60))


@pytest.mark.smoke
@pytest.mark.feature("cgroup v2: controllers handed down")
def test_controllers_are_handed_down_from_the_delegated_root(cgroups: Cgroups, root: Path) -> None:
    (instance,) = cgroups.instance_dirs
    wanted = {"cpu", "memory", "pids"} & words(root / "cgroup.controllers")
    assert wanted == {"cpu", "memory", "pids"}
    for level in levels(root, Path(instance)):
        assert wanted <= words(level / "cgroup.controllers")
        assert wanted <= words(level / "cgroup.subtree_control")


@pytest.mark.smoke
@pytest.mark.feature("cgroup v2: no internal processes")
def test_no_cgroup_with_controllers_for_children_has_processes(jobs: Jobs, root: Path) -> None:
    def look(run: Live) -> dict[Path, set[str]]:
        leaf = run.cgroup_file("cgroup.procs").parent
        assert words(leaf / "cgroup.procs")
        return {level: words(level / "cgroup.procs") for level in levels(root, leaf.parent) if has_parent(level)}

    assert all(not processes for processes in while_waiting(jobs, look).values())


def has_parent(level: Path) -> bool:
    """The top of the hierarchy alone may hold both: it has no cgroup.events."""
    return (level / "cgroup.events").exists()


def while_waiting(jobs: Jobs, look: object, **limits: object) -> dict[Path, set[str]]:
    async def main() -> dict[Path, set[str]]:
        async with jobs.supervisor() as supervisor:
            run = await start(supervisor, jobs.probe("wait", limits=limits))
            seen: dict[Path, set[str]] = look(run)  # type: ignore[operator]
            await run.end()
            return seen

    return on_uvloop(main())


@pytest.mark.smoke
@pytest.mark.feature("cgroup v2: CLONE_INTO_CGROUP")
def test_a_run_is_in_its_cgroup_from_its_first_instruction(cgroups: Cgroups) -> None:
    """Nothing is left to join: the directory that clone3 takes is the only way in, for every controller."""
    run = cgroups.create("into", Limits(memory=32 * MIB, pids=4))
    assert run.into_fd is not None
    assert os.path.samestat(os.fstat(run.into_fd), os.stat(run.dirs["memory"]))
    assert run.join_fds == ()
    assert len(set(run.dirs.values())) == 1
    removed(run)


@pytest.mark.smoke
@pytest.mark.feature("cgroup v2: cgroup.kill")
def test_a_kill_is_one_write_and_reaches_what_is_frozen(cgroups: Cgroups, host: CgroupHost) -> None:
    """Signals one by one would find a frozen process too, but not one that it forks meanwhile: cgroup.kill it is."""
    run = cgroups.create("frozen", Limits())
    directory = Path(run.dirs["pids"])
    assert (directory / "cgroup.kill").exists()
    with subprocess.Popen(["sleep", "1000"]) as child:
        (directory / "cgroup.procs").write_text(str(child.pid))
        (directory / "cgroup.freeze").write_text("1")
        run.kill()
        assert child.wait(30) == -9
    removed(run)


@pytest.mark.smoke
@pytest.mark.feature("OOM verdict from the kernel's count")
def test_memory_events_are_the_evidence_of_an_oom_kill(cgroups: Cgroups, host: CgroupHost) -> None:
    run = cgroups.create("events", Limits(memory=16 * MIB, swap=0))
    directory = Path(run.dirs["memory"])
    script = f"echo $$ >{directory}/cgroup.procs; tail /dev/zero; exit 0"
    subprocess.run(["sh", "-c", script], check=True, timeout=60, stderr=subprocess.DEVNULL)
    events = dict(line.split() for line in (directory / "memory.events").read_text().splitlines())
    figures = run.figures()
    removed(run)
    assert figures.oom_kills == int(events["oom_kill"]) == 1
    assert figures.memory_limit_hits == int(events["max"]) > 0


@pytest.mark.smoke
@pytest.mark.feature("pressure (PSI)")
def test_pressure_is_told_for_each_resource(jobs: Jobs, host: CgroupHost) -> None:
    """Half a CPU for a loop that wants a whole one is pressure on the CPU and on nothing else."""
    result = jobs.run(jobs.probe("burn", "1", limits={"cpus": 0.5}))
    assert Facts.of(result)
    assert result.pressure_s is not None
    assert set(result.pressure_s) == {"cpu", "memory", "io"}
    assert result.pressure_s["cpu"] > 0.1
