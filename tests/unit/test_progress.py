"""What people and logs see while runs go on: enough, in order, and never a control character."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest

from diyc.cli.progress import LiveProgress, PlainProgress, Progress, make_progress
from diyc.cli.text import Paint
from diyc.results import Result, Verdict

EVIL = "a\x1b]0;pwned\x07\r\u202e\x9b2J"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def result(index: int = 0, verdict: Verdict = Verdict.OK, job: str = "sum", **fields: Any) -> Result:
    return Result(f"run-{index}", job, index, fields.pop("attempt", 1), verdict, wall_s=0.012, **fields)


def plain(total: int | None = None, verbose: bool = False) -> tuple[PlainProgress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return PlainProgress(stream, Paint(False), total, clock, verbose), stream, clock


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    progress = LiveProgress(stream, Paint(False), 100, clock, color=False)
    yield progress, stream, clock
    progress.close()


def drawn(progress: LiveProgress) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(progress.draw())
    return capture.get()


def test_each_run_of_a_small_batch_has_a_line() -> None:
    progress, stream, _ = plain(total=3)
    progress.started("run-3", "sum", 3)
    progress.finished(result(3))
    progress.finished(result(4, Verdict.EXIT, reason="exit status 3"))
    progress.finished(result(5, Verdict.OOM, attempt=2, reason="memory limit 64 MiB reached (1 kill)"))
    assert stream.getvalue().splitlines() == [
        "ok         sum[3]  0.012s",
        "exit       sum[4]  0.012s  exit status 3",
        "oom        sum[5]#2  0.012s  memory limit 64 MiB reached (1 kill)",
    ]


def test_a_run_that_never_started_has_no_time() -> None:
    progress, stream, _ = plain()
    progress.finished(Result("r", "sum", 0, 1, Verdict.SKIPPED, reason="depends on build"))
    assert stream.getvalue() == "skipped    sum[0]  depends on build\n"


def test_a_large_batch_has_a_line_each_tenth_and_its_failures() -> None:
    progress, stream, clock = plain(total=1000)
    for index in range(1000):
        clock.now += 0.01
        progress.finished(result(index, Verdict.EXIT if index == 555 else Verdict.OK, reason="exit status 1"))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == " 10%  100/1,000  100 ok  100 runs/s  eta 9.00 s"
    assert lines[5] == "exit       sum[555]  0.012s  exit status 1"
    assert lines[-1] == "100%  1,000/1,000  999 ok, 1 exit  100 runs/s"


def test_a_flood_of_failures_is_cut_and_the_cut_is_told_once() -> None:
    progress, stream, _ = plain(total=5000)
    for index in range(5000):
        progress.finished(result(index, Verdict.EXIT))
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("exit ") for line in lines) == 50
    assert sum("further failures are counted" in line for line in lines) == 1
    assert len(lines) == 50 + 1 + 10


def test_without_a_known_total_a_long_batch_turns_terse() -> None:
    progress, stream, _ = plain(total=None)
    for index in range(3000):
        progress.finished(result(index))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 200 + 3
    assert lines[-1].startswith("3,000 done  3,000 ok")


def test_verbose_tells_every_start_and_end() -> None:
    progress, stream, _ = plain(total=300, verbose=True)
    for index in range(300):
        progress.started(f"run-{index}", "sum", index)
        progress.finished(result(index))
    lines = [line for line in stream.getvalue().splitlines() if "%" not in line]
    assert lines[:2] == ["start      sum[0]", "ok         sum[0]  0.012s"]
    assert len(lines) == 600


def test_the_silent_kind_still_passes_messages_on() -> None:
    stream = io.StringIO()
    progress = Progress(stream, Paint(False))
    progress.started("run-0", "sum", 0)
    progress.finished(result(0, Verdict.EXIT))
    assert stream.getvalue() == ""
    progress.message("draining: 3 runs left")
    progress.close()
    assert stream.getvalue() == "draining: 3 runs left\n"


def test_control_characters_are_escaped_in_plain_lines_and_messages() -> None:
    progress, stream, _ = plain()
    progress.started("run-0", EVIL, 0)
    progress.finished(result(0, Verdict.EXIT, job=EVIL, reason=EVIL))
    progress.message(f"{EVIL}\nsecond line")
    shown = stream.getvalue()
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert shown.count(r"a\x1b]0;pwned\x07\r\u202e\x9b2J") == 3
    assert shown.endswith("\nsecond line\n")


def test_a_closed_stream_ends_the_telling_not_the_runs() -> None:
    class Gone(io.StringIO):
        attempts = 0

        def write(self, _text: str) -> int:
            Gone.attempts += 1
            raise BrokenPipeError(32, "Broken pipe")

    progress = PlainProgress(Gone(), Paint(False))
    for index in range(5):
        progress.finished(result(index))
    progress.message("still here")
    assert progress.done == 5
    assert Gone.attempts == 1


def test_the_live_display_shows_where_things_stand(live: Any) -> None:
    progress, _, clock = live
    drawn(progress)
    progress.queued = 40
    for index in range(60):
        progress.started(f"run-{index}", "sum", index)
    for index in range(50):
        progress.finished(result(index, Verdict.OOM if index == 7 else Verdict.OK, reason="memory limit reached"))
    clock.now += 2.0
    assert drawn(progress).splitlines() == [
        "[###############...............]   50%  50/100  25.0 runs/s  eta 2.00 s",
        "10 running, 40 queued, 49 ok, 1 oom",
        "longest running: sum[50] 2.00 s, sum[51] 2.00 s, sum[52] 2.00 s",
        "oom        sum[7]  0.012s  memory limit reached",
    ]


def test_the_live_display_follows_the_recent_rate_and_the_latest_failures(live: Any) -> None:
    progress, _, clock = live
    progress.total = None
    for second in range(60):
        for index in range(1000 if second < 20 else 10):
            progress.finished(result(index, Verdict.EXIT, reason=f"second {second}"))
        for _ in range(5):
            clock.now += 0.2
            shown = drawn(progress)
    assert "20,400 done" in shown
    speed = re.search(r"([\d.,]+) runs/s", shown)
    assert speed is not None
    assert 8 < float(speed[1]) < 12
    assert shown.count("second 59") == 5
    assert "second 58" not in shown


def test_the_live_display_is_drawn_a_few_times_a_second_whatever_the_rate(live: Any) -> None:
    progress, stream, _ = live
    before = stream.getvalue().count("%")
    for index in range(5000):
        progress.started(f"run-{index}", "sum", index)
        progress.finished(result(index))
    assert stream.getvalue().count("%") - before <= 8
    assert 0 < progress._live.refresh_per_second <= 8


@pytest.mark.usefixtures("live")
def test_standard_output_does_not_pass_through_the_live_display() -> None:
    assert sys.stdout is not None
    assert "rich" not in type(sys.stdout).__module__
    assert "rich" not in type(sys.stderr).__module__


def test_control_characters_are_escaped_in_the_live_display(live: Any) -> None:
    progress, stream, _ = live
    progress.started("run-1", EVIL, 1)
    progress.finished(result(0, Verdict.EXIT, job=EVIL, reason=f"[red]{EVIL}"))
    progress.message(EVIL)
    shown = drawn(progress)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert r"\x1b]0;pwned" in shown
    assert "[red]" in shown
    progress.close()
    raw = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "\x1b" not in raw
    assert "\x9b" not in raw


def test_a_message_stays_above_the_live_display_and_close_clears_it(live: Any) -> None:
    progress, stream, _ = live
    progress.message("warning: [bold]no swap accounting")
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "warning: [bold]no swap accounting\n" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


@pytest.mark.parametrize(
    "mode,tty,env,verbosity,kind",
    [
        ("auto", True, {"TERM": "xterm"}, 0, LiveProgress),
        ("auto", True, {"TERM": "xterm", "CI": "false"}, 0, LiveProgress),
        ("auto", True, {"TERM": "xterm", "NO_COLOR": "1"}, 0, LiveProgress),
        ("auto", True, {"TERM": "xterm", "CI": "true"}, 0, PlainProgress),
        ("auto", True, {"TERM": "dumb"}, 0, PlainProgress),
        ("auto", True, {}, 0, PlainProgress),
        ("auto", True, {"TERM": "xterm"}, 1, PlainProgress),
        ("auto", False, {"TERM": "xterm"}, 0, PlainProgress),
        ("auto", True, {"TERM": "xterm"}, -1, Progress),
        ("always", True, {"TERM": "xterm", "CI": "true"}, 0, LiveProgress),
        ("always", True, {"TERM": "xterm"}, -1, LiveProgress),
        ("always", True, {"TERM": "dumb"}, 0, PlainProgress),
        ("always", False, {"TERM": "xterm"}, -1, PlainProgress),
        ("never", True, {"TERM": "xterm"}, 1, Progress),
    ],
)
def test_the_kind_fits_the_stream_and_what_was_asked(
    mode: str, tty: bool, env: dict[str, str], verbosity: int, kind: type[Progress]
) -> None:
    progress = make_progress(mode, Terminal() if tty else io.StringIO(), env, verbosity, 10)
    progress.close()
    assert type(progress) is kind
    assert progress.total == 10


@pytest.mark.parametrize("env,colored", [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False)])
def test_no_color_is_respected_in_the_live_display(
    env: dict[str, str], colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    progress = make_progress("auto", stream, env, 0, 10)
    progress.finished(result(0, Verdict.EXIT))
    progress.close()
    assert bool(re.search(r"\x1b\[[0-9;]*m", stream.getvalue())) is colored


def test_plain_output_does_not_load_rich() -> None:
    import subprocess

    code = (
        "import io, sys; from diyc.cli.progress import make_progress; make_progress('auto', io.StringIO(), {});"
        "import diyc.cli.summary; print([m for m in sys.modules if m.split('.')[0] in ('rich', 'prometheus_client')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
