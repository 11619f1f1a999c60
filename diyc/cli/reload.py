"""The jobs that are in force, and how a file read again takes their place: all of it, or nothing.

Equal jobs go on untouched. Of removed and changed ones the runs that have not started are dropped and running ones
finish as they began. New and changed ones are prepared before anything else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from diyc.config import Config, SupervisorConfig
from diyc.errors import DiycError
from diyc.execution import Prepared
from diyc.jobs import JobSpec
from diyc.results import Result
from diyc.supervisor import Batch, Supervisor

LIVE = ("max_parallel", "max_memory", "shutdown_grace")  # keys of [supervisor] that may change while it runs


@dataclass(frozen=True, slots=True)
class Changes:
    """How one configuration differs from another; `restart` names the keys that only a new start can change."""

    kept: tuple[str, ...]
    gone: tuple[str, ...]
    changed: tuple[str, ...]
    new: tuple[str, ...]
    to_start: tuple[JobSpec, ...]
    live: dict[str, Any]
    restart: tuple[str, ...]


def compare(old: Config, new: Config) -> Changes:
    """What has to be done to get from one to the other."""
    before, after = ({spec.name: spec for spec in config.jobs} for config in (old, new))
    differing = [
        key.name
        for key in fields(SupervisorConfig)
        if getattr(old.supervisor, key.name) != getattr(new.supervisor, key.name)
    ]
    return Changes(
        kept=tuple(name for name, spec in after.items() if before.get(name) == spec),
        gone=tuple(name for name in before if name not in after),
        changed=tuple(name for name, spec in after.items() if name in before and before[name] != spec),
        new=tuple(name for name in after if name not in before),
        to_start=tuple(spec for name, spec in after.items() if before.get(name) != spec),
        live={key: getattr(new.supervisor, key) for key in differing if key in LIVE},
        restart=tuple(key for key in differing if key not in LIVE),
    )


class Work:
    """The jobs of a file in a supervisor. `total` counts the runs submitted, `dropped` those taken back."""

    def __init__(self, supervisor: Supervisor, settings: Config, on_result: Callable[[Result], None]) -> None:
        self.settings = settings
        self.total = sum(spec.count for spec in settings.jobs)
        self.dropped = 0
        self._supervisor = supervisor
        self._on_result = on_result
        self._batches: dict[str, Batch] = {}

    async def prepare(self) -> list[Prepared]:
        """Get every job ready; raises for the first that this host cannot run."""
        return [await self._supervisor.prepare(spec) for spec in self.settings.jobs]

    def submit(self, prepared: list[Prepared]) -> None:
        """Queue them."""
        for job in prepared:
            self._batches[job.spec.name] = self._supervisor.submit(job, self._on_result)

    @property
    def begun(self) -> bool:
        """Whether the first jobs were submitted."""
        return bool(self._batches)

    async def exchange(self, new: Config) -> list[str]:
        """Put `new` into force; what was done, in lines for people. Raises DiycError with nothing changed."""
        changes = compare(self.settings, new)
        prepared = await self._prepare_all(changes.to_start, new.supervisor.max_memory)
        self._supervisor.reconfigure(**changes.live)
        dropped = {name: self._drop(name) for name in (*changes.gone, *changes.changed)}
        self.submit(prepared)
        self.total += sum(spec.count for spec in changes.to_start)
        self.settings = replace(new, supervisor=replace(self.settings.supervisor, **changes.live))
        return _told(changes, dropped)

    async def _prepare_all(self, specs: tuple[JobSpec, ...], max_memory: int) -> list[Prepared]:
        """All or none, with every reason why not."""
        prepared, problems = [], []
        for spec in specs:
            try:
                prepared.append(await self._supervisor.prepare(spec, max_memory=max_memory))
            except DiycError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"job {spec.name}: {error}")
        if problems:
            raise DiycError("\n".join(problems))
        return prepared

    def _drop(self, name: str) -> int:
        batch = self._batches.pop(name, None)
        dropped = self._supervisor.drop(batch) if batch is not None else 0
        self.dropped += dropped
        return dropped


def _told(changes: Changes, dropped: dict[str, int]) -> list[str]:
    counts = [
        ("new", changes.new),
        ("changed", changes.changed),
        ("removed", changes.gone),
        ("as before", changes.kept),
    ]
    parts = [f"{len(names)} {what}" for what, names in counts if names]
    lines = [f"reloaded: jobs: {', '.join(parts)}"]
    lines += [f"{name}: {count} runs not started were dropped" for name, count in dropped.items() if count]
    lines += [f"supervisor.{key} is {value} now" for key, value in changes.live.items()]
    lines += [f"supervisor.{key} was changed: restart needed for it to count" for key in changes.restart]
    return lines


class Reloads:
    """One reload at a time; requests that come meanwhile are one more after it. `idle` is set when none is going on."""

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._reload = reload
        self._again = False
        self._opened = False
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """From now on requests are served, those included that came before."""
        self._opened = True
        if self._again:
            self.request()

    def request(self) -> None:
        """Reload, now or when the reload that goes on is done."""
        self._again = True
        if self._opened and self.idle.is_set():
            self.idle.clear()
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(_surface)

    async def _run(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._reload()
        finally:
            self.idle.set()


def _surface(task: asyncio.Task[None]) -> None:
    """Hand an exception that nobody expected to the loop's exception handler."""
    if not task.cancelled():
        task.result()
