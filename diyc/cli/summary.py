"""What is told when all runs have ended: verdict counts, speed, the slowest and hungriest runs, and what failed.

Tally keeps counts and a few extremes, not results: its size grows with the number of jobs, not of runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from heapq import heappush, heapreplace
from typing import Any

from diyc.cli.text import Paint, cells, explained, fit, pad, printable, rate, run_name, short_duration
from diyc.results import Result, Verdict, timestamp
from diyc.units import format_size

TOP = 3  # slowest and hungriest runs that are named
FIRST_FAILURES = 10
GROUPS = 12  # groups of failures that the text shows


@dataclass(frozen=True, slots=True)
class Extreme:
    """A run that stands out; `value` is its wall time in seconds or its memory peak in bytes."""

    job: str
    index: int
    run_id: str
    verdict: Verdict
    value: float


class Top:
    """The runs with the highest values; of equals, the first."""

    def __init__(self, size: int = TOP) -> None:
        self._size = size
        self._added = 0
        self._heap: list[tuple[float, int, Extreme]] = []

    def add(self, value: float | None, result: Result) -> None:
        """Consider one run; None does not compete."""
        full = len(self._heap) == self._size
        if value is None or (full and value <= self._heap[0][0]):
            return
        self._added += 1
        entry = (value, -self._added, Extreme(result.job, result.index, result.run_id, result.verdict, value))
        if full:
            heapreplace(self._heap, entry)
        else:
            heappush(self._heap, entry)

    def ordered(self) -> list[Extreme]:
        """The highest first."""
        return [extreme for _, _, extreme in sorted(self._heap, reverse=True)]


@dataclass(slots=True)
class Group:
    """Failures of one job with one verdict: how many, and the first of them."""

    job: str
    verdict: Verdict
    index: int
    reason: str | None
    count: int = 0


class Tally:
    """Counts results as they come."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.jobs: dict[str, Counter[Verdict]] = {}
        self.failures: list[dict[str, Any]] = []
        self.slowest = Top()
        self.hungriest = Top()
        self.cpu_s: float | None = None
        self.started = 0
        self.first_start: float | None = None
        self.last_finish: float | None = None
        self._groups: dict[tuple[str, Verdict], Group] = {}

    def add(self, result: Result) -> None:
        """Count one ended run."""
        verdict = result.verdict
        self.verdicts[verdict] += 1
        self.jobs.setdefault(result.job, Counter())[verdict] += 1
        self._add_times(result)
        self.slowest.add(result.wall_s, result)
        self.hungriest.add(result.memory_peak_bytes, result)
        if verdict is not Verdict.OK:
            self._add_failure(result)

    def _add_times(self, result: Result) -> None:
        for seconds in (result.cpu_user_s, result.cpu_system_s):
            if seconds is not None:
                self.cpu_s = (self.cpu_s or 0.0) + seconds
        start, finish = result.started_at, result.finished_at
        if start is not None:
            self.started += 1
            if self.first_start is None or start < self.first_start:
                self.first_start = start
        if finish is not None and (self.last_finish is None or finish > self.last_finish):
            self.last_finish = finish

    def _add_failure(self, result: Result) -> None:
        if len(self.failures) < FIRST_FAILURES:
            self.failures.append(_failure_json(result))
        key = (result.job, result.verdict)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(*key, result.index, explained(result))
        group.count += 1

    @property
    def runs(self) -> int:
        """All runs that ended, those included that never started."""
        return self.verdicts.total()

    @property
    def wall_s(self) -> float | None:
        """From the first start to the last end; None where nothing started."""
        if self.first_start is None or self.last_finish is None:
            return None
        return max(0.0, self.last_finish - self.first_start)

    @property
    def runs_per_s(self) -> float | None:
        """Started runs by wall time; None where there was no time to measure."""
        return self.started / self.wall_s if self.wall_s else None

    @property
    def exit_status(self) -> int:
        """0 if every run was ok, else 1."""
        return 0 if self.verdicts[Verdict.OK] == self.runs else 1

    def to_json(self) -> dict[str, Any]:
        """The last object of `--json`."""
        return {
            "type": "summary",
            "schema": 1,
            "runs": self.runs,
            "verdicts": {verdict.value: self.verdicts[verdict] for verdict in Verdict},
            "jobs": {job: {verdict.value: n for verdict, n in counts.items()} for job, counts in self.jobs.items()},
            "wall_s": self.wall_s,
            "runs_per_s": self.runs_per_s,
            "cpu_s": self.cpu_s,
            "started_at": timestamp(self.first_start),
            "finished_at": timestamp(self.last_finish),
            "slowest": [_extreme_json(extreme, "wall_s") for extreme in self.slowest.ordered()],
            "hungriest": [_extreme_json(extreme, "memory_peak_bytes") for extreme in self.hungriest.ordered()],
            "failures": self.failures,
            "exit_status": self.exit_status,
        }

    def render(self, width: int = 80, color: bool = False) -> str:
        """The same for people; names and reasons are cut so that lines stay within `width` columns (60 or more)."""
        paint = Paint(color)
        sections = [self._headline(paint), self._verdict_lines(paint), self._extreme_lines(paint, width)]
        sections.append(self._failure_lines(paint, width))
        return "\n".join("".join(f"{line}\n" for line in lines) for lines in sections if lines)

    def _headline(self, paint: Paint) -> list[str]:
        if not self.runs:
            return [paint.bold("no runs")]
        parts = [f"{self.runs - self.started:,} never started"] if self.started < self.runs else []
        if self.wall_s is not None:
            parts.append(short_duration(self.wall_s))
        if self.runs_per_s is not None:
            parts.append(f"{rate(self.runs_per_s)} runs/s")
        if self.cpu_s is not None:
            parts.append(f"{short_duration(self.cpu_s)} CPU")
        head = paint.bold(f"{self.runs:,} {'run' if self.runs == 1 else 'runs'}")
        return [", ".join([head, *parts])]

    def _verdict_lines(self, paint: Paint) -> list[str]:
        counted = [(verdict, self.verdicts[verdict]) for verdict in Verdict if self.verdicts[verdict]]
        digits = max((len(f"{count:,}") for _, count in counted), default=0)
        return [f"  {paint.verdict(verdict, 12)}  {count:>{digits},}" for verdict, count in counted]

    def _extreme_lines(self, paint: Paint, width: int) -> list[str]:
        tops = (("slowest", self.slowest, short_duration), ("hungriest", self.hungriest, _size))
        rows = [
            (title if place == 0 else "", show(extreme.value), extreme)
            for title, top, show in tops
            for place, extreme in enumerate(top.ordered())
        ]
        value_width = max((len(value) for _, value, _ in rows), default=0)
        return [
            f"{paint.bold(title.ljust(9))}  {value:>{value_width}}  {self._name(extreme, width - value_width - 13)}"
            for title, value, extreme in rows
        ]

    def _failure_lines(self, paint: Paint, width: int) -> list[str]:
        groups = sorted(self._groups.values(), key=lambda group: -group.count)
        if not groups:
            return []
        shown = groups[:GROUPS]
        name_width = min(max(cells(printable(group.job)) for group in shown), max(8, width // 3))
        digits = max(len(f"{group.count:,}") for group in shown)
        room = max(8, width - name_width - digits - 20)
        lines = [paint.bold("not ok")]
        for group in shown:
            name = pad(fit(printable(group.job), name_width), name_width)
            verdict = paint.verdict(group.verdict, 12)
            lines.append(f"  {name}  {verdict}  {group.count:>{digits},}  {fit(self._why(group), room)}".rstrip())
        if len(groups) > GROUPS:
            rest = groups[GROUPS:]
            lines.append(f"  and {sum(group.count for group in rest):,} runs in {len(rest):,} more groups")
        return lines

    def _why(self, group: Group) -> str:
        reason = printable(group.reason or "")
        return f"{reason} (first: [{group.index}])" if self.jobs[group.job].total() > 1 else reason

    def _name(self, extreme: Extreme, room: int) -> str:
        alone = extreme.index == 0 and self.jobs[extreme.job].total() == 1
        return fit(printable(extreme.job) if alone else run_name(extreme.job, extreme.index), max(8, room))


def _extreme_json(extreme: Extreme, name: str) -> dict[str, Any]:
    return {
        "run_id": extreme.run_id,
        "job": extreme.job,
        "index": extreme.index,
        "verdict": extreme.verdict.value,
        name: extreme.value,
    }


def _failure_json(failure: Result) -> dict[str, Any]:
    names = ("run_id", "job", "index", "attempt", "verdict", "reason", "exit_code", "signal")
    return {name: getattr(failure, name) for name in names}


def _size(value: float) -> str:
    return format_size(round(value))
