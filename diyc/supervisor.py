"""Decides what runs when: admission, order, drain. The only mutable state of a supervisor is here.

Jobs wait as batches (a spec and how many of its runs are left), so a queued run costs nothing. Every change
(a submission, an end) calls admit(); nothing polls. What a run does once admitted is execution.py's."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from diyc import capabilities, process, rootless
from diyc.cgroups import Cgroups, RunCgroup, detect, open_cgroups, remove_leftovers, without_cgroups
from diyc.config import SupervisorConfig, supervisor_from_mapping
from diyc.errors import CgroupError, DiycError, HostError, ImageError
from diyc.execution import Execution, Prepared, Services, Sink
from diyc.host import is_initial_root, load_overlay, read_host, tmpfs_keeps_user_attributes
from diyc.ids import new_id
from diyc.images.directories import private_directory
from diyc.images.store import ImageStore, RootTree
from diyc.images.users import resolve_user
from diyc.instance import Instance, Leftover
from diyc.jobs import JobSpec, Limits, Mount, Run
from diyc.metrics import LiveContainer
from diyc.plan import Bind, Box, User
from diyc.process import Launcher
from diyc.results import Result
from diyc.security import check_labels
from diyc.slots import RANGE, RangeLocks, SharedSlots, Slots

STARTS_PER_TURN = 8  # of the event loop; then completions and scrapes have their turn
SPAWNER_THREADS = 4
CLOSE_PATIENCE = 5.0
PREPARED_KEPT = 1024
DESCRIPTORS_PER_RUN, DESCRIPTORS_OTHERWISE = 12, 40

OnResult = Callable[[Result], None]
OnStart = Callable[[Run], None]


@dataclass(slots=True, eq=False)
class Batch:
    """The runs of one submission that have not started yet, and what all of them share."""

    prepared: Prepared
    queued_at: float
    on_result: OnResult
    on_dropped: Callable[[int], None] | None = None
    sink: Sink | None = None
    stdin: int | None = None
    next_index: int = 0
    running: int = 0
    cancelled: bool = False
    order: tuple[int, int] = (0, 0)

    @property
    def left(self) -> int:
        """How many runs are still to be started."""
        return 0 if self.cancelled else self.prepared.spec.count - self.next_index

    @property
    def full(self) -> bool:
        """Whether the job's own max_parallel is reached."""
        limit = self.prepared.spec.max_parallel
        return limit is not None and self.running >= limit

    def __lt__(self, other: Batch) -> bool:
        return self.order < other.order


@dataclass(slots=True)
class State:
    """Everything that changes while a supervisor runs."""

    queue: list[Batch] = field(default_factory=list)
    parked: set[Batch] = field(default_factory=set)  # at their job's own max_parallel
    running: dict[str, tuple[Execution, Batch]] = field(default_factory=dict)
    memory: int = 0
    queued: int = 0
    draining: bool = False
    admitting: bool = False
    graves: set[asyncio.Task[None]] = field(default_factory=set)


