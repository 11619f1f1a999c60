"""Plans: which steps a job comes to, and the orders among them that its isolation rests on."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from diyc import _core
from diyc.jobs import JobSpec, Limits, Mount
from diyc.plan import (
    ATTR_RDONLY,
    CLONE_NEWCGROUP,
    LABEL_FD,
    O_WRONLY,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    STEP_DOCS,
    SUPERVISOR_FD,
    Bind,
    Box,
    Plan,
    Step,
    User,
    build_plan,
)

MIB = 1024**2
PLAIN = JobSpec("test", command=("true",))
RICH = JobSpec(
    "rich",
    shell="true",
    workdir="/srv/data",
    user="app",
    writable=False,
    network="loopback",
    limits=Limits(memory=8 * MIB, disk=3 * MIB, nofile=77, core=5),
    mounts=(
        Mount("bind", "/in", "/host/in", True),
        Mount("bind", "/conf/file", "/host/file"),
        Mount("tmpfs", "/scratch/deep", size=5 * MIB),
        Mount("tmpfs", "/frozen", read_only=True),
    ),
)
RICH_BOX = Box(
    hostname="node.example.org",
    user=User(1000, 1001, (4, 24), "/home/app"),
    binds=(Bind("/usr", "/usr", True), Bind("/host/in", "/in", True), Bind("/host/file", "/conf/file", False, False)),
    joins=3,
    into_cgroup=True,
    capabilities=1 << 10,
)
PLANS = {"plain": build_plan(PLAIN, Box("test")), "rich": build_plan(RICH, RICH_BOX)}


def kinds(plan: Plan) -> list[str]:
    return [step.kind for step in plan.steps]


def where(plan: Plan, kind: str, **fields: object) -> list[int]:
    """The indices of the steps of a kind with these fields."""
    return [
        index
        for index, step in enumerate(plan.steps)
        if step.kind == kind and all(getattr(step, name) == value for name, value in fields.items())
    ]


def only(plan: Plan, kind: str, **fields: object) -> Step:
    (index,) = where(plan, kind, **fields)
    return plan.steps[index]


LABELLED = {
    "apparmor": (replace(PLAIN, apparmor="job one"), "/proc/thread-self/attr/apparmor/exec", b"exec job one"),
    "selinux": (replace(PLAIN, selinux="u:r:t:s0"), "/proc/thread-self/attr/exec", b"u:r:t:s0"),
}


@pytest.mark.parametrize("module", LABELLED)
def test_a_label_is_written_last_of_all_to_a_file_opened_first(module: str) -> None:
    spec, path, text = LABELLED[module]
    plan, plain = build_plan(spec, Box("test")), build_plan(PLAIN, Box("test"))
    opened, written = only(plan, "open_file", source=path), only(plan, "exec_label")
    assert (opened.flags, written.data) == (O_WRONLY, text)
    (open_at,), (write_at,) = where(plan, "open_file", source=path), where(plan, "exec_label")
    assert open_at < where(plan, "pivot_root")[0]
    assert all(step.kind in ("signals", "mark", "exec") for step in plan.steps[write_at + 1 :])
    kept = only(plan, "dup", flags=LABEL_FD)
    assert (kept.fd, kept.data) == ("label", b"cloexec")
    assert only(plan, "close_from").flags == LABEL_FD + 1
    assert written.fd == "label_kept"
    assert "label_kept" in plan.given
    # nothing else differs from the plan of a job without
    rest = [step for step in plan.steps if step not in (opened, kept, written) and step.kind != "close_from"]
    assert rest == [step for step in plain.steps if step.kind != "close_from"]


def test_without_a_label_no_file_of_the_security_modules_is_opened(plan: Plan) -> None:
    assert [step.source for step in plan.steps if step.kind == "open_file"] == ["/proc/self/stat"]
    assert where(plan, "exec_label") == []
    assert "label_kept" not in plan.given


def test_every_file_system_made_for_a_job_gets_its_label_for_files() -> None:
    label = "system_u:object_r:job_file_t:s0:c1,c2"
    for by_spawner in (False, True):
        box = replace(RICH_BOX, overlay_by_spawner=by_spawner)
        labelled = build_plan(replace(RICH, selinux_mount=label), box)
        plain = build_plan(RICH, box)
        for step, before in zip(labelled.steps, plain.steps, strict=True):
            made = step.kind == "mount" and step.type is not None
            data = (before.data or b"") + f',context="{label}"'.encode() if made else before.data
            assert step == replace(before, data=data)
    assert {step.type for step in labelled.steps if b"context=" in (step.data or b"")} == {"tmpfs", "overlay", "devpts"}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]


# -- order -----------------------------------------------------------------------------------------------------------

# (kind and fields of the earlier steps, of the later ones, why): every one of the first comes before every one of
# the second, and both are there.
ORDER: list[tuple[tuple[str, dict[str, object]], tuple[str, dict[str, object]], str]] = [
    (("cgroup_join", {}), ("await_parent", {}), "all that set-up uses counts for the job"),
    (("cgroup_join", {}), ("unshare", {"flags": CLONE_NEWCGROUP}), "the namespace's root is the job's own cgroup"),
    (("await_parent", {}), ("setresuid", {"flags": 0}), "ids are mapped before they are taken"),
    (("setresuid", {"flags": 0}), ("mkdir", {}), "an unmapped id can create nothing"),
    (("umask", {}), ("mkdir", {}), "modes do not depend on the supervisor's mask"),
    (("mount", {"target": "/"}), ("move_mount", {}), "no mount of the job's shows on the host"),
    (("mount", {"target": "/"}), ("mount", {"target": "/scratch"}), "no mount of the job's shows on the host"),
    (("move_mount", {"fd": "layer"}), ("mount", {"type": "overlay"}), "the image is below the overlay"),
    (("mount", {"type": "overlay"}), ("pivot_root", {}), "the new root is there before it is entered"),
    (("fsmount", {"type": "proc"}), ("pivot_root", {}), "a new proc needs the old one in sight"),
    (("open_tree", {"source": "/dev"}), ("pivot_root", {}), "the prepared /dev lies on the old root"),
    (("pivot_root", {}), ("write_file", {}), "generated files go into the job's root"),
    (("pivot_root", {}), ("move_mount", {"fd": "bind0"}), "targets are resolved inside the job's root"),
    (("pivot_root", {}), ("chdir", {}), "the working directory is the container's"),
    (("dup", {}), ("close_from", {}), "what is kept is in place before the rest is closed"),
    (("close_from", {}), ("chdir", {}), "no descriptor can lead the working directory out (CVE-2024-21626)"),
    (("bounding_set", {}), ("capset", {}), "dropping from the bounding set takes a capability"),
    (("setgroups", {}), ("capset", {}), "changing groups takes a capability"),
    (("setresuid", {}), ("capset", {}), "changing ids changes capabilities"),
    (("capset", {}), ("no_new_privs", {}), "confinement is the last thing"),
    (("capset", {}), ("pdeathsig", {"fd": "supervisor_kept"}), "a change of credentials clears the signal"),
    (("setresuid", {}), ("pdeathsig", {"fd": "supervisor_kept"}), "a change of credentials clears the signal"),
    (("signals", {}), ("exec", {}), "what the supervisor ignores is not inherited"),
    (("no_new_privs", {}), ("exec", {}), "setuid files have no effect"),
]


@pytest.mark.parametrize("earlier, later, why", ORDER)
def test_order(earlier: tuple[str, dict[str, object]], later: tuple[str, dict[str, object]], why: str) -> None:
    plan = PLANS["rich"]
    first, second = where(plan, earlier[0], **earlier[1]), where(plan, later[0], **later[1])
    assert first, f"no step {earlier}"
    assert second, f"no step {later}"
    assert max(first) < max(second), why
    if (earlier[0], later[0]) not in (("setgroups", "capset"), ("setresuid", "capset")):
        assert max(first) < min(second), why


def test_exec_is_the_last_step_and_the_only_one(plan: Plan) -> None:
    assert where(plan, "exec") == [len(plan.steps) - 1]


def test_nothing_mounts_after_the_root_has_been_made_read_only() -> None:
    (sealed,) = where(PLANS["rich"], "mount_setattr", target="/", flags=ATTR_RDONLY)
    changing = {"mount", "move_mount", "mkdir", "mknod_file", "write_file", "symlink", "pivot_root", "fsmount"}
    assert not changing & set(kinds(PLANS["rich"])[sealed:])


def test_a_register_is_filled_before_it_is_used(plan: Plan) -> None:
    known = set(plan.given)
    for step in plan.steps:
        assert step.fd is None or step.fd in known, f"{step.kind} uses {step.fd}"
        if step.out:
            known.add(step.out)
    assert known == set(plan.registers)
    assert len(plan.registers) == len(set(plan.registers))


def test_every_given_descriptor_is_used(plan: Plan) -> None:
    assert set(plan.given) <= {step.fd for step in plan.steps}


# -- what a job asks for ---------------------------------------------------------------------------------------------


def test_all_namespaces_are_new(plan: Plan) -> None:
    call = plan.clone_call(False)
    for name in ("NEWUSER", "NEWNS", "NEWPID", "NEWUTS", "NEWIPC", "NEWNET"):
        assert f"CLONE_{name}" in call
    assert only(plan, "unshare").flags == CLONE_NEWCGROUP
    assert "CLONE_INTO_CGROUP" not in call
    assert "CLONE_INTO_CGROUP" in plan.clone_call(True)


@pytest.mark.parametrize("joins", [0, 1, 8])
def test_each_v1_cgroup_is_joined_by_a_descriptor_of_its_own(joins: int) -> None:
    plan = build_plan(PLAIN, Box("test", joins=joins))
    assert [step.fd for step in plan.steps if step.kind == "cgroup_join"] == [f"tasks{i}" for i in range(joins)]


def test_the_disk_limit_is_the_size_of_the_root() -> None:
    assert only(PLANS["rich"], "mount", target="/scratch").data == b"size=3145728,mode=0755"
    unlimited = build_plan(JobSpec("t", limits=Limits(disk=None)), Box("t"))
    assert only(unlimited, "mount", target="/scratch").data == b"size=0,mode=0755"


@pytest.mark.parametrize("memory, size", [(8 * MIB, 8 * MIB), (1024 * MIB, 64 * MIB), (None, 64 * MIB)])
def test_shared_memory_is_no_larger_than_the_memory_limit(memory: int | None, size: int) -> None:
    plan = build_plan(JobSpec("t", limits=Limits(memory=memory)), Box("t"))
    assert f"size={size}".encode() in (only(plan, "mount", target="/dev/shm").data or b"")


def test_kernel_file_systems_are_mounted_without_setuid_devices_and_programs(plan: Plan) -> None:
    assert only(plan, "fsmount", type="proc").call().count("NOSUID|MOUNT_ATTR_NODEV|MOUNT_ATTR_NOEXEC") == 1
    assert only(plan, "fsmount", type="sysfs").flags & ATTR_RDONLY
    for name in ("proc", "sys", "dev"):
        assert only(plan, "move_mount", fd=name).flags == RESOLVE_NO_SYMLINKS, "an image's link must not be followed"


def test_names_are_the_jobs_own() -> None:
    plan = PLANS["rich"]
    assert only(plan, "sethostname").data == b"node.example.org"
    assert only(plan, "setdomainname").data == b"example.org"
    assert only(plan, "write_file", target="/etc/hostname").data == b"node.example.org\n"
    assert b"127.0.1.1\tnode.example.org node\n" in (only(plan, "write_file", target="/etc/hosts").data or b"")
    assert only(PLANS["plain"], "setdomainname").data == b"localdomain"
    assert b"127.0.1.1\ttest\n" in (only(PLANS["plain"], "write_file", target="/etc/hosts").data or b"")


def test_binds_are_attached_in_their_order_and_follow_no_magic_link() -> None:
    plan = PLANS["rich"]
    found = [step for step in plan.steps if step.kind == "move_mount" and (step.fd or "").startswith("bind")]
    assert [(step.fd, step.target) for step in found] == [("bind0", "/usr"), ("bind1", "/in"), ("bind2", "/conf/file")]
    assert {step.flags for step in found} == {RESOLVE_NO_MAGICLINKS}
    assert [step.why for step in found] == [
        "/usr of the host, read-only",
        "/host/in of the host, read-only",
        "/host/file of the host, writable",
    ]


def test_a_file_is_mounted_upon_a_file_and_a_directory_upon_a_directory() -> None:
    plan = PLANS["rich"]
    (attach,) = where(plan, "move_mount", target="/conf/file")
    before = [(step.kind, step.target) for step in plan.steps[attach - 2 : attach]]
    assert before == [("mkdir", "/conf"), ("mknod_file", "/conf/file")]
    (attach,) = where(plan, "mount", target="/scratch/deep")
    before = [(step.kind, step.target) for step in plan.steps[attach - 2 : attach]]
    assert before == [("mkdir", "/scratch"), ("mkdir", "/scratch/deep")]


def test_a_tmpfs_has_its_size_and_may_be_read_only() -> None:
    scratch, frozen = (only(PLANS["rich"], "mount", target=name) for name in ("/scratch/deep", "/frozen"))
    assert scratch.data == b"mode=1777,size=5242880"
    assert "MS_RDONLY" not in scratch.call()
    assert "MS_RDONLY" in frozen.call()


@pytest.mark.parametrize("network, up", [("none", []), ("loopback", ["lo"])])
def test_the_loopback_link_is_up_only_where_it_was_asked_for(network: str, up: list[str]) -> None:
    plan = build_plan(JobSpec("t", network=network), Box("t"))
    assert [step.target for step in plan.steps if step.kind == "link_up"] == up


def test_descriptors_are_three_and_one_that_execve_closes(plan: Plan) -> None:
    found = [(step.fd, step.flags, step.data) for step in plan.steps if step.kind == "dup"]
    standard = [("stdin", 0, None), ("stdout", 1, None), ("stderr", 2, None)]
    assert found == [*standard, ("supervisor", SUPERVISOR_FD, b"cloexec")]
    assert only(plan, "close_from").flags == SUPERVISOR_FD + 1


def test_a_user_gets_its_ids_and_groups_and_no_capability_even_if_some_were_added() -> None:
    plan = PLANS["rich"]
    last = {kind: plan.steps[max(where(plan, kind))] for kind in ("setresuid", "setresgid", "setgroups")}
    assert (last["setresuid"].flags, last["setresgid"].flags) == (1000, 1001)
    assert struct.unpack("<2I", last["setgroups"].data or b"") == (4, 24)
    assert only(plan, "capset").flags == 0
    assert only(plan, "bounding_set").flags == 1 << 10


def test_root_inside_gets_the_capabilities_that_were_added_and_by_default_none() -> None:
    assert only(PLANS["plain"], "capset").flags == only(PLANS["plain"], "bounding_set").flags == 0
    added = build_plan(PLAIN, Box("t", capabilities=5))
    assert only(added, "capset").flags == only(added, "bounding_set").flags == 5


def test_resource_limits_are_soft_and_hard() -> None:
    found = {
        step.flags: struct.unpack("<2Q", step.data or b"") for step in PLANS["rich"].steps if step.kind == "rlimit"
    }
    assert found == {7: (77, 77), 4: (5, 5)}


def test_workdir_is_entered() -> None:
    assert only(PLANS["rich"], "chdir").target == "/srv/data"


# -- as a value ------------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_plans_that_can_be_kept() -> None:
    again = build_plan(RICH, RICH_BOX)
    assert again == PLANS["rich"]
    assert hash(again) == hash(PLANS["rich"])
    assert build_plan(PLAIN, RICH_BOX) != again


def test_a_plan_knows_nothing_of_a_single_run() -> None:
    text = "\n".join(step.call() for step in build_plan(JobSpec("t", command=("echo", "{index}")), Box("t")).steps)
    assert "{index}" not in text
    assert "{" not in text


def test_every_kind_of_the_core_can_be_shown_and_no_other() -> None:
    assert set(STEP_DOCS) == set(_core.STEP_NAMES)


def test_every_step_says_its_call_and_why(plan: Plan) -> None:
    for step in plan.steps:
        assert step.why, step.kind
        assert step.call(), step.kind
        assert "None" not in step.call(), step.call()


def test_calls_are_shown_as_they_are_made() -> None:
    plan = PLANS["rich"]
    shown = [step.call() for step in plan.steps]
    for call in (
        'mount(NULL, "/", NULL, MS_REC|MS_PRIVATE, NULL)',
        "unshare(CLONE_NEWCGROUP)",
        "prctl(PR_SET_PDEATHSIG, SIGKILL)",
        "umask(0o022)",
        "setgroups([4, 24])",
        "setresuid(1000, 1000, 1000)",
        'mkdirat("/conf", 0o755)',
        'move_mount(layer, "/scratch/lower")',
        'mount("devpts", "/dev/pts", "devpts", MS_NOSUID|MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")',
        'mount_setattr("/", MOUNT_ATTR_RDONLY)',
        "prlimit64(RLIMIT_NOFILE, 77)",
        "dup3(stdout, 1)",
        "close_range(4, ~0)",
        'ioctl(SIOCSIFFLAGS, "lo", IFF_UP)',
        'write(tasks2, "0")',
    ):
        assert call in shown, call


def test_rows_name_registers_by_their_position() -> None:
    numbers = {name: number for number, name in enumerate(_core.STEP_NAMES)}
    plan = PLANS["rich"]
    rows = plan.rows(numbers)
    assert len(rows) == len(plan.steps)
    for step, row in zip(plan.steps, rows, strict=True):
        assert row[0] == numbers[step.kind]
        assert (None if row[1] == -1 else plan.registers[row[1]]) == step.fd  # type: ignore[index, operator]
        assert (None if row[2] == -1 else plan.registers[row[2]]) == step.out  # type: ignore[index, operator]
        assert row[3:] == (step.flags, step.source, step.target, step.type, step.data)


def test_the_core_takes_every_plan(plan: Plan) -> None:
    numbers = {name: number for number, name in enumerate(_core.STEP_NAMES)}
    _core.Plan(plan.rows(numbers), plan.clone_flags, len(plan.registers))
