"""Sizes, durations and CPU sets are read as people write them, and written so that they can be read again."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diyc.units import (
    CPUSET_PATTERN,
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_cpuset,
    format_duration,
    format_size,
    parse_cpuset,
    parse_duration,
    parse_size,
)

SIZES = [
    ("4096", 4096),
    (4096, 4096),
    (0, 0),
    ("0", 0),
    ("1K", 1000),
    ("1KB", 1000),
    ("1Ki", 1024),
    ("1KiB", 1024),
    ("64MiB", 64 * 2**20),
    ("64 MiB", 64 * 2**20),
    ("10MB", 10_000_000),
    ("12G", 12 * 10**9),
    ("1.5GiB", 3 * 2**29),
    ("2TiB", 2 * 2**40),
    ("2T", 2 * 10**12),
    ("7B", 7),
]


@pytest.mark.parametrize("written, size", SIZES)
def test_size_is_read(written: str | int, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written, advice",
    [
        ("64Mb", 'try "64MB"'),
        ("64mib", 'try "64MiB"'),
        ("5 megs", 'try "5MiB"'),
        ("plenty", 'try "64MiB"'),
        ("", 'try "64MiB"'),
        ("1.5", 'try "1.5MiB"'),
        ("-1", "not a size"),
        (-1, "negative"),
        (True, "true is not a size"),
        (1.5, "not a size"),
        (["1"], "an array is not a size"),
        (2**63, "larger than"),
        pytest.param(10**5000, "larger than", id="huge"),
        pytest.param("9" * 10_000, "not a size", id="long"),
    ],
)
def test_wrong_size_is_refused_with_advice(written: str | int, advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(advice)):
        parse_size(written)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1023, "1023 B"),
        (4096, "4 KiB"),
        (64 * 2**20, "64 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (10_000_000, "10 MB"),
        (67_108_865, "64.0 MiB"),
        (2**20 - 1, "1.0 MiB"),
    ],
)
def test_size_is_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 999), st.sampled_from(["", "KiB", "MiB", "GiB", "TiB", "KB", "MB", "GB", "TB"]))
def test_written_size_reads_back_exactly(number: int, unit: str) -> None:
    size = parse_size(f"{number}{unit}")
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 2**62))
def test_any_size_reads_back_within_a_twentieth(size: int) -> None:
    text = format_size(size)
    assert abs(parse_size(text) - size) <= size * 0.05
    assert re.fullmatch(SIZE_PATTERN, text)


@pytest.mark.parametrize(
    "written, seconds",
    [
        (0, 0.0),
        (10, 10.0),
        (2.5, 2.5),
        ("10", 10.0),
        ("10s", 10.0),
        ("250ms", 0.25),
        ("50us", 0.00005),
        ("2m", 120.0),
        ("1h30m", 5400.0),
        ("1 h 30 m", 5400.0),
        ("1d", 86400.0),
        ("1.5h", 5400.0),
        ("0.1s", 0.1),
    ],
)
def test_duration_is_read(written: str | float, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written, advice",
    [
        ("10 sec", 'try "10s"'),
        ("10S", 'try "10s"'),
        ("5min30sec", 'try "5m30s"'),
        ("1m1m", "each unit once"),
        ("3 weeks", 'try "10s"'),
        ("", 'try "10s"'),
        ("soon", 'try "10s"'),
        ("1h30", 'try "'),
        (-1, "negative"),
        (float("nan"), "not a duration"),
        (float("inf"), "not a duration"),
        (True, "true is not a duration"),
        ("99999d", "at most 31 years"),
        pytest.param(10**400, "at most 31 years", id="huge"),
    ],
)
def test_wrong_duration_is_refused_with_advice(written: str | float, advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(advice)):
        parse_duration(written)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (0.0005, "0.5 ms"),
        (0.25, "250 ms"),
        (0.9999, "1 s"),
        (1.5, "1.5 s"),
        (10, "10 s"),
        (60, "1 m"),
        (5400, "1 h 30 m"),
        (90061.5, "1 d 1 h 1 m 1.5 s"),
    ],
)
def test_duration_is_written_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10**11))
def test_duration_in_milliseconds_reads_back_exactly(milliseconds: int) -> None:
    text = format_duration(milliseconds / 1000)
    assert parse_duration(text) == milliseconds / 1000
    assert re.fullmatch(DURATION_PATTERN, text)


@pytest.mark.parametrize("written, cpus", [("0", (0,)), ("0-3,5", (0, 1, 2, 3, 5)), ("5, 0-1\n", (0, 1, 5))])
def test_cpu_set_is_read(written: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpuset(written) == cpus


@pytest.mark.parametrize(
    "written, advice",
    [
        ("", "not a CPU set"),
        ("3-1", 'try "1-3"'),
        ("all", 'try "0-3"'),
        ("0-9999999", "above 8191"),
        ("1,,2", "not a CPU set"),
    ],
)
def test_wrong_cpu_set_is_refused_with_advice(written: str, advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(advice)):
        parse_cpuset(written)


@given(st.frozensets(st.integers(0, 8191), min_size=1))
def test_cpu_set_reads_back(cpus: frozenset[int]) -> None:
    text = format_cpuset(cpus)
    assert parse_cpuset(text) == tuple(sorted(cpus))
    assert re.fullmatch(CPUSET_PATTERN, text)


@given(st.text())
def test_no_text_does_anything_but_parse_or_raise_one_line(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_cpuset):
        assert "\n" not in outcome(parse, text)


def outcome(parse: Callable[[str], object], text: str) -> str:
    try:
        return str(parse(text))
    except ValueError as error:
        return str(error)
