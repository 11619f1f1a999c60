"""packaging/diyc-supervisor.service under a real systemd: start, reload, restart, watchdog, kill, stop, leftovers.

Only where systemd is PID 1. The unit is installed as diyc-test.service, with its lines but for paths and patience."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from needs import require
from sources import ROOT
from system.commands import MARK, SUPERVISOR, marked, wait_until

pytestmark = pytest.mark.privileged

UNIT = "diyc-test.service"
UNITS = Path("/run/systemd/system")
RUNTIME, STATE = Path("/run/diyc-test"), Path("/var/lib/diyc-test")
SMALL = 'limits = { memory = "8MiB", pids = 8, disk = "1MiB" }\n'
PATIENCE = 90.0  # seconds; in a machine of software every start takes some
DROP_IN = f"""[Service]
ExecStart=
ExecStart={SUPERVISOR} --serve --config {{config}}
RuntimeDirectory=
RuntimeDirectory={RUNTIME.name}
StateDirectory=
StateDirectory={STATE.name}
RestartSec=200ms
WatchdogSec=8s
"""


def ctl(*arguments: str, check: bool = True) -> str:
    """systemctl's output. What it says when it fails is in the message."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=120)
    if check and done.returncode != 0:
        pytest.fail(f"systemctl {' '.join(arguments)}: {done.stdout}{done.stderr}\n{journal()}", pytrace=False)
    return done.stdout.strip()


