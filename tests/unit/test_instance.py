"""A supervisor's mark on the host: a killed one's objects are found and removed, a living one's never touched."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from diyc.errors import CgroupError, HostError
from diyc.instance import Instance

KILLED = """
import os, signal, sys
from diyc.instance import Instance
instance = Instance(sys.argv[1], sys.argv[2])
instance.record(cgroups=["/cg/one", "/cg/two"], paths=sys.argv[3:])
os.kill(os.getpid(), signal.SIGKILL)
"""


class Remover:
    """Stands in for the cgroups package: notes what it is asked to remove."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self._error = error

    def __call__(self, paths: Iterable[str]) -> int:
        if self._error is not None:
            raise self._error
        found = list(paths)
        self.asked += found
        return len(found)


def leave(runtime: Path, name: str, *paths: Path) -> int:
    """A supervisor that was killed; its pid."""
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(runtime), name, *map(str, paths)])
    assert run.wait() == -9
    return run.pid


def test_what_a_killed_supervisor_left_is_removed_and_told(tmp_path: Path) -> None:
    scratch = tmp_path / "run/scratch"
    (scratch / "below").mkdir(parents=True)
    (scratch / "below/file").write_text("x")
    pid = leave(tmp_path / "run", "killed", scratch, tmp_path / "run/gone-already")
    remover = Remover()
    instance = Instance(str(tmp_path / "run"), "next")
    (left,) = instance.recover(remover)
    assert (left.instance, left.pid, left.cgroups, left.paths) == ("killed", pid, 2, 1)
    assert remover.asked == ["/cg/one", "/cg/two"]
    assert not scratch.exists()
    assert instance.recover(remover) == []
    instance.close()
    assert list((tmp_path / "run/instances").iterdir()) == []


@pytest.mark.parametrize("text", ["[]", '{"pid": "x"}', '{"pid": 1, "cgroups": 5, "paths": []}', "{"])
def test_a_file_that_is_no_record_is_named_and_kept(text: str, tmp_path: Path) -> None:
    instance = Instance(str(tmp_path / "run"), "next")
    odd = tmp_path / "run/instances/odd.json"
    odd.write_text(text)
    assert instance.recover(Remover()) == []
    assert [str(odd) in line for line in instance.unreadable] == [True]
    assert odd.exists()
    instance.close()


def test_a_record_removes_nothing_outside_runtime_dir(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    leave(tmp_path / "run", "forged", victim)
    instance = Instance(str(tmp_path / "run"), "next")
    assert instance.recover(Remover()) == []
    assert victim.exists()
    instance.close()


def test_a_living_supervisor_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    living = Instance(str(tmp_path / "run"), "living")
    living.record(cgroups=["/cg/living"], paths=[str(kept)])
    other = Instance(str(tmp_path / "run"), "other")
    remover = Remover()
    assert other.recover(remover) == []
    assert remover.asked == []
    assert kept.exists()
    assert (tmp_path / "run/instances/living.json").exists()
    other.close()
    living.close()


def test_a_shorter_record_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    instance = Instance(str(tmp_path / "run"), "one")
    instance.record(cgroups=[f"/cg/{n}" for n in range(100)], paths=[])
    instance.record(cgroups=["/cg/x"], paths=["/p"])
    entry = json.loads((tmp_path / "run/instances/one.json").read_text())
    assert entry == {"pid": os.getpid(), "cgroups": ["/cg/x"], "paths": ["/p"]}
    instance.close()


def test_a_supervisor_killed_before_it_wrote_anything_is_forgotten(tmp_path: Path) -> None:
    instance = Instance(str(tmp_path / "run"), "next")
    empty = tmp_path / "run/instances/early.json"
    empty.touch()
    assert [left.instance for left in instance.recover(Remover())] == ["early"]
    assert not empty.exists()
    instance.close()


def test_a_record_cut_short_does_not_stop_the_next_supervisor(tmp_path: Path) -> None:
    """Killed between write and truncation, or the machine lost power: one bad file must not lock everybody out."""
    instance = Instance(str(tmp_path / "run"), "next")
    (tmp_path / "run/instances/torn.json").write_text('{"pid": 12, "cgro')
    leave(tmp_path / "run", "whole")
    assert "whole" in [left.instance for left in instance.recover(Remover())]
    instance.close()


def test_a_supervisor_that_is_just_starting_is_not_taken_for_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one recovers between the making of the file and its lock: the record must not be lost."""
    other = Instance(str(tmp_path / "run"), "other")
    lock = fcntl.flock

    def meanwhile(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        other.recover(Remover())
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    starting = Instance(str(tmp_path / "run"), "starting")
    assert json.loads((tmp_path / "run/instances/starting.json").read_text())["pid"] == os.getpid()
    starting.close()
    other.close()


def test_a_record_stays_when_its_cgroups_cannot_be_removed(tmp_path: Path) -> None:
    leave(tmp_path / "run", "killed")
    instance = Instance(str(tmp_path / "run"), "next")
    stuck = Remover(CgroupError("remove", "/cg/one", OSError(16, "Device or resource busy")))
    with pytest.raises(CgroupError, match="/cg/one"):
        instance.recover(stuck)
    assert (tmp_path / "run/instances/killed.json").exists()
    assert [left.instance for left in instance.recover(Remover())] == ["killed"]
    instance.close()


def test_recovery_leaks_no_descriptor(tmp_path: Path) -> None:
    instance = Instance(str(tmp_path / "run"), "next")
    living = Instance(str(tmp_path / "run"), "living")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        leave(tmp_path / "run", f"killed{number}")
        instance.recover(Remover())
    assert len(os.listdir("/proc/self/fd")) == before
    living.close()
    instance.close()


def test_a_runtime_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=f"runtime_dir: cannot write {tmp_path}/file/run/instances: Not a directory"):
        Instance(str(tmp_path / "file/run"), "one")


def test_the_record_is_for_its_owner_alone(tmp_path: Path) -> None:
    instance = Instance(str(tmp_path / "run"), "one")
    assert (tmp_path / "run/instances").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run/instances/one.json").stat().st_mode & 0o777 == 0o600
    instance.close()
