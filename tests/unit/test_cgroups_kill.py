"""Killing what a cgroup.procs file lists, removing leftovers, and waiting for an end: real children, no root."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from diyc.cgroups import EmptyWatch, remove_leftovers
from diyc.cgroups.files import Files
from diyc.cgroups.kill import kill_listed
from diyc.errors import CgroupError

if TYPE_CHECKING:
    from conftest import LoopKind


def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


child = pytest.fixture(sleeper, name="child")
second = pytest.fixture(sleeper, name="second")


class Tree(Files):
    """Cgroup directories of plain files; a directory is free once the processes it lists have ended."""

    def __init__(self, *children: subprocess.Popen[bytes]) -> None:
        self.children = {process.pid: process for process in children}

    def add(self, directory: Path, *pids: int) -> str:
        directory.mkdir(parents=True)
        (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        return str(directory)

    def rmdir(self, path: str, dir_fd: int | None = None) -> None:
        assert dir_fd is None
        listed = [int(pid) for pid in (Path(path) / "cgroup.procs").read_text().split()]
        if any(pid not in self.children or self.children[pid].poll() is None for pid in listed):
            raise OSError(errno.EBUSY, "Device or resource busy")
        (Path(path) / "cgroup.procs").unlink()
        os.rmdir(path)


def test_every_listed_process_is_killed(child: subprocess.Popen[bytes]) -> None:
    kill_listed("/x", lambda: {child.pid})
    assert child.wait(30) == -signal.SIGKILL


def test_processes_forked_meanwhile_are_killed_too(
    child: subprocess.Popen[bytes], second: subprocess.Popen[bytes]
) -> None:
    rounds = iter([{child.pid}, {child.pid}, {child.pid, second.pid}, {child.pid, second.pid}])
    kill_listed("/x", lambda: next(rounds, set()))
    assert second.wait(30) == -signal.SIGKILL


def test_a_pid_that_left_the_list_since_is_not_killed(child: subprocess.Popen[bytes]) -> None:
    rounds = iter([{child.pid}])  # by the second look the pid is another process's
    kill_listed("/x", lambda: next(rounds, set()))
    assert child.poll() is None


def test_ended_processes_and_those_of_other_namespaces_are_passed_over() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    kill_listed("/x", lambda: {process.pid, 0})


def test_killing_gives_up_in_the_end() -> None:
    counter = iter(range(2**22 + 1, 2**22 + 10**6))  # always another one, above the highest pid there can be
    with pytest.raises(CgroupError, match="cannot kill all processes of /x"):
        kill_listed("/x", lambda: {next(counter)})


def test_leftovers_are_killed_and_removed_bottom_up(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    tree = Tree(child)
    one = tree.add(tmp_path / "one")
    tree.add(tmp_path / "one/run", child.pid)
    tree.add(tmp_path / "one/run/inner")
    two = tree.add(tmp_path / "two")
    assert remove_leftovers([one, two, str(tmp_path / "gone")], files=tree) == 4
    assert child.wait(30) == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_no_cgroup_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "home/files").mkdir(parents=True)
    with pytest.raises(CgroupError, match="home: it is not a cgroup"):
        remove_leftovers([str(tmp_path / "home")], patience=0, files=Tree())
    assert (tmp_path / "home/files").exists()


def test_a_tree_with_this_process_in_it_is_left_alone(tmp_path: Path) -> None:
    tree = Tree()
    path = tree.add(tmp_path / "one", os.getpid())
    with pytest.raises(CgroupError, match="this very process is in it"):
        remove_leftovers([path], patience=0, files=tree)
    assert os.path.isdir(path)


def test_one_that_stays_busy_is_named_after_the_others_are_gone(tmp_path: Path) -> None:
    tree = Tree()
    stuck = tree.add(tmp_path / "stuck", 2**22 + 1)
    free = tree.add(tmp_path / "free")
    with pytest.raises(CgroupError, match=r"cannot remove .*/stuck: Device or resource busy"):
        remove_leftovers([stuck, free], patience=0, files=tree)
    assert os.listdir(tmp_path) == ["stuck"]


def test_a_watch_wakes_the_loop_when_a_process_ends(loop_kind: LoopKind, child: subprocess.Popen[bytes]) -> None:
    async def main() -> None:
        watch = EmptyWatch.of_processes({child.pid})
        assert watch is not None
        with watch:
            waiting = asyncio.create_task(watch.wait())
            await asyncio.sleep(0)
            assert not waiting.done()
            child.kill()
            await asyncio.wait_for(waiting, 30)

    def pidfds() -> list[str]:
        fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]  # one of them is listdir's own
        return [fd for fd in fds if os.path.exists(fd) and "pidfd" in os.readlink(fd)]

    loop_kind(main())
    assert pidfds() == []


def test_there_is_nothing_to_watch_once_all_processes_are_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert EmptyWatch.of_processes({process.pid}) is None


def test_there_is_nothing_to_watch_in_an_empty_cgroup(tmp_path: Path) -> None:
    (tmp_path / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    before = os.listdir("/proc/self/fd")
    assert EmptyWatch.of_events(str(tmp_path / "cgroup.events")) is None
    assert os.listdir("/proc/self/fd") == before


def test_a_tree_that_is_no_cgroup_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "plain/a/b").mkdir(parents=True)
    with pytest.raises(CgroupError, match="not a cgroup"):
        remove_leftovers([str(tmp_path / "plain")])
    assert (tmp_path / "plain/a/b").is_dir()