def journal() -> str:
    command = ["journalctl", "--unit", UNIT, "--no-pager", "--lines=40", "--output=cat"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def namespaces() -> set[str]:
    """The network namespaces that any process is in."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue  # ended meanwhile
    return found


@dataclass(slots=True)
class Service:
    """The installed unit and its jobs.toml."""

    root: Path
    mark: str

    @property
    def config(self) -> Path:
        return self.root / "jobs.toml"

    def write(self, *jobs: str, supervisor: str = "") -> None:
        head = f'[supervisor]\nstate_dir = "{STATE}"\nruntime_dir = "{RUNTIME}"\n{supervisor}\n'
        self.config.write_text(head + "".join(jobs))

    def long(self, name: str = "long", count: int = 1) -> str:
        """A job that goes on until it is stopped, with a process that it leaves behind if it can."""
        shell = "sleep 1000 & exec sleep 1000"
        return f'[jobs.{name}]\nshell = "{shell}"\ncount = {count}\nenv = {{ {MARK} = "{self.mark}" }}\n{SMALL}'

    def show(self, name: str) -> str:
        return ctl("show", "--property", name, "--value", UNIT)

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    def wait(self, name: str, value: str) -> None:
        try:
            wait_until(lambda: value in self.show(name), f"{name} {value!r}", PATIENCE)
        except AssertionError as error:
            pytest.fail(f"{error}; it is {self.show(name)!r}\n{journal()}", pytrace=False)

    def left(self) -> list[str]:
        """Whatever of the service is still there."""
        found = [str(path) for path in Path("/sys/fs/cgroup").rglob(f"*{UNIT}")]
        found += [str(path) for path in RUNTIME.rglob("*")]
        found += [str(path) for path in STATE.rglob("host-root-*") if path.is_dir()]
        found += [line for line in Path("/proc/1/mountinfo").read_text().splitlines() if RUNTIME.name in line]
        return found + [f"process {pid}" for pid in marked(self.mark)]


def quick(name: str, word: str = "hello") -> str:
    return f'[jobs.{name}]\ncommand = ["echo", "{word}"]\n{SMALL}'


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """The unit, installed and not started; stopped and removed at the end, with nothing left of it."""
    require("systemd")
    before = namespaces()
    there = Service(tmp_path, secrets.token_hex(8))
    drop_in = UNITS / f"{UNIT}.d"
    drop_in.mkdir(parents=True)
    shutil.copy(ROOT / "packaging/diyc-supervisor.service", UNITS / UNIT)
    (drop_in / "test.conf").write_text(DROP_IN.format(config=there.config))
    try:
        ctl("daemon-reload")
        yield there
    finally:
        ctl("stop", UNIT, check=False)
        ctl("reset-failed", UNIT, check=False)
        (UNITS / UNIT).unlink()
        shutil.rmtree(drop_in)
        ctl("daemon-reload")
        left = there.left()
        shutil.rmtree(STATE, ignore_errors=True)
        shutil.rmtree(RUNTIME, ignore_errors=True)
    assert left == []
    wait_until(lambda: namespaces() <= before, "network namespaces to be gone")


def test_the_units_are_without_fault(service: Service) -> None:
    done = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_start_tells_counts_and_stop_leaves_nothing(service: Service) -> None:
    service.write(service.long(count=2), quick("short"), supervisor="max_parallel = 2")
    ctl("start", UNIT)  # returns when READY=1 was sent
    assert service.show("ActiveState") == "active"
    service.wait("StatusText", "2 running, 1 queued, 0 ok, 0 not ok")
    assert Path(f"/proc/{service.pid}/oom_score_adj").read_text().strip() == "-900"
    assert len(marked(service.mark)) == 4
    assert all(service.show("ControlGroup") in Path(f"/proc/{pid}/cgroup").read_text() for pid in marked(service.mark))
    ctl("stop", UNIT)
    assert service.show("Result") == "success"
    assert service.show("ActiveState") == "inactive"
    assert service.left() == []


def test_reload_and_restart(service: Service) -> None:
    service.write(service.long(), quick("short"))
    ctl("start", UNIT)
    service.wait("StatusText", "1 running, 0 queued, 1 ok")
    pid, jobs = service.pid, marked(service.mark)
    service.write(service.long(), quick("short"), quick("more"))
    ctl("reload", UNIT)
    service.wait("StatusText", "1 running, 0 queued, 2 ok")
    service.write(service.long(), "[jobs.wrong]\n")
    ctl("reload", UNIT)
    service.wait("StatusText", "last reload failed: ")
    assert service.show("ActiveState") == "active"
    assert (service.pid, marked(service.mark)) == (pid, jobs)
    service.write(service.long(), quick("after"))
    ctl("restart", UNIT)
    service.wait("StatusText", "1 running, 0 queued, 1 ok, 0 not ok")
    assert service.pid != pid
    assert not set(jobs) & set(marked(service.mark))


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_supervisor_that_died_or_hangs_is_started_again(how: str, service: Service) -> None:
    service.write(service.long(count=2))
    ctl("start", UNIT)
    service.wait("StatusText", "2 running")
    pid, jobs = service.pid, marked(service.mark)
    os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    service.wait("NRestarts", "1")
    service.wait("StatusText", "2 running, 0 queued, 0 ok, 0 not ok")
    assert service.pid not in (0, pid)
    assert not set(jobs) & set(marked(service.mark))
    if how == "hung":
        assert "watchdog" in journal().lower()


def test_what_another_try_cannot_mend_is_not_tried_again(service: Service) -> None:
    service.write("[jobs.wrong]\n")
    ctl("start", UNIT, check=False)
    assert service.show("ActiveState") == "failed"
    assert service.show("NRestarts") == "0"
    assert "failed: " in service.show("StatusText")
    assert "jobs.wrong" in journal()


def test_a_login_session_is_left_for_a_delegated_scope(service: Service) -> None:
    """By hand, in a session whose cgroup holds other processes: diyc starts itself anew in a scope of its own."""
    service.write(service.long())
    report = service.root / "report"
    script = service.root / "session"
    script.write_text(
        f"{SUPERVISOR} --config {service.config} --progress never &\n"
        f"until grep -q running-as-pid {report} 2>/dev/null; do sleep 0.2; done\n"
        "kill -TERM $!\nwait $!\n"
        f'echo "status $?" >> {report}\n'
    )
    session = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=PAMName=login"]
    with subprocess.Popen(
        [*session, "/bin/sh", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as shell:
        try:
            jobs = wait_until(lambda: marked(service.mark), "the job to run", PATIENCE)
            at = {pid: Path(f"/proc/{pid}/cgroup").read_text() for pid in jobs}
            report.write_text("running-as-pid\n")
            output, _ = shell.communicate(timeout=PATIENCE)
        except BaseException:
            shell.kill()
            raise
    assert all(re.search(r"/run-[^/]+\.scope/", path) for path in at.values()), (at, output)
    assert "session" not in json.dumps(list(at.values()))
    assert "status 143" in report.read_text(), output
