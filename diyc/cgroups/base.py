"""The one face of the cgroup layouts: Cgroups for a supervisor, a RunCgroup for each of its runs.

A run gets a directory in every hierarchy that limits or measures it: one on pure v2; on v1 one for each
controller; on a hybrid host both, because the v2 mount kills, tells of emptiness and accounts CPU time."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from diyc.cgroups import delegation, devices, v1, v2
from diyc.cgroups.detect import CgroupHost
from diyc.cgroups.draft import KEYS, Dialect, Draft, asked_for
from diyc.cgroups.files import Files
from diyc.cgroups.hierarchy import Hierarchy
from diyc.cgroups.machine import Machine
from diyc.cgroups.run import Recipe, RunCgroup
from diyc.errors import CgroupError, HostError
from diyc.jobs import Limits

_DIALECTS: dict[int, Dialect] = {1: v1.DIALECT, 2: v2.DIALECT}

# Every run has these where there are such; the others only if a limit asks for them.
_ALWAYS = frozenset({"memory", "pids", "cpu", "io"})

_MOST_RECIPES = 1024
_DEVICES_ADVICE = (
    "a container around diyc may forbid that (bpf(2) takes CAP_BPF or CAP_SYS_ADMIN): let it, "
    'or set supervisor.enforce = "best-effort" to run without'
)


def open_cgroups(
    host: CgroupHost,
    parent: str = "diyc",
    instance: str = "default",
    machine: Machine | None = None,
    files: Files | None = None,
    *,
    into: bool = True,
) -> Cgroups:
    """The cgroups of one supervisor: <delegated root>/<parent>/<instance>/ in each hierarchy. Writes nothing yet.

    `into`: a run's process is cloned into its v2 cgroup; else it joins that as it joins those of v1.
    HostError: no cgroups here at all."""
    if not host.controllers and host.unified is None:
        raise HostError("cgroups", "no cgroup hierarchy is mounted (try `mount -t cgroup2 none /sys/fs/cgroup`)")
    return Cgroups(host, parent, instance, machine or Machine(), files or Files(), into)


def without_cgroups(why: str) -> Cgroups:
    """The same face where no cgroup may be written: runs are in the supervisor's own, every limit that needs one is
    unsupported because of `why`, and there are no figures."""
    return Cgroups(CgroupHost("none", {}, None), "diyc", "none", Machine(), Files(), absent=why)


@dataclass(frozen=True, slots=True)
class Preview:
    """A run's cgroups: a directory in each of `directories`, (file, value) pairs of its limits, the files by which it
    joins by itself in order, and the v2 directory below which it is cloned, if it is."""

    directories: tuple[str, ...]
    writes: tuple[tuple[str, str], ...]
    joins: tuple[str, ...]
    into: str | None


class Cgroups:
    """Makes runs' cgroups. prepare() first; close() at the end, when no run is left."""

    def __init__(
        self,
        host: CgroupHost,
        parent: str,
        instance: str,
        machine: Machine,
        files: Files,
        into: bool = True,
        absent: str | None = None,
    ) -> None:
        self._absent = absent
        self.layout = host.layout
        self._machine = machine
        self._files = files
        places = [*([host.unified] if host.unified else []), *host.controllers.values()]
        by_place = {place: Hierarchy(place, parent, instance, files) for place in dict.fromkeys(places)}
        self._hierarchies = list(by_place.values())
        self._by_controller = {name: by_place[place] for name, place in host.controllers.items()}
        self._unified = by_place[host.unified] if host.unified else None
        self._recipes: dict[Limits, Recipe] = {}
        self._prepared = False
        self.into = into and self._unified is not None

    @property
    def instance_dirs(self) -> list[str]:
        """Every directory that this object may ever make runs in: what remove_leftovers() needs to know."""
        return [hierarchy.path for hierarchy in self._hierarchies]

    def describe(self) -> list[str]:
        """A line a controller: its version and where its runs are."""
        lines = [f"{name} (v{h.place.version}): {h.path}" for name, h in sorted(self._by_controller.items())]
        return lines + ([f"unified (v2): {self._unified.path}"] if self._unified else [])

    def unsupported(self, limits: Limits) -> list[str]:
        """Each limit that this host cannot enforce: key, reason, remedy. Exact after prepare(); before it, what only
        a new cgroup's files would tell is taken to be fine."""
        return self._draft(limits).problems

    def prepare(self) -> None:
        """Make the instance directories and enable the controllers that every run has. Doing it twice is harmless.

        HostError: this user or this host does not let us; nothing is left behind."""
        if self._prepared:
            return
        try:
            if self._unified:
                self._unified.make()
                self._unified.enable(name for name in _ALWAYS if self._by_controller.get(name) is self._unified)
            for name in self._measured():
                self._by_controller[name].make()
        except (HostError, CgroupError) as error:
            self._give_up(error)
            raise
        self._prepared = True

    def limit_devices(self, attach: Callable[[bytes, int], None]) -> None:
        """After prepare(): let no run make or open a device node beyond devices.ALLOWED.

        `attach` binds a BPF program to a v2 directory. HostError: the kernel, or a container around us, refuses."""
        try:
            if self._unified:
                attach(devices.v2_program(), self._unified.fd)
            elif hierarchy := self._by_controller.get("devices"):
                for file, value in devices.v1_rules():
                    self._files.write(file, value.encode(), hierarchy.fd)
            else:
                raise HostError("device policy", "no devices controller is mounted, nor cgroup v2")
        except OSError as error:
            what = f"cannot {error.args[1]}" if self._unified else "cannot set devices.deny and devices.allow"
            raise HostError("device policy", f"{what}: {os.strerror(error.args[0])}; {_DEVICES_ADVICE}") from error

    def create(self, name: str, limits: Limits) -> RunCgroup:
        """Make the cgroups of one run. Limits that unsupported() names are left out.

        CgroupError: the kernel refused a directory or a value; nothing is left behind."""
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is not a name for a cgroup")
        return RunCgroup(name, self._recipes.get(limits) or self._ready(limits))

    def preview(self, limits: Limits) -> Preview:
        """What create() would do for a run with these limits, for people to read. Makes nothing."""
        recipe = self._recipe(self._draft(limits))
        return Preview(
            directories=tuple(hierarchy.path for hierarchy in recipe.hierarchies),
            writes=tuple((f"{h.path}/RUN/{file}", value.decode()) for h, file, value in recipe.writes),
            joins=tuple(f"{h.path}/RUN/{h.join_file}" for h in recipe.hierarchies if h is not recipe.into),
            into=recipe.into.path if recipe.into else None,
        )

    def close(self) -> None:
        """Remove the instance directories. CgroupError while there are runs in them; the empty ones are gone then."""
        self._prepared = False
        self._recipes.clear()
        failures = []
        for hierarchy in self._hierarchies:
            try:
                hierarchy.discard()
            except CgroupError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _give_up(self, cause: Exception) -> None:
        try:
            self.close()
        except CgroupError as error:
            cause.add_note(str(error))

    def _measured(self) -> list[str]:
        """The controllers that every run has, here. The v2 mount counts CPU time, and limits devices, without any."""
        names = [name for name in self._by_controller if name in _ALWAYS]
        counts_cpu = self._unified is not None and self._unified.has("cpu.stat")
        more = () if counts_cpu else ("cpuacct",)
        return names + [name for name in (*more, "devices") if name in self._by_controller]

    def _ready(self, limits: Limits) -> Recipe:
        """The recipe for `limits`, with all that it needs in place. Runs with equal limits find it again,
        unless there are problems: those may go away."""
        self.prepare()
        draft = self._draft(limits)
        recipe = self._recipe(draft)
        for hierarchy in recipe.hierarchies:
            hierarchy.make()
        if self._unified:
            self._unified.enable(
                name
                for name, hierarchy in recipe.controllers.items()
                if name != "unified" and hierarchy is self._unified
            )
        if not draft.problems:
            if len(self._recipes) >= _MOST_RECIPES:
                self._recipes.clear()
            self._recipes[limits] = recipe
        return recipe

    def _recipe(self, draft: Draft) -> Recipe:
        used = {"unified": self._unified} if self._unified else {}
        for name in (*self._measured(), *(setting.controller for setting in draft.settings)):
            used[name] = self._by_controller[name]
        return Recipe(
            hierarchies=tuple(dict.fromkeys(used.values())),
            controllers=used,
            writes=tuple((self._by_controller[s.controller], s.file, s.value.encode()) for s in draft.settings),
            readers=tuple(
                (hierarchy, reader)
                for name, hierarchy in used.items()
                if (reader := _DIALECTS[hierarchy.place.version].figures.get(name))
            ),
            unified=self._unified,
            into=self._unified if self.into else None,
        )

    def _draft(self, limits: Limits) -> Draft:
        draft = Draft(self._machine, self._present, self._usable_cpus, self._has_iocost)
        for controller in KEYS:
            asked = asked_for(limits, controller)
            if why := self._obstacle(controller, asked):
                for key in asked:
                    if key != "swap" or self._machine.has_swap():
                        draft.refuse(key, why)
            elif asked:
                hierarchy = self._by_controller[controller]
                _DIALECTS[hierarchy.place.version].settings[controller](limits, draft)
        return draft

    def _obstacle(self, controller: str, asked: list[str]) -> str | None:
        """Why a controller that a limit asks for cannot be used."""
        if not asked:
            return None
        hierarchy = self._by_controller.get(controller)
        if hierarchy is None:
            return self._absence(controller)
        if hierarchy is self._unified and controller not in hierarchy.enabled:
            return delegation.obstacle(hierarchy.place.directory, [controller], self._files)
        return None

    def _absence(self, controller: str) -> str:
        if self._absent:
            return self._absent
        place = self._unified.place if self._unified else None
        offered = self._files.read(f"{place.mount}/cgroup.controllers") if place else None
        if place and controller.encode() in (offered or b"").split():
            return f"the {controller} controller is not handed down to {place.directory}: {delegation.HOW_TO_DELEGATE}"
        return (
            f"there is no {controller} controller: the kernel lacks it, it is off (see /proc/cgroups; "
            f"cgroup_enable={controller} on the kernel's command line), or it is not mounted"
        )

    def _present(self, controller: str, file: str) -> bool:
        """Whether runs' directories have `file`; taken to be so where none could be looked at yet."""
        hierarchy = self._by_controller[controller]
        if not hierarchy.made or (hierarchy is self._unified and controller not in hierarchy.enabled):
            return True
        return file in hierarchy.names

    def _usable_cpus(self) -> str | None:
        """The CPUs of the delegated root; v2, then v1, then v1 of old kernels."""
        directory = self._by_controller["cpuset"].place.directory
        for file in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if text := (self._files.read(f"{directory}/{file}") or b"").strip():
                return text.decode()
        return None

    def _has_iocost(self) -> bool:
        """Whether any disk has the weights of io.cost (its switch is at the top of the v2 hierarchy)."""
        if self._unified is None:
            return False
        return b"enable=1" in (self._files.read(f"{self._unified.place.mount}/io.cost.qos") or b"")
