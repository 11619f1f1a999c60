"""Which layout this is and which subtree is ours, from mountinfo, /proc/self/cgroup and a tree of plain files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diyc.cgroups import CgroupHost, detect, needs_systemd_scope
from diyc.errors import HostError

V1 = ["memory", "pids", "cpu,cpuacct", "cpuset", "blkio", "freezer"]


class Host:
    """A fake /proc and /sys/fs/cgroup below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounts: list[str] = ["23 1 254:0 / / rw - ext4 /dev/root rw"]
        self.own: list[str] = []

    def mount(self, point: str, kind: str, options: str, top: str = "/", flags: str = "rw") -> Path:
        number = 30 + len(self.mounts)
        self.mounts.append(f"{number} 23 0:{number} {top} {point} {flags},relatime - {kind} {kind} {options}")
        return self.cgroup(point.replace("\\040", " "))

    def cgroup(self, path: str, **files: str) -> Path:
        """One cgroup directory with the files given (their dots written as __)."""
        directory = self.root / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").touch()
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)
        return directory

    def v1(self, own: str = "/") -> None:
        for number, controllers in enumerate(V1, 1):
            self.mount(f"/sys/fs/cgroup/{controllers}", "cgroup", f"rw,{controllers}")
            self.own.append(f"{number}:{controllers}:{own}")
        self.mount("/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,name=systemd")
        self.own.append(f"9:name=systemd:{own}")

    def v2(self, point: str = "/sys/fs/cgroup", own: str = "/", controllers: str = "cpuset cpu io memory pids") -> Path:
        top = self.mount(point, "cgroup2", "rw,nsdelegate")
        (top / "cgroup.controllers").write_text(controllers)
        self.own.append(f"0::{own}")
        if own == "/":
            return top
        return self.cgroup(point + own, cgroup__controllers=controllers, cgroup__events="populated 1\n")

    def detect(self, is_marked: Callable[[str], bool] = lambda _: False) -> CgroupHost:
        (self.root / "mountinfo").write_text("\n".join(self.mounts) + "\n")
        (self.root / "cgroup").write_text("\n".join(self.own) + "\n")
        return detect(str(self.root / "mountinfo"), str(self.root / "cgroup"), str(self.root), is_marked)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_v1_finds_each_controller_with_its_own_path(host: Host) -> None:
    host.v1(own="/pod/a b:c")
    found = host.detect()
    assert found.layout == "v1"
    assert found.unified is None
    assert set(found.controllers) == {"memory", "pids", "cpu", "cpuacct", "cpuset", "io"}
    assert found.controllers["cpu"] == found.controllers["cpuacct"]
    place = found.controllers["io"]
    assert (place.version, place.own) == (1, "/pod/a b:c")
    assert place.directory == f"{host.root}/sys/fs/cgroup/blkio/pod/a b:c"


def test_hybrid_takes_a_controller_from_the_v2_mount(host: Host) -> None:
    host.v1()
    host.v2("/sys/fs/cgroup/unified", controllers="hugetlb misc")
    found = host.detect()
    assert found.layout == "hybrid"
    assert found.controllers["hugetlb"] == found.unified
    assert found.controllers["memory"].version == 1
    assert "misc" not in found.controllers


def test_v2_with_systemds_named_v1_hierarchy_is_still_v2(host: Host) -> None:
    host.v2()
    host.mount("/sys/fs/cgroup/systemd", "cgroup", "rw,name=systemd")
    host.own.append("1:name=systemd:/")
    found = host.detect()
    assert found.layout == "v2"
    assert set(found.controllers) == {"cpuset", "cpu", "io", "memory", "pids"}


def test_v2_offers_only_what_reaches_the_delegated_root(host: Host) -> None:
    own = host.v2(own="/user.slice/a.scope")
    (own / "cgroup.controllers").write_text("memory pids\n")
    assert set(host.detect().controllers) == {"memory", "pids"}


def test_no_cgroups_at_all_is_a_host_without_controllers(host: Host) -> None:
    host.own.append("0::/")
    found = host.detect()
    assert (found.controllers, found.unified) == ({}, None)


def test_a_bind_mounted_subtree_is_taken_off_the_own_path(host: Host) -> None:
    host.mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory", top="/docker/1")
    host.own.append("3:memory:/docker/1/job")
    assert host.detect().controllers["memory"].own == "/job"


def test_a_writable_mount_is_preferred(host: Host) -> None:
    host.mount("/ro/memory", "cgroup", "rw,memory", flags="ro")
    host.mount("/rw/memory", "cgroup", "rw,memory")
    host.own.append("3:memory:/")
    place = host.detect().controllers["memory"]
    assert place.directory == f"{host.root}/rw/memory"
    assert not place.read_only


