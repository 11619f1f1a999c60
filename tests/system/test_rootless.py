"""The commands as an ordinary user starts them: with subordinate ids, and with the one id everybody has.

Root plays an ordinary user (setpriv, files of /etc covered in a mount namespace of the test's own); where the tests
run as one already, that user is taken as they are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from needs import require
from system.commands import DIYC, MARK, Done, Place, finish, killed_at_the_end, marked, wait_until

UID, FIRST = 54321, 700_000_000  # of nobody on any host that these tests know
BEST_EFFORT = 'enforce = "best-effort"'
FREE = 'limits = { memory = "none", swap = "none", pids = "none" }'


@dataclass(slots=True)
class User(Place):
    """A place where commands are started by `prefix`, as a user with `subordinate` ids or none."""

    prefix: tuple[str, ...] = ()
    subordinate: bool = False

    def spawn(self, *command: str, **popen: Any) -> subprocess.Popen[str]:
        return Place.spawn(self, *self.prefix, *command, **popen)


def _etc(root: Path, subordinate: bool) -> list[str]:
    """Files that cover those of /etc: who the user is, and what ids newuidmap may lend."""
    lent = f"ordinary:{FIRST}:65536\n" if subordinate else ""
    texts = {
        "passwd": f"root:x:0:0::/root:/bin/sh\nordinary:x:{UID}:{UID}::/:/bin/sh\n",
        "group": f"root:x:0:\nordinary:x:{UID}:\n",
        "subuid": lent,
        "subgid": lent,
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    return [f"mount --bind {root}/{name} /etc/{name}" for name in texts if Path("/etc", name).exists()]


def _prefix(root: Path, subordinate: bool) -> tuple[str, ...]:
    become = f'exec setpriv --reuid {UID} --regid {UID} --clear-groups -- "$@"'
    script = " && ".join([*_etc(root, subordinate), become])
    return ("unshare", "--mount", "sh", "-c", script, "sh")


@pytest.fixture(params=["subordinate ids", "one id"])
def user(request: pytest.FixtureRequest) -> Iterator[User]:
    """An ordinary user with a directory of their own that is gone afterwards."""
    subordinate = request.param == "subordinate ids"
    require("user_namespaces", "overlay.rootless", *(["program.newuidmap"] if subordinate else []))
    root = Path(tempfile.mkdtemp(prefix="diyc-rootless-"))
    try:
        home = root / "home"
        home.mkdir()
        environment = {"HOME": str(home)}
        if os.geteuid() == 0:
            root.chmod(0o755)
            os.chown(home, UID, UID)
            prefix = _prefix(root, subordinate)
            _require_reachable(prefix)
            environment |= {"XDG_RUNTIME_DIR": "", "XDG_STATE_HOME": ""}
        else:
            if subordinate is not _has_subordinate_ids():
                pytest.skip(f"this user has {'no' if subordinate else 'a set of'} subordinate ids")
            prefix = ()
        yield User(home, environment, prefix, subordinate)
    finally:
        if os.geteuid() == 0:
            shutil.rmtree(root)
        else:
            subprocess.run([DIYC, "unshare", "rm", "-rf", str(root)], check=True)


def _has_subordinate_ids() -> bool:
    from diyc.rootless import lent_ids

    return not isinstance(lent_ids(os.getuid()), str)


def _require_reachable(prefix: tuple[str, ...]) -> None:
    """Skip where an ordinary user may not even run this Python."""
    tried = subprocess.run([*prefix, sys.executable, "-c", "import diyc._core"], check=False, capture_output=True)
    if tried.returncode:
        pytest.skip(f"{sys.executable} or diyc is closed to an ordinary user: {tried.stderr.decode()[-200:]}")


def _supervise(user: User, jobs: str, supervisor: str = "") -> Done:
    """The jobs, without those limits that take a cgroup, as not every ordinary user has one."""
    user.write(f"[defaults]\n{FREE}\n{jobs}", supervisor or BEST_EFFORT)
    return user.supervise("--json", "-q")


def _one(done: Done) -> dict[str, Any]:
    assert len(done.results) == 1, done.stderr
    return done.results[0]


def test_a_job_is_root_of_a_container_and_the_user_outside(user: User) -> None:
    done = _supervise(
        user, '[jobs.a]\nshell = "id -u; hostname; cat /proc/self/uid_map; echo $$; grep CapEff /proc/self/status"'
    )
    result = _one(done)
    assert (result["verdict"], result["stderr"]) == ("ok", "")
    lines = result["stdout"].split("\n")
    assert lines[:2] == ["0", "a"]
    extents = [line.split() for line in lines[2:-3]]
    assert sum(int(count) for _, _, count in extents) == (65536 if user.subordinate else 1)
    assert lines[-3:] == ["1", "CapEff:\t0000000000000000", ""]


def test_the_root_can_be_written_to_up_to_its_limit_and_vanishes(user: User) -> None:
    script = (
        "rm -r /etc/alternatives && mkdir /etc/alternatives && ls -A /etc/alternatives; head -c 9000000 /dev/zero >/big"
    )
    result = _one(_supervise(user, f'[jobs.a]\nshell = "{script}"\nlimits = {{ disk = "4MiB" }}'))
    assert (result["verdict"], result["stdout"]) == ("exit", "")
    assert "No space left on device" in result["stderr"]


def test_a_directory_of_the_users_own_can_be_written_to(user: User) -> None:
    shared = user.root / "shared"
    shared.mkdir()
    os.chown(shared, *((UID, UID) if os.geteuid() == 0 else (-1, -1)))
    mounts = f'mounts = [{{ type = "bind", source = "{shared}", target = "/shared" }}]'
    result = _one(_supervise(user, f'[jobs.a]\nshell = "echo mine >/shared/new"\n{mounts}'))
    assert (result["verdict"], result["stderr"]) == ("ok", "")
    made = (shared / "new").stat()
    assert made.st_uid == shared.stat().st_uid


def test_the_network_is_a_loopback_or_nothing(user: User) -> None:
    script = "cat /sys/class/net/lo/operstate /sys/class/net/lo/flags; ls /sys/class/net"
    jobs = f'[jobs.{{0}}]\nshell = "{script}"\nnetwork.mode = "{{0}}"\n'
    done = _supervise(user, jobs.format("none") + jobs.format("loopback"))
    flags = {result["job"]: result["stdout"].split()[1:] for result in done.results}
    assert flags == {"none": ["0x8", "lo"], "loopback": ["0x9", "lo"]}  # IFF_LOOPBACK, and IFF_UP


def _archive(user: User) -> Path:
    """Busybox, and a directory of user 1000."""
    require("program.busybox")
    path = user.root / "image.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(shutil.which("busybox") or "", "bin/sh")
        for name, uid in (("mine", 1000), ("etc", 0)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o755, uid, uid
            tar.addfile(entry)
    path.chmod(0o644)
    return path


def test_an_archives_owners_are_kept_where_there_are_ids_for_them(user: User) -> None:
    image = f'[images.a]\ntar = "{_archive(user)}"\n'
    done = _supervise(user, f'{image}[jobs.a]\nimage = "a"\nuser = "1000:1000"\nshell = "echo >/mine/new && echo made"')
    if user.subordinate:
        assert _one(done)["stdout"] == "made\n", done.stderr
    else:
        assert done.status == 3
        assert "there is no user 1000 here, only 0 to 0" in done.stderr
        assert "/etc/subuid" in done.stderr


def test_what_needs_a_cgroup_that_nobody_delegated_is_refused_by_name(user: User) -> None:
    if _delegated():
        pytest.skip("this user's systemd hands out cgroups")
    user.write('[jobs.a]\nshell = "true"\n')
    done = user.supervise("--json", "-q")
    assert (done.status, done.stdout) == (3, "")
    assert "cgroup" in done.stderr
    assert "Delegate" in done.stderr


def test_best_effort_says_which_limits_are_not_enforced(user: User) -> None:
    if _delegated():
        pytest.skip("this user's systemd hands out cgroups")
    user.write('[jobs.a]\nshell = "echo ran"\n', BEST_EFFORT)
    done = user.supervise("--json")
    assert _one(done)["stdout"] == "ran\n"
    assert "not enforced: limits.memory" in done.stderr
    assert _one(done)["memory_peak_bytes"] is None


def _delegated() -> bool:
    """Whether an ordinary user has a systemd to ask for a cgroup."""
    return os.geteuid() != 0 and Path(os.environ.get("XDG_RUNTIME_DIR", "/nowhere"), "systemd/private").exists()


def test_limits_are_enforced_in_a_cgroup_that_systemd_delegates(user: User) -> None:
    if not _delegated():
        pytest.skip("this user has no systemd of their own")
    user.write(
        '[jobs.hog]\ncommand = ["tail", "/dev/zero"]\nlimits = { memory = "16MiB" }\n'
        '[jobs.many]\nshell = "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait"\nlimits = { pids = 4 }\n'
    )
    done = user.supervise("--json", "-q")
    assert done.verdicts()["hog"] == "oom", done.stderr
    hog, many = sorted(done.results, key=lambda result: str(result["job"]))
    assert hog["oom_kills"] == 1
    assert many["pids_limit_hits"] > 0


def test_diyc_run_passes_output_and_exit_status(user: User) -> None:
    if not _delegated():
        done = user.run("host", "true")
        assert done.status == 125
        assert "Delegate" in done.stderr
        return
    done = user.run("host", "sh", "-c", "echo out; exit 7")
    assert (done.stdout, done.status) == ("out\n", 7), done.stderr


def _sleepers(mark: str) -> list[int]:
    return [pid for pid in marked(mark) if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]


def test_a_killed_supervisor_takes_its_jobs_along(user: User) -> None:
    mark = f"rootless-{os.getpid()}-{user.subordinate}"
    user.environment[MARK] = mark
    job = f'[jobs.a]\nshell = "sleep 1000 & sleep 1000"\nenv = {{ {MARK} = "{mark}" }}\ncount = 3\n'
    user.write(f"[defaults]\n{FREE}\n{job}", BEST_EFFORT)
    with killed_at_the_end(user.start("-q")) as supervisor:
        wait_until(lambda: len(_sleepers(mark)) == 6, "the jobs")
        for pid in set(marked(mark)) - set(_sleepers(mark)):
            os.kill(pid, signal.SIGKILL)  # the supervisor, and whatever started it
        supervisor.wait()
        wait_until(lambda: not marked(mark), "their end")


def test_nothing_is_left_behind(user: User) -> None:
    _supervise(user, '[jobs.a]\nshell = "true"\ncount = 5')
    left = [path for path in (user.root / "run").rglob("*") if path.is_file() and not path.name.endswith("lock")]
    assert left == []


def test_cleanup_is_for_the_users_own(user: User) -> None:
    done = user.diyc("cleanup", "--runtime-dir", f"{user.root}/run")
    assert (done.status, done.stdout) == (0, "nothing was left behind\n"), done.stderr


def test_unshare_shows_what_jobs_see(user: User) -> None:
    done = finish(user.spawn(DIYC, "unshare", "id", "-u"))
    assert (done.stdout, done.status) == ("0\n", 0), done.stderr
    assert finish(user.spawn(DIYC, "unshare", "no-such-program")).status == 127


def test_doctor_tells_which_ids_there_are(user: User) -> None:
    done = user.diyc("doctor")
    assert ("65537 ids" if user.subordinate else "1 id") in done.stdout, done.stdout + done.stderr
