"""The last word on a batch: counts, speed and extremes are right, and the text stays in its lines."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from typing import Any

import pytest

from diyc.cli.summary import Tally
from diyc.cli.text import cells, fit, pad, printable, rate, short_duration, use_color
from diyc.results import Result, Verdict

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def result(index: int = 0, verdict: Verdict = Verdict.OK, job: str = "sum", **fields: Any) -> Result:
    return Result(f"run-{job}-{index}", job, index, 1, verdict, **fields)


def tally(*results: Result) -> Tally:
    made = Tally()
    for one in results:
        made.add(one)
    return made


def mixed() -> Tally:
    runs = [result(i, started_at=100.0 + i, finished_at=101.0 + i, wall_s=0.01 * i, cpu_user_s=0.5) for i in range(8)]
    return tally(
        *runs,
        result(8, Verdict.EXIT, reason="exit status 3", wall_s=0.001, memory_peak_bytes=5000),
        result(9, Verdict.EXIT, reason="exit status 4"),
        result(
            0, Verdict.OOM, job="hog", reason="memory limit 64 MiB reached (1 kill)", memory_peak_bytes=64 * 1024**2
        ),
        result(0, Verdict.SKIPPED, job="after"),
    )


def test_the_exit_status_is_0_only_if_every_run_was_ok() -> None:
    assert tally().exit_status == 0
    assert tally(result(), result(1)).exit_status == 0
    for verdict in Verdict:
        if verdict is not Verdict.OK:
            assert tally(result(), result(1, verdict)).exit_status == 1, verdict


def test_json_counts_every_verdict_and_can_be_written() -> None:
    summary = json.loads(json.dumps(mixed().to_json()))
    assert (summary["type"], summary["schema"], summary["runs"]) == ("summary", 1, 12)
    assert set(summary["verdicts"]) == {verdict.value for verdict in Verdict}
    assert {verdict: n for verdict, n in summary["verdicts"].items() if n} == {
        "ok": 8,
        "exit": 2,
        "oom": 1,
        "skipped": 1,
    }
    assert summary["jobs"] == {"sum": {"ok": 8, "exit": 2}, "hog": {"oom": 1}, "after": {"skipped": 1}}
    assert summary["exit_status"] == 1


def test_wall_time_runs_from_the_first_start_to_the_last_end_in_any_order() -> None:
    late = result(0, started_at=110.0, finished_at=112.5)
    early = result(1, started_at=100.0, finished_at=101.0)
    for order in ((late, early), (early, late)):
        made = tally(*order, result(2, Verdict.SKIPPED))
        assert made.wall_s == 12.5
        assert made.runs_per_s == pytest.approx(2 / 12.5)
        assert made.to_json()["started_at"] == "1970-01-01T00:01:40.000000Z"


def test_what_was_not_measured_is_null_not_zero() -> None:
    summary = tally(result(0, Verdict.SKIPPED)).to_json()
    assert [summary[name] for name in ("wall_s", "runs_per_s", "cpu_s", "started_at")] == [None] * 4
    assert (summary["slowest"], summary["hungriest"]) == ([], [])


def test_slowest_and_hungriest_are_the_top_three_in_order() -> None:
    walls = [3.0, 9.0, 1.0, 7.0, 5.0, 9.0]
    summary = tally(*(result(i, wall_s=w, memory_peak_bytes=int(100 - w)) for i, w in enumerate(walls))).to_json()
    assert [(run["index"], run["wall_s"]) for run in summary["slowest"]] == [(1, 9.0), (5, 9.0), (3, 7.0)]
    assert [run["memory_peak_bytes"] for run in summary["hungriest"]] == [99, 97, 95]
    assert summary["slowest"][0]["run_id"] == "run-sum-1"


def test_of_equal_runs_the_first_are_named() -> None:
    summary = tally(*(result(i, wall_s=2.0) for i in range(9))).to_json()
    assert [run["index"] for run in summary["slowest"]] == [0, 1, 2]


def test_only_the_first_ten_failures_are_listed_but_all_are_counted() -> None:
    made = tally(*(result(i, Verdict.EXIT, reason=f"exit status {i}", exit_code=i) for i in range(1, 30)))
    failures = made.to_json()["failures"]
    assert [failure["reason"] for failure in failures] == [f"exit status {i}" for i in range(1, 11)]
    assert failures[0]["exit_code"] == 1
    assert made.verdicts[Verdict.EXIT] == 29


def test_memory_does_not_grow_with_the_number_of_runs() -> None:
    def add(made: Tally, count: int) -> None:
        for i in range(count):
            verdict = Verdict.EXIT if i % 2 else Verdict.OK
            made.add(result(i, verdict, wall_s=float(i), memory_peak_bytes=i, stdout=b"x" * 1000, reason=f"reason {i}"))

    made = Tally()
    add(made, 500)
    tracemalloc.start()
    add(made, 5000)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 20_000


def test_the_text_tells_counts_speed_extremes_and_grouped_failures() -> None:
    assert mixed().render(80) == (
        "12 runs, 4 never started, 8.00 s, 1.0 runs/s, 4.00 s CPU\n"
        "\n"
        "  ok            8\n"
        "  exit          2\n"
        "  oom           1\n"
        "  skipped       1\n"
        "\n"
        "slowest     70 ms  sum[7]\n"
        "            60 ms  sum[6]\n"
        "            50 ms  sum[5]\n"
        "hungriest  64 MiB  hog\n"
        "             5 KB  sum[8]\n"
        "\n"
        "not ok\n"
        "  sum    exit          2  exit status 3 (first: [8])\n"
        "  hog    oom           1  memory limit 64 MiB reached (1 kill)\n"
        "  after  skipped       1\n"
    )


def test_a_clean_batch_has_no_failure_section() -> None:
    assert "not ok" not in tally(result(), result(1)).render()
    assert tally().render() == "no runs\n"
    assert tally(result(started_at=1.0)).render().startswith("1 run\n")


def test_colour_adds_codes_and_changes_nothing_else() -> None:
    colored = mixed().render(80, color=True)
    assert "\x1b[32mok\x1b[0m" in colored
    assert "\x1b[31moom\x1b[0m" in colored
    assert ANSI.sub("", colored) == mixed().render(80)
    assert "\x1b" not in mixed().render(80)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    made = mixed()
    made.add(result(12345, Verdict.INFRA, job="a-very-long-job-name-" * 5, reason="step 3 failed " * 20, wall_s=9.0))
    made.add(result(0, Verdict.EXIT, job="日本語の名前" * 10, reason="終了" * 60, wall_s=8.0))
    assert max(cells(line) for line in made.render(width).splitlines()) <= width


def test_columns_line_up_with_wide_characters() -> None:
    text = tally(
        result(0, Verdict.EXIT, job="日本", reason="one"), result(0, Verdict.OOM, job="abcd", reason="two")
    ).render()
    places = {cells(line[: line.index("one" if "one" in line else "two")]) for line in text.splitlines()[-2:]}
    assert len(places) == 1


def test_many_kinds_of_failures_are_summed_up() -> None:
    made = tally(*(result(0, Verdict.EXIT, job=f"job-{i}", reason="exit status 1") for i in range(40)))
    assert "  and 28 runs in 28 more groups\n" in made.render()


def test_control_characters_never_reach_the_terminal() -> None:
    evil = "a\x1b]0;pwned\x07\r\n\u202eb\x9b31m"
    made = tally(result(0, Verdict.EXIT, job=evil, reason=evil, wall_s=1.0, memory_peak_bytes=1))
    text = made.render(200)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert r"a\x1b]0;pwned\x07\r\n\u202eb\x9b31m" in text
    assert len(text.splitlines()) == len(
        tally(result(0, Verdict.EXIT, wall_s=1.0, memory_peak_bytes=1)).render().splitlines()
    )


@pytest.mark.parametrize(
    "text,shown",
    [("ü 日本", "ü 日本"), ("a\tb", r"a\tb"), ("\udc80", r"\udc80"), ("\x00\x7f", r"\x00\x7f"), ("\u2028", r"\u2028")],
)  # fmt: skip
def test_printable_escapes_what_a_terminal_would_act_on(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


@pytest.mark.parametrize(
    "text,width,expected",
    [("abcdef", 6, "abcdef"), ("abcdefg", 6, "abc..."), ("日本語", 5, "日..."), ("e\u0301" * 4, 4, "e\u0301" * 4),
     ("abc", 2, "..")],
)  # fmt: skip
def test_fit_cuts_at_the_column(text: str, width: int, expected: str) -> None:
    assert fit(text, width) == expected
    assert cells(pad(fit(text, width), width)) == width


@pytest.mark.parametrize(
    "seconds,text",
    [(0, "0.0 ms"), (0.00084, "0.8 ms"), (0.012, "12 ms"), (0.9996, "1.00 s"), (1.234, "1.23 s"), (59.4, "59.4 s"),
     (59.96, "1 m 00 s"), (245, "4 m 05 s"), (7380, "2 h 03 m")],
)  # fmt: skip
def test_measured_times_are_short(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text


def test_rates_keep_what_matters() -> None:
    assert [rate(r) for r in (0.25, 3.0, 99.94, 99.96, 1234.5)] == ["0.2", "3.0", "99.9", "100", "1,234"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "stream,env,expected",
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(stream: io.StringIO, env: dict[str, str], expected: bool) -> None:
    assert use_color(stream, env) is expected
