"""What the end-to-end tests share: a tiny image with the probe in it, ways to run it, and what it saw as data."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from diyc.config import job_from_mapping
from diyc.jobs import JobSpec, Run
from diyc.results import Result
from diyc.supervisor import Batch, Supervisor

T = TypeVar("T")

KIB, MIB = 1024, 1024**2
REPEAT = int(os.environ.get("DIYC_REPEAT", "5"))
PATIENCE = 20.0  # seconds; a test that waits longer has failed

# What the probe's image has in /etc/passwd and /etc/group.
PASSWD = "root:x:0:0:root:/root:/bin/sh\nworker:x:1000:1000:Worker:/home/worker:/bin/sh\n"
GROUP = "root:x:0:\nworker:x:1000:\naudio:x:29:worker\nvideo:x:44:other,worker\nother:x:77:other\n"


class Facts(dict[str, list[str]]):
    """The "key value" lines of the probe: each key with its values in order."""

    @classmethod
    def of(cls, result: Result) -> Facts:
        """What the probe said in a run that ended well."""
        assert result.verdict == "ok", (result.verdict, result.reason, result.stderr)
        return cls.parse(result.stdout)

    @classmethod
    def parse(cls, output: bytes) -> Facts:
        facts = cls()
        for line in output.decode("utf-8", "surrogateescape").splitlines():
            key, _, value = line.partition(" ")
            facts.setdefault(key, []).append(value)
        return facts

    def one(self, key: str) -> str:
        """The value of a key that is there once."""
        (value,) = self[key]
        return value

    def all(self, key: str) -> list[str]:
        """The values of a key that may not be there."""
        return self.get(key, [])

    def number(self, key: str) -> float:
        return float(self.one(key))


def make_image(directory: Path, probe: Path) -> Path:
    """An image directory with nothing but the probe and an /etc."""
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/passwd").write_text(PASSWD)
    (directory / "etc/group").write_text(GROUP)
    shutil.copy(probe, directory / "probe")
    return directory


def on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    """For tests that have no reason to run on both event loops."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@dataclass(frozen=True, slots=True)
class Jobs:
    """Makes a test's jobs and runs them in supervisors whose files are below `path`."""

    path: Path
    image: Path

    def supervisor(self, on_start: Callable[[Run], None] | None = None, **settings: Any) -> Supervisor:
        """A supervisor, not entered yet."""
        places = {"state_dir": str(self.path / "state"), "runtime_dir": str(self.path / "run")}
        return Supervisor(on_start=on_start, **{"max_parallel": 16, **places, **settings})

    def probe(self, *command: str, image: Path | None = None, **keys: Any) -> JobSpec:
        """A job that does a command of the probe, with keys of jobs.toml."""
        return self.of(image or self.image, "/probe", *command, **keys)

    def of(self, image: str | Path, *command: str, **keys: Any) -> JobSpec:
        """A job of any command in an image: "host", a directory or an archive."""
        job = {"image": "host" if image == "host" else "box", "command": list(command), "timeout": "30s", **keys}
        images = {"box": {"dir" if os.path.isdir(image) else "tar": str(image)}} if image != "host" else {}
        return job_from_mapping("test", job, images=images)

    def run(self, spec: JobSpec) -> Result:
        """The result of one run."""

        async def main() -> Result:
            async with asyncio.timeout(2 * PATIENCE), self.supervisor() as supervisor:
                return await supervisor.run(spec)

        return on_uvloop(main())

    def report(self, **keys: Any) -> Facts:
        """What a job with these keys sees."""
        return Facts.of(self.run(self.probe("report", **keys)))

    async def repeated(self, spec: JobSpec) -> list[Result]:
        """The results of DIYC_REPEAT runs of one job."""
        async with asyncio.timeout(PATIENCE + REPEAT), self.supervisor() as supervisor:
            return [result async for result in supervisor.map([replace(spec, count=REPEAT)])]


@dataclass(frozen=True, slots=True)
class Live:
    """A run that is in its container and waits there."""

    supervisor: Supervisor
    batch: Batch
    run_id: str
    ended: asyncio.Future[Result]

    def cgroup_file(self, *names: str) -> Path:
        """The first of the files that one of the run's cgroups has."""
        places = [Path(parent, self.run_id) for parent in self.supervisor.cgroups.instance_dirs]
        found = [place / name for name in names for place in places if (place / name).exists()]
        assert found, f"{self.run_id} has none of {names}"
        return found[0]

    @property
    def pid(self) -> int:
        """The host's pid of the run's only process."""
        (pid,) = self.cgroup_file("cgroup.procs").read_text().split()
        return int(pid)

    def status(self, key: str) -> list[str]:
        """A line of /proc/PID/status as the host sees it."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split()[1:] for line in lines if line.startswith(f"{key}:"))

    async def end(self) -> Result:
        """Cancel it."""
        self.supervisor.cancel(self.batch)
        return await asyncio.wait_for(self.ended, PATIENCE)


async def start(supervisor: Supervisor, spec: JobSpec, word: bytes = b"ready\n") -> Live:
    """Start a run and wait until it says a word."""
    prepared = await supervisor.prepare(spec)
    before = {live.run_id for live in supervisor.live()}
    ended: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    spoken = asyncio.Event()
    ended.add_done_callback(lambda _: spoken.set())
    said = bytearray()

    def hear(_: str, chunk: bytes) -> None:
        said.extend(chunk)
        if word in said:
            spoken.set()

    batch = supervisor.submit(prepared, ended.set_result, sink=hear)
    await asyncio.wait_for(spoken.wait(), PATIENCE)
    assert not ended.done(), ended.result()
    (run_id,) = {live.run_id for live in supervisor.live()} - before
    return Live(supervisor, batch, run_id, ended)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what tells nobody that it has come."""
    for _ in range(int(PATIENCE / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")
