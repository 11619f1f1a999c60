"""What a job sees and is: the promises of the default profile, each looked at from inside by the probe, and from
outside where inside could be deceived."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from system.helpers import Facts, Jobs, Live, on_uvloop, start

pytestmark = pytest.mark.privileged

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
PR_GET_DUMPABLE = 3
SIX_DEVICES = {"null": "1:3", "zero": "1:5", "full": "1:7", "random": "1:8", "urandom": "1:9", "tty": "5:0"}


def live(jobs: Jobs, look: Any, *specs_keys: dict[str, Any]) -> Any:
    """What `look` makes of waiting runs with these keys."""

    async def main() -> Any:
        async with jobs.supervisor() as supervisor:
            runs = [await start(supervisor, jobs.probe("wait", **keys)) for keys in specs_keys]
            seen = look(*runs)
            for run in runs:
                await run.end()
            return seen

    return on_uvloop(main())


# ---- namespaces, ids ----


def test_all_seven_namespaces_differ_from_the_hosts(jobs: Jobs) -> None:
    facts = jobs.report()
    shared = [name for name in NAMESPACES if facts.one(f"ns.{name}") == os.readlink(f"/proc/self/ns/{name}")]
    assert shared == []


def test_all_seven_namespaces_differ_between_concurrent_runs(jobs: Jobs) -> None:
    def look(*runs: Live) -> list[str]:
        links = [[os.readlink(f"/proc/{run.pid}/ns/{name}") for run in runs] for name in NAMESPACES]
        return [first for first, second in links if first == second]

    assert live(jobs, look, {}, {}) == []


def test_root_inside_is_an_unprivileged_id_outside(jobs: Jobs) -> None:
    def look(run: Live) -> tuple[list[str], list[str], list[str]]:
        return run.status("Uid"), run.status("Gid"), run.status("Groups")

    uids, gids, groups = live(jobs, look, {})
    assert len(set(uids)) == 1
    assert int(uids[0]) >= 524288
    assert gids == uids
    assert groups == []
    assert jobs.report().one("uid") == "0 0 0"


def test_user_1000_inside_is_another_id_outside(jobs: Jobs) -> None:
    uids = live(jobs, lambda run: run.status("Uid"), {"user": "1000"})
    assert {int(uid) % 65536 for uid in uids} == {1000}
    assert min(map(int, uids)) > 524288


def test_ids_inside_end_at_65535(jobs: Jobs) -> None:
    facts = jobs.report()
    inside, outside, count = facts.one("uid_map").split()
    assert (inside, count) == ("0", "65536")
    assert int(outside) >= 524288
    assert facts.one("gid_map") == facts.one("uid_map")


def test_concurrent_runs_have_disjoint_id_ranges(jobs: Jobs) -> None:
    firsts = live(jobs, lambda *runs: [int(run.status("Uid")[0]) for run in runs], {}, {}, {})
    assert len({uid // 65536 for uid in firsts}) == 3
    assert all(uid % 65536 == 0 for uid in firsts)


def test_host_name_is_the_jobs_own(jobs: Jobs) -> None:
    facts = jobs.report(hostname="inside.example")
    assert facts.one("hostname") == facts.one("etc_hostname") == "inside.example"
    assert facts.one("domainname") == "example"
    assert os.uname().nodename != "inside.example"


def test_host_name_is_the_jobs_name_by_default(jobs: Jobs) -> None:
    facts = jobs.report()
    assert (facts.one("hostname"), facts.one("domainname")) == ("test", "localdomain")
    assert "127.0.1.1\ttest" in facts["hosts"]


# ---- processes, mounts ----


def test_proc_shows_own_processes_only(jobs: Jobs) -> None:
    facts = jobs.report()
    assert facts["process"] == ["1"]
    assert (facts.one("pid"), facts.one("ppid")) == ("1", "0")


def mounts(facts: Facts) -> list[tuple[str, str, str, str]]:
    """Each mount's point, type, source and which part of the file system it shows."""
    found = []
    for line in facts["mount"]:
        left, right = line.split(" - ")
        kind, source, _ = right.split(" ", 2)
        found.append((left.split()[4], kind, source, left.split()[3]))
    return sorted(found)


FLAGS = ("nosuid", "nodev", "noexec", "ro")
OWN_MOUNTS = [
    ("/", "overlay", "overlay", "/"),
    ("/dev", "tmpfs", "dev", "/"),
    ("/dev/pts", "devpts", "devpts", "/"),
    ("/dev/shm", "tmpfs", "shm", "/"),
    ("/proc", "proc", "none", "/"),
    ("/sys", "sysfs", "none", "/"),
]


