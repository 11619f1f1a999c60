"""Limits, figures, delegation and clean-up on each layout, against a tree of plain files that acts like cgroupfs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from diyc.cgroups import CgroupHost, Cgroups, RunCgroup, detect, open_cgroups
from diyc.cgroups.devices import v1_rules, v2_program
from diyc.cgroups.files import Files
from diyc.cgroups.machine import Machine
from diyc.errors import CgroupError, HostError
from diyc.jobs import Limits

MIB = 1024**2
STRANGER = 2**22 + 1  # above the highest pid there can be

# What a new cgroup has, for each v1 controller and for each v2 one ("" is v2 itself).
V1 = {
    "memory": ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"],
    "pids": ["pids.max"],
    "cpu": ["cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us"],
    "cpuacct": [],
    "cpuset": ["cpuset.cpus", "cpuset.mems"],
    "devices": ["devices.deny", "devices.allow"],
    "blkio": [f"blkio.throttle.{way}_{unit}_device" for way in ("read", "write") for unit in ("bps", "iops")],
}
V2 = {
    "": ["cgroup.events", "cgroup.kill", "cgroup.subtree_control", "cpu.stat"],
    "memory": ["memory.max", "memory.swap.max"],
    "pids": ["pids.max"],
    "cpu": ["cpu.max", "cpu.weight"],
    "cpuset": ["cpuset.cpus"],
    "io": ["io.max", "io.bfq.weight", "io.weight"],
    "hugetlb": ["hugetlb.2MB.max"],
}


class Kernel(Files):
    """Fills new directories with files, keeps cgroupfs's rules, notes what is touched, refuses what it is told to."""

    def __init__(self) -> None:
        self.touched: list[str] = []
        self.refuse_at: int | None = None
        self.refuse: dict[str, int] = {}
        self.lacks: set[str] = set()

    def populate(self, directory: Path) -> None:
        above = directory.parent
        if (above / "cgroup.subtree_control").exists():
            enabled = ["", *(above / "cgroup.subtree_control").read_text().split()]
            names = [name for controller in enabled for name in V2[controller]]
        else:
            names = [path.name for path in above.iterdir() if path.is_file()]
        for name in {*names, "cgroup.procs", *(["tasks"] if "cgroup.kill" not in names else [])} - self.lacks:
            (directory / name).write_text("\n" if name.startswith("cpuset.") else "")
        cloned = above / "cgroup.clone_children"
        if cloned.exists() and cloned.read_text() == "1":
            (directory / "cpuset.mems").write_text((above / "cpuset.mems").read_text())

    def mkdir(self, path: str, dir_fd: int | None = None) -> None:
        target = self._touch(path, dir_fd)
        os.mkdir(target)
        self.populate(target)

    def rmdir(self, path: str, dir_fd: int | None = None) -> None:
        target = self._resolve(path, dir_fd)
        if not target.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        if (target / "cgroup.procs").read_text().strip() or any(child.is_dir() for child in target.iterdir()):
            raise OSError(errno.EBUSY, "Device or resource busy")
        self.touched.append(str(target))
        shutil.rmtree(target)

    def open_dir(self, path: str, dir_fd: int | None = None) -> int:
        self._touch(path, dir_fd)
        return super().open_dir(path, dir_fd)

    def open_write(self, path: str, dir_fd: int | None = None) -> int:
        self._touch(path, dir_fd)
        return super().open_write(path, dir_fd)

    def write(self, path: str, value: bytes, dir_fd: int | None = None) -> None:
        target = self._touch(path, dir_fd)
        if not target.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        if target.name == "cgroup.subtree_control":
            self._enable(target, value.decode())
        elif target.name == "cgroup.procs":
            self._move(target)
        else:
            target.write_bytes(value)

    def _enable(self, file: Path, value: str) -> None:
        inside = (file.parent / "cgroup.procs").read_text().strip()
        if inside and (file.parent / "cgroup.events").exists():
            raise OSError(errno.EBUSY, "Device or resource busy")
        wanted = {word.lstrip("+") for word in value.split()}
        file.write_text(" ".join(sorted({*file.read_text().split(), *wanted})))
        for child in (path for path in file.parent.iterdir() if path.is_dir()):
            for name in {name for controller in wanted for name in V2[controller]} - self.lacks:
                (child / name).touch()

    def _move(self, file: Path) -> None:
        mine = f"{os.getpid()}\n"
        for procs in file.parent.parent.rglob("cgroup.procs"):
            procs.write_text(procs.read_text().replace(mine, ""))
        file.write_text(file.read_text() + mine)

    def _touch(self, path: str, dir_fd: int | None) -> Path:
        """Note a change, unless it is to be refused."""
        target = self._resolve(path, dir_fd)
        if self.refuse_at is not None:
            self.refuse_at -= 1
        number = errno.EINVAL if self.refuse_at == -1 else self.refuse.get(target.name)
        if number:
            raise OSError(number, os.strerror(number))
        self.touched.append(str(target))
        return target

    def _resolve(self, path: str, dir_fd: int | None) -> Path:
        return Path(path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path))


