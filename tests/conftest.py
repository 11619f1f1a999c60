"""What all tests share: privileged ones skip without root and are wrapped in the leak check; both event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import settings

import features
from leakcheck import Snapshot, settled_leaks, snapshot
from needs import require

T = TypeVar("T")

# No test passes or fails by its speed.
settings.register_profile("diyc", deadline=None)
settings.load_profile("diyc")

FACTORIES = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    if plugin := features.plugin():
        config.pluginmanager.register(plugin)


def pytest_sessionstart() -> None:
    """libuv keeps a pipe from its first loop for ever: before the leak checks, not in the first of them."""
    uvloop.new_event_loop().close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("privileged"):
        require("root")


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a privileged test that leaves anything behind.

    Files are looked for in tmp_path's `state` and `run` and in the default places of root's supervisor."""
    if request.node.get_closest_marker("privileged") is None:
        yield
        return
    tmp_path: Path = request.getfixturevalue("tmp_path")
    places = [tmp_path / "state", tmp_path / "run", Path("/var/lib/diyc"), Path("/run/diyc")]

    def look() -> Snapshot:
        return snapshot(places)

    before = look()
    yield
    if found := settled_leaks(before, look):
        pytest.fail("left behind by this test:\n  " + "\n  ".join(found), pytrace=False)


@dataclass(frozen=True, slots=True)
class LoopKind:
    """Calling it runs a coroutine to its end on a new event loop of the kind `name`."""

    name: str

    def __call__(self, main: Coroutine[Any, Any, T]) -> T:
        with asyncio.Runner(loop_factory=FACTORIES[self.name]) as runner:
            return runner.run(main)


@pytest.fixture(params=sorted(FACTORIES, reverse=True))
def loop_kind(request: pytest.FixtureRequest) -> LoopKind:
    """The test runs twice, on uvloop and on plain asyncio: `loop_kind(coroutine())`."""
    return LoopKind(request.param)