def test_mounts_are_the_containers_own_and_no_other(jobs: Jobs) -> None:
    assert mounts(jobs.report()) == OWN_MOUNTS


def test_only_asked_for_mounts_are_added(jobs: Jobs) -> None:
    jobs.path.joinpath("given").mkdir()
    facts = jobs.report(
        mounts=[
            {"type": "bind", "source": str(jobs.path / "given"), "target": "/given"},
            {"type": "tmpfs", "target": "/scratch"},
        ]
    )
    added = {mount[:2] for mount in mounts(facts)} - {mount[:2] for mount in OWN_MOUNTS}
    assert {point for point, _ in added} == {"/given", "/scratch"}


def test_mounts_of_the_host_image_are_its_programs_read_only(jobs: Jobs) -> None:
    result = jobs.run(jobs.of("host", "cat", "/proc/self/mountinfo"))
    own = [mount[0] for mount in OWN_MOUNTS]
    added = [line for line in result.stdout.decode().splitlines() if line.split()[4] not in own]
    points = {line.split()[4] for line in added}
    assert points == {"/usr"} | {f"/{name}" for name in ("bin", "sbin", "lib", "lib64") if real_directory(f"/{name}")}
    assert all(line.split()[5].startswith("ro,nosuid,nodev") for line in added)


def real_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def test_no_mount_is_shared_with_the_host(jobs: Jobs) -> None:
    optional = [line.split(" - ")[0].split()[6:] for line in jobs.report()["mount"]]
    assert optional == [[]] * len(OWN_MOUNTS)


def test_mounts_give_no_setuid_programs_no_devices_and_no_writing_but_where_needed(jobs: Jobs) -> None:
    options = {line.split()[4]: set(line.split()[5].split(",")) for line in jobs.report()["mount"]}
    lacking = {flag: {point for point, found in options.items() if flag not in found} for flag in FLAGS}
    assert lacking == {
        "nosuid": set(),
        "nodev": {"/dev", "/dev/pts"},
        "noexec": {"/"},
        "ro": {"/", "/proc", "/dev/pts", "/dev/shm"},
    }


def test_root_has_the_image_and_the_mount_points_only(jobs: Jobs) -> None:
    assert sorted(jobs.report()["root"]) == ["dev", "etc", "probe", "proc", "sys"]


def test_cgroup_namespace_hides_the_path_of_the_run(jobs: Jobs) -> None:
    assert {line.split(":", 2)[2] for line in jobs.report()["cgroup"]} == {"/"}


# ---- what is inherited ----


@contextmanager
def untidy_supervisor() -> Iterator[None]:
    """This process with 100 inheritable descriptors, ignored and blocked signals and another umask."""
    with ExitStack() as stack:
        for _ in range(100):
            fd = os.open("/", os.O_RDONLY)
            stack.callback(os.close, fd)
            os.set_inheritable(fd, True)
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGUSR1):
            stack.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
        blocked = {signal.SIGUSR2, signal.SIGALRM}
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, blocked))
        stack.callback(os.umask, os.umask(0o077))
        yield


def test_descriptors_are_0_1_2_only(jobs: Jobs) -> None:
    with untidy_supervisor():
        facts = jobs.report()
    numbers, links = zip(*(fd.split(" ") for fd in facts["fd"]), strict=True)
    assert numbers == ("0", "1", "2")
    assert links[0] == "/dev/null"
    assert [link.partition(":")[0] for link in links[1:]] == ["pipe", "pipe"]


def test_no_signal_is_ignored_or_blocked(jobs: Jobs) -> None:
    with untidy_supervisor():
        facts = jobs.report()
    assert (facts.all("ignored"), facts.all("blocked")) == ([], [])
    assert {facts.one(f"status.{key}") for key in ("SigBlk", "SigIgn", "SigCgt")} == {"0" * 16}


def test_umask_is_022(jobs: Jobs) -> None:
    with untidy_supervisor():
        assert jobs.report().one("umask") == "22"


def test_files_made_for_the_job_do_not_depend_on_the_supervisors_umask(jobs: Jobs) -> None:
    with untidy_supervisor():
        facts = Facts.of(jobs.run(jobs.probe("look", "/proc", "/dev", "/dev/null", "/etc/hosts", "/dev/shm", "/")))
    modes = {path: facts.one(path).split()[1] for path in facts}
    assert modes == {
        "/proc": "555",
        "/dev": "755",
        "/dev/null": "666",
        "/etc/hosts": "644",
        "/dev/shm": "1777",
        "/": "755",
    }


