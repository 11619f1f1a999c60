"""Each kind of step, made to fail: the report names the step, its index and the kernel's errno."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import Bench, rlimit
from diyc import _core
from diyc.plan import CLONE_NEWNS, RESOLVE_NO_SYMLINKS, SIGKILL, Step

pytestmark = pytest.mark.privileged

MARK = Step("mark")
EXEC = Step("exec")
WAIT = (Step("await_parent"), Step("setresgid"), Step("setresuid"))

# kind -> what fails, and with which errno. The steps before it are WAIT: ids are mapped, the child is root inside.
FAILING: dict[str, tuple[Step, int]] = {
    "cgroup_join": (Step("cgroup_join", fd="null"), errno.EBADF),
    "pdeathsig": (Step("pdeathsig", flags=999), errno.EINVAL),
    "unshare": (Step("unshare", flags=1), errno.EINVAL),
    "setgroups": (Step("setgroups", data=b"\0" * 4 * 65537), errno.EINVAL),
    "setresgid": (Step("setresgid", flags=70000), errno.EINVAL),
    "setresuid": (Step("setresuid", flags=70000), errno.EINVAL),
    "mkdir": (Step("mkdir", target="/nowhere/dir", flags=0o755), errno.ENOENT),
    "mknod_file": (Step("mknod_file", target="/nowhere/file"), errno.ENOENT),
    "chown": (Step("chown", target="/nowhere"), errno.ENOENT),
    "sysctl": (Step("sysctl", target="/proc/sys/user/nowhere", data=b"0"), errno.ENOENT),
    "write_file": (Step("write_file", target="/nowhere/file", data=b"text"), errno.ENOENT),
    "symlink": (Step("symlink", source="to", target="/nowhere/link"), errno.ENOENT),
    "mount": (Step("mount", source="x", target="/", type="nosuchfs"), errno.ENODEV),
    "open_tree": (Step("open_tree", source="/nowhere", out="made", flags=1), errno.ENOENT),
    "open_file": (Step("open_file", source="/nowhere", out="made"), errno.ENOENT),
    "fsmount": (Step("fsmount", type="nosuchfs", out="made", data=b""), errno.ENODEV),
    "move_mount": (Step("move_mount", fd="null", target="/nowhere"), errno.ENOENT),
    "mount_setattr": (Step("mount_setattr", target="/nowhere", flags=1), errno.ENOENT),
    "pivot_root": (Step("pivot_root", target="/scratch"), errno.EINVAL),
    "sethostname": (Step("sethostname", data=b"x" * 65), errno.EINVAL),
    "setdomainname": (Step("setdomainname", data=b"x" * 65), errno.EINVAL),
    "link_up": (Step("link_up", target="nolink0"), errno.ENODEV),
    "dup": (Step("dup", fd="closed", flags=5), errno.EBADF),
    "chdir": (Step("chdir", target="/nowhere"), errno.ENOENT),
    "rlimit": (Step("rlimit", flags=99, data=rlimit(1)), errno.EINVAL),
    "exec_label": (Step("exec_label", fd="null", data=b"exec profile"), errno.EBADF),
    "exec": (EXEC, errno.ENOENT),
}
NEEDS_MORE = {"await_parent", "setsid", "bounding_set", "capset"}  # tests of their own below
CANNOT_FAIL = {
    "keyring",
    "mark",
    "umask",
    "close_from",
    "clear_ambient",
    "no_new_privs",
    "signals",
}  # by their manual pages


def test_every_kind_of_step_is_covered_here() -> None:
    assert set(FAILING) | NEEDS_MORE | CANNOT_FAIL == set(_core.STEP_NAMES)


@pytest.mark.parametrize("kind", FAILING)
def test_a_failing_step_is_named_with_its_index_and_errno(kind: str, bench: Bench) -> None:
    step, expected = FAILING[kind]
    before = (*WAIT, MARK)
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    given = {"null": null, "closed": 999}
    outcome = bench.run(*before, *((step,) if kind == "exec" else (step, EXEC)), given=given)
    os.close(null)
    assert (outcome.failed, outcome.index, outcome.errno) == (True, len(before), expected)


def test_a_refused_id_map_fails_the_waiting_step(bench: Bench) -> None:
    outcome = bench.run(MARK, Step("await_parent"), EXEC, id_map="nonsense\n")
    assert (outcome.failed, outcome.index, outcome.errno) == (True, 1, errno.EINVAL)


def test_a_refused_oom_score_fails_the_waiting_step(bench: Bench) -> None:
    outcome = bench.run(Step("await_parent"), EXEC, oom_score_adj="2000")
    assert (outcome.failed, outcome.index, outcome.errno) == (True, 0, errno.EINVAL)


def test_a_second_setsid_is_refused(bench: Bench) -> None:
    outcome = bench.run(*WAIT, Step("setsid"), Step("setsid"), EXEC)
    assert (outcome.index, outcome.errno) == (4, errno.EPERM)


def test_capabilities_that_were_dropped_cannot_be_taken_again(bench: Bench) -> None:
    outcome = bench.run(*WAIT, Step("capset", flags=0), Step("capset", flags=1), EXEC)
    assert (outcome.index, outcome.errno) == (4, errno.EPERM)


def test_the_bounding_set_needs_a_capability(bench: Bench) -> None:
    outcome = bench.run(*WAIT, Step("capset", flags=0), Step("bounding_set", flags=0), EXEC)
    assert (outcome.index, outcome.errno) == (4, errno.EPERM)


def test_clone_itself_failing_is_reported_as_such(bench: Bench) -> None:
    clone_fs = 0x200  # excludes a mount namespace of one's own
    outcome = bench.run(EXEC, namespaces=CLONE_NEWNS | clone_fs)
    assert (outcome.failed, outcome.index, outcome.errno, outcome.pid) == (True, -1, errno.EINVAL, 0)


def test_a_failing_step_of_the_spawner_is_reported_and_the_next_run_finds_a_clean_spawner(bench: Bench) -> None:
    tmpfs = Step("mount", source="t", target="/scratch", type="tmpfs")
    make = Step("mkdir", target="/scratch/made", flags=0o755)
    for _ in range(3):
        outcome = bench.run(tmpfs, make, Step("chown", target="/nowhere"), EXEC, spawner_steps=3)
        assert (outcome.failed, outcome.index, outcome.errno, outcome.pid) == (True, 2, errno.ENOENT, 0)
    outcome = bench.run(make, EXEC, spawner_steps=1, namespaces=CLONE_NEWNS)
    assert (outcome.index, outcome.errno) == (1, errno.ENOENT)  # the command: /scratch was there and empty
    assert bench.run(Step("chdir", target="/scratch/made"), EXEC).errno == errno.ENOENT


def test_a_dead_parent_is_noticed(bench: Bench) -> None:
    """Whoever is the parent now is not the one that the plan was made for."""
    stat = Step("open_file", source="/proc/self/stat", out="stat")
    for pid, expected in ((os.getpid(), errno.ENOENT), (os.getppid(), errno.ESRCH), (0, errno.ESRCH)):
        outcome = bench.run(stat, Step("pdeathsig", fd="stat", flags=SIGKILL, data=b"%d " % pid), EXEC)
        assert outcome.errno == expected


def test_a_symlink_in_place_of_a_mount_point_is_refused(bench: Bench) -> None:
    proc = Step("fsmount", type="tmpfs", out="made", data=b"size\0" + b"4k\0")
    link = Step("symlink", source="/sys", target="/scratch/proc")
    tmpfs = Step("mount", source="t", target="/scratch", type="tmpfs")
    move = Step("move_mount", fd="made", target="/scratch/proc", flags=RESOLVE_NO_SYMLINKS)
    outcome = bench.run(*WAIT, tmpfs, link, proc, move, EXEC)
    assert (outcome.index, outcome.errno) == (6, errno.ELOOP)


def test_a_file_that_does_not_fit_is_not_left_half_written_in_silence(bench: Bench) -> None:
    tmpfs = Step("mount", source="t", target="/scratch", type="tmpfs", data=b"size=4k")
    write = Step("write_file", target="/scratch/file", flags=0o644, data=b"x" * 10000)
    outcome = bench.run(*WAIT, tmpfs, write, EXEC)
    assert (outcome.index, outcome.errno) == (4, errno.ENOSPC)


def test_a_mount_option_that_does_not_exist_is_an_error(bench: Bench) -> None:
    outcome = bench.run(*WAIT, Step("fsmount", type="tmpfs", out="made", data=b"nosuch\0x\0"), EXEC)
    assert (outcome.index, outcome.errno) == (3, errno.EINVAL)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/nowhere/a", "/nowhere/b"], errno.ENOENT),
        (["/proc", "/nowhere"], errno.EACCES),  # a directory: found, but not to be run
        (["/proc/self/cmdline/x", "/nowhere"], errno.ENOENT),
        (["/proc/self/status", "/nowhere"], errno.EACCES),
    ],
)
def test_the_command_is_searched_as_execvp_does(paths: list[str], expected: int, bench: Bench) -> None:
    outcome = bench.run(*WAIT, EXEC, paths=paths)
    assert (outcome.index, outcome.errno) == (3, expected)


def blocked_plan(bench: Bench) -> tuple[int, Callable[[], None]]:
    """Submit a run whose second step writes to a full pipe, which blocks."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 65536)
    os.set_blocking(write_end, True)
    token = bench.submit(Step("await_parent"), Step("cgroup_join", fd="pipe"), EXEC, given={"pipe": write_end})

    def close() -> None:
        os.close(read_end)
        os.close(write_end)

    return token, close