class Supervisor:
    """Runs jobs in containers of their own: `async with Supervisor(max_parallel=8) as s: await s.run(job)`.

    Keyword arguments are the keys of [supervisor] in jobs.toml. Entering raises HostError where this host or
    this user cannot run jobs. Several supervisors may live in one process, each on its own loop or not."""

    def __init__(
        self, config: SupervisorConfig | None = None, *, on_start: OnStart | None = None, **settings: Any
    ) -> None:
        self.config = config if config is not None else supervisor_from_mapping(settings)
        self.leftovers: list[Leftover] = []
        self.warnings: list[str] = []
        self._on_start = on_start
        self._state = State()
        self._sequence = itertools.count()
        self._prepared: dict[JobSpec, Prepared] = {}
        self._owned = ExitStack()
        self._overlay_by_spawner = not tmpfs_keeps_user_attributes()

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Supervisor:
        load_overlay()
        read_host(calls=process.system_calls()).require()
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        config = self.config
        private_directory(config.state_dir, "state_dir")
        private_directory(config.runtime_dir, "runtime_dir")
        private_directory(os.path.join(config.runtime_dir, "instances"), "runtime_dir")
        log_dir = private_directory(os.path.join(config.state_dir, "logs"), "state_dir")
        try:
            self._services = self._open(log_dir)
        except BaseException:
            self._owned.close()
            raise
        return self

    def _open(self, log_dir: str) -> Services:
        """Take what a supervisor needs, each thing with its way back on `_owned`."""
        config, owned = self.config, self._owned
        instance = Instance(config.runtime_dir, new_id())
        owned.callback(instance.close)
        self.leftovers = instance.recover(remove_leftovers)
        self.warnings += instance.unreadable
        self.cgroups = self._open_cgroups(instance)
        owned.callback(self.cgroups.close)
        self._limit_devices()
        self._slots = self._open_slots()
        # a tmpfs is quicker, where it can be idmapped: from Linux 6.3 on
        fast = self._can_show(os.path.realpath(config.runtime_dir))
        runtime_dir = config.runtime_dir if fast else None
        self._images = ImageStore(config.state_dir, runtime_dir, chown=os.geteuid() == 0 and self._ids > 1)
        owned.callback(self._images.close)
        threads = min(SPAWNER_THREADS, config.max_parallel)
        launcher = Launcher(self._loop, threads=threads, scratch=config.runtime_dir)
        return Services(self._loop, launcher, self.cgroups, self._slots, self._bury, log_dir)

    def _open_cgroups(self, instance: Instance) -> Cgroups:
        """Without root and where nobody delegated a cgroup, best-effort makes do with none: prepare() of each job
        then names the limits that are not enforced."""
        cgroups = open_cgroups(detect(), self.config.cgroup_parent, instance.id, into=process.has_clone3())
        instance.record(cgroups=cgroups.instance_dirs, paths=())
        try:
            cgroups.prepare()
        except HostError as error:
            if rootless.mapped_ids() is None or self.config.enforce == "strict":
                raise
            cgroups = without_cgroups(str(error))
        return cgroups

    def _open_slots(self) -> Slots | SharedSlots:
        """Id ranges to lend, each with a user namespace to idmap with; without root every run has all ids there are."""
        config, owned = self.config, self._owned
        self._mapped = rootless.mapped_ids()
        self._ids = RANGE if self._mapped is None else min(RANGE, self._mapped.count)
        if self._mapped is not None:
            if self._overlay_by_spawner:
                raise HostError(
                    "kernel",
                    f"Linux {os.uname().release}: without root, the root file system of a job needs Linux 6.6 (an "
                    "overlay on a tmpfs with user.* attributes); run diyc as root, or use a later kernel",
                )
            return SharedSlots(self._mapped.id_map(RANGE))
        self._userns = process.user_namespace(f"0 {config.id_range[0]} {RANGE}\n")
        owned.callback(os.close, self._userns)
        locks = RangeLocks()
        owned.callback(locks.close)
        slots = Slots(config.id_range, process.user_namespace, reuse=config.reuse, lock=locks.take)
        owned.callback(slots.close)
        return slots

    def _can_show(self, path: str) -> bool:
        """Whether files at `path` can have the ids inside a job that they have for us."""
        return self._mapped is not None or process.can_idmap(path, self._userns)

    def _limit_devices(self) -> None:
        """Root of a user namespace cannot: there no device node can be made, and all mounts are nodev."""
        if not is_initial_root():
            return
        try:
            self.cgroups.limit_devices(process.limit_devices)
        except HostError as error:
            if self.config.enforce == "strict":
                raise
            self.warnings.append(f"not enforced: {error}")

    async def __aexit__(self, *_: object) -> None:
        """End what still runs, and give back everything that was made."""
        self.drain()
        self.kill()
        await self.wait()
        self._services.launcher.close()
        await self._close_graves()
        self._owned.close()

    async def _close_graves(self) -> None:
        if self._state.graves:
            await asyncio.wait(self._state.graves, timeout=CLOSE_PATIENCE)

    # -- submission --------------------------------------------------------------------------------

    async def prepare(self, spec: JobSpec, *, max_memory: int | None = None) -> Prepared:
        """Get a job's image ready and check that this host can run it, within `max_memory` if not the one in force.

        Raises ImageError; HostError naming each limit that cannot be enforced (a warning where best-effort)."""
        if self._state.draining:
            raise _stopped()
        prepared = self._prepared.get(spec)
        if prepared is None:
            self._check_limits(spec, self.config.max_memory if max_memory is None else max_memory)
            self.warnings += check_labels(spec)
            try:
                tree = await self._loop.run_in_executor(None, self._images.ensure, spec.image)
                prepared = self._prepared[spec] = self._join(spec, tree)
            except ImageError as error:
                raise ImageError(f"job {spec.name}, image {spec.image.name}: {error}") from error
            if len(self._prepared) > PREPARED_KEPT:
                del self._prepared[next(iter(self._prepared))]  # the oldest; batches keep their own
        return prepared

    def _join(self, spec: JobSpec, tree: RootTree) -> Prepared:
        tree = replace(tree, path=os.path.realpath(tree.path))
        account = resolve_user(tree.path, spec.user)
        user = User(account.uid, account.gid, account.groups, account.home)
        _check_mapped(spec, user, self._ids)
        if not self._can_show(tree.path):
            raise HostError("idmapped mounts", _no_idmap(tree.path, "the image"))
        binds = tuple(self._bind(mount) for mount in (*_image_mounts(tree), *spec.mounts) if mount.type == "bind")
        box = Box(
            hostname="",
            user=user,
            binds=binds,
            into_cgroup=self.cgroups.into,
            capabilities=capabilities.mask(spec.cap_add),
            overlay_by_spawner=self._overlay_by_spawner,
            supervisor=os.getpid(),
            may_set_groups=self._mapped is None or rootless.may_set_groups(),
            ids=self._ids,
        )
        return Prepared(spec, tree, box, os.path.realpath(spec.stdin) if spec.stdin else None)

    def _bind(self, mount: Mount) -> Bind:
        """Without shifted ids a read-only mount still serves, a writable one could be written by nobody."""
        source = os.path.realpath(mount.source or "")  # from here on no link is followed
        idmapped = self._can_show(source)
        if not idmapped and not mount.read_only:
            raise HostError("idmapped mounts", _no_idmap(source, "a writable mount"))
        return Bind(source, mount.target, mount.read_only, os.path.isdir(source), idmapped)

    def _check_limits(self, spec: JobSpec, max_memory: int) -> None:
        problems = self.cgroups.unsupported(spec.limits)
        problems += _above_own_limits(spec.limits)
        if (spec.limits.memory or 0) > max_memory:
            raise DiycError(
                f"job {spec.name}: limits.memory is above the supervisor's max_memory: it could never start"
            )
        if problems and self.config.enforce == "strict":
            remedy = 'set supervisor.enforce = "best-effort" to run without'
            raise HostError("limits", f"job {spec.name}: " + "; ".join(problems) + f"; {remedy}")
        self.warnings += [f"job {spec.name}: not enforced: {problem}" for problem in problems]

    def submit(
        self,
        prepared: Prepared,
        on_result: OnResult,
        *,
        on_dropped: Callable[[int], None] | None = None,
        sink: Sink | None = None,
        stdin: int | None = None,
    ) -> Batch:
        """Queue all runs of a prepared job; `on_result` is called for each as it ends. The batch serves cancel().

        `on_dropped` is told how many runs a drain kept from starting. With `sink`, output goes there as it comes
        and is not kept; `stdin` is a descriptor that the caller keeps open."""
        if self._state.draining:
            raise _stopped()
        batch = Batch(prepared, time.monotonic(), on_result, on_dropped, sink, stdin)
        batch.order = (-prepared.spec.priority, next(self._sequence))
        self._state.queued += batch.left
        self._idle.clear()
        heapq.heappush(self._state.queue, batch)
        self._admit_soon()
        return batch

    def cancel(self, batch: Batch) -> None:
        """Start none of the batch's runs any more and stop those that run (verdict cancelled)."""
        self._state.queued -= batch.left
        batch.cancelled = True
        for execution, owner in list(self._state.running.values()):
            if owner is batch:
                execution.stop("cancelled")
        self._admit_soon()

    def drop(self, batch: Batch) -> int:
        """Start none of the batch's runs any more, and let those that run go on. Returns how many were dropped."""
        left, batch.cancelled = batch.left, True
        self._state.queued -= left
        self._admit_soon()
        return left

    def reconfigure(self, **settings: Any) -> None:
        """Change max_parallel, max_memory or shutdown_grace from now on. Runs that go on are left alone, also where
        they are more than would be started now."""
        self.config = replace(self.config, **settings)
        self._admit_soon()

    async def run(self, spec: JobSpec) -> Result:
        """Run a job once and return its result. Cancelling the awaiting task cancels the run."""
        ended: asyncio.Future[Result] = self._loop.create_future()
        prepared = await self.prepare(replace(spec, count=1))
        batch = self.submit(prepared, ended.set_result, on_dropped=lambda _: ended.set_exception(_stopped()))
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            self.cancel(batch)
            raise

    async def map(self, specs: Iterable[JobSpec]) -> AsyncIterator[Result]:
        """Run each job with all its runs; results come as runs end."""
        results: asyncio.Queue[Result | None] = asyncio.Queue()
        batches: list[Batch] = []
        try:
            for spec in specs:
                prepared = await self.prepare(spec)
                batches.append(self.submit(prepared, results.put_nowait, on_dropped=lambda _: results.put_nowait(None)))
            for _ in range(sum(batch.prepared.spec.count for batch in batches)):
                result = await results.get()
                if result is None:
                    raise _stopped()
                yield result
        finally:
            for batch in batches:  # the caller went away, or failed: nobody wants the rest
                self.cancel(batch)

    # -- admission ---------------------------------------------------------------------------------

    def _admit_soon(self) -> None:
        if not self._state.admitting:
            self._state.admitting = True
            self._loop.call_soon(self._admit)

    def _admit(self) -> None:
        """Start what may start, a few at a time so that the loop stays responsive."""
        state = self._state
        state.admitting = False
        for _ in range(STARTS_PER_TURN):
            batch = self._next()
            if batch is None:
                self._note_idle()
                return
            self._start(batch)
        self._admit_soon()

    def _next(self) -> Batch | None:
        """The first batch, by priority and age, whose job may start a run now. A batch whose turn it is and whose
        memory does not fit is waited for: passing it over for ever smaller jobs would starve it."""
        state = self._state
        if state.draining or len(state.running) >= self.slots:
            return None
        while state.queue:
            batch = state.queue[0]
            if batch.left == 0:
                heapq.heappop(state.queue)
            elif batch.full:
                state.parked.add(heapq.heappop(state.queue))
            else:
                fits = state.memory + (batch.prepared.spec.limits.memory or 0) <= self.config.max_memory
                return batch if fits else None
        return None

    def _start(self, batch: Batch) -> None:
        state, spec = self._state, batch.prepared.spec
        run = Run(new_id(), spec, batch.next_index)
        batch.next_index += 1
        batch.running += 1
        state.queued -= 1
        state.memory += spec.limits.memory or 0
        execution = Execution(
            self._services, batch.prepared, run, batch.queued_at, self._ended, batch.sink, batch.stdin
        )
        state.running[run.run_id] = (execution, batch)
        if self._on_start is not None:
            self._on_start(run)
        execution.start()

    def _ended(self, execution: Execution, result: Result) -> None:
        state = self._state
        _, batch = state.running.pop(execution.run.run_id)
        state.memory -= execution.run.spec.limits.memory or 0
        batch.running -= 1
        if batch in state.parked and not batch.full:
            state.parked.remove(batch)
            heapq.heappush(state.queue, batch)
        self._admit_soon()
        batch.on_result(result)

    def _note_idle(self) -> None:
        state = self._state
        if not state.running and (state.draining or not (state.queue or state.parked)):
            self._idle.set()

    # -- the end of runs ---------------------------------------------------------------------------

    async def wait(self) -> None:
        """Return when nothing runs and nothing can start any more."""
        await self._idle.wait()

    def drain(self) -> None:
        """Start nothing more; running jobs get their stop_signal, and KILL after their stop_timeout or
        shutdown_grace, whichever is shorter."""
        if self._state.draining:
            return
        self._state.draining = True
        for execution, _ in list(self._state.running.values()):
            execution.stop("cancelled")
        if self._state.running:
            self._loop.call_later(self.config.shutdown_grace, self.kill)
        for batch in (*self._state.queue, *self._state.parked):
            left, batch.cancelled = batch.left, True
            if left and batch.on_dropped is not None:
                batch.on_dropped(left)
        self._state.queued = 0
        self._admit_soon()

    def kill(self) -> None:
        """SIGKILL everything that runs."""
        for execution, _ in list(self._state.running.values()):
            execution.stop("cancelled")
            execution.kill()

    def _bury(self, cgroup: RunCgroup) -> None:
        """Remove a run's cgroups, now or as soon as the kernel lets go of them."""
        try:
            if cgroup.remove():
                return
        except CgroupError as error:
            self.warnings.append(str(error))
            return
        task = self._loop.create_task(cgroup.wait_removed())
        self._state.graves.add(task)
        task.add_done_callback(self._state.graves.discard)

    # -- figures -----------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Runs in a container now."""
        return len(self._state.running)

    @property
    def queued(self) -> int:
        """Runs waiting to start."""
        return self._state.queued

    @property
    def slots(self) -> int:
        """How many runs the id range, max_parallel and the limit on open files allow at once."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        affordable = max(1, (descriptors - DESCRIPTORS_OTHERWISE) // DESCRIPTORS_PER_RUN)
        return min(self.config.max_parallel, self._slots.size, affordable)

    def live(self) -> Iterator[LiveContainer]:
        """The running containers with their figures, for a scrape."""
        now = time.time()
        for execution, _ in list(self._state.running.values()):
            if execution.started_at is not None:
                run = execution.run
                yield LiveContainer(
                    run_id=run.run_id,
                    job_name=run.spec.name,
                    image=run.spec.image.name,
                    started_at=execution.started_at,
                    age_s=now - execution.started_at,
                    memory_limit=run.spec.limits.memory,
                    figures=execution.figures,
                )


def _image_mounts(tree: RootTree) -> Iterator[Mount]:
    """The parts of the host that an image shows, as read-only mounts."""
    return (Mount("bind", target, source, read_only=True) for source, target in tree.binds)


def _above_own_limits(limits: Limits) -> Iterator[str]:
    """A child in a user namespace may not raise a hard limit (getrlimit(2))."""
    for key, number in (("nofile", resource.RLIMIT_NOFILE), ("core", resource.RLIMIT_CORE)):
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY and getattr(limits, key) > hard:
            yield f"limits.{key}: this process itself may have {hard} at most (ulimit -H): raise that"


def _no_idmap(path: str, what: str) -> str:
    advice = "put it on ext4, xfs or btrfs, or use a later kernel (tmpfs: Linux 6.3)"
    return f"{path} is on a file system that has none under Linux {os.uname().release}, and {what} needs them: {advice}"


def _check_mapped(spec: JobSpec, user: User, count: int) -> None:
    """Refuse a user or group that has no id outside."""
    for what, number in (("user", user.uid), ("group", user.gid), *(("group", group) for group in user.groups)):
        if number >= count:
            raise HostError(
                "user ids",
                f"job {spec.name}: there is no {what} {number} here, only 0 to {count - 1}: without root, ids come "
                "from /etc/subuid and /etc/subgid (usermod --add-subuids, --add-subgids), and newuidmap lends them",
            )


def _stopped() -> DiycError:
    return DiycError("the supervisor was stopped before the run could start")
