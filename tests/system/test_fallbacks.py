"""An old kernel, or a seccomp filter of an outer container: each system call that may be missing is refused in earnest,
and diyc either does without, with every figure there, or says which call it is and ends with status 3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from diyc.host import SYSTEM_CALLS
from needs import require
from system.commands import DIYC, SUPERVISOR, Done, Place, finish, our_cgroups
from system.refuse_calls import NUMBERS

pytestmark = pytest.mark.privileged

REFUSE = str(Path(__file__).with_name("refuse_calls.py"))
REFUSALS = ("ENOSYS", "EPERM")  # of old kernels and today's filters; of older container engines
NEEDED = sorted(set(SYSTEM_CALLS) - {"clone3", "keyctl", "bpf"})
WITHOUT = [("clone3", "ENOSYS"), ("keyctl", "ENOSYS"), ("keyctl", "EPERM")]

JOBS = """
[jobs.plain]
command = ["cat", "/proc/self/cgroup"]
[jobs.tree]
shell = "sleep 1000 & sleep 1000 & exec sleep 1000"
timeout = "200ms"
stop_timeout = "100ms"
[jobs.hog]
command = ["tail", "/dev/zero"]
limits = { memory = "16MiB" }
[jobs.crowd]
shell = "for i in 1 2 3 4 5 6 7 8; do sleep 0.2 & done; wait"
limits = { pids = 4 }
[jobs.absent]
command = ["/no/such/program"]
"""
VERDICTS = {"plain": "ok", "tree": "timeout", "hog": "oom", "crowd": "exit", "absent": "infra"}
# Times and what depends on them; all else must be there or not as without a filter.
MEASURED = {"queued_s", "started_at", "finished_at"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def refusing(place: Place, name: str, error: str, *command: str) -> Done:
    """A command to which the kernel refuses one call."""
    return finish(place.spawn(sys.executable, REFUSE, name, error, *command))


def supervise(place: Place, name: str, error: str) -> Done:
    return refusing(place, name, error, SUPERVISOR, "--config", str(place.file), "--json")


def shape(result: dict[str, Any]) -> dict[str, bool]:
    """Which fields of a result have a value."""
    return {key: value is not None for key, value in result.items() if key not in MEASURED}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results where nothing is refused."""
    require("root", "overlay", "cgroup.memory", "cgroup.pids")
    place = Place(tmp_path_factory.mktemp("usual"))
    place.write(JOBS)
    done = place.supervise("--json")
    assert done.verdicts() == VERDICTS, done.stderr
    return {result["job"]: result for result in done.results}


def test_every_call_that_may_be_missing_can_be_refused_here() -> None:
    assert set(NUMBERS) == set(SYSTEM_CALLS)


@pytest.mark.parametrize(("name", "error"), WITHOUT)
def test_what_can_be_done_without_changes_no_verdict_and_no_figure(
    name: str, error: str, usual: dict[str, dict[str, Any]], place: Place
) -> None:
    require("cgroup.memory", "cgroup.pids")
    place.write(JOBS)
    before = our_cgroups()
    done = supervise(place, name, error)
    assert done.verdicts() == VERDICTS, done.stderr
    results = {result["job"]: result for result in done.results}
    assert {job: shape(result) for job, result in results.items()} == {
        job: shape(result) for job, result in usual.items()
    }
    assert results["plain"]["stdout"] == usual["plain"]["stdout"]  # the same cgroups, seen from inside
    assert results["hog"]["oom_kills"] == 1
    assert results["absent"]["error"]["step"] == "exec"
    assert our_cgroups() == before


def test_the_spawner_keeps_every_promise_with_clone_too(place: Place) -> None:
    """The core's own tests of steps, failures and kills, where clone3 is hidden."""
    tests = str(Path(__file__).parent.parent / "core/test_steps.py")
    options = ("-q", "-p", "no:cacheprovider", "--basetemp", str(place.root / "nested"))
    done = refusing(place, "clone3", "ENOSYS", sys.executable, "-m", "pytest", *options, tests)
    assert done.status == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("name", NEEDED)
def test_what_no_job_can_do_without_is_named(name: str, error: str, place: Place) -> None:
    place.write(JOBS)
    done = supervise(place, name, error)
    assert done.status == 3
    (line,) = done.stderr.splitlines()
    assert f": {name}: this system call (since Linux {SYSTEM_CALLS[name][0]}) is refused with {error}" in line
    assert "seccomp filter" in line
    assert done.stdout == ""


