"""What Prometheus is told: each figure once, under its documented name, in both formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from diyc.errors import CgroupError
from diyc.metrics import LiveContainer, Metrics
from diyc.results import CgroupFigures, Result, Verdict

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

RESULT = Result(
    "01J", "sum", 3, 1, Verdict.OK, queued_s=0.8, setup_s=0.0009, wall_s=0.21, cpu_user_s=0.1, cpu_system_s=0.02,
    memory_peak_bytes=67108864, oom_kills=0, throttled_s=0.25, io_read_bytes=10, io_write_bytes=4096,
    started_at=1000.0, finished_at=1000.5, steps_s={"queue": 0.8, "clone": 0.0003, "mounts": 0.0004},
)  # fmt: skip
FIGURES = CgroupFigures(
    cpu_user_s=1.5, cpu_system_s=0.5, cpu_usage_s=2.0, throttled_s=0.125, throttled_periods=4,
    memory_current_bytes=3000, memory_working_set_bytes=2000, memory_peak_bytes=4000, oom_kills=1, pids_current=5,
    io_read_bytes=100, io_write_bytes=200, pressure_s={"cpu": 0.1, "memory": 0.2, "io": 0.3},
)  # fmt: skip
CONTAINER = LiveContainer("01R", "serve", "py312", 990.0, 10.0, 8000, FIGURES)
ODD_NAMES = ['a"b', "a\\b", "a\nb", "a\\nb", "ü 日本", "{x=}", "a,b", " ", "", "\udc80", "\r\t\x00"]


def families(metrics: Metrics, openmetrics: bool = False) -> list[Metric]:
    page = "".join(metrics.text(openmetrics))
    return list(parse_openmetrics(page) if openmetrics else parse_text(page))


def samples(metrics: Metrics, openmetrics: bool = False) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(metrics, openmetrics)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


def names(metrics: Metrics) -> set[str]:
    return {name for name, _ in samples(metrics)}


def watch(metrics: Metrics, *live: LiveContainer) -> None:
    metrics.watch(running=lambda: 3, queued=lambda: 40, slots=lambda: 8, live=lambda: iter(live))


def full() -> Metrics:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(RESULT)
    metrics.observe(replace(RESULT, verdict=Verdict.OOM, oom_kills=1, net_rx_bytes=7, net_tx_bytes=9))
    metrics.leaked("cgroup", 2)
    watch(metrics, CONTAINER)
    return metrics


def test_a_finished_run_is_added_to_every_counter_exactly_once() -> None:
    metrics = full()
    expected = {
        ("diyc_job_runs_total", "verdict", "ok"): 1,
        ("diyc_job_runs_total", "verdict", "oom"): 1,
        ("diyc_job_cpu_seconds_total", "mode", "user"): 0.2,
        ("diyc_job_cpu_seconds_total", "mode", "system"): 0.04,
        ("diyc_job_io_bytes_total", "direction", "read"): 20,
        ("diyc_job_io_bytes_total", "direction", "write"): 8192,
        ("diyc_job_network_bytes_total", "direction", "receive"): 7,
        ("diyc_job_network_bytes_total", "direction", "transmit"): 9,
    }
    for (name, label, kind), total in expected.items():
        assert value(metrics, name, job_name="sum", **{label: kind}) == total, (name, kind)
    assert value(metrics, "diyc_job_oom_kills_total", job_name="sum") == 1
    assert value(metrics, "diyc_job_throttled_seconds_total", job_name="sum") == 0.5


def test_a_figure_the_kernel_did_not_supply_makes_no_series() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(Result("01J", "bare", 0, 1, Verdict.CANCELLED))
    told = {name for name in names(metrics) if name.startswith("diyc_job_")}
    queue = {f"diyc_job_queue_seconds_{suffix}" for suffix in ("bucket", "count", "sum")}
    assert told == {"diyc_job_runs_total"} | queue


def test_a_missing_figure_of_a_later_run_changes_nothing() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(RESULT)
    before = samples(metrics)
    metrics.observe(Result("01K", "sum", 4, 1, Verdict.EXIT))
    changed = {name for (name, labels), new in samples(metrics).items() if before.get((name, labels)) != new}
    assert changed == {"diyc_job_runs_total", "diyc_job_queue_seconds_bucket", "diyc_job_queue_seconds_count"}


def test_half_of_the_cpu_time_is_not_observed_as_the_whole() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(replace(RESULT, cpu_system_s=None))
    assert value(metrics, "diyc_job_cpu_seconds_total", job_name="sum", mode="user") == 0.1
    assert value(metrics, "diyc_job_cpu_seconds_count", job_name="sum") is None


@pytest.mark.parametrize(
    "name,seen",
    [("queue_seconds", 0.8), ("setup_seconds", 0.0009), ("wall_seconds", 0.21), ("cpu_seconds", 0.12),
     ("memory_peak_bytes", 67108864)],
)  # fmt: skip
def test_a_histogram_counts_a_run_in_the_buckets_at_or_above_its_value(name: str, seen: float) -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(RESULT)
    buckets = {
        float(dict(labels)["le"]): count
        for (sample, labels), count in samples(metrics).items()
        if sample == f"diyc_job_{name}_bucket"
    }
    assert buckets[float("inf")] == 1
    assert len(buckets) > 8
    assert {bound for bound, count in buckets.items() if count == 1} == {bound for bound in buckets if bound >= seen}
    assert value(metrics, f"diyc_job_{name}_count", job_name="sum") == 1
    assert value(metrics, f"diyc_job_{name}_sum", job_name="sum") == pytest.approx(seen)


def test_set_up_is_told_by_step_without_the_queue() -> None:
    metrics = full()
    steps = {dict(labels)["step"] for name, labels in samples(metrics) if name == "diyc_setup_step_seconds_count"}
    assert steps == {"clone", "mounts"}
    assert value(metrics, "diyc_setup_step_seconds_sum", step="clone") == pytest.approx(0.0006)


def test_last_success_is_the_end_of_the_last_run_that_was_ok() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(RESULT)
    metrics.observe(replace(RESULT, verdict=Verdict.EXIT, finished_at=2000.0))
    metrics.observe(replace(RESULT, job="broken", verdict=Verdict.EXIT))
    assert value(metrics, "diyc_job_last_success_timestamp_seconds", job_name="sum") == 1000.5
    assert value(metrics, "diyc_job_last_success_timestamp_seconds", job_name="broken") is None


def test_gauges_ask_at_each_scrape() -> None:
    metrics, running = Metrics(CollectorRegistry()), [1]
    metrics.watch(running=lambda: running[0], queued=lambda: 40, slots=lambda: 8)
    metrics.leaked("mount", 2)
    running[0] = 5
    assert value(metrics, "diyc_jobs_running") == 5
    assert value(metrics, "diyc_jobs_queued") == 40
    assert value(metrics, "diyc_slots") == 8
    assert value(metrics, "diyc_leaked_objects_found", kind="mount") == 2


def test_build_info_names_the_version() -> None:
    metrics = Metrics(CollectorRegistry(), version="1.2.3")
    [info] = next(family for family in families(metrics) if family.name == "diyc_build_info").samples
    assert info.labels["version"] == "1.2.3"
    assert info.value == 1


def test_names_beyond_the_cap_share_other_and_no_run_is_lost() -> None:
    metrics = Metrics(CollectorRegistry(), max_job_names=3, max_histogram_names=2)
    for index in range(10):
        metrics.observe(replace(RESULT, job=f"job-{index}"))
    metrics.observe(replace(RESULT, job="job-0"))
    runs = {dict(labels)["job_name"]: n for (name, labels), n in samples(metrics).items() if "runs_total" in name}
    walls = {dict(labels)["job_name"]: n for (name, labels), n in samples(metrics).items() if "wall_seconds_c" in name}
    assert runs == {"job-0": 2, "job-1": 1, "job-2": 1, "_other": 7}
    assert walls == {"job-0": 2, "job-1": 1, "_other": 8}


def test_a_job_that_is_itself_called_other_shares_the_series() -> None:
    metrics = Metrics(CollectorRegistry(), max_job_names=1, max_histogram_names=1)
    for job in ("_other", "a", "b", "_other"):
        metrics.observe(replace(RESULT, job=job))
    assert value(metrics, "diyc_job_runs_total", job_name="_other", verdict="ok") == 4


def test_a_thousand_names_stay_within_a_bounded_page() -> None:
    metrics = Metrics(CollectorRegistry())
    for index in range(1500):
        metrics.observe(replace(RESULT, job=f"job-{index}"))
    assert "".join(metrics.text()).count("\n") < 30_000


@pytest.mark.parametrize("openmetrics", [False, True])
def test_odd_job_names_come_back_as_they_were(openmetrics: bool) -> None:
    metrics = Metrics(CollectorRegistry())
    for name in ODD_NAMES:
        metrics.observe(replace(RESULT, job=name))
    watch(metrics, *(replace(CONTAINER, job_name=name, run_id=str(at)) for at, name in enumerate(ODD_NAMES)))
    page = "".join(metrics.text(openmetrics))
    page.encode("utf-8")
    told = {dict(labels)["job_name"] for name, labels in samples(metrics, openmetrics) if "runs_total" in name}
    assert told == {"\\udc80" if name == "\udc80" else name for name in ODD_NAMES}


def test_both_formats_say_what_the_client_librarys_own_writers_say() -> None:
    metrics = full()
    assert families(metrics, openmetrics=True) == list(
        parse_openmetrics(generate_openmetrics(metrics.registry).decode())  # type: ignore[no-untyped-call]
    )
    theirs = {family.name: family.samples for family in parse_text(generate_latest(metrics.registry).decode())}
    ours = {family.name: family.samples for family in families(metrics)}
    # The counter that OpenMetrics cannot name is declared a counter in our text, and the parser drops its suffix then.
    assert ours.pop("diyc_job_cpu_seconds")
    assert theirs.pop("diyc_job_cpu_seconds_total")
    assert theirs.pop("diyc_job_cpu_seconds")
    assert ours == theirs


def test_every_family_has_its_type_and_a_help_text() -> None:
    page = "".join(full().text())
    for name, kind in {
        "diyc_job_runs_total": "counter",
        "diyc_job_cpu_seconds_total": "counter",
        "diyc_job_cpu_seconds": "histogram",
        "container_memory_usage_bytes": "gauge",
        "container_cpu_usage_seconds_total": "counter",
    }.items():
        assert f"# TYPE {name} {kind}\n" in page
        assert f"# HELP {name} " in page
    assert all(family.documentation for family in families(full()))


def test_a_live_container_has_cadvisors_series() -> None:
    metrics = full()
    labels = {"id": "01R", "name": "serve", "image": "py312"}
    told = {name: v for (name, at), v in samples(metrics).items() if at == frozenset(labels.items())}
    assert told == {
        "container_cpu_usage_seconds_total": 2.0,
        "container_cpu_user_seconds_total": 1.5,
        "container_cpu_system_seconds_total": 0.5,
        "container_cpu_cfs_throttled_seconds_total": 0.125,
        "container_cpu_cfs_throttled_periods_total": 4,
        "container_memory_usage_bytes": 3000,
        "container_memory_working_set_bytes": 2000,
        "container_memory_max_usage_bytes": 4000,
        "container_spec_memory_limit_bytes": 8000,
        "container_oom_events_total": 1,
        "container_processes": 5,
        "container_fs_reads_bytes_total": 100,
        "container_fs_writes_bytes_total": 200,
        "container_start_time_seconds": 990.0,
        "container_pressure_cpu_waiting_seconds_total": 0.1,
        "container_pressure_memory_waiting_seconds_total": 0.2,
        "container_pressure_io_waiting_seconds_total": 0.3,
    }


def test_a_live_figure_that_is_none_leaves_its_series_out() -> None:
    metrics = Metrics(CollectorRegistry())
    watch(metrics, replace(CONTAINER, memory_limit=None, figures=CgroupFigures(cpu_usage_s=0.0, pressure_s={"io": 1})))
    told = {name for name in names(metrics) if name.startswith("container_")}
    assert told == {
        "container_cpu_usage_seconds_total",
        "container_start_time_seconds",
        "container_pressure_io_waiting_seconds_total",
    }


def test_young_and_surplus_containers_are_left_out_counted_and_never_read() -> None:
    def unread() -> CgroupFigures:
        raise AssertionError("the figures of a container that is not shown were read")

    metrics = Metrics(CollectorRegistry(), live_min_age=1.0, live_max=2)
    young = [replace(CONTAINER, age_s=0.9, figures=unread) for _ in range(3)]
    shown = [replace(CONTAINER, run_id=f"shown-{n}", age_s=1.0) for n in range(2)]
    surplus = [replace(CONTAINER, figures=unread) for _ in range(4)]
    watch(metrics, *young, *shown, *surplus)
    ids = {dict(labels)["id"] for name, labels in samples(metrics) if name == "container_processes"}
    assert ids == {"shown-0", "shown-1"}
    assert value(metrics, "diyc_live_containers_omitted", reason="young") == 3
    assert value(metrics, "diyc_live_containers_omitted", reason="cap") == 4


def test_a_container_that_ends_during_the_scrape_is_left_out() -> None:
    def gone() -> CgroupFigures:
        raise CgroupError("read", "memory.current", FileNotFoundError(2, "No such file or directory"))

    metrics = Metrics(CollectorRegistry())
    watch(metrics, replace(CONTAINER, run_id="gone", figures=gone), CONTAINER)
    assert {dict(labels)["id"] for name, labels in samples(metrics) if name == "container_processes"} == {"01R"}
    assert value(metrics, "diyc_live_containers_omitted", reason="ended") == 1


@pytest.mark.parametrize("writer", [lambda m: "".join(m.text()), lambda m: generate_latest(m.registry)])
def test_one_scrape_reads_each_container_once(writer: object) -> None:
    asked, read = [], []

    def live() -> Iterator[LiveContainer]:
        asked.append(1)
        for at in range(3):
            yield replace(CONTAINER, run_id=str(at), figures=lambda: read.append(1) or FIGURES)  # type: ignore[func-returns-value]

    metrics = Metrics(CollectorRegistry())
    metrics.watch(running=lambda: 0, queued=lambda: 0, slots=lambda: 0, live=live)
    assert callable(writer)
    writer(metrics)
    assert (len(asked), len(read)) == (1, 3)


def test_reading_containers_can_be_interrupted_between_any_two() -> None:
    read = []

    def live() -> Iterator[LiveContainer]:
        for at in range(100):
            read.append(at)
            yield replace(CONTAINER, run_id=str(at))

    metrics = Metrics(CollectorRegistry())
    metrics.watch(running=lambda: 0, queued=lambda: 0, slots=lambda: 0, live=live)
    steps, before = [], 0
    for _piece in metrics.text():
        steps.append(len(read) - before)
        before = len(read)
    assert sum(steps) == 100
    assert max(steps) == 1


def test_runs_may_finish_while_a_page_is_written() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(RESULT)
    pages = []
    for at, piece in enumerate(metrics.text(openmetrics=True)):
        pages.append(piece)
        if at < 30:
            metrics.observe(replace(RESULT, job=f"late-{at}", steps_s={f"step-{at}": 0.1}))
    assert list(parse_openmetrics("".join(pages)))


def test_a_job_without_success_leaves_no_empty_family_header() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(replace(RESULT, verdict=Verdict.EXIT))
    assert "last_success" not in "".join(metrics.text())


def test_the_default_registry_is_its_own_and_tells_of_the_supervisor_process() -> None:
    first, second = Metrics(), Metrics()
    first.observe(RESULT)
    assert value(second, "diyc_job_runs_total", job_name="sum", verdict="ok") is None
    assert "process_resident_memory_bytes" in names(first)
    assert "process_resident_memory_bytes" in {name for name, _ in samples(first, openmetrics=True)}


def test_a_registry_refuses_a_second_set_of_the_same_names() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(ValueError, match="diyc_"):
        Metrics(registry)


def test_registering_does_not_touch_live_containers() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    def unasked() -> Iterator[LiveContainer]:
        raise AssertionError("live containers were asked for without a scrape")

    metrics.watch(running=lambda: 0, queued=lambda: 0, slots=lambda: 0, live=unasked)
    list(metrics.describe())
