"""What the kernel sees is what `diyc explain` says: the child's system calls, traced between clone3 and execve, against
the plan's steps one by one. A step left out, one too many, or a call of libc's own fails here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diyc import _core
from needs import require

pytestmark = pytest.mark.privileged

Step = dict[str, Any]
LAST_SIGNAL = 64
WAIT = "futex*"  # any number of times: woken early, the child waits again


def bounding_set(step: Step) -> list[str]:
    """One call for each capability that is not kept, and one past the last, which tells that there are no more."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    kept = int(step["call"].rpartition("all but ")[2].rstrip(")"), 16)
    return ["prctl"] * (last + 1 - kept.bit_count() + 1)


def fsmount(step: Step) -> list[str]:
    options = len(re.findall(r"\w+=", step["call"].rpartition(")")[2]))
    return ["fsopen", *["fsconfig"] * (options + 1), "fsmount", "close"]


def exactly(*names: str) -> Callable[[Step], list[str]]:
    return lambda step: list(names)


# kind of step -> the system calls that it is, in order.
CALLS: dict[str, Callable[[Step], list[str]]] = {
    "mark": exactly("clock_gettime"),
    "await_parent": exactly("futex", WAIT),
    "pdeathsig": exactly("prctl", "pread64"),
    "cgroup_join": exactly("write"),
    "unshare": exactly("unshare"),
    "keyring": exactly("keyctl"),
    "sysctl": exactly("openat2", "write", "close"),
    "setsid": exactly("setsid"),
    "umask": exactly("umask"),
    "setgroups": exactly("setgroups"),
    "setresgid": exactly("setresgid"),
    "setresuid": exactly("setresuid"),
    "open_file": exactly("openat2"),
    "mkdir": exactly("mkdirat"),
    "mknod_file": exactly("mknodat"),
    "write_file": exactly("unlinkat", "openat2", "write", "close"),
    "symlink": exactly("symlinkat"),
    "mount": exactly("mount"),
    "chown": exactly("fchownat"),
    "open_tree": exactly("open_tree"),
    "fsmount": fsmount,
    "move_mount": exactly("openat2", "move_mount", "close"),
    "mount_setattr": exactly("mount_setattr"),
    "pivot_root": exactly("chdir", "pivot_root", "umount2", "chdir"),
    "sethostname": exactly("sethostname"),
    "setdomainname": exactly("setdomainname"),
    "link_up": exactly("socket", "ioctl", "ioctl", "close"),
    "dup": exactly("dup3"),
    "close_from": exactly("close_range"),
    "chdir": exactly("chdir"),
    "rlimit": exactly("prlimit64"),
    "bounding_set": bounding_set,
    "clear_ambient": exactly("prctl"),
    "capset": exactly("capset"),
    "no_new_privs": exactly("prctl"),
    "exec_label": exactly("write"),
    "signals": exactly(*["rt_sigaction"] * LAST_SIGNAL, "rt_sigprocmask"),
    "exec": exactly("execve"),
}
# Calls whose explained text is, up to spaces and flag names, what strace prints: the arguments are compared too.
SAME_TEXT = ("setresuid", "setresgid", "umask", "sethostname", "setdomainname")


@dataclass(frozen=True)
class Traced:
    """The child's calls from its first to the execve that succeeded: names, and the lines that strace wrote."""

    names: list[str]
    lines: list[str]


