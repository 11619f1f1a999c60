"""Figures for Prometheus: totals of finished runs, gauges, and the cgroups of running containers.

Finished runs are added into plain numbers, which costs a few microseconds, and become series when somebody scrapes.
The lines are written here, piece by piece, because prometheus_client's writer takes the loop for a tenth of a
second over a thousand containers; its registry remains the place where everything meets."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from operator import attrgetter
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from diyc import __version__
from diyc.errors import CgroupError
from diyc.results import CgroupFigures, Result, Verdict

OTHER = "_other"
"""The job_name that all names beyond a cap share."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LiveContainer:
    """A running container at the moment of a scrape; `started_at` is in seconds since the epoch.

    `figures` may be a function: it is then called only for containers that are shown, at most once a scrape,
    and may raise CgroupError where the run has ended meanwhile."""

    run_id: str
    job_name: str
    image: str
    started_at: float
    age_s: float
    memory_limit: int | None
    figures: CgroupFigures | Callable[[], CgroupFigures]


class Labels:
    """Label names and values, with the text they have in both formats made once."""

    __slots__ = ("pairs", "text")

    def __init__(self, **pairs: str) -> None:
        # A lone surrogate (a file name that is not UTF-8) would make the whole page unencodable.
        self.pairs = {name: value.encode("utf-8", "backslashreplace").decode() for name, value in pairs.items()}
        self.text = ",".join(f'{name}="{_escaped(value)}"' for name, value in self.pairs.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# One line of a series: the suffix of its name, labels beside the series' own, and the number.
Point = tuple[str, Labels, float]
Series = tuple[Labels, Iterable[Point]]

_NONE = Labels()

# OpenMetrics reserves X for a counter X_total, and diyc_job_cpu_seconds is also a histogram: that one counter
# is declared as unknown there. The plain text format has no such rule.
_TEXT_TYPES = {"unknown": "counter"}


class Family(Metric):
    """All series of one name, made while they are read, so that whoever writes them can pause in between."""

    def __init__(self, name: str, kind: str, explanation: str, series: Callable[[], Iterable[Series]]) -> None:
        super().__init__(name, explanation, kind)
        self.series = series
        del self.samples  # the list that Metric made hides the property

    @cached_property
    def samples(self) -> list[Sample]:  # type: ignore[override]
        """The same series for prometheus_client's own writers."""
        return [
            Sample(self.name + suffix, labels.pairs | extra.pairs, value)
            for labels, points in self.series()
            for suffix, extra, value in points
        ]

    def text(self, openmetrics: bool) -> Iterator[str]:
        """Whole lines, a series at a time; nothing at all where there is no series."""
        header = self._header(openmetrics)
        for labels, points in self.series():
            yield header + "".join([_line(self.name + suffix, labels, extra, value) for suffix, extra, value in points])
            header = ""

    def _header(self, openmetrics: bool) -> str:
        name, kind = self.name, self.type
        if not openmetrics:
            name += "_total" if kind == "counter" else ""
            kind = _TEXT_TYPES.get(kind, kind)
        return f"# HELP {name} {self.documentation}\n# TYPE {name} {kind}\n"


def _line(name: str, labels: Labels, extra: Labels, value: float) -> str:
    text = f"{labels.text},{extra.text}" if extra.text else labels.text
    return f"{name}{{{text}}} {value}\n" if text else f"{name} {value}\n"


class Buckets:
    """The upper bounds of a histogram's buckets and their `le` labels."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.labels = [Labels(le=floatToGoString(bound)) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]


class Histogram:
    """How many observations fell below each bound, and their sum."""

    __slots__ = ("buckets", "counts", "sum")

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.counts = [0] * len(buckets.labels)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.buckets.bounds, value)] += 1
        self.sum += value

    def points(self) -> list[Point]:
        """The lines of this histogram; none before the first observation."""
        total = sum(self.counts)
        if not total:
            return []
        below = zip(self.buckets.labels, accumulate(self.counts), strict=True)
        return [*(("_bucket", le, count) for le, count in below), ("_count", _NONE, total), ("_sum", _NONE, self.sum)]


_MIB = 1024**2
_HISTOGRAMS = (
    (
        "diyc_job_queue_seconds",
        "From the moment a run could start to its start.",
        Buckets(0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800, 3600),
    ),
    (
        "diyc_job_setup_seconds",
        "From the end of the queue to execve: the building of the container.",
        Buckets(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
    ),
    (
        "diyc_job_wall_seconds",
        "From execve to the end of the run.",
        Buckets(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800, 3600),
    ),
    (
        "diyc_job_cpu_seconds",
        "CPU time of a run, user and system.",
        Buckets(0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 3600),
    ),
    (
        "diyc_job_memory_peak_bytes",
        "The most memory that a run's cgroup was charged for.",
        Buckets(*(_MIB * 4**power for power in range(-1, 9))),
    ),
)
_STEP_BUCKETS = Buckets(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.05, 0.1, 1)

# Name, type, explanation, and the points: (suffix, labels, field of Result).
_COUNTERS = (
    (
        "diyc_job_cpu_seconds_total",
        "unknown",
        "CPU time of finished runs.",
        (("", Labels(mode="user"), "cpu_user_s"), ("", Labels(mode="system"), "cpu_system_s")),
    ),
    (
        "diyc_job_io_bytes",
        "counter",
        "Bytes that finished runs read from and wrote to block devices.",
        (
            ("_total", Labels(direction="read"), "io_read_bytes"),
            ("_total", Labels(direction="write"), "io_write_bytes"),
        ),
    ),
    (
        "diyc_job_network_bytes",
        "counter",
        "Bytes that finished runs received and sent.",
        (
            ("_total", Labels(direction="receive"), "net_rx_bytes"),
            ("_total", Labels(direction="transmit"), "net_tx_bytes"),
        ),
    ),
    (
        "diyc_job_oom_kills",
        "counter",
        "Processes of finished runs that the kernel killed for lack of memory.",
        (("_total", _NONE, "oom_kills"),),
    ),
    (
        "diyc_job_throttled_seconds",
        "counter",
        "Time that finished runs were held back by their CPU limit.",
        (("_total", _NONE, "throttled_s"),),
    ),
)
_COUNTED = tuple(field for *_, points in _COUNTERS for _, _, field in points)
_counted = attrgetter(*_COUNTED)
_VERDICTS = {verdict: Labels(verdict=verdict.value) for verdict in Verdict}

Reader = Callable[[LiveContainer, CgroupFigures], float | None]


def _pressure(resource: str) -> Reader:
    return lambda _, figures: None if figures.pressure_s is None else figures.pressure_s.get(resource)


# cAdvisor's names and types, so that dashboards made for it work.
_CONTAINER: tuple[tuple[str, str, str, Reader], ...] = (
    ("cpu_usage_seconds", "counter", "CPU time used.", lambda _, f: f.cpu_usage_s),
    ("cpu_user_seconds", "counter", "CPU time used in user mode.", lambda _, f: f.cpu_user_s),
    ("cpu_system_seconds", "counter", "CPU time used in the kernel.", lambda _, f: f.cpu_system_s),
    ("cpu_cfs_throttled_seconds", "counter", "Time held back by the CPU limit.", lambda _, f: f.throttled_s),
    ("cpu_cfs_throttled_periods", "counter", "Periods cut short by the CPU limit.", lambda _, f: f.throttled_periods),
    ("memory_usage_bytes", "gauge", "Memory in use, page cache included.", lambda _, f: f.memory_current_bytes),
    (
        "memory_working_set_bytes",
        "gauge",
        "Memory in use without page cache that is easily dropped.",
        lambda _, f: f.memory_working_set_bytes,
    ),
    ("memory_max_usage_bytes", "gauge", "The most memory used so far.", lambda _, f: f.memory_peak_bytes),
    ("spec_memory_limit_bytes", "gauge", "The memory limit.", lambda container, _: container.memory_limit),
    ("oom_events", "counter", "Processes killed for lack of memory.", lambda _, f: f.oom_kills),
    ("processes", "gauge", "Processes and threads.", lambda _, f: f.pids_current),
    ("fs_reads_bytes", "counter", "Bytes read from block devices.", lambda _, f: f.io_read_bytes),
    ("fs_writes_bytes", "counter", "Bytes written to block devices.", lambda _, f: f.io_write_bytes),
    ("start_time_seconds", "gauge", "Start, in seconds since the epoch.", lambda container, _: container.started_at),
    ("pressure_cpu_waiting_seconds", "counter", "Time some task waited for CPU.", _pressure("cpu")),
    ("pressure_memory_waiting_seconds", "counter", "Time some task waited for memory.", _pressure("memory")),
    ("pressure_io_waiting_seconds", "counter", "Time some task waited for I/O.", _pressure("io")),
)


class _Job:
    """The totals of one job_name. A total stays None until a run had the figure."""

    __slots__ = ("histograms", "labels", "last_success", "runs", "totals")

    def __init__(self, labels: Labels, histograms: tuple[Histogram, ...]) -> None:
        self.labels = labels
        self.histograms = histograms
        self.runs: dict[Verdict, int] = {}
        self.totals: list[float | None] = [None] * len(_COUNTED)
        self.last_success: float | None = None

    def add(self, result: Result) -> None:
        verdict, totals = result.verdict, self.totals
        self.runs[verdict] = self.runs.get(verdict, 0) + 1
        if verdict is Verdict.OK and result.finished_at is not None:
            self.last_success = result.finished_at
        for index, figure in enumerate(_counted(result)):
            if figure is not None:
                totals[index] = (totals[index] or 0) + figure
        user, system = result.cpu_user_s, result.cpu_system_s
        cpu = None if user is None or system is None else user + system
        values = (result.queued_s, result.setup_s, result.wall_s, cpu, result.memory_peak_bytes)
        for histogram, value in zip(self.histograms, values, strict=True):
            if value is not None:
                histogram.observe(value)


def _entry(table: dict[str, T], name: str, limit: int, make: Callable[[str], T]) -> T:
    """The table's entry for `name`, made at need; the shared one where `limit` names are in already."""
    key = name if name in table or len(table) < limit else OTHER
    if key not in table:
        table[key] = make(key)
    return table[key]


class _Once(Generic[T]):
    """An iterable that can be read many times, over a source that is read once, and only as far as needed."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._read: list[T] = []

    def __iter__(self) -> Iterator[T]:
        index = 0
        while index < len(self._read) or self._advance():
            yield self._read[index]
            index += 1

    def _advance(self) -> bool:
        for item in self._source:
            self._read.append(item)
            return True
        return False


class Metrics(Collector):
    """Everything that diyc tells Prometheus, registered in `registry` (default: one of its own).

    Each job_name has a series of counters until there are `max_job_names` and of histograms until there are
    `max_histogram_names`; later names share `_other`. Containers are shown from `live_min_age` seconds on,
    at most `live_max` of them. Not thread-safe: observe and scrape on one loop."""

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        version: str = __version__,
        max_job_names: int = 1000,
        max_histogram_names: int = 200,
        live_min_age: float = 1.0,
        live_max: int = 1000,
    ) -> None:
        self._max_job_names = max_job_names
        self._max_histogram_names = max_histogram_names
        self._live_min_age = live_min_age
        self._live_max = live_max
        self._build = Labels(version=version, python=platform.python_version(), kernel=platform.release())
        self._jobs: dict[str, _Job] = {}
        self._histograms: dict[str, tuple[Histogram, ...]] = {}
        self._steps: dict[str, Histogram] = {}
        self._leaked: dict[str, int] = {}
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self._live: Callable[[], Iterable[LiveContainer]] = tuple
        self.registry = CollectorRegistry() if registry is None else registry
        self.registry.register(self)
        if registry is None:
            ProcessCollector(registry=self.registry)

    def watch(
        self,
        *,
        running: Callable[[], float],
        queued: Callable[[], float],
        slots: Callable[[], float],
        live: Callable[[], Iterable[LiveContainer]] = tuple,
    ) -> None:
        """Say where the gauges and the live containers come from; each is called once a scrape.

        `live` may be a generator: it is advanced a container at a time with other work of the loop in between, so
        it must bear runs that start and end meanwhile (iterate over a copy)."""
        self._gauges = [
            ("diyc_jobs_running", "Runs in a container now.", running),
            ("diyc_jobs_queued", "Runs waiting to start.", queued),
            ("diyc_slots", "Sets of kernel objects that runs can use at once.", slots),
        ]
        self._live = live

    def leaked(self, kind: str, count: int) -> None:
        """Tell how many objects of a kind (cgroup, mount, directory, ...) an earlier supervisor had left behind."""
        self._leaked[kind] = count

    def observe(self, result: Result) -> None:
        """Add a finished run. A figure that is None adds nothing and makes no series."""
        job = self._jobs.get(result.job) or _entry(self._jobs, result.job, self._max_job_names, self._new_job)
        job.add(result)
        for step, seconds in result.steps_s.items():
            if step != "queue":  # has a histogram by job
                histogram = self._steps.get(step) or self._steps.setdefault(step, Histogram(_STEP_BUCKETS))
                histogram.observe(seconds)

    def _new_job(self, name: str) -> _Job:
        return _Job(Labels(job_name=name), _entry(self._histograms, name, self._max_histogram_names, _new_histograms))

    def text(self, openmetrics: bool = False) -> Iterator[str]:
        """The page for a scrape, in pieces of whole lines; the caller may do other work between two of them."""
        for metric in self.registry.collect():
            if isinstance(metric, Family):
                yield from metric.text(openmetrics)
            elif openmetrics:
                page: bytes = generate_openmetrics(_Single(metric))  # type: ignore[no-untyped-call]
                yield page.decode().removesuffix("# EOF\n")
            else:
                yield generate_latest(_Single(metric)).decode()
        if openmetrics:
            yield "# EOF\n"

    def describe(self) -> Iterator[Metric]:
        """The names alone: with them a registry refuses a second Metrics instead of serving each series twice."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """All families; nothing is read before their series are."""
        yield _gauge("diyc_build_info", "Versions; always 1.", lambda: [(self._build, 1)])
        for name, explanation, read in self._gauges:
            yield _gauge(name, explanation, partial(_reading, read))
        yield _gauge(
            "diyc_leaked_objects_found",
            "Objects of an earlier supervisor that this one found at its start and removed.",
            lambda: [(Labels(kind=kind), count) for kind, count in self._leaked.items()],
        )
        yield from self._job_counters()
        yield from self._job_histograms()
        yield from self._containers()

    def _job_counters(self) -> Iterator[Family]:
        yield Family("diyc_job_runs", "counter", "Finished runs.", self._runs)
        for name, kind, explanation, points in _COUNTERS:
            yield Family(name, kind, explanation, partial(self._totals, points))
        yield _gauge("diyc_job_last_success_timestamp_seconds", "When a run last ended ok.", self._last_successes)

    def _runs(self) -> Iterator[Series]:
        for job in list(self._jobs.values()):
            yield job.labels, [("_total", _VERDICTS[verdict], count) for verdict, count in job.runs.items()]

    def _totals(self, points: tuple[tuple[str, Labels, str], ...]) -> Iterator[Series]:
        places = [(suffix, extra, _COUNTED.index(field)) for suffix, extra, field in points]
        for job in list(self._jobs.values()):
            known = [(suffix, extra, total) for suffix, extra, at in places if (total := job.totals[at]) is not None]
            if known:
                yield job.labels, known

    def _last_successes(self) -> Iterator[tuple[Labels, float]]:
        for job in list(self._jobs.values()):
            if job.last_success is not None:
                yield job.labels, job.last_success

    def _job_histograms(self) -> Iterator[Family]:
        for index, (name, explanation, _) in enumerate(_HISTOGRAMS):
            yield Family(name, "histogram", explanation, partial(self._by_job, index))
        yield Family("diyc_setup_step_seconds", "histogram", "Time of each step of a run.", self._by_step)

    def _by_job(self, index: int) -> Iterator[Series]:
        for name, histograms in list(self._histograms.items()):
            if points := histograms[index].points():
                yield Labels(job_name=name), points

    def _by_step(self) -> Iterator[Series]:
        for step, histogram in list(self._steps.items()):
            yield Labels(step=step), histogram.points()

    def _containers(self) -> Iterator[Family]:
        omitted = {"young": 0, "cap": 0, "ended": 0}
        shown = _Once(self._read_live(omitted))
        for name, kind, explanation, reader in _CONTAINER:
            yield Family(f"container_{name}", kind, explanation, partial(_live_series, shown, reader, kind))
        yield _gauge(
            "diyc_live_containers_omitted",
            "Running containers without container_ series in this scrape.",
            lambda: [(Labels(reason=reason), count) for reason, count in omitted.items()],
        )

    def _read_live(self, omitted: dict[str, int]) -> Iterator[tuple[Labels, LiveContainer, CgroupFigures]]:
        shown = 0
        for container in self._live():
            if container.age_s < self._live_min_age:
                omitted["young"] += 1
            elif shown >= self._live_max:
                omitted["cap"] += 1
            elif (figures := _figures(container)) is None:
                omitted["ended"] += 1
            else:
                shown += 1
                labels = Labels(id=container.run_id, name=container.job_name, image=container.image)
                yield labels, container, figures


def _new_histograms(_name: str) -> tuple[Histogram, ...]:
    return tuple(Histogram(buckets) for _, _, buckets in _HISTOGRAMS)


def _gauge(name: str, explanation: str, values: Callable[[], Iterable[tuple[Labels, float]]]) -> Family:
    return Family(name, "gauge", explanation, lambda: ((labels, (("", _NONE, value),)) for labels, value in values()))


def _reading(read: Callable[[], float]) -> list[tuple[Labels, float]]:
    return [(_NONE, read())]


def _figures(container: LiveContainer) -> CgroupFigures | None:
    """The container's figures, or None where it ended before they could be read."""
    try:
        return container.figures if isinstance(container.figures, CgroupFigures) else container.figures()
    except CgroupError:
        return None


def _live_series(
    shown: Iterable[tuple[Labels, LiveContainer, CgroupFigures]], reader: Reader, kind: str
) -> Iterator[Series]:
    suffix = "_total" if kind == "counter" else ""
    for labels, container, figures in shown:
        value = reader(container, figures)
        if value is not None:
            yield labels, ((suffix, _NONE, value),)


class _Single(Collector):
    """One family as prometheus_client's writers want it."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric
