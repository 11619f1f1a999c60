"""What the end-to-end tests share: a tiny image with the probe in it, ways to run it, and what it saw as data."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from diyc.config import job_from_mapping
from diyc.jobs import JobSpec
from diyc.results import Result
from diyc.supervisor import Supervisor

T = TypeVar("T")

KIB, MIB = 1024, 1024**2
REPEAT = int(os.environ.get("DIYC_REPEAT", "5"))

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


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs jobs of one test in supervisors of their own, whose files are below `path`."""

    path: Path
    image: Path

    def supervisor(self, **settings: Any) -> Supervisor:
        """A supervisor, not entered yet."""
        places = {"state_dir": str(self.path / "state"), "runtime_dir": str(self.path / "run")}
        return Supervisor(**{"max_parallel": 2, **places, **settings})

    def job(self, *command: str, image: str | os.PathLike[str] | None = None, **keys: Any) -> JobSpec:
        """A job of the keys of jobs.toml: the probe with this command, or, with `image`, a command of that image
        ("host", a directory or a tarball)."""
        if image == "host":
            return job_from_mapping("test", {"command": list(command), "timeout": "30s", **keys})
        argv = ["/probe", *command] if image is None else list(command)
        source = Path(image or self.image)
        images = {"box": {"dir" if source.is_dir() else "tar": str(source)}}
        job = {"image": "box", "command": argv, "timeout": "30s", **keys}
        return job_from_mapping("test", job, images=images)

    def probe(self, *command: str, **keys: Any) -> Result:
        """One run of the probe's command."""
        return self.run(self.job(*command, **keys))

    def report(self, **keys: Any) -> Facts:
        """What a job with these keys sees."""
        return Facts.of(self.probe("report", **keys))

    def run(self, spec: JobSpec) -> Result:
        """One run in a supervisor of its own."""

        async def main() -> Result:
            async with self.supervisor() as supervisor:
                return await supervisor.run(spec)

        return on_uvloop(main())

    async def repeat(self, spec: JobSpec, times: int = REPEAT, parallel: int = 4) -> list[Result]:
        """The results of that many runs of one job."""
        many = job_times(spec, times)
        async with self.supervisor(max_parallel=parallel) as supervisor:
            return [result async for result in supervisor.map([many])]


def job_times(spec: JobSpec, times: int) -> JobSpec:
    from dataclasses import replace

    return replace(spec, count=times)


def on_uvloop(main: Awaitable[T]) -> T:
    """For tests that have no reason to run on both loops."""

    async def run() -> T:
        return await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())
