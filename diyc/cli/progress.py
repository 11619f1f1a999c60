"""What is told on stderr while runs are going on: a live display on a terminal, plain lines elsewhere, or nothing.

An event costs some counting and at most one line; the live display is drawn a few times a second whatever the rate."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from diyc.cli.text import Paint, explained, fit, printable, rate, run_name, short_duration, use_color, verdict_counts
from diyc.results import Result, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

EACH = 200  # up to that many runs, plain output has a line for each
FAILURES = 50  # beyond them, failures are counted but not shown
STEP = 1000  # finished runs between two lines where the total is not known

_DRAWINGS_PER_S = 5
_RECENT_FAILURES = 5
_LONGEST_RUNNING = 3
_RATE_WINDOW_S = 5.0
_REASON_COLUMNS = 160

Clock = Callable[[], float]


class Progress:
    """The silent kind: counts, and prints messages only. `total` and `queued` are set by whoever knows them."""

    def __init__(self, stream: TextIO, paint: Paint, total: int | None = None, clock: Clock = time.monotonic) -> None:
        self.total = total
        self.queued = 0
        self.done = 0
        self.verdicts: Counter[Verdict] = Counter()
        self.running: dict[str, tuple[str, int, float]] = {}
        self._paint = paint
        self._clock = clock
        self._began = clock()
        self._stream = stream
        self._broken = False

    def started(self, run_id: str, job: str, index: int) -> None:
        """A run's command is about to be executed."""
        self.running[run_id] = (job, index, self._clock())

    def finished(self, result: Result) -> None:
        """A run has ended, or will never start."""
        self.running.pop(result.run_id, None)
        self.done += 1
        self.verdicts[result.verdict] += 1

    def message(self, text: str) -> None:
        """Something that the user should know now; of any kind of progress."""
        self._print("\n".join(printable(line) for line in text.split("\n")))

    def close(self) -> None:
        """The last call: leave the terminal as it was."""

    def speed(self) -> float | None:
        """Finished runs by second since the beginning."""
        elapsed = self._clock() - self._began
        return self.done / elapsed if elapsed > 0 and self.done else None

    def _eta(self, per_second: float | None) -> str:
        left = (self.total or 0) - self.done
        return f"eta {short_duration(left / per_second)}" if per_second and left > 0 else ""

    def _print(self, line: str) -> None:
        self._attempt(lambda: print(line, file=self._stream, flush=True))

    def _attempt(self, tell: Callable[[], None]) -> None:
        # Runs matter more than being told of them: a closed terminal ends the telling, not the supervisor.
        if not self._broken:
            try:
                tell()
            except OSError:
                self._broken = True

    def _run_line(self, result: Result) -> str:
        took = "" if result.wall_s is None else f"{result.wall_s:.3f}s"
        name = run_name(result.job, result.index, result.attempt)
        reason = fit(printable(explained(result)), _REASON_COLUMNS)
        return "  ".join(part for part in (self._paint.verdict(result.verdict, 9), name, took, reason) if part)


class PlainProgress(Progress):
    """A line an event. With many runs: a line each tenth of them, and the first failures (`verbose`: everything)."""

    def __init__(
        self,
        stream: TextIO,
        paint: Paint,
        total: int | None = None,
        clock: Clock = time.monotonic,
        verbose: bool = False,
    ) -> None:
        super().__init__(stream, paint, total, clock)
        self._verbose = verbose
        self._told = 0
        self._failures = 0

    def started(self, run_id: str, job: str, index: int) -> None:
        super().started(run_id, job, index)
        if self._verbose:
            self._print(f"{'start':9}  {run_name(job, index)}")

    def finished(self, result: Result) -> None:
        super().finished(result)
        if self._verbose or (self.total or self.done) <= EACH:
            self._print(self._run_line(result))
        elif result.verdict is not Verdict.OK:
            self._tell_failure(result)
        self._tell_milestone()

    def _tell_failure(self, result: Result) -> None:
        self._failures += 1
        if self._failures <= FAILURES:
            self._print(self._run_line(result))
        elif self._failures == FAILURES + 1:
            self._print("further failures are counted, not shown (-v shows every run)")

    def _tell_milestone(self) -> None:
        """Tell where things stand, each tenth of the way (or each 1,000 runs, where the end is not known)."""
        if (self.total or self.done) <= EACH:
            return
        passed = self.done * 10 // self.total if self.total else self.done // STEP
        if passed <= self._told:
            return
        self._told = passed
        speed = self.speed()
        parts = [
            f"{min(passed, 10) * 10:3}%  {self.done:,}/{self.total:,}" if self.total else f"{self.done:,} done",
            verdict_counts(self.verdicts, self._paint),
            f"{rate(speed)} runs/s" if speed else "",
            self._eta(speed),
        ]
        self._print("  ".join(part for part in parts if part))