@dataclass
class World:
    """One fake host: its cgroup trees, the kernel behind them, and the rest of the machine."""

    root: Path
    layout: str
    own: str
    kernel: Kernel = field(default_factory=Kernel)
    instance: str = "one"
    devices: dict[str, os.stat_result] = field(default_factory=dict)

    def host(self) -> CgroupHost:
        mountinfo, own = str(self.root / "mountinfo"), str(self.root / "cgroup")
        return detect(mountinfo, own, str(self.root), lambda _: False)

    def open(self, instance: str = "one", parent: str = "diyc") -> Cgroups:
        machine = Machine(str(self.root / "swaps"), str(self.root / "sys"), self.device)
        return open_cgroups(self.host(), parent, instance, machine, self.kernel)

    def device(self, path: str) -> os.stat_result:
        if path not in self.devices:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return self.devices[path]

    def add_disk(self, path: str, major: int, minor: int, part_of: str = "") -> None:
        """A block device; a partition lies in the directory of its disk."""
        values = (stat.S_IFBLK, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self.devices[path] = os.stat_result(values, {"st_rdev": os.makedev(major, minor)})
        entry = self.root / "sys/devices" / part_of.removeprefix("/dev/") / path.removeprefix("/dev/")
        entry.mkdir(parents=True)
        (entry / "dev").write_text(f"{major}:{minor}\n")
        if part_of:
            (entry / "partition").write_text("1\n")
        link = self.root / f"sys/dev/block/{major}:{minor}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(entry)

    def set_scheduler(self, words: str) -> None:
        queue = self.root / "sys/block/vda/queue"
        queue.mkdir(parents=True, exist_ok=True)
        (queue / "scheduler").write_text(f"{words}\n")

    def v2_root(self) -> Path:
        return self.root / ("sys/fs/cgroup/unified" if self.layout == "hybrid" else "sys/fs/cgroup")

    def delegated(self) -> list[Path]:
        """The delegated root in each hierarchy."""
        tops = [] if self.layout == "v2" else [self.root / "sys/fs/cgroup" / name for name in V1]
        tops += [] if self.layout == "v1" else [self.v2_root()]
        return [top / self.own.strip("/") for top in tops]

    def directories(self) -> set[str]:
        return {str(path) for path in (self.root / "sys/fs/cgroup").rglob("*") if path.is_dir()}


def build(root: Path, layout: str, own: str) -> World:
    world = World(root, layout, own)
    mounts, memberships = [], []
    if layout != "v2":
        for number, (name, files) in enumerate(V1.items(), 1):
            mounts.append(f"{number} 0 0:{number} / /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}")
            memberships.append(f"{number}:{name}:{own}")
            directory = root / "sys/fs/cgroup" / name / own.strip("/")
            directory.mkdir(parents=True)
            plain = ["cgroup.procs", "tasks", *files, *(["cgroup.clone_children"] if name == "cpuset" else [])]
            for level in (directory, root / "sys/fs/cgroup" / name):
                for file in plain:
                    (level / file).touch()
    if layout != "v1":
        build_v2(world, own)
        point = "/" + str(world.v2_root().relative_to(root))
        mounts.append(f"99 0 0:99 / {point} rw - cgroup2 cgroup2 rw")
        memberships.append(f"0::{own}")
    for top in world.delegated():
        if (top / "cpuset.cpus").exists() or layout == "v2":
            (top / "cpuset.cpus").write_text("0-3\n")
            (top / "cpuset.mems").write_text("0-1\n")
    (root / "mountinfo").write_text("\n".join(mounts) + "\n")
    (root / "cgroup").write_text("\n".join(memberships) + "\n")
    (root / "swaps").write_text("Filename Type Size Used Priority\n/dev/vdb partition 1 0 -2\n")
    (root / "sys/kernel/mm/hugepages/hugepages-2048kB").mkdir(parents=True)
    (root / "sys/kernel/mm/hugepages/hugepages-1048576kB").mkdir(parents=True)
    world.add_disk("/dev/vda", 254, 0)
    world.set_scheduler("[none] bfq")
    return world


def build_v2(world: World, own: str) -> None:
    offered = "hugetlb" if world.layout == "hybrid" else "cpuset cpu io memory pids hugetlb"
    top = world.v2_root()
    top.mkdir(parents=True, exist_ok=True)
    path = top
    for name in ["", *own.strip("/").split("/")]:
        path = path / name
        path.mkdir(exist_ok=True)
        (path / "cgroup.controllers").write_text(offered)
        (path / "cgroup.procs").touch()
        (path / "cpu.stat").touch()
        (path / "cgroup.subtree_control").write_text("" if path == top / own.strip("/") else offered)
        if path != top:
            (path / "cgroup.events").touch()
    (path / "cgroup.procs").write_text(f"{os.getpid()}\n")


@pytest.fixture(params=["v1", "hybrid", "v2"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return build(tmp_path, request.param, "/pod.slice/diyc.service")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    return lambda layout, own="/pod.slice/diyc.service": build(tmp_path, layout, own)


@pytest.fixture
def cgroups(world: World) -> Iterator[Cgroups]:
    opened = world.open()
    yield opened
    opened.close()


def written(run: RunCgroup) -> dict[str, str]:
    """What stands in the files of a run's directories, where that is not what a new one has."""
    found = {}
    for directory in set(run.dirs.values()):
        for path in Path(directory).iterdir():
            if path.name != "cgroup.procs" and path.read_text().strip():
                found[path.name] = path.read_text()
    return found


def finish(run: RunCgroup) -> None:
    assert run.remove()


FULL = Limits(
    memory=64 * MIB,
    swap=16 * MIB,
    cpus=1.5,
    cpu_weight=200,
    cpuset="0,2-3",
    pids=7,
    io_read_bps=(("/dev/vda", 1000),),
    io_write_iops=(("/dev/vda", 50),),
    io_weight=300,
)
FULL_WITHOUT_WEIGHT = replace(FULL, io_weight=None)
FULL_V1 = {
    "memory.limit_in_bytes": str(64 * MIB),
    "memory.memsw.limit_in_bytes": str(80 * MIB),
    "cpu.cfs_quota_us": "150000",
    "cpu.shares": "2048",
    "cpuset.cpus": "0,2-3",
    "cpuset.mems": "0-1",
    "pids.max": "7",
    "blkio.throttle.read_bps_device": "254:0 1000",
    "blkio.throttle.write_iops_device": "254:0 50",
    "blkio.bfq.weight": "118",
}
FULL_V2 = {
    "memory.max": str(64 * MIB),
    "memory.swap.max": str(16 * MIB),
    "cpu.max": "150000 100000",
    "cpu.weight": "200",
    "cpuset.cpus": "0,2-3",
    "pids.max": "7",
    "io.max": "254:0 rbps=1000 wiops=50",
    "io.bfq.weight": "118",
}


def add_v1_weight(world: World) -> None:
    for top in world.delegated():
        if top.parent.parent.name == "blkio":
            (top / "blkio.bfq.weight").touch()


def test_every_limit_reaches_its_file(world: World, cgroups: Cgroups) -> None:
    world.set_scheduler("none [bfq]")
    add_v1_weight(world)
    assert cgroups.unsupported(FULL) == []
    run = cgroups.create("r", FULL)
    assert written(run) == (FULL_V2 if world.layout == "v2" else FULL_V1)
    finish(run)


def test_devices_are_limited_once_above_all_runs(world: World, cgroups: Cgroups) -> None:
    attached: list[tuple[bytes, str]] = []
    cgroups.prepare()
    before = len(world.kernel.touched)
    cgroups.limit_devices(lambda program, fd: attached.append((program, os.readlink(f"/proc/self/fd/{fd}"))))
    if world.layout == "v1":
        top = str(world.root / "sys/fs/cgroup/devices/pod.slice/diyc.service/diyc/one")
        assert attached == []
        assert world.kernel.touched[before:] == [f"{top}/{file}" for file, _ in v1_rules()]
    else:
        assert attached == [(v2_program(), str(world.v2_root() / "pod.slice/diyc.service/diyc/one"))]
        assert world.kernel.touched[before:] == []
    run = cgroups.create("r", Limits())
    assert ("devices" in run.dirs) == (world.layout == "v1")
    finish(run)


def test_a_host_that_cannot_limit_devices_is_told_so(make: Callable[..., World]) -> None:
    world = make("v1")
    world.kernel.refuse["devices.deny"] = errno.EPERM
    cgroups = world.open()
    cgroups.prepare()
    with pytest.raises(HostError, match=r"device policy: cannot set devices.deny .* not permitted; a container"):
        cgroups.limit_devices(lambda program, fd: None)
    cgroups.close()


def test_a_host_without_a_devices_controller_is_told_so(make: Callable[..., World]) -> None:
    world = make("v1")
    host = world.host()
    kept = {name: place for name, place in host.controllers.items() if name != "devices"}
    cgroups = open_cgroups(replace(host, controllers=kept), files=world.kernel)
    with pytest.raises(HostError, match="device policy: no devices controller is mounted, nor cgroup v2"):
        cgroups.limit_devices(lambda program, fd: None)


@pytest.mark.parametrize("layout", ["hybrid", "v2"])
def test_without_clone3_a_run_joins_its_v2_cgroup_by_itself(layout: str, make: Callable[..., World]) -> None:
    world = make(layout)
    cgroups = open_cgroups(world.host(), files=world.kernel, into=False)
    preview = cgroups.preview(Limits())
    run = cgroups.create("RUN", Limits())
    assert (run.into_fd, preview.into, cgroups.into) == (None, None, False)
    joined = [os.readlink(f"/proc/self/fd/{fd}") for fd in run.join_fds]
    assert joined[0] == f"{run.dirs['unified']}/cgroup.procs"
    assert joined == list(preview.joins)
    assert all(path.endswith("/tasks") for path in joined[1:])
    assert len(joined) == len(set(run.dirs.values()))
    finish(run)
    cgroups.close()


def test_defaults_write_memory_swap_and_pids_only(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    if world.layout == "v2":
        expected = {"memory.max": str(256 * MIB), "memory.swap.max": "0", "pids.max": "64"}
    else:
        size = str(256 * MIB)
        expected = {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes": size, "pids.max": "64"}
    assert written(run) == expected
    finish(run)


def test_without_limits_nothing_is_written(cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits(memory=None, swap=None, pids=None, cpu_weight=100, io_weight=100))
    assert written(run) == {}
    finish(run)


@pytest.mark.parametrize(
    "limits,v1,v2",
    [
        (Limits(cpus=0.005), {"cpu.cfs_period_us": "1000000", "cpu.cfs_quota_us": "5000"}, {"cpu.max": "5000 1000000"}),
        (Limits(cpus=0.5), {"cpu.cfs_quota_us": "50000"}, {"cpu.max": "50000 100000"}),
        (Limits(cpu_weight=1), {"cpu.shares": "10"}, {"cpu.weight": "1"}),
        (Limits(cpu_weight=10000), {"cpu.shares": "102400"}, {"cpu.weight": "10000"}),
    ],
)
def test_cpu_limits_are_spelled_as_each_version_wants(
    world: World, cgroups: Cgroups, limits: Limits, v1: dict[str, str], v2: dict[str, str]
) -> None:
    run = cgroups.create("r", limits)
    assert {k: v for k, v in written(run).items() if k.startswith("cpu.")} == (v2 if world.layout == "v2" else v1)
    finish(run)


def test_v1_memory_is_limited_before_the_sum_with_swap(make: Callable[..., World]) -> None:
    world = make("v1")
    cgroups = world.open()
    run = cgroups.create("r", Limits())
    names = [os.path.basename(path) for path in world.kernel.touched]
    assert names.index("memory.limit_in_bytes") < names.index("memory.memsw.limit_in_bytes")
    finish(run)
    cgroups.close()


def test_paths_of_one_disk_share_its_smallest_limit(world: World, cgroups: Cgroups) -> None:
    world.add_disk("/dev/vda1", 254, 1, part_of="/dev/vda")
    world.add_disk("/dev/vdb", 254, 16)
    limits = Limits(io_read_bps=(("/dev/vda1", 500), ("/dev/vda", 900), ("/dev/vdb", 30)))
    assert cgroups.unsupported(limits) == []
    run = cgroups.create("r", limits)
    file = "io.max" if world.layout == "v2" else "blkio.throttle.read_bps_device"
    values = [Path(path).name for path in world.kernel.touched].count(file)
    assert values == 2  # one write a disk: the kernel takes one at a time
    finish(run)


def test_a_partition_is_limited_through_its_whole_disk(world: World, cgroups: Cgroups) -> None:
    world.add_disk("/dev/vda1", 254, 1, part_of="/dev/vda")
    run = cgroups.create("r", Limits(io_write_bps=(("/dev/vda1", 500), ("/dev/vda", 900))))
    assert "254:0 500" in written(run).values() or "254:0 wbps=500" in written(run).values()
    finish(run)


def test_v2_weight_goes_to_iocost_where_that_is_on(make: Callable[..., World]) -> None:
    world = make("v2")
    (world.v2_root() / "io.cost.qos").write_text("254:0 enable=1 ctrl=auto\n")
    cgroups = world.open()
    run = cgroups.create("r", Limits(io_weight=300))
    assert written(run)["io.weight"] == "default 300"
    finish(run)
    cgroups.close()


# --- which directories, which descriptors


def test_a_run_gets_only_the_directories_that_it_needs(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    always = {"memory", "pids", "cpu", "io"}
    expected = {"v1": always | {"cpuacct", "devices"}, "hybrid": always | {"unified"}, "v2": always | {"unified"}}
    assert set(run.dirs) == expected[world.layout]
    assert len(set(run.dirs.values())) == {"v1": 6, "hybrid": 5, "v2": 1}[world.layout]
    finish(run)


def test_the_child_gets_a_tasks_file_of_each_v1_hierarchy_and_the_v2_directory(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits(cpuset="0"))
    for fd in run.join_fds:
        os.write(fd, b"0")
    joined = {os.readlink(f"/proc/self/fd/{fd}") for fd in run.join_fds}
    v1 = {path for name, path in run.dirs.items() if name != "unified"} if world.layout != "v2" else set()
    assert joined == {f"{path}/tasks" for path in v1}
    if world.layout == "v1":
        assert run.into_fd is None
    else:
        assert os.readlink(f"/proc/self/fd/{run.into_fd}") == run.dirs["unified"]
    finish(run)


def test_remove_closes_every_descriptor(cgroups: Cgroups) -> None:
    cgroups.prepare()
    before = os.listdir("/proc/self/fd")
    run = cgroups.create("r", Limits())
    run.figures()
    finish(run)
    assert (run.join_fds, run.into_fd) == ((), None)
    assert os.listdir("/proc/self/fd") == before


def test_close_join_fds_leaves_the_cgroup_usable(world: World, cgroups: Cgroups) -> None:
    cgroups.prepare()
    before = os.listdir("/proc/self/fd")
    run = cgroups.create("r", Limits())
    run.close_join_fds()
    assert os.listdir("/proc/self/fd") == before
    assert run.figures() is not None
    finish(run)


def test_kill_uses_cgroup_kill_where_there_is_a_v2_mount(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    run.kill()
    if world.layout != "v1":
        assert Path(run.dirs["unified"], "cgroup.kill").read_text() == "1"
    finish(run)
    run.kill()  # a removed one has nothing to kill


def test_remove_says_no_while_a_process_is_inside_and_goes_on_later(cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    procs = Path(run.dirs["pids"], "cgroup.procs")
    procs.write_text(f"{STRANGER}\n")
    assert not run.remove()
    assert run.remove() is False
    procs.write_text("")
    assert run.remove()
    assert not any(Path(path).exists() for path in run.dirs.values())


def test_a_name_cannot_lead_elsewhere(cgroups: Cgroups) -> None:
    for name in ("../x", "a/b", "..", ""):
        with pytest.raises(ValueError, match="not a name for a cgroup"):
            cgroups.create(name, Limits())


# --- failures


def test_a_failure_at_any_point_of_create_leaves_nothing(world: World, cgroups: Cgroups) -> None:
    cgroups.prepare()
    before, open_before = world.directories(), os.listdir("/proc/self/fd")
    world.kernel.touched.clear()
    run = cgroups.create("r", Limits())
    calls = len(world.kernel.touched)
    finish(run)
    for point in range(calls):
        world.kernel.refuse_at = point
        with pytest.raises(CgroupError) as caught:
            cgroups.create("r", Limits())
        assert (caught.value.errno, world.kernel.refuse_at) == (errno.EINVAL, -1)
        world.kernel.refuse_at = None
        assert world.directories() == before
        assert os.listdir("/proc/self/fd") == open_before


def test_a_refused_limit_names_file_and_value(world: World, cgroups: Cgroups) -> None:
    cgroups.prepare()
    world.kernel.refuse["pids.max"] = errno.ERANGE
    with pytest.raises(CgroupError, match=r"cannot write '64' to /.*/diyc/one/r/pids\.max: Numerical result"):
        cgroups.create("r", Limits())


def test_a_cgroup_of_the_same_name_is_refused_and_left_alone(cgroups: Cgroups) -> None:
    first = cgroups.create("r", Limits())
    with pytest.raises(CgroupError, match="File exists"):
        cgroups.create("r", Limits())
    assert all(Path(path).exists() for path in first.dirs.values())
    finish(first)


@pytest.mark.parametrize("number,advice", [(errno.EACCES, "run as root"), (errno.EROFS, "read-write")])
def test_a_host_that_refuses_is_named_and_nothing_is_left(world: World, number: int, advice: str) -> None:
    before = world.directories()
    world.kernel.refuse["one"] = number
    with pytest.raises(HostError, match=rf"cgroup delegation: cannot make /.*/diyc/one: .*{advice}"):
        world.open().prepare()
    assert world.directories() == before


def test_a_read_only_mount_is_a_host_error(world: World) -> None:
    text = (world.root / "mountinfo").read_text()
    (world.root / "mountinfo").write_text(text.replace(" rw - ", " ro - "))
    with pytest.raises(HostError, match=r"is mounted read-only: remount it read-write"):
        world.open().prepare()
    assert world.kernel.touched == []


def test_a_host_without_cgroups_is_a_host_error() -> None:
    with pytest.raises(HostError, match="no cgroup hierarchy is mounted"):
        open_cgroups(CgroupHost("v1", {}, None))


# --- delegation


def test_nothing_is_ever_touched_outside_the_delegated_root(world: World) -> None:
    cgroups = world.open()
    run = cgroups.create("r", FULL)
    run.kill()
    finish(run)
    cgroups.close()
    roots = [str(path) for path in world.delegated()]
    outside = [path for path in world.kernel.touched if not any(path.startswith(f"{root}/") for root in roots)]
    assert outside == []
    # In the delegated root itself, only what hands controllers down.
    direct = {os.path.relpath(path, root) for path in world.kernel.touched for root in roots if path.startswith(root)}
    assert {name for name in direct if "/" not in name} <= {"diyc", "diyc-supervisor", "cgroup.subtree_control"}


def test_prepare_twice_and_by_two_instances_is_harmless(world: World) -> None:
    before = world.directories()
    first, second = world.open("one"), world.open("two")
    first.prepare()
    first.prepare()
    second.prepare()
    first.close()
    run = second.create("r", Limits())
    finish(run)
    second.close()
    assert {path for path in world.directories() - before if "diyc-supervisor" not in path} == set()


def test_close_with_a_run_inside_says_so_and_a_later_close_ends_it(world: World) -> None:
    cgroups = world.open()
    run = cgroups.create("r", Limits())
    with pytest.raises(CgroupError, match=r"cannot remove .*/diyc/one: Device or resource busy"):
        cgroups.close()
    for path in set(run.dirs.values()):
        world.kernel.rmdir(path)
    cgroups.close()
    assert not any(Path(path).exists() for path in cgroups.instance_dirs)
    run.close_join_fds()


def test_instance_dirs_name_every_directory_before_it_is_made(world: World) -> None:
    cgroups = world.open()
    dirs = cgroups.instance_dirs
    assert world.kernel.touched == []
    run = cgroups.create("r", FULL)
    assert {os.path.dirname(path) for path in run.dirs.values()} <= set(dirs)
    finish(run)
    cgroups.close()


def test_describe_names_each_controllers_directory(world: World, cgroups: Cgroups) -> None:
    version = "v2" if world.layout == "v2" else "v1"
    lines = cgroups.describe()
    assert any(line.startswith(f"memory ({version}): /") and line.endswith("/diyc/one") for line in lines)
    assert any(line.startswith("unified (v2): ") for line in lines) == (world.layout != "v1")


def test_a_preview_before_prepare_is_what_create_then_does(world: World, cgroups: Cgroups) -> None:
    preview = cgroups.preview(FULL_WITHOUT_WEIGHT)
    assert world.kernel.touched == []
    run = cgroups.create("RUN", FULL_WITHOUT_WEIGHT)
    assert {f"{path}/RUN" for path in preview.directories} == set(run.dirs.values())
    assert {os.path.basename(path): value for path, value in preview.writes}.items() <= written(run).items()
    assert list(preview.joins) == [os.readlink(f"/proc/self/fd/{fd}") for fd in run.join_fds]
    assert preview.into == (None if world.layout == "v1" else os.path.dirname(run.dirs["unified"]))
    finish(run)


def test_a_parent_of_several_levels_is_made_and_removed(world: World) -> None:
    before = world.directories()
    cgroups = world.open(parent="batch/diyc")
    cgroups.prepare()
    assert all(path.endswith("/batch/diyc/one") for path in cgroups.instance_dirs)
    cgroups.close()
    assert {path for path in world.directories() - before if "diyc-supervisor" not in path} == set()


@pytest.mark.parametrize("parent", ["../up", "/abs", "a//b", ""])
def test_a_parent_that_leads_out_is_refused(world: World, parent: str) -> None:
    with pytest.raises(ValueError, match="not a path below the delegated cgroup"):
        world.open(parent=parent)


def test_v2_supervisor_moves_itself_into_a_leaf(make: Callable[..., World]) -> None:
    world = make("v2")
    cgroups = world.open()
    cgroups.prepare()
    own = world.delegated()[0]
    assert (own / "cgroup.procs").read_text() == ""
    assert (own / "diyc-supervisor/cgroup.procs").read_text() == f"{os.getpid()}\n"
    for level in (own, own / "diyc", own / "diyc/one"):
        assert (level / "cgroup.subtree_control").read_text() == "cpu io memory pids"
    cgroups.close()


def test_v2_supervisor_in_its_leaf_opens_the_same_root_again(make: Callable[..., World]) -> None:
    world = make("v2")
    world.open().prepare()
    (world.root / "cgroup").write_text(f"0::{world.own}/diyc-supervisor\n")
    again = world.open("two")
    again.prepare()
    assert again.instance_dirs == [str(world.delegated()[0] / "diyc/two")]
    again.close()


def test_v2_top_of_the_hierarchy_needs_no_leaf(make: Callable[..., World]) -> None:
    world = make("v2", "/")
    (world.v2_root() / "cgroup.procs").write_text(f"{STRANGER}\n{os.getpid()}\n")
    cgroups = world.open()
    cgroups.prepare()
    assert not (world.v2_root() / "diyc-supervisor").exists()
    assert (world.v2_root() / "cgroup.subtree_control").read_text() == "cpu io memory pids"
    cgroups.close()


def test_v2_with_other_processes_in_the_way_tells_how_to_start(make: Callable[..., World]) -> None:
    world = make("v2")
    procs = world.delegated()[0] / "cgroup.procs"
    procs.write_text(f"{STRANGER}\n{os.getpid()}\n")
    before = world.directories()
    with pytest.raises(HostError, match=r"other processes than diyc are in .*systemd-run --scope -p Delegate=yes"):
        world.open().prepare()
    assert procs.read_text() == f"{STRANGER}\n{os.getpid()}\n"
    assert world.directories() == before


def test_v2_needs_no_move_where_controllers_are_already_handed_down(make: Callable[..., World]) -> None:
    world = make("v2")
    (world.delegated()[0] / "cgroup.subtree_control").write_text("cpu io memory pids")
    cgroups = world.open()
    cgroups.prepare()
    assert (world.delegated()[0] / "cgroup.procs").read_text() == f"{os.getpid()}\n"
    cgroups.close()


def test_hybrid_enables_hugetlb_only_when_a_limit_asks_for_it(make: Callable[..., World]) -> None:
    world = make("hybrid")
    cgroups = world.open()
    finish(cgroups.create("a", Limits()))
    root = world.v2_root() / world.own.strip("/")
    assert (root / "cgroup.subtree_control").read_text() == ""
    assert (root / "cgroup.procs").read_text() == f"{os.getpid()}\n"
    limits = Limits(hugetlb=(("2MB", 4 * MIB),))
    assert cgroups.unsupported(limits) == []
    run = cgroups.create("b", limits)
    assert (root / "cgroup.subtree_control").read_text() == "hugetlb"
    assert written(run)["hugetlb.2MB.max"] == str(4 * MIB)
    assert (root / "diyc-supervisor/cgroup.procs").read_text() == f"{os.getpid()}\n"
    finish(run)
    cgroups.close()


def test_v2_enables_cpuset_only_when_a_limit_asks_for_it(make: Callable[..., World]) -> None:
    world = make("v2")
    cgroups = world.open()
    finish(cgroups.create("a", Limits()))
    control = world.delegated()[0] / "cgroup.subtree_control"
    assert "cpuset" not in control.read_text()
    run = cgroups.create("b", Limits(cpuset="1"))
    assert "cpuset" in control.read_text()
    assert written(run)["cpuset.cpus"] == "1"
    finish(run)
    cgroups.close()


def test_v1_cpuset_directories_inherit_cpus_and_memory_nodes(make: Callable[..., World]) -> None:
    world = make("v1")
    cgroups = world.open()
    run = cgroups.create("r", Limits(cpuset="1"))
    own = world.root / "sys/fs/cgroup/cpuset" / world.own.strip("/")
    for level in (own / "diyc", own / "diyc/one"):
        assert (level / "cpuset.cpus").read_text() == "0-3"
        assert (level / "cpuset.mems").read_text() == "0-1"
    assert Path(run.dirs["cpuset"], "cpuset.mems").read_text() == "0-1"
    finish(run)
    cgroups.close()


# --- what cannot be enforced


@pytest.mark.parametrize(
    "limits,problem",
    [
        (Limits(cpuset="2-5"), "limits.cpuset: CPU 4-5 is not among 0-3"),
        (Limits(cpus=0.0005), "limits.cpus: 0.0005 is less than the kernel's smallest share of a CPU, 0.001"),
        (Limits(io_read_bps=(("/dev/nix", 5),)), 'limits.io_read_bps."/dev/nix": cannot look at it: No such file'),
        (Limits(io_write_iops=(("/dev/vda", 0),)), 'limits.io_write_iops."/dev/vda": the kernel knows no limit of 0'),
        (Limits(io_weight=50), "limits.io_weight: no disk here has a scheduler that knows weights"),
    ],
    ids=["cpuset", "cpus", "device", "zero", "weight"],
)
def test_an_unenforceable_limit_is_named_with_its_reason(cgroups: Cgroups, limits: Limits, problem: str) -> None:
    before = cgroups.unsupported(limits)
    cgroups.prepare()
    found = cgroups.unsupported(limits)
    assert found == before
    assert len(found) == 1
    assert found[0].startswith(problem)
    finish(cgroups.create("r", limits))  # best effort: all the others hold


def test_a_limit_that_became_enforceable_holds_for_the_next_run(world: World, cgroups: Cgroups) -> None:
    limits = Limits(io_read_bps=(("/dev/vdb", 77),))
    finish(cgroups.create("r", limits))
    world.add_disk("/dev/vdb", 254, 16)
    run = cgroups.create("r", limits)
    assert any("77" in text for text in written(run).values())
    finish(run)


def test_a_plain_file_is_no_device(world: World, cgroups: Cgroups) -> None:
    world.devices["/dev/null"] = os.stat("/dev/null")
    [problem] = cgroups.unsupported(Limits(io_read_bps=(("/dev/null", 5),)))
    assert problem == 'limits.io_read_bps."/dev/null": not a block device'


def test_a_page_size_that_is_not_there_is_named(make: Callable[..., World]) -> None:
    [problem] = make("v2").open().unsupported(Limits(hugetlb=(("4MB", 0),)))
    assert problem == "limits.hugetlb.4MB: this machine has huge pages of 2MB, 1GB only"


def test_swap_without_accounting_is_refused_only_where_there_is_swap(world: World) -> None:
    world.kernel.lacks = {"memory.memsw.limit_in_bytes", "memory.swap.max"}
    for top in world.delegated():
        (top / "memory.memsw.limit_in_bytes").unlink(missing_ok=True)
    cgroups = world.open()
    cgroups.prepare()
    [problem] = cgroups.unsupported(Limits())
    assert problem.startswith("limits.swap: this kernel does not account swap (boot with swapaccount=1")
    assert cgroups.unsupported(Limits(swap=None)) == []
    (world.root / "swaps").write_text("Filename Type Size Used Priority\n")
    assert cgroups.unsupported(Limits()) == []
    cgroups.close()


def test_v1_cannot_limit_swap_without_memory(world: World, cgroups: Cgroups) -> None:
    problems = cgroups.unsupported(Limits(memory=None))
    if world.layout == "v2":
        assert problems == []
    else:
        assert problems == ["limits.swap: cgroup v1 limits swap only together with memory (set limits.memory too)"]


def test_a_missing_controller_is_named_for_each_limit_it_would_enforce(world: World) -> None:
    if world.layout == "v2":
        for path in (world.v2_root(), world.delegated()[0]):
            (path / "cgroup.controllers").write_text("cpu io pids")
    else:
        shutil.rmtree(world.root / "sys/fs/cgroup/memory")
    cgroups = world.open()
    cgroups.prepare()
    problems = cgroups.unsupported(Limits())
    assert [problem.split(":")[0] for problem in problems] == ["limits.memory", "limits.swap"]
    assert "there is no memory controller" in problems[0]
    assert "cgroup_enable=memory" in problems[0]
    (world.root / "swaps").write_text("Filename Type Size Used Priority\n")  # then nobody can swap
    assert [problem.split(":")[0] for problem in cgroups.unsupported(Limits())] == ["limits.memory"]
    run = cgroups.create("r", Limits())
    assert written(run) == {"pids.max": "64"}
    assert run.figures().memory_peak_bytes is None
    finish(run)
    cgroups.close()


def test_a_controller_that_is_not_handed_down_tells_how_to_get_it(make: Callable[..., World]) -> None:
    world = make("v2")
    (world.delegated()[0] / "cgroup.controllers").write_text("memory pids")
    [problem] = world.open().unsupported(Limits(cpus=1.0))
    assert problem.startswith("limits.cpus: the cpu controller is not handed down to /")
    assert "systemd-run --scope -p Delegate=yes" in problem


def test_hybrid_names_the_processes_that_keep_hugetlb_from_being_used(make: Callable[..., World]) -> None:
    world = make("hybrid")
    (world.v2_root() / world.own.strip("/") / "cgroup.procs").write_text(f"{STRANGER}\n")
    cgroups = world.open()
    [problem] = cgroups.unsupported(Limits(hugetlb=(("2MB", 0),)))
    assert problem.startswith("limits.hugetlb: other processes than diyc are in /")
    finish(cgroups.create("r", Limits()))
    cgroups.close()


def test_a_kernel_without_a_file_is_named(make: Callable[..., World]) -> None:
    world = make("v2")
    world.kernel.lacks = {"cpu.max"}
    cgroups = world.open()
    cgroups.prepare()
    assert cgroups.unsupported(Limits(cpus=1.0)) == ["limits.cpus: this kernel's cpu controller has no cpu.max"]
    cgroups.close()


# --- figures

V1_TEXTS = {
    "memory.usage_in_bytes": "5000\n",
    "memory.max_usage_in_bytes": "9000\n",
    "memory.failcnt": "1\n",
    "memory.memsw.failcnt": "2\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "memory.stat": "inactive_file 1\ntotal_cache 7\ntotal_inactive_file 1200\n",
    "pids.current": "4\n",
    "pids.peak": "6\n",
    "pids.events": "max 11\n",
    "cpu.stat": "nr_periods 9\nnr_throttled 5\nthrottled_time 1500000000\n",
    "blkio.throttle.io_service_bytes_recursive": "254:0 Read 10\n254:0 Write 4\n254:0 Total 14\n8:0 Read 1\nTotal 15\n",
}
CPUACCT_TEXTS = {"cpuacct.usage": "2500000000\n", "cpuacct.stat": f"user {2 * os.sysconf('SC_CLK_TCK')}\nsystem 0\n"}
UNIFIED_TEXTS = {
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 0\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\nfull avg10=0.00 total=7\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
    "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=250000\n",
}
V2_TEXTS = UNIFIED_TEXTS | {
    "cpu.stat": UNIFIED_TEXTS["cpu.stat"] + "nr_periods 9\nnr_throttled 5\nthrottled_usec 1500000\n",
    "memory.current": "5000\n",
    "memory.peak": "9000\n",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 0\n",
    "memory.stat": "anon 7\ninactive_file 1200\n",
    "pids.current": "4\n",
    "pids.peak": "6\n",
    "pids.events": "max 11\n",
    "io.stat": "254:0 rbytes=10 wbytes=4 rios=1 wios=1 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=0 rios=1\n",
}


def fill(run: RunCgroup, layout: str) -> None:
    for name, directory in run.dirs.items():
        if name == "unified":
            texts = V2_TEXTS if layout == "v2" else UNIFIED_TEXTS
        else:
            prefix = {"io": "blkio."}.get(name, f"{name}.")
            texts = {k: v for k, v in (V1_TEXTS | CPUACCT_TEXTS).items() if k.startswith(prefix)}
        if name == "unified" or layout != "v2":
            for file, text in texts.items():
                Path(directory, file).write_text(text)


def test_figures_say_the_same_on_every_layout(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    fill(run, world.layout)
    figures = run.figures()
    assert (figures.cpu_usage_s, figures.cpu_user_s, figures.cpu_system_s) == (2.5, 2.0, 0.0)
    assert (figures.throttled_s, figures.throttled_periods) == (1.5, 5)
    assert (figures.memory_current_bytes, figures.memory_peak_bytes) == (5000, 9000)
    assert figures.memory_working_set_bytes == 3800
    assert (figures.memory_limit_hits, figures.oom_kills) == (3, 2)
    assert (figures.pids_current, figures.pids_peak, figures.pids_limit_hits) == (4, 6, 11)
    assert (figures.io_read_bytes, figures.io_write_bytes) == (11, 4)
    pressure = None if world.layout == "v1" else {"cpu": 1.5, "memory": 0.0, "io": 0.25}
    assert figures.pressure_s == pressure
    assert run.figures(full=False).pressure_s is None
    finish(run)


def test_figures_that_are_not_there_are_none(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    for directory in set(run.dirs.values()):
        for path in Path(directory).iterdir():
            path.unlink()
    figures = run.figures()
    assert all(getattr(figures, name) is None for name in figures.__slots__)
    for directory in set(run.dirs.values()):
        os.rmdir(directory)
    assert run.figures() == figures
    finish(run)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EOPNOTSUPP], ids=["removed while open", "turned off"])
def test_a_figure_that_the_kernel_will_not_read_out_is_none(
    cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    run = cgroups.create("r", Limits())
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", refuse)
        figures = run.figures()
    assert all(getattr(figures, name) is None for name in figures.__slots__)
    finish(run)


def test_an_old_kernel_without_peaks_gives_none_for_them_alone(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    fill(run, world.layout)
    for directory in set(run.dirs.values()):
        Path(directory, "pids.peak").unlink(missing_ok=True)
        Path(directory, "memory.peak").unlink(missing_ok=True)
    figures = run.figures()
    assert figures.pids_peak is None
    assert figures.memory_peak_bytes == (None if world.layout == "v2" else 9000)
    assert (figures.pids_current, figures.oom_kills) == (4, 2)
    finish(run)


def test_io_figures_of_an_unused_disk_are_zero(world: World, cgroups: Cgroups) -> None:
    run = cgroups.create("r", Limits())
    file = "io.stat" if world.layout == "v2" else "blkio.throttle.io_service_bytes"
    Path(run.dirs["io"], file).write_text("" if world.layout == "v2" else "Total 0\n")
    assert (run.figures().io_read_bytes, run.figures().io_write_bytes) == (0, 0)
    finish(run)


def test_each_figure_file_is_read_once(world: World, cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cgroups.create("r", Limits())
    fill(run, world.layout)
    reads: list[tuple[str, int | None]] = []
    read = Files.read

    def noted(self: Files, path: str, dir_fd: int | None = None) -> bytes | None:
        reads.append((path, dir_fd))
        return read(self, path, dir_fd)

    monkeypatch.setattr(Files, "read", noted)
    run.figures()
    assert len(reads) == len(set(reads)) > 8
    finish(run)


@pytest.mark.parametrize(
    "failures,sum_failures,peak,hits",
    [
        ("3", "0", 64, 3),
        ("0", "2", 64, 2),
        ("0", "0", 64, None),
        ("0", "0", 63, None),
        ("0", "0", 62, 0),
        ("4", "", 64, 4),
    ],
    ids=["memory", "memory and swap", "uncounted at the limit", "just below", "far below", "no swap accounting"],
)
def test_v1_limit_hits_are_unknown_where_the_kernel_did_not_count_them(
    make: Callable[..., World], failures: str, sum_failures: str, peak: int, hits: int | None
) -> None:
    cgroups = make("v1").open()
    run = cgroups.create("r", Limits(memory=64 * MIB))
    directory = Path(run.dirs["memory"])
    (directory / "memory.failcnt").write_text(f"{failures}\n")
    if sum_failures:
        (directory / "memory.memsw.failcnt").write_text(f"{sum_failures}\n")
    (directory / "memory.max_usage_in_bytes").write_text(f"{peak * MIB}\n")
    (directory / "memory.stat").write_text(f"hierarchical_memory_limit {64 * MIB}\n")
    assert run.figures().memory_limit_hits == hits
    finish(run)
    cgroups.close()


def test_a_working_set_is_never_negative(make: Callable[..., World]) -> None:
    world = make("v2")
    cgroups = world.open()
    run = cgroups.create("r", Limits())
    Path(run.dirs["memory"], "memory.current").write_text("100\n")
    Path(run.dirs["memory"], "memory.stat").write_text("inactive_file 4096\n")
    assert run.figures().memory_working_set_bytes == 0
    finish(run)
    cgroups.close()