def test_clone3_refused_as_the_c_library_cannot_bear_is_named(place: Place) -> None:
    """glibc makes threads with clone3 and falls back at ENOSYS only."""
    place.write(JOBS)
    done = supervise(place, "clone3", "EPERM")
    assert done.status == 3
    assert "clone3: refused with EPERM" in done.stderr


@pytest.mark.parametrize("error", REFUSALS)
def test_without_bpf_there_is_no_device_policy_and_that_is_refused_or_told(error: str, place: Place) -> None:
    require("cgroup.v2")
    place.write('[jobs.one]\ncommand = ["true"]\n')
    done = supervise(place, "bpf", error)
    assert done.status == 3
    assert "device policy: cannot load a BPF program for devices" in done.stderr
    assert "best-effort" in done.stderr
    place.write('[jobs.one]\ncommand = ["true"]\n', 'enforce = "best-effort"')
    done = supervise(place, "bpf", error)
    assert (done.status, done.verdicts()) == (0, {"one": "ok"})
    assert "warning: not enforced: device policy: cannot load a BPF program" in done.stderr


@pytest.mark.parametrize("name", ["clone3", "openat2", "bpf"])
def test_doctor_says_which_call_is_missing(name: str, place: Place) -> None:
    done = refusing(place, name, "ENOSYS", DIYC, "doctor", "--json")
    (report,) = done.lines
    missing = {feature["name"] for feature in report["features"] if not feature["present"]} & set(SYSTEM_CALLS)
    assert missing == {name}
    assert done.status == (0 if name == "clone3" else 3)


def test_explain_shows_the_call_that_is_made(place: Place) -> None:
    place.write('[jobs.one]\ncommand = ["true"]\n')
    explain = (DIYC, "explain", "one", "--config", str(place.file))
    assert "  clone3(CLONE_NEWUSER" in finish(place.spawn(*explain)).stdout
    shown = refusing(place, "clone3", "ENOSYS", *explain).stdout
    assert "  clone(CLONE_NEWUSER" in shown
    assert "clone3" not in shown
    assert "CLONE_INTO_CGROUP" not in shown


# ---- file systems that cannot show ids shifted (idmapped mounts): ramfs, as network file systems, has none ----

ON_RAMFS = """
mount -t ramfs ramfs "$1/there" && cp -a "$1/image/." "$1/there" && shift && exec "$@"
"""
REFUSED_MOUNTS = {
    "an image": (
        '[images.there]\ndir = "{root}/there"\n[jobs.one]\nimage = "there"\ncommand = ["/bin/ls"]\n',
        "the image",
    ),
    "a writable mount": (
        '[jobs.one]\ncommand = ["ls"]\nmounts = [{{ type = "bind", source = "{root}/there", target = "/mnt" }}]\n',
        "a writable mount",
    ),
}
READ_ONLY = """
[jobs.one]
command = ["stat", "-c", "%u %n", "/mnt", "/mnt/bin"]
mounts = [{{ type = "bind", source = "{root}/there", target = "/mnt", read_only = true }}]
"""
NOBODY = 65534


def on_ramfs(place: Place, jobs: str) -> Done:
    """These jobs in a supervisor for which `there` is on a ramfs: in a mount namespace that goes with it."""
    require("program.unshare")
    (place.root / "there").mkdir()
    (place.root / "image/bin").mkdir(parents=True)
    place.write(jobs.format(root=place.root))
    command = (SUPERVISOR, "--config", str(place.file), "--json")
    return finish(place.spawn("unshare", "--mount", "sh", "-c", ON_RAMFS, "sh", str(place.root), *command))


@pytest.mark.parametrize("case", REFUSED_MOUNTS)
def test_a_file_system_without_idmapped_mounts_is_refused_by_name(case: str, place: Place) -> None:
    jobs, what = REFUSED_MOUNTS[case]
    done = on_ramfs(place, jobs)
    assert done.status == 3, done.stderr
    assert f"idmapped mounts: {place.root}/there is on a file system that has none" in done.stderr
    assert f"and {what} needs them" in done.stderr


def test_a_read_only_mount_of_such_a_file_system_shows_its_files_as_nobodys(place: Place) -> None:
    done = on_ramfs(place, READ_ONLY)
    assert done.verdicts() == {"one": "ok"}, done.stderr
    assert done.results[0]["stdout"] == f"{NOBODY} /mnt\n{NOBODY} /mnt/bin\n"
