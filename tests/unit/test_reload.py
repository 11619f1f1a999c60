"""How two configurations differ, and one reload after another."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from diyc.cli.reload import Reloads, compare
from diyc.config import Config, supervisor_from_mapping
from diyc.jobs import JobSpec

ONE, TWO, THREE = (JobSpec(name, ("true",)) for name in ("one", "two", "three"))
SUPERVISOR = supervisor_from_mapping({"max_parallel": 2})


def config(*jobs: JobSpec, **keys: object) -> Config:
    return Config("jobs.toml", replace(SUPERVISOR, **keys), jobs)  # type: ignore[arg-type]


def test_each_job_is_as_before_new_changed_or_gone() -> None:
    changed = replace(TWO, timeout=1.0)
    changes = compare(config(ONE, TWO), config(changed, THREE))
    assert (changes.kept, changes.gone, changes.changed, changes.new) == ((), ("one",), ("two",), ("three",))
    assert changes.to_start == (changed, THREE)
    assert compare(config(ONE, TWO), config(TWO, ONE)).kept == ("two", "one")


def test_keys_of_the_supervisor_count_at_once_or_after_a_restart() -> None:
    changes = compare(config(ONE), config(ONE, max_parallel=5, shutdown_grace=1.0, reuse=False, cgroup_parent="other"))
    assert changes.live == {"max_parallel": 5, "shutdown_grace": 1.0}
    assert changes.restart == ("cgroup_parent", "reuse")


def test_requests_before_and_during_a_reload_are_one_after_it() -> None:
    async def main() -> int:
        done = 0
        gate = asyncio.Event()

        async def reload() -> None:
            nonlocal done
            done += 1
            await gate.wait()

        reloads = Reloads(reload)
        reloads.request()
        await asyncio.sleep(0)
        assert done == 0  # not open yet
        reloads.open()
        await asyncio.sleep(0)
        for _ in range(3):
            reloads.request()
        gate.set()
        await reloads.idle.wait()
        return done

    assert asyncio.run(main()) == 2
