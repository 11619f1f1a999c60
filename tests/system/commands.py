"""The two commands as a user starts them: a place with a jobs.toml and directories of its own, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from leakcheck import cgroups

T = TypeVar("T")

SUPERVISOR = str(Path(sys.executable).with_name("diyc-supervisor"))
DIYC = str(Path(sys.executable).with_name("diyc"))
SOAK = os.environ.get("DIYC_SOAK") == "1"
PATIENCE = 30.0  # seconds; what takes longer has failed
MARK = "TEST_MARK"


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output as JSON, an object a line."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def results(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["type"] == "result"]

    @property
    def summary(self) -> dict[str, Any]:
        last = self.lines[-1]
        assert last["type"] == "summary"
        return last

    def verdicts(self) -> dict[str, str]:
        """The verdict of each job's first run."""
        return {result["job"]: result["verdict"] for result in self.results if result["index"] == 0}


@dataclass(slots=True)
class Place:
    """A directory with a jobs.toml whose supervisor keeps everything below it. `environment` is added to its own."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.root / "jobs.toml"

    def write(self, jobs: str, supervisor: str = "") -> Path:
        """The jobs.toml: these tables, and these lines for [supervisor]."""
        head = f'[supervisor]\nstate_dir = "{self.root}/state"\nruntime_dir = "{self.root}/run"\n{supervisor}\n'
        self.file.write_text(head + jobs)
        return self.file

    def start(self, *arguments: str, **popen: Any) -> subprocess.Popen[str]:
        """diyc-supervisor on this place's file; its output is text in pipes unless told otherwise."""
        return self.spawn(SUPERVISOR, "--config", str(self.file), *arguments, **popen)

    def supervise(self, *arguments: str, **popen: Any) -> Done:
        """The same, ended."""
        return finish(self.start(*arguments, **popen))

    def diyc(self, *arguments: str, stdin: str | None = None, **popen: Any) -> Done:
        """diyc with these arguments, ended."""
        return finish(self.spawn(DIYC, *arguments, **{"stdin": subprocess.PIPE, **popen}), stdin)

    def run(self, *arguments: str, stdin: str | None = None, **popen: Any) -> Done:
        """diyc run with images below this place."""
        return self.diyc("run", "--state-dir", f"{self.root}/state", *arguments, stdin=stdin, **popen)

    def spawn(self, *command: str, **popen: Any) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CI", "TERM")}
        settings: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "stdin": subprocess.DEVNULL,
            "env": {**environment, **self.environment},
        }
        return subprocess.Popen(command, text=True, **{**settings, **popen})


def finish(process: subprocess.Popen[str], stdin: str | None = None) -> Done:
    """Wait for a command. One that does not end is killed, and the test fails."""
    try:
        stdout, stderr = process.communicate(stdin, timeout=120)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Done(process.returncode, stdout or "", stderr or "")


def wait_until(seen: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """The first true value of `seen`; fails by name when it does not come."""
    deadline = time.monotonic() + seconds
    while not (value := seen()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.01)
    return value


@contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever the test comes to, the process is dead and waited for."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def marked(mark: str) -> list[int]:
    """Every process on this host with MARK=`mark` in its environment: jobs whose file says so and all they started,
    and a supervisor started with it, with its children that have not yet called execve."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile
    return found


def our_cgroups() -> set[str]:
    """Every cgroup of diyc's below our own."""
    return set(cgroups(Path("/proc/self")))


def scrape(address: str) -> dict[str, float]:
    """/metrics as {"name{labels}": value}."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
        page: str = answer.read().decode()
    samples = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def metrics_address(stderr: Iterator[str]) -> str:
    """The address that a supervisor with metrics_listen tells on standard error."""
    for line in stderr:
        if line.startswith("metrics at "):
            return line.removeprefix("metrics at ").strip().removeprefix("http://").removesuffix("/metrics")
    raise AssertionError("no address was told")


def without(environment: Mapping[str, str], *names: str) -> dict[str, str]:
    """A copy lacking these variables."""
    return {name: value for name, value in environment.items() if name not in names}
