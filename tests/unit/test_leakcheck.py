"""The leak check finds what is leaked: each kind of object is leaked on purpose, found by name, and put away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from leakcheck import Snapshot, leaks, own_cgroups, settled_leaks, snapshot

TESTS = Path(__file__).resolve().parents[1]


def leaked_by(action: Callable[[], object], *places: Path) -> list[str]:
    before = snapshot(places)
    action()
    return leaks(before, snapshot(places))


def test_nothing_leaked_is_nothing_found() -> None:
    before = snapshot()
    assert settled_leaks(before, snapshot, patience=1.0) == []


def test_leaked_descriptor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept-open"
    path.touch()
    opened: list[int] = []
    try:
        found = leaked_by(lambda: opened.append(os.open(path, os.O_RDONLY)))
        assert f"descriptor: {path}" in found
    finally:
        os.close(opened[0])


def test_second_descriptor_of_the_same_file_is_a_leak(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as first:
        copies: list[int] = []
        try:
            assert f"descriptor: {tmp_path / 'x'}" in leaked_by(lambda: copies.append(os.dup(first.fileno())))
        finally:
            os.close(copies[0])


def test_running_child_is_named() -> None:
    started: list[subprocess.Popen[bytes]] = []
    try:
        found = leaked_by(lambda: started.append(subprocess.Popen(["sleep", "60"])))
        assert f"child: {started[0].pid} (sleep)" in found
    finally:
        started[0].kill()
        started[0].wait()


def test_child_that_nobody_waited_for_is_a_leak() -> None:
    pid = 0

    def leave_zombie() -> None:
        nonlocal pid
        pid = os.posix_spawn("/bin/true", ["true"], {})
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    try:
        assert any(line.startswith(f"child: {pid} ") for line in leaked_by(leave_zombie))
    finally:
        os.waitpid(pid, 0)


def test_leaked_file_of_a_run_is_named_and_a_kept_image_is_not(tmp_path: Path) -> None:
    def fill() -> None:
        for name in ("runs/01J/stdout", "images/sha256/x", "instances/01K.json"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()

    leaked = ("instances/01K.json", "runs", "runs/01J", "runs/01J/stdout")
    found = [line for line in leaked_by(fill, tmp_path) if line.startswith("file: ")]
    assert found == [f"file: {tmp_path / name}" for name in leaked]


def test_leaked_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "class/net/lo").mkdir(parents=True)
    before = snapshot(sys=tmp_path)
    (tmp_path / "class/net/veth0").mkdir()
    assert "link: veth0" in leaks(before, snapshot(sys=tmp_path))


def test_what_the_kernel_cleans_up_a_moment_later_is_no_leak(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    before = snapshot([tmp_path])
    (tmp_path / "run/socket").touch()
    looks = 0

    def look() -> Snapshot:
        nonlocal looks
        looks += 1
        if looks == 3:
            (tmp_path / "run/socket").unlink()
        return snapshot([tmp_path])

    assert settled_leaks(before, look, patience=5.0) == []
    assert looks == 3


@pytest.mark.privileged
def test_leaked_mount_is_named(tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    try:
        found = leaked_by(lambda: subprocess.run(["mount", "-t", "tmpfs", "leak", str(point)], check=True))
        assert [line for line in found if line.startswith("mount: ") and line.endswith(f" {point} (tmpfs)")]
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.privileged
def test_leaked_cgroup_is_named_in_each_hierarchy() -> None:
    hierarchies = own_cgroups(Path("/proc/self"))
    assert hierarchies
    for hierarchy in hierarchies:
        leaked = hierarchy / "diyc-leak-check"
        try:
            assert f"cgroup: {leaked}" in leaked_by(leaked.mkdir)
        finally:
            leaked.rmdir()


@pytest.mark.privileged
def test_leaked_network_namespace_is_named() -> None:
    started: list[subprocess.Popen[str]] = []

    def start() -> None:
        command = ["unshare", "--net", "sh", "-c", "readlink /proc/self/ns/net; exec sleep 60"]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        names.append(started[0].stdout.readline().strip())  # type: ignore[union-attr]

    names: list[str] = []
    try:
        found = leaked_by(start)
        assert f"network namespace: {names[0]}" in found
    finally:
        started[0].kill()
        started[0].communicate()


@pytest.mark.privileged
def test_fixture_fails_a_test_that_leaks_and_says_what(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.privileged\n"
        "def test_leaks():\n"
        f"    os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
        "def test_may_leak_without_the_mark():\n"
        f"    os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
    )
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "2 passed, 1 error" in run.stdout, run.stdout + run.stderr
    assert "left behind by this test:\n" in run.stdout
    assert f"\n  descriptor: {tmp_path}\n" in run.stdout
