"""Admission, order, cancelling and drain of a supervisor in this process, on both event loops, with real runs."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diyc import Job, Result, Supervisor
from diyc.errors import ConfigError, DiycError, HostError, ImageError
from diyc.jobs import JobSpec, Run
from system.commands import our_cgroups
from system.helpers import on_uvloop

if TYPE_CHECKING:
    from conftest import LoopKind

pytestmark = pytest.mark.privileged

MIB = 1024**2
SMALL: dict[str, Any] = {"memory": "8MiB", "pids": 8, "disk": "1MiB"}
SLEEP = "60"


@pytest.fixture(autouse=True, scope="module")
def first_loop() -> None:
    """libuv makes a pipe with its first loop and keeps it: that is no leak of the first test."""
    on_uvloop(asyncio.sleep(0))


def job(*command: str, name: str = "job", **keys: Any) -> JobSpec:
    """A small job: a command, or `shell` among the keys of jobs.toml."""
    what = {"command": list(command)} if command else {}
    return Job(name, **{**what, "limits": SMALL, "timeout": "30s", **keys})


@dataclass
class Watch:
    """What runs at any moment, by the supervisor's own word (live) and by starts and ends."""

    place: Path
    order: list[Run] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    peak: Counter[str] = field(default_factory=Counter)
    supervisor: Supervisor | None = None

    def open(self, **settings: Any) -> Supervisor:
        places = {"state_dir": str(self.place / "state"), "runtime_dir": str(self.place / "run")}
        self.supervisor = Supervisor(on_start=self.started, **{"max_parallel": 8, **places, **settings})
        return self.supervisor

    def started(self, run: Run) -> None:
        self.order.append(run)
        self._measure()

    def ended(self, result: Result) -> None:
        self.results.append(result)
        self._measure()

    def _measure(self) -> None:
        ended = {result.run_id for result in self.results}
        specs = [run.spec for run in self.order if run.run_id not in ended]
        now = Counter({f"runs of {spec.name}": 0 for spec in specs})
        now.update(f"runs of {spec.name}" for spec in specs)
        now["runs"] = len(specs)
        now["memory"] = sum(spec.limits.memory or 0 for spec in specs)
        assert self.supervisor is not None
        now["memory of live runs"] = sum(live.memory_limit or 0 for live in self.supervisor.live())
        self.peak |= now

    async def all(self, *specs: JobSpec, **settings: Any) -> list[Result]:
        """Submit these jobs at once and wait for all their runs."""
        async with self.open(**settings) as supervisor:
            for prepared in [await supervisor.prepare(spec) for spec in specs]:
                supervisor.submit(prepared, self.ended)
            await asyncio.wait_for(supervisor.wait(), 60)
        return self.results

    @property
    def names(self) -> list[str]:
        return [run.spec.name for run in self.order]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