def test_session_is_new_and_has_no_terminal(jobs: Jobs) -> None:
    facts = jobs.report()
    assert (facts.one("sid"), facts.one("pgid")) == ("1", "1")
    refused = Facts.of(jobs.run(jobs.probe("forbidden")))
    assert refused.number("new_terminal") == errno.ENXIO


def test_oom_score_is_500_and_cannot_be_lowered(jobs: Jobs) -> None:
    assert jobs.report().one("oom_score_adj") == "500"
    assert Facts.of(jobs.run(jobs.probe("forbidden"))).number("lower_oom_score") == errno.EACCES


def test_limits_of_descriptors_and_core_files_are_the_documented_ones(jobs: Jobs) -> None:
    facts = jobs.report()
    assert (facts.one("rlimit.nofile"), facts.one("rlimit.core")) == ("1024 1024", "0 0")


def test_job_dies_with_its_supervisor(jobs: Jobs) -> None:
    assert jobs.report().one("pdeathsig") == str(int(signal.SIGKILL))


def test_job_and_supervisor_stay_dumpable(jobs: Jobs) -> None:
    """The child's change of credentials tells on the memory it shares with the supervisor until execve."""
    libc = ctypes.CDLL(None)
    before = libc.prctl(PR_GET_DUMPABLE)
    assert jobs.report().one("dumpable") == "1"
    assert libc.prctl(PR_GET_DUMPABLE) == before


# ---- rights ----


