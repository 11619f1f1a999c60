"""One run's cgroups: made in one go, joined by its first process, read, killed and removed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from diyc.cgroups import v2
from diyc.cgroups.delegation import processes
from diyc.cgroups.draft import Figures, Read
from diyc.cgroups.hierarchy import Hierarchy
from diyc.cgroups.kill import kill_listed
from diyc.cgroups.watch import EmptyWatch
from diyc.errors import CgroupError
from diyc.results import CgroupFigures


@dataclass(frozen=True, slots=True)
class Recipe:
    """What limits come to on this host. Runs with equal limits share one.

    `hierarchies` has the v2 one first, if any: it is the last to be removed, and tells when it is empty. `into` is that
    one again where a run's process is cloned into it."""

    hierarchies: tuple[Hierarchy, ...]
    controllers: Mapping[str, Hierarchy]
    writes: tuple[tuple[Hierarchy, str, bytes], ...]
    readers: tuple[tuple[Hierarchy, Callable[[Read], Figures]], ...]
    unified: Hierarchy | None
    into: Hierarchy | None


class RunCgroup:
    """The cgroups of one run, from creation to remove().

    `into_fd` is the v2 directory for CLONE_INTO_CGROUP, None without that; `join_fds` are the files of the others,
    to each of which the child writes "0" (a pid written from outside waits for an RCU grace period)."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        """Make the directories and set the limits. CgroupError leaves nothing behind."""
        self.name = name
        self.into_fd: int | None = None
        self.join_fds: tuple[int, ...] = ()
        self._recipe = recipe
        self._left: list[Hierarchy] = []
        try:
            for hierarchy in recipe.hierarchies:
                hierarchy.mkdir(name)
                self._left.append(hierarchy)
            for hierarchy, file, value in recipe.writes:
                hierarchy.write(name, file, value)
            for hierarchy in recipe.hierarchies:
                self._open(hierarchy)
        except BaseException as error:
            self._undo(error)
            raise

    @property
    def dirs(self) -> dict[str, str]:
        """The directory of each controller; "unified" is the v2 one."""
        return {label: f"{hierarchy.path}/{self.name}" for label, hierarchy in self._recipe.controllers.items()}

    def figures(self, full: bool = True) -> CgroupFigures:
        """Read each file once. None stands where this layout or kernel has no such figure;
        `full=False` leaves out the pressures."""
        values: Figures = {}
        for hierarchy, reader in self._recipe.readers:
            values |= reader(partial(hierarchy.read, self.name))
        if full and self._recipe.unified:
            values["pressure_s"] = v2.pressure(partial(self._recipe.unified.read, self.name))
        return CgroupFigures(**values)

    def kill(self) -> None:
        """SIGKILL to every process of the run, however many it forks meanwhile. Nothing to do if it is removed."""
        if not self._left:
            return
        unified = self._recipe.unified
        if unified and "cgroup.kill" in unified.names:  # Linux 5.14
            unified.write(self.name, "cgroup.kill", b"1")
        else:
            kill_listed(self._path, self._processes)

    def watch_empty(self) -> EmptyWatch | None:
        """Something to wait on after remove() said False: see EmptyWatch. None: no process is left to wait for."""
        if self._recipe.unified:
            return EmptyWatch.of_events(f"{self._path}/cgroup.events")
        return EmptyWatch.of_processes(self._processes())

    async def wait_removed(self) -> None:
        """remove(), waiting as long as there are processes: call kill() first, or bound the wait."""
        while not self.remove():
            watch = self.watch_empty()
            if watch is None:
                # The last process ended this moment. v1 tells nobody when it has let go of the directory.
                await asyncio.sleep(0.001)
                continue
            with watch:
                await watch.wait()

    def remove(self) -> bool:
        """Remove the directories and close what is open. False: something is still in there (see watch_empty);
        what could be removed is, and the next call goes on. Never waits."""
        while self._left:
            if not self._left[-1].rmdir(self.name):
                return False
            self._left.pop()
        self.close_join_fds()
        return True

    def close_join_fds(self) -> None:
        """Close the descriptors that only the start of the run needs."""
        fds, self.join_fds = self.join_fds, ()
        for fd in fds:
            os.close(fd)
        if self.into_fd is not None:
            os.close(self.into_fd)
            self.into_fd = None

    @property
    def _path(self) -> str:
        return f"{self._recipe.hierarchies[0].path}/{self.name}"

    def _processes(self) -> set[int]:
        return processes(self._path, self._recipe.hierarchies[0].files)

    def _open(self, hierarchy: Hierarchy) -> None:
        if hierarchy is self._recipe.into:
            self.into_fd = hierarchy.open(self.name)
        else:
            self.join_fds += (hierarchy.open(self.name, hierarchy.join_file),)

    def _undo(self, cause: BaseException) -> None:
        self.close_join_fds()
        try:
            if not self.remove():
                cause.add_note(f"{self._path} could not be removed: it is in use")
        except CgroupError as error:
            cause.add_note(str(error))
