"""The device policy of a run's cgroup: root itself, put in there, reaches no other node than a job's /dev has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diyc import process
from diyc.cgroups import CgroupHost, Cgroups, RunCgroup, detect, open_cgroups, remove_leftovers
from diyc.cgroups.devices import v2_program
from diyc.errors import HostError
from diyc.jobs import Limits
from system.helpers import PATIENCE, Jobs, on_uvloop, start

pytestmark = pytest.mark.privileged

FULL, KMSG = os.makedev(1, 7), os.makedev(1, 11)  # reading the kernel's log does no harm
LOOP = os.makedev(7, 0)  # made, never opened
PROGRAM = """
import os, sys
def tried(call):
    try:
        return call() is not None or "yes"
    except OSError as error:
        return error.strerror
for name in sys.argv[2:]:
    print(name, tried(lambda: os.close(os.open(f"{sys.argv[1]}/{name}", os.O_RDONLY | os.O_NONBLOCK))))
for name, mode, number in (("full", 0o20600, (1, 7)), ("kmsg", 0o20600, (1, 11)), ("loop0", 0o60600, (7, 0))):
    print("mknod", name, tried(lambda: os.mknod(f"{sys.argv[1]}/{name}.new", mode, os.makedev(*number))))
    if os.path.exists(f"{sys.argv[1]}/{name}.new"):
        os.unlink(f"{sys.argv[1]}/{name}.new")
"""
EVERYTHING = "full yes\nkmsg yes\nmknod full yes\nmknod kmsg yes\nmknod loop0 yes\n"
NO = os.strerror(1)
THE_USUAL = f"full yes\nkmsg {NO}\nmknod full yes\nmknod kmsg {NO}\nmknod loop0 {NO}\n"


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """A directory with an allowed and another node."""
    made = tmp_path / "nodes"
    made.mkdir()
    for name, number in (("full", FULL), ("kmsg", KMSG)):
        os.mknod(made / name, stat.S_IFCHR | 0o600, number)
    if os.statvfs(made).f_flag & os.ST_NODEV:
        pytest.skip(f"{made} is on a nodev mount: set TMPDIR to another")
    return made


def seen(nodes: Path, files: list[str]) -> str:
    """What root sees from inside the cgroups that these files (`tasks`, `cgroup.procs`) belong to."""

    def join() -> None:
        for file in files:
            with open(file, "wb", buffering=0) as opened:
                opened.write(b"0")

    command = [sys.executable, "-S", "-E", "-c", PROGRAM, str(nodes), "full", "kmsg"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, preexec_fn=join).stdout


def v1_only(scratch: Path) -> CgroupHost:
    """This host without its v2 mount: as another one would be found."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
    fake = scratch / "mountinfo"
    fake.write_text("".join(line for line in mounts if " - cgroup2 " not in line))
    return detect(str(fake))


@contextlib.contextmanager
def opened(host: CgroupHost, name: str = "one") -> Iterator[Cgroups]:
    made = open_cgroups(host, parent="diyc-test", instance=f"devices-{name}-{os.getpid()}")
    try:
        made.prepare()
    except HostError as error:
        pytest.skip(f"needs a cgroup subtree of its own: {error}")
    try:
        yield made
    finally:
        remove_leftovers(made.instance_dirs)
        made.close()


@contextlib.contextmanager
def run_of(cgroups: Cgroups) -> Iterator[RunCgroup]:
    run = cgroups.create("run", Limits())
    yield run
    assert run.remove()


def join_files(run: RunCgroup) -> list[str]:
    return [f"{path}/cgroup.procs" for path in set(run.dirs.values())]


@pytest.mark.parametrize("layout", ["this", "v1"])
def test_root_in_a_runs_cgroup_reaches_the_usual_devices_only(layout: str, nodes: Path) -> None:
    host = detect()
    if layout == "v1":
        if host.layout == "v2":
            pytest.skip("needs cgroup v1")
        host = v1_only(nodes)
        if "devices" not in host.controllers:
            pytest.skip("needs the cgroup v1 controller devices")
        assert host.layout == "v1"
    with opened(host, "without") as cgroups, run_of(cgroups) as run:
        assert seen(nodes, join_files(run)) == EVERYTHING  # the control
    with opened(host, "with") as cgroups:
        cgroups.limit_devices(process.limit_devices)
        with run_of(cgroups) as run:
            assert seen(nodes, join_files(run)) == THE_USUAL
        assert seen(nodes, []) == EVERYTHING  # outside of it nothing has changed


def test_a_supervisor_inside_a_run_can_have_a_policy_too(nodes: Path) -> None:
    with opened(detect()) as cgroups:
        if cgroups.layout == "v1":
            pytest.skip("needs a cgroup v2 mount")
        cgroups.limit_devices(process.limit_devices)
        with run_of(cgroups) as run:
            assert run.into_fd is not None
            process.limit_devices(v2_program(), run.into_fd)
            assert seen(nodes, join_files(run)) == THE_USUAL


def test_a_supervisors_runs_have_the_policy(jobs: Jobs, nodes: Path) -> None:
    async def main() -> str:
        async with asyncio.timeout(2 * PATIENCE), jobs.supervisor() as supervisor:
            run = await start(supervisor, jobs.probe("wait"))
            places = [Path(parent, run.run_id) for parent in run.supervisor.cgroups.instance_dirs]
            files = [str(place / "cgroup.procs") for place in places if place.exists()]
            found = await asyncio.get_running_loop().run_in_executor(None, seen, nodes, files)
            await run.end()
            return found

    assert on_uvloop(main()) == THE_USUAL


def test_a_refused_program_names_the_policy_and_what_to_do() -> None:
    def refuse(program: bytes, cgroup: int) -> None:
        raise PermissionError(1, "load a BPF program for devices")

    with opened(detect()) as cgroups:
        if cgroups.layout == "v1":
            pytest.skip("needs a cgroup v2 mount")
        with pytest.raises(
            HostError, match=r"device policy: cannot load a BPF .* not permitted; .*best-effort"
        ) as caught:
            cgroups.limit_devices(refuse)
        assert caught.value.feature == "device policy"