async def until(seen: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


async def soon(awaitable: Any, seconds: float = 10.0) -> Any:
    """The value of something that must not take long."""
    return await asyncio.wait_for(awaitable, seconds)


# -- what may run at once --------------------------------------------------------------------------------------------


def test_no_more_than_max_parallel_run_at_once_and_so_many_do(watch: Watch, loop_kind: LoopKind) -> None:
    results = loop_kind(watch.all(job("sleep", "0.05", count=20), max_parallel=5))
    assert [result.verdict for result in results] == ["ok"] * 20
    assert watch.peak["runs"] == 5


def test_a_jobs_own_max_parallel_holds_while_others_go_on(watch: Watch, loop_kind: LoopKind) -> None:
    narrow = job("sleep", "0.05", name="narrow", count=6, max_parallel=2)
    wide = job("sleep", "0.05", name="wide", count=12)
    results = loop_kind(watch.all(narrow, wide, max_parallel=6))
    assert [result.verdict for result in results] == ["ok"] * 18
    assert watch.peak["runs of narrow"] == 2
    assert watch.peak["runs"] == 6
    assert watch.peak["runs of wide"] >= 4


def test_the_memory_limits_of_running_runs_never_add_up_to_more_than_max_memory(
    watch: Watch, loop_kind: LoopKind
) -> None:
    specs = [
        job("sleep", "0.02", name=f"m{size}", count=8, limits={**SMALL, "memory": f"{size}MiB"})
        for size in (8, 24, 40, 64)
    ]
    results = loop_kind(watch.all(*specs, max_parallel=20, max_memory="64MiB"))
    assert Counter(result.verdict for result in results) == {"ok": 32}
    assert 48 * MIB < watch.peak["memory"] <= 64 * MIB
    assert 0 < watch.peak["memory of live runs"] <= 64 * MIB


def test_a_job_that_waits_for_memory_is_not_starved_by_small_ones(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open(max_parallel=10, max_memory="64MiB") as supervisor:
            small = await supervisor.prepare(job("sleep", "0.03", name="small", count=10))
            later = await supervisor.prepare(job("sleep", "0.03", name="later", count=30))
            large = await supervisor.prepare(job("true", name="large", limits={**SMALL, "memory": "64MiB"}))
            for prepared in (small, large, later):
                supervisor.submit(prepared, watch.ended)
            await soon(supervisor.wait(), 60)

    loop_kind(main())
    assert watch.names == ["small"] * 10 + ["large"] + ["later"] * 30
    assert watch.peak["memory"] == 64 * MIB


def test_a_job_that_could_never_start_is_refused(watch: Watch) -> None:
    async def main() -> None:
        async with watch.open(max_memory="16MiB") as supervisor:
            await supervisor.run(job("true", limits={**SMALL, "memory": "17MiB"}))

    with pytest.raises(DiycError, match="memory is above the supervisor's max_memory"):
        on_uvloop(main())


def test_priority_comes_first_then_the_order_of_submission(watch: Watch, loop_kind: LoopKind) -> None:
    specs = [
        job("true", name=f"p{priority + 5}-{turn}", priority=priority, count=2)
        for turn in range(3)
        for priority in (0, 5, -5)
    ]
    loop_kind(watch.all(*specs, max_parallel=1))
    expected = [f"p{priority + 5}-{turn}" for priority in (5, 0, -5) for turn in range(3) for _ in range(2)]
    assert watch.names == expected


def test_a_late_job_of_higher_priority_passes_the_queue(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open(max_parallel=1) as supervisor:
            supervisor.submit(await supervisor.prepare(job("sleep", "0.02", name="long", count=6)), watch.ended)
            await until(lambda: watch.order)
            supervisor.submit(await supervisor.prepare(job("true", name="urgent", priority=1)), watch.ended)
            await soon(supervisor.wait())

    loop_kind(main())
    assert watch.names.index("urgent") < 5
    assert len(watch.names) == 7


# -- count and placeholders ------------------------------------------------------------------------------------------


def test_every_run_of_an_array_knows_its_index(watch: Watch, loop_kind: LoopKind) -> None:
    shell = "echo {index} $DIYC_INDEX {job} $DIYC_JOB $DIYC_ATTEMPT $OWN $(hostname) {run_id} $DIYC_RUN_ID"
    spec = job(name="array", shell=shell, env={"OWN": "own-{index}"}, hostname="node-{index}", count=12)
    results = loop_kind(watch.all(spec))
    said = {result.index: result.stdout.decode().split() for result in results}
    assert sorted(said) == list(range(12))
    for result in results:
        i, run = str(result.index), result.run_id
        assert said[result.index] == [i, i, "array", "array", "1", f"own-{i}", f"node-{i}", run, run]
    assert len({result.run_id for result in results}) == 12


def test_results_come_as_runs_end_and_not_in_order_of_submission(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> list[str]:
        async with watch.open() as supervisor:
            specs = [job("sleep", seconds, name=seconds) for seconds in ("0.4", "0.2", "0")]
            return [result.job async for result in supervisor.map(specs)]

    assert loop_kind(main()) == ["0", "0.2", "0.4"]


# -- the end before the end ------------------------------------------------------------------------------------------


def test_cancelling_the_task_cancels_the_run(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open() as supervisor:
            task = asyncio.create_task(supervisor.run(job("sleep", SLEEP)))
            await until(lambda: list(supervisor.live()))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(task)
            await until(lambda: supervisor.running == 0)
            assert (await soon(supervisor.run(job("true")))).verdict == "ok"

    loop_kind(main())


def test_cancelling_the_task_that_reads_a_map_cancels_its_runs(watch: Watch, loop_kind: LoopKind) -> None:
    async def consume(supervisor: Supervisor) -> None:
        async for _ in supervisor.map([job("sleep", SLEEP, count=20)]):
            pass

    async def main() -> None:
        async with watch.open(max_parallel=4) as supervisor:
            task = asyncio.create_task(consume(supervisor))
            await until(lambda: len(list(supervisor.live())) == 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(task)
            await until(lambda: supervisor.running == 0 and supervisor.queued == 0, 8.0)

    loop_kind(main())


def test_a_cancelled_batch_starts_nothing_more_and_its_runs_end_cancelled(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open(max_parallel=3) as supervisor:
            batch = supervisor.submit(await supervisor.prepare(job("sleep", SLEEP, count=9)), watch.ended)
            other = supervisor.submit(await supervisor.prepare(job("true", name="other", count=2)), watch.ended)
            await until(lambda: len(list(supervisor.live())) == 3)
            assert supervisor.queued == 8
            supervisor.cancel(batch)
            await soon(supervisor.wait())
            assert (supervisor.queued, supervisor.running, other.left) == (0, 0, 0)

    loop_kind(main())
    assert Counter((result.job, result.verdict) for result in watch.results) == {
        ("job", "cancelled"): 3,
        ("other", "ok"): 2,
    }


def test_a_run_cancelled_while_it_is_set_up_ends_cancelled(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open() as supervisor:
            prepared = await supervisor.prepare(job("sleep", SLEEP, count=8))
            for _ in range(5):
                batch = supervisor.submit(prepared, watch.ended)
                await until(lambda: supervisor.running)  # submitted to the spawner threads, hardly started
                supervisor.cancel(batch)
                await soon(supervisor.wait())

    loop_kind(main())
    assert {result.verdict for result in watch.results} == {"cancelled"}
    assert len(watch.results) == len(watch.order)


def test_a_drain_drops_what_is_queued_and_says_so_to_everyone(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open(max_parallel=1) as supervisor:
            running = asyncio.create_task(supervisor.run(job("sleep", SLEEP, name="running")))
            await until(lambda: list(supervisor.live()))
            queued = asyncio.create_task(supervisor.run(job("true", name="queued")))
            mapped = asyncio.create_task(collect(supervisor, job("true", name="mapped", count=5)))
            await until(lambda: supervisor.queued == 6)
            supervisor.drain()
            assert (await soon(running)).verdict == "cancelled"
            for task in (queued, mapped):
                with pytest.raises(DiycError, match="stopped before the run could start"):
                    await soon(task)
            await soon(supervisor.wait())
            assert supervisor.queued == 0

    loop_kind(main())
    assert watch.names == ["running"]


async def collect(supervisor: Supervisor, *specs: JobSpec) -> list[Result]:
    return [result async for result in supervisor.map(specs)]


def test_a_drain_drops_the_rest_of_a_job_that_is_at_its_own_max_parallel(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open(max_parallel=8) as supervisor:
            mapped = asyncio.create_task(collect(supervisor, job("sleep", SLEEP, count=5, max_parallel=2)))
            await until(lambda: len(list(supervisor.live())) == 2)
            supervisor.drain()
            with pytest.raises(DiycError, match="stopped before the run could start"):
                await soon(mapped)
            await soon(supervisor.wait())

    loop_kind(main())
    assert len(watch.order) == 2


@pytest.mark.parametrize("stopped", ["drained", "closed"])
def test_a_run_after_the_end_fails_clearly(stopped: str, watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open() as supervisor:
            await supervisor.run(job("true"))
            if stopped == "drained":
                supervisor.drain()
                await refused(supervisor)
        if stopped == "closed":
            await refused(supervisor)

    loop_kind(main())


async def refused(supervisor: Supervisor) -> None:
    for spec in (job("true"), job("true", name="never-seen-before")):
        with pytest.raises(DiycError):
            await soon(supervisor.run(spec), 3.0)
        with pytest.raises(DiycError):
            await soon(collect(supervisor, spec), 3.0)


def test_leaving_the_block_ends_what_still_runs(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open() as supervisor:
            stubborn = job(shell="trap '' TERM; sleep 60 & sleep 60", count=4)
            supervisor.submit(await supervisor.prepare(stubborn), watch.ended)
            await until(lambda: len(list(supervisor.live())) == 4)

    began = time.monotonic()
    loop_kind(main())
    assert time.monotonic() - began < 20
    assert [result.verdict for result in watch.results] == ["cancelled"] * 4


def test_an_exception_in_the_block_ends_what_still_runs(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> None:
        async with watch.open() as supervisor:
            supervisor.submit(await supervisor.prepare(job("sleep", SLEEP, count=3)), watch.ended)
            await until(lambda: len(list(supervisor.live())) == 3)
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        loop_kind(main())
    assert [result.verdict for result in watch.results] == ["cancelled"] * 3


# -- several supervisors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["the same directories", "directories of their own"])
def test_several_supervisors_live_in_one_process(shared: bool, tmp_path: Path, loop_kind: LoopKind) -> None:
    watches = [Watch(tmp_path if shared else tmp_path / f"{number}") for number in range(3)]

    async def main() -> None:
        async with watches[0].open(max_parallel=2) as first, watches[1].open(max_parallel=3) as second:
            prepared = [await supervisor.prepare(job("sleep", "0.2", count=9)) for supervisor in (first, second)]
            first.submit(prepared[0], watches[0].ended)
            second.submit(prepared[1], watches[1].ended)
            await until(lambda: list(first.live()) and list(second.live()))
            async with watches[2].open(max_parallel=1) as third:
                assert third.leftovers == []
                assert (await third.run(job("true"))).verdict == "ok"
            await soon(asyncio.gather(first.wait(), second.wait()))

    loop_kind(main())
    assert [watch.peak["runs"] for watch in watches] == [2, 3, 1]
    assert [result.verdict for watch in watches for result in watch.results] == ["ok"] * 18


def test_supervisors_one_after_another_in_one_process(watch: Watch) -> None:
    async def main() -> None:
        for _ in range(3):
            async with watch.open() as supervisor:
                assert (await supervisor.run(job("true"))).verdict == "ok"

    on_uvloop(main())


# -- what goes wrong before a run ------------------------------------------------------------------------------------


def test_settings_that_are_wrong_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Supervisor(max_parallel=0, max_memory="lots", colour="blue")
    assert [problem.key for problem in caught.value.problems] == ["max_parallel", "max_memory", "colour"]


def test_an_image_that_is_not_there_is_an_error_of_the_caller_and_nothing_runs(watch: Watch, tmp_path: Path) -> None:
    async def main() -> None:
        async with watch.open() as supervisor:
            (tmp_path / "image").mkdir()
            spec = job("true", image=str(tmp_path / "image"))
            os.rmdir(tmp_path / "image")
            await supervisor.run(spec)

    with pytest.raises((ImageError, ConfigError), match="image"):
        on_uvloop(main())
    assert watch.order == []


def test_a_limit_this_host_cannot_enforce_is_refused_or_warned_of(watch: Watch) -> None:
    spec = job("true", limits={**SMALL, "cpuset": "0"})
    spec = replace(spec, limits=replace(spec.limits, cpuset="8000"))

    async def main(enforce: str) -> list[str]:
        async with watch.open(enforce=enforce) as supervisor:
            await supervisor.prepare(spec)
            return supervisor.warnings

    with pytest.raises(HostError, match=r"job job: .*cpuset.*best-effort"):
        on_uvloop(main("strict"))
    assert "cpuset" in on_uvloop(main("best-effort"))[0]


def test_a_defect_while_a_run_starts_is_told_and_never_waited_for(
    watch: Watch, loop_kind: LoopKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody thought of must end the run, with its error, and not leave its caller waiting for ever."""

    def broken(*_: object) -> int:
        raise TypeError("a defect")

    async def main() -> Result:
        async with watch.open() as supervisor:
            prepared = await supervisor.prepare(job("true"))
            monkeypatch.setattr("diyc.process.Launcher.start", broken)
            return await soon(supervisor.run(prepared.spec), 5.0)

    result = loop_kind(main())
    assert (result.verdict, "a defect" in str(result.reason)) == ("infra", True)


def test_a_failed_start_gives_everything_back(watch: Watch, tmp_path: Path) -> None:
    """The start fails after the cgroups were made: here, where images should be."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state/images").touch()

    async def main() -> None:
        async with watch.open():
            raise AssertionError("it started")

    for _ in range(2):
        with pytest.raises((DiycError, OSError)):
            on_uvloop(main())
    assert list((tmp_path / "run/instances").iterdir()) == []
    (tmp_path / "state/images").unlink()


# -- figures ---------------------------------------------------------------------------------------------------------


def test_wall_time_counts_from_execve_however_busy_the_loop_is(watch: Watch, loop_kind: LoopKind) -> None:
    async def main() -> Result:
        async with watch.open() as supervisor:
            await supervisor.run(job("true"))
            task = asyncio.create_task(supervisor.run(job("sleep", "0.3")))
            while not supervisor.running:  # noqa: ASYNC110  what is waited for has no event
                await asyncio.sleep(0)
            time.sleep(0.2)  # noqa: ASYNC251  the loop is busy with something else
            return await soon(task)

    result = loop_kind(main())
    assert result.wall_s is not None
    assert 0.3 <= result.wall_s < 3
    assert result.setup_s is not None
    assert result.setup_s < 0.2


def test_the_time_in_the_queue_is_told(watch: Watch) -> None:
    results = on_uvloop(watch.all(job("sleep", "0.1", count=3), max_parallel=1))
    first, second, third = (result.queued_s for result in sorted(results, key=lambda result: result.index))
    assert first < 0.1 <= second < third
    assert all(result.steps_s["queue"] == pytest.approx(result.queued_s, abs=1e-5) for result in results)


def test_a_result_has_a_time_for_every_step(watch: Watch) -> None:
    (result,) = on_uvloop(watch.all(job("true")))
    assert set(result.steps_s) == {"queue", "cgroup", "network", "clone", "mounts", "exec", "teardown"}
    assert all(seconds >= 0 for seconds in result.steps_s.values())
    assert result.started_at is not None
    assert result.finished_at is not None
    assert 0 <= result.finished_at - result.started_at < 20


def test_the_loop_goes_on_while_many_runs_start(watch: Watch, loop_kind: LoopKind) -> None:
    """500 queued at once: others get their turn between a few starts and the next."""

    async def main() -> tuple[int, int]:
        async with watch.open(max_parallel=8) as supervisor:
            task = asyncio.create_task(collect(supervisor, job("true", count=100)))
            await until(lambda: supervisor.running)
            turns = 0
            while not task.done():
                await asyncio.sleep(0)
                turns += 1
            return turns, len(await task)

    turns, ended = loop_kind(main())
    assert ended == 100
    assert turns > 100


def test_nothing_of_a_supervisor_is_there_after_it(watch: Watch, tmp_path: Path, loop_kind: LoopKind) -> None:
    before = our_cgroups()
    loop_kind(watch.all(job("true", count=30), max_parallel=4))
    assert our_cgroups() == before
    assert list((tmp_path / "run/instances").iterdir()) == []
    kept = {"instances", "host-root-lock"}
    assert {path.name for path in (tmp_path / "run").iterdir()} <= kept