def test_a_run_that_hangs_in_its_setup_can_be_killed_and_says_where(bench: Bench) -> None:
    token, close = blocked_plan(bench)
    while not bench.spawner.kill(token):
        pass  # not cloned yet
    outcome = bench.outcome()
    close()
    assert (outcome.failed, outcome.errno) == (True, 0)
    assert outcome.index <= 1
    assert not bench.spawner.kill(token)


def dispositions() -> dict[str, Any]:
    status = Path("/proc/self/status").read_text()
    return {
        line.split(":")[0]: line
        for line in status.splitlines()
        if line.startswith(("Sig", "Uid", "Gid", "Cap", "Umask"))
    }


def test_nothing_the_child_does_reaches_the_supervisor(bench: Bench) -> None:
    """It shares the supervisor's memory, so this is worth a look: ids, mask, signals, limits, directory, names."""
    before = (dispositions(), os.getcwd(), os.uname().nodename, signal.getsignal(signal.SIGPIPE))
    score = Path("/proc/self/oom_score_adj").read_text()
    steps = (
        Step("umask", flags=0o777),
        Step("setsid"),
        Step("sethostname", data=b"other"),
        Step("rlimit", flags=7, data=rlimit(64)),
        Step("signals"),
        Step("close_from", flags=0),
        Step("bounding_set"),
        Step("capset"),
        Step("no_new_privs"),
        Step("chdir", target="/proc"),
    )
    outcome = bench.run(*WAIT, *steps, EXEC, oom_score_adj="700")
    assert (outcome.index, outcome.errno) == (len(WAIT) + len(steps), errno.ENOENT)
    assert before == (dispositions(), os.getcwd(), os.uname().nodename, signal.getsignal(signal.SIGPIPE))
    assert Path("/proc/self/oom_score_adj").read_text() == score


def test_a_started_command_is_a_process_with_a_pidfd(bench: Bench) -> None:
    """A static program run from its descriptor, in nothing but a mount namespace."""
    fd = os.open("/usr/bin/busybox", os.O_PATH | os.O_CLOEXEC)
    paths = ["/nowhere", f"/proc/self/fd/{fd}"]
    outcome = bench.run(MARK, EXEC, namespaces=CLONE_NEWNS, argv=["sh", "-c", "exit 7"], paths=paths, id_map=None)
    os.close(fd)
    assert not outcome.failed
    assert outcome.marks[0] > 0
    assert outcome.wait() == (os.CLD_EXITED, 7)


def test_runs_queued_at_close_are_dropped_and_blocked_ones_end_first(tmp_path: Path) -> None:
    made = Bench(str(tmp_path))
    token, close = blocked_plan(made)
    for _ in range(3):
        made.submit(EXEC)
    while not made.spawner.kill(token):
        pass
    made.spawner.close()
    close()
    with pytest.raises(ValueError, match="closed"):
        made.spawner.completions()