@pytest.mark.parametrize("user", ["root", "1000"])
def test_no_capability_in_any_set(jobs: Jobs, user: str) -> None:
    facts = jobs.report(user=user)
    sets = {name: int(facts.one(f"status.{name}"), 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert sets == dict.fromkeys(sets, 0)
    assert (facts.all("bounding"), facts.all("ambient")) == ([], [])


def test_cap_add_gives_that_capability_and_no_other(jobs: Jobs) -> None:
    facts = jobs.report(security={"cap_add": ["CHOWN"]})
    sets = {name: int(facts.one(f"status.{name}"), 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert sets == {"CapInh": 0, "CapPrm": 1, "CapEff": 1, "CapBnd": 1, "CapAmb": 0}


@pytest.mark.parametrize("user", ["root", "1000"])
def test_no_new_privs_is_set(jobs: Jobs, user: str) -> None:
    facts = jobs.report(user=user)
    assert facts.one("no_new_privs") == facts.one("status.NoNewPrivs") == "1"


def test_what_no_job_may_do_is_refused(jobs: Jobs) -> None:
    facts = {name: int(values[0]) for name, values in Facts.of(jobs.run(jobs.probe("forbidden"))).items()}
    # The owner of what lies in /sys and /proc is not mapped: refused before it is asked whether the mount is read-only.
    assert facts.pop("write_sys") in (errno.EACCES, errno.ENOENT)
    assert facts.pop("write_sysrq") in (errno.EACCES, errno.ENOENT)  # ENOENT: a kernel without them
    assert facts == {
        "mknod_device": errno.EPERM,
        "mknod_in_dev": errno.EROFS,
        "mkdir_sys": errno.EROFS,
        "mkdir_dev": errno.EROFS,
        "remount": errno.EPERM,
        "mount_tmpfs": errno.EPERM,
        "umount_proc": errno.EPERM,
        "chroot": errno.EPERM,
        "sethostname": errno.EPERM,
        "lower_oom_score": errno.EACCES,
        "raise_nofile": errno.EPERM,
        "open_kmsg": errno.ENOENT,
        "new_terminal": errno.ENXIO,
        "write_sysctl": errno.EACCES,
        "init_root": errno.ENOENT,
    }


# ---- /dev ----


def test_dev_has_six_devices_and_the_usual_links(jobs: Jobs) -> None:
    found = {line.split()[0]: line.split()[1:] for line in jobs.report()["dev"]}
    assert found == {
        **{name: ["20666", number] for name, number in SIX_DEVICES.items()},
        **{name: ["120777", "0:0"] for name in ("fd", "stdin", "stdout", "stderr", "ptmx")},
        "pts": ["40755", "0:0"],
        "shm": ["41777", "0:0"],
    }


@pytest.mark.parametrize("user", ["root", "1000"])
def test_devices_and_terminals_work(jobs: Jobs, user: str) -> None:
    before = set(os.listdir("/dev/pts"))
    facts = Facts.of(jobs.run(jobs.probe("allowed", user=user)))
    assert facts.one("read_zero") == "1 0"
    assert facts.one("ptsname") == "/dev/pts/0"
    assert facts.number("write_full") == errno.ENOSPC
    worked = ("write_null", "read_urandom", "write_shm", "ptmx", "unlockpt", "open_pts")
    assert {name: facts.number(name) for name in worked} == dict.fromkeys(worked, 0)
    assert set(os.listdir("/dev/pts")) == before


@pytest.mark.parametrize("user", ["root", "1000"])
def test_dev_stdout_and_stderr_can_be_opened(jobs: Jobs, user: str) -> None:
    facts = Facts.of(jobs.run(jobs.probe("allowed", user=user)))
    assert (facts.number("open_stdout"), facts.number("open_stderr")) == (0, 0)


# ---- network ----


def test_network_none_has_no_link_up(jobs: Jobs) -> None:
    links = dict(line.split() for line in jobs.report()["link"])
    assert links["lo"] == "down"
    assert set(links.values()) == {"down"}
    assert Facts.of(jobs.run(jobs.probe("loopback"))).number("v4") != 0


def test_network_loopback_reaches_itself_only(jobs: Jobs) -> None:
    network = {"mode": "loopback"}
    links = dict(line.split() for line in jobs.report(network=network)["link"])
    assert [name for name, state in links.items() if state == "up"] == ["lo"]
    facts = Facts.of(jobs.run(jobs.probe("loopback", network=network)))
    assert facts.number("v4") == 0
    if os.path.exists("/proc/net/if_inet6"):
        assert facts.number("v6") == 0


def test_sys_shows_the_links_of_the_own_network_only(jobs: Jobs) -> None:
    facts = jobs.report()
    control_files = {"bonding_masters"}
    assert set(facts["sys_net"]) - control_files == {line.split()[0] for line in facts["link"]}


# ---- the command's world: user, environment, working directory, input ----


@pytest.mark.parametrize(
    "user, uid, gid, groups, home",
    [
        ("root", 0, 0, [], "/root"),
        ("worker", 1000, 1000, ["29", "44"], "/home/worker"),
        ("1000", 1000, 1000, ["29", "44"], "/home/worker"),
        (1000, 1000, 1000, ["29", "44"], "/home/worker"),
        ("1234", 1234, 0, [], "/"),
        ("1234:5678", 1234, 5678, [], "/"),
        ("65535:65535", 65535, 65535, [], "/"),
    ],
)
def test_user_is_who_the_image_says(
    jobs: Jobs, user: str | int, uid: int, gid: int, groups: list[str], home: str
) -> None:
    facts = jobs.report(user=user)
    assert facts.one("uid") == f"{uid} {uid} {uid}"
    assert facts.one("gid") == f"{gid} {gid} {gid}"
    assert sorted(facts.all("group")) == groups
    assert f"HOME={home}" in facts["env"]


def test_environment_is_exactly_the_documented_one(jobs: Jobs) -> None:
    os.environ["LEAKED"] = "from the supervisor"
    try:
        result = jobs.run(jobs.probe("report", env={"LANG": "C.UTF-8", "N": "run {index}"}, hostname="h"))
    finally:
        del os.environ["LEAKED"]
    assert sorted(Facts.of(result)["env"]) == [
        "DIYC_ATTEMPT=1",
        "DIYC_INDEX=0",
        "DIYC_JOB=test",
        f"DIYC_RUN_ID={result.run_id}",
        "HOME=/root",
        "HOSTNAME=h",
        "LANG=C.UTF-8",
        "N=run 0",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]


def test_env_file_is_read_and_env_overrides_it(jobs: Jobs) -> None:
    jobs.path.joinpath("test.env").write_text("# comment\nONE=1\nTWO='two words'\nPATH=/elsewhere\n")
    facts = jobs.report(env_file=str(jobs.path / "test.env"), env={"ONE": "one"})
    assert {"ONE=one", "TWO=two words", "PATH=/elsewhere"} <= set(facts["env"])


def test_arguments_arrive_as_they_are(jobs: Jobs) -> None:
    words = ["", "two words", "$HOME", "*", "{{index}", "é", "-x"]
    result = jobs.run(jobs.probe("report", *words))
    assert Facts.of(result)["arg"] == ["", "two words", "$HOME", "*", "{index}", "é", "-x"]


def test_command_is_looked_up_on_the_jobs_path(jobs: Jobs) -> None:
    assert jobs.run(jobs.of(jobs.image, "probe", "exit", "0", env={"PATH": "/nowhere:/"})).verdict == "ok"


def test_workdir_is_where_the_command_starts(jobs: Jobs) -> None:
    assert jobs.report().one("cwd") == "/"
    assert jobs.report(workdir="/etc").one("cwd") == "/etc"


def test_stdin_is_the_named_file(jobs: Jobs) -> None:
    data = os.urandom(200_000)
    jobs.path.joinpath("in").write_bytes(data)
    result = jobs.run(jobs.probe("copy", stdin=str(jobs.path / "in")))
    assert (result.verdict, result.stdout) == ("ok", data)


def test_stdin_cannot_be_written_to(jobs: Jobs) -> None:
    file = jobs.path / "in"
    file.write_text("as it was")
    file.chmod(0o666)
    jobs.run(jobs.of("host", "sh", "-c", "echo changed >&0; echo changed >/proc/self/fd/0", stdin=str(file)))
    assert file.read_text() == "as it was"


# ---- an image's own passwd is not believed ----


def hostile(jobs: Jobs, name: str = "passwd") -> Path:
    """An image whose /etc/passwd (or group) is still to be made."""
    image = jobs.path / "hostile"
    image.joinpath("etc").mkdir(parents=True)
    os.link(jobs.image / "probe", image / "probe")
    for other, text in (("passwd", "worker:x:1000:1000::/:/x\n"), ("group", "worker:x:1000:\n")):
        if other != name:
            image.joinpath("etc", other).write_text(text)
    return image


def refused(jobs: Jobs, image: Path, user: str) -> str:
    """What is said of a user whom the image does not give."""
    from diyc.errors import ImageError

    with pytest.raises(ImageError) as error:
        jobs.run(jobs.probe("report", image=image, user=user))
    return str(error.value)


def test_passwd_that_links_to_the_hosts_is_not_followed(jobs: Jobs) -> None:
    image = hostile(jobs)
    outside = jobs.path / "outside"
    outside.write_text("secret:x:42:42::/found:/bin/sh\n")
    image.joinpath("etc/passwd").symlink_to(outside)
    assert '"secret" is not in the image' in refused(jobs, image, "secret")
    assert jobs.report(image=image, user="42").one("uid") == "42 42 42"


def test_passwd_that_is_a_fifo_does_not_block(jobs: Jobs) -> None:
    image = hostile(jobs)
    os.mkfifo(image / "etc/passwd")
    assert "not in the image" in refused(jobs, image, "worker")
    assert jobs.report(image=image, user="42").one("uid") == "42 42 42"


def test_passwd_that_is_huge_is_not_read_whole(jobs: Jobs) -> None:
    image = hostile(jobs)
    with open(image / "etc/passwd", "wb") as file:
        file.write(b"worker:x:7:7::/:/x\n")
        file.truncate(10 * 1024**3)
        file.seek(9 * 1024**3)
        file.write(b"\nlate:x:8:8::/:/x\n")
    assert jobs.report(image=image, user="worker").one("uid") == "7 7 7"
    assert '"late" is not in the image' in refused(jobs, image, "late")


@pytest.mark.parametrize("number", ["65536", "4294967296", "4294967295", "9" * 5000])
def test_passwd_with_an_id_beyond_the_containers_is_refused(jobs: Jobs, number: str) -> None:
    image = hostile(jobs)
    image.joinpath("etc/passwd").write_text(f"worker:x:{number}:1000::/:/x\n")
    assert "worker" in refused(jobs, image, "worker")


@pytest.mark.parametrize("home", [b"/ho\0me", b"/caf\xe9", b"relative", b""])
def test_passwd_with_a_strange_home_does_no_harm(jobs: Jobs, home: bytes) -> None:
    image = hostile(jobs)
    image.joinpath("etc/passwd").write_bytes(b"worker:x:7:7::" + home + b":/x\n")
    facts = jobs.report(image=image, user="worker")
    assert facts.one("uid") == "7 7 7"
    (value,) = [variable for variable in facts["env"] if variable.startswith("HOME=")]
    assert value.startswith("HOME=/")


def test_group_that_names_thousands_of_groups_does_no_harm(jobs: Jobs) -> None:
    image = hostile(jobs, "group")
    image.joinpath("etc/group").write_text("".join(f"g{i}:x:{i}:worker\n" for i in range(1, 30_000)))
    facts = jobs.report(image=image, user="worker")
    assert facts.one("gid") == "1000 1000 1000"
    assert 0 < len(facts["group"]) <= 64