class LiveProgress(Progress):
    """A display in place on a terminal, drawn by rich from a thread of its own."""

    def __init__(
        self,
        stream: TextIO,
        paint: Paint,
        total: int | None = None,
        clock: Clock = time.monotonic,
        color: bool = True,
    ) -> None:
        super().__init__(stream, paint, total, clock)
        self._failures: deque[Result] = deque(maxlen=_RECENT_FAILURES)
        self._samples: deque[tuple[float, int]] = deque(maxlen=int(_RATE_WINDOW_S * _DRAWINGS_PER_S))
        self._live = self._open(stream, color)

    def _open(self, stream: TextIO, color: bool) -> Live:
        from rich.console import Console
        from rich.live import Live

        console = Console(
            file=stream, force_terminal=True, color_system="standard" if color else None, no_color=not color,
            highlight=False, markup=False, emoji=False,
        )  # fmt: skip
        # Standard output is data: it must not pass through the display.
        live = Live(
            console=console, get_renderable=self.draw, refresh_per_second=_DRAWINGS_PER_S, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        live.start()
        return live

    def finished(self, result: Result) -> None:
        super().finished(result)
        if result.verdict is not Verdict.OK:
            self._failures.append(result)

    def message(self, text: str) -> None:
        from rich.text import Text

        shown = Text("\n".join(printable(line) for line in text.split("\n")))
        self._attempt(lambda: self._live.console.print(shown))

    def close(self) -> None:
        self._attempt(self._live.stop)

    def draw(self) -> RenderableType:
        """The display as it stands now. Called from rich's thread: reads counters, changes nothing of the run's."""
        from rich.console import Group
        from rich.text import Text

        speed = self._recent_rate()
        lines = [self._bar(speed), self._counts(), *self._oldest(), *map(self._run_line, list(self._failures))]
        return Group(*(Text.from_ansi(line, no_wrap=True, overflow="ellipsis") for line in lines if line))

    def _bar(self, speed: float | None) -> str:
        shown_rate = f"{rate(speed)} runs/s" if speed is not None else ""
        if not self.total:
            return "  ".join(part for part in (f"{self.done:,} done", shown_rate) if part)
        share = min(1.0, self.done / self.total)
        filled = round(share * 30)
        bar = f"[{'#' * filled}{'.' * (30 - filled)}]"
        parts = (bar, f"{share:4.0%}", f"{self.done:,}/{self.total:,}", shown_rate, self._eta(speed))
        return "  ".join(part for part in parts if part)

    def _counts(self) -> str:
        counts = verdict_counts(self.verdicts, self._paint)
        return ", ".join(part for part in (f"{len(self.running):,} running, {self.queued:,} queued", counts) if part)

    def _oldest(self) -> list[str]:
        # A dict keeps its order: the runs that started first come first. list() takes them in one step, so that the
        # loop's thread cannot change the dict meanwhile.
        now = self._clock()
        oldest = list(self.running.values())[:_LONGEST_RUNNING]
        runs = [f"{run_name(job, index)} {short_duration(now - start)}" for job, index, start in oldest]
        return [self._paint.dim(f"longest running: {', '.join(runs)}")] if runs else []

    def _recent_rate(self) -> float | None:
        """Finished runs by second over the last drawings."""
        self._samples.append((self._clock(), self.done))
        (then, done_then), (now, done_now) = self._samples[0], self._samples[-1]
        return (done_now - done_then) / (now - then) if now > then else None


def make_progress(
    mode: str,
    stream: TextIO,
    env: Mapping[str, str] = os.environ,
    verbosity: int = 0,
    total: int | None = None,
) -> Progress:
    """The progress for --progress auto|always|never and -v (verbosity 1) or -q (-1).

    auto: live on a terminal; plain lines elsewhere, in CI, on a dumb terminal and with -v, which asks for a line an
    event; nothing with -q. always: the same without regard to CI and -q."""
    paint = Paint(use_color(stream, env))
    if mode == "never" or (mode == "auto" and verbosity < 0):
        return Progress(stream, paint, total)
    in_ci = env.get("CI", "").lower() not in ("", "0", "false")
    capable = stream.isatty() and env.get("TERM", "dumb") != "dumb"
    if capable and (mode == "always" or not in_ci) and verbosity < 1:
        return LiveProgress(stream, paint, total, color=use_color(stream, env))
    return PlainProgress(stream, paint, total, verbose=verbosity > 0)