JOBS = """
[supervisor]
state_dir = "{root}/state"
runtime_dir = "{root}/run"
[images.dir]
dir = "{root}/image"
[jobs.plain]
command = ["/usr/bin/true"]
[jobs.rich]
image = "dir"
command = ["/bin/true"]
user = "app"
hostname = "node.example.org"
workdir = "/srv"
writable = false
network = {{ mode = "loopback" }}
limits = {{ memory = "32MiB", nofile = 77, cpus = 0.5, pids = 9 }}
security = {{ cap_add = ["NET_RAW", "CHOWN"] }}
mounts = [
    {{ type = "tmpfs", target = "/scratch/deep", size = "1MiB" }},
    {{ type = "bind", source = "{root}/image/etc", target = "/in", read_only = true }},
    {{ type = "bind", source = "{root}/image/etc/passwd", target = "/a/file", read_only = true }},
]
[jobs.unlimited]
command = ["/usr/bin/true"]
limits = {{ memory = "none", pids = "none", disk = "none" }}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    require("program.strace", "program.busybox")
    for name in ("bin", "etc", "srv"):
        (tmp_path / "image" / name).mkdir(parents=True)
    (tmp_path / "image/etc/passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n")
    (tmp_path / "image/etc/group").write_text("extra:x:29:app\n")
    busybox = subprocess.run(["which", "busybox"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "image/bin/true").write_bytes(Path(busybox).read_bytes())
    (tmp_path / "image/bin/true").chmod(0o755)
    path = tmp_path / "jobs.toml"
    path.write_text(JOBS.format(root=tmp_path))
    return path


def explained(config: Path, job: str) -> list[Step]:
    command = [sys.executable, "-m", "diyc", "explain", job, "--config", str(config), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    plan = json.loads(shown.stdout)
    steps: list[Step] = plan["steps"]
    return steps[plan.get("spawner_steps", 0) :]  # those before are the spawner's own, where the host needs that


def traced(config: Path, job: str, where: Path) -> Traced:
    """One run of the job under strace; the file of each thread and child is looked through for the job's own."""
    where.mkdir()
    strace = ["strace", "-ff", "-qq", "-s", "200", "-e", "signal=none", "-o", str(where / "trace")]
    code = "from diyc.cli.supervisor import main; main()"
    run = [*strace, sys.executable, "-c", code, "--config", str(config), "--only", job, "--json", "-j", "1"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (lines,) = [lines for path in where.iterdir() if (lines := child_lines(path))]
    return Traced([line.partition("(")[0] for line in lines], lines)


def child_lines(path: Path) -> list[str]:
    """The lines up to execve of a process that took no_new_privs, which nobody but the job's child does."""
    lines = path.read_text(errors="replace").splitlines()
    execs = [number for number, line in enumerate(lines) if re.match(r"execve\(.*\) = 0$", line)]
    if not execs or not any("PR_SET_NO_NEW_PRIVS" in line for line in lines[: execs[0]]):
        return []
    return lines[: execs[0] + 1]


def compare(steps: list[Step], child: Traced) -> None:
    """Walk both at once; the first difference is told with the step it is at."""
    at = 0
    for step in steps:
        began = at
        for name in CALLS[step["kind"]](step):
            if name == WAIT:
                while child.names[at] == "futex":
                    at += 1
                continue
            assert at < len(child.names), f"the trace ends before {step['call']}"
            assert child.names[at] == name, f"step {step['index']} {step['call']}: the kernel saw {child.lines[at]}"
            at += 1
        if step["target"] is not None:
            assert any(f'"{step["target"]}"' in line for line in child.lines[began:at]), step["call"]
        if step["kind"] in SAME_TEXT:
            assert arguments(child.lines[began]) == arguments(step["call"])
    assert child.lines[at:] == [], "the kernel saw more than was explained"


def arguments(call: str) -> list[str]:
    """The first words between the parentheses: numbers as numbers, strings without their quotes."""
    words = re.findall(r"[\w.]+", call[call.index("(") + 1 : call.rindex(")")])
    return [str(int(word.replace("0o", ""), 8)) if re.fullmatch(r"0o?\d+", word) else word for word in words[:3]][
        : 1 if "name" in call.partition("(")[0] else 3
    ]


def test_every_kind_of_step_has_its_system_calls_here() -> None:
    assert set(CALLS) == set(_core.STEP_NAMES)


@pytest.mark.parametrize("job", ["plain", "rich", "unlimited"])
def test_the_kernel_sees_what_is_explained_and_nothing_else(job: str, config: Path, tmp_path: Path) -> None:
    compare(explained(config, job), traced(config, job, tmp_path / "traces"))


def test_the_comparison_finds_a_step_left_out_one_too_many_and_a_call_of_libc(config: Path, tmp_path: Path) -> None:
    steps = explained(config, "plain")
    child = traced(config, "plain", tmp_path / "traces")
    compare(steps, child)
    for number, step in enumerate(steps):
        if step["kind"] not in ("mkdir", "mark", "rlimit"):  # of those the neighbour may look the same
            with pytest.raises(AssertionError):
                compare(steps[:number] + steps[number + 1 :], child)
    for sneaked in ("brk(NULL) = 0x1000", "mmap(NULL, 4096) = 0x1000", "getpid() = 1"):
        for at in range(0, len(child.lines), 7):
            lines = [*child.lines[:at], sneaked, *child.lines[at:]]
            with pytest.raises(AssertionError):
                compare(steps, Traced([line.partition("(")[0] for line in lines], lines))