def test_a_read_only_mount_is_noted(host: Host) -> None:
    host.mount("/sys/fs/cgroup/memory", "cgroup", "ro,memory")
    host.own.append("3:memory:/")
    assert host.detect().controllers["memory"].read_only


def test_a_mount_covered_by_another_is_not_used(host: Host) -> None:
    host.v1()
    host.v2("/sys/fs/cgroup/unified")
    (host.root / "sys/fs/cgroup/unified/cgroup.procs").unlink()
    assert host.detect().layout == "v1"


def test_a_mount_point_with_a_space_is_read(host: Host) -> None:
    host.mount("/my\\040groups", "cgroup", "rw,memory")
    host.own.append("3:memory:/")
    assert host.detect().controllers["memory"].directory == f"{host.root}/my groups"


@pytest.mark.parametrize(
    "top,own",
    [("/", "/../sibling"), ("/..", "/"), ("/docker/1", "/docker/2"), ("/docker/1", "/docker/12")],
    ids=["own above namespace", "mount above namespace", "beside", "name with the same start"],
)
def test_an_own_cgroup_outside_of_the_mount_is_a_host_error(host: Host, top: str, own: str) -> None:
    host.mount("/sys/fs/cgroup/memory", "cgroup", "rw,memory", top=top)
    host.own.append(f"3:memory:{own}")
    with pytest.raises(HostError, match=r"the memory hierarchy.*outside"):
        host.detect()


def test_a_missing_proc_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot read .*mountinfo.*is /proc mounted"):
        detect(str(tmp_path / "mountinfo"), str(tmp_path / "cgroup"))


def test_the_delegated_root_is_the_nearest_marked_ancestor(host: Host) -> None:
    host.v2(own="/system.slice/diyc.service/jobs/a")
    service = host.cgroup("/sys/fs/cgroup/system.slice/diyc.service", cgroup__controllers="memory")
    found = host.detect(lambda directory: directory.endswith(("/diyc.service", "/system.slice")))
    assert found.unified is not None
    assert found.unified.directory == str(service)
    assert found.unified.marked
    assert set(found.controllers) == {"memory"}


def test_the_mark_of_a_users_systemd_is_not_for_us(host: Host) -> None:
    own = host.v2(own="/user.slice/user-1000.slice/user@1000.service/app.slice/a.scope")
    place = host.detect(lambda directory: directory.endswith("/user@1000.service")).unified
    assert place is not None
    assert (place.directory, place.marked) == (str(own), False)


def test_without_a_mark_the_delegated_root_is_the_own_cgroup(host: Host) -> None:
    own = host.v2(own="/a.scope")
    place = host.detect().unified
    assert place is not None
    assert (place.directory, place.marked) == (str(own), False)


def test_a_supervisor_in_its_leaf_still_finds_the_root_above(host: Host) -> None:
    host.v2(own="/a.scope/diyc-supervisor")
    own = host.cgroup("/sys/fs/cgroup/a.scope", cgroup__controllers="memory pids")
    place = host.detect().unified
    assert place is not None
    assert place.directory == str(own)


SHELL = 2**22 + 1  # above the highest pid there can be


@pytest.mark.parametrize(
    "own,procs,marked,systemd,needed",
    [
        ("/a.scope", [SHELL, os.getpid()], False, True, True),
        ("/a.scope", [os.getpid()], False, True, False),
        ("/a.scope", [SHELL, os.getpid()], True, True, False),
        ("/a.scope", [SHELL, os.getpid()], False, False, False),
        ("/", [SHELL, os.getpid()], False, True, False),
    ],
    ids=["shared", "alone", "marked", "no systemd", "top of the hierarchy"],
)
def test_a_systemd_scope_is_needed_only_where_others_share_the_cgroup(
    host: Host, own: str, procs: list[int], marked: bool, systemd: bool, needed: bool
) -> None:
    directory = host.v2(own=own)
    (directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in procs))
    if systemd:
        (host.root / "systemd").mkdir()
    found = host.detect(lambda _: marked)
    assert needs_systemd_scope(found, str(host.root / "systemd")) is needed


def test_no_systemd_scope_is_needed_on_a_hybrid_host(host: Host) -> None:
    host.v1()
    directory = host.v2("/sys/fs/cgroup/unified", own="/a.scope")
    (directory / "cgroup.procs").write_text(f"{SHELL}\n")
    assert not needs_systemd_scope(host.detect(), str(host.root))
