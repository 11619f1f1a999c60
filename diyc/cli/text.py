"""Text for terminals and logs: no control character of a job gets through, columns line up, colours are optional."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TextIO

from diyc.results import Result, Verdict

_GREEN, _RED, _YELLOW, _BOLD, _DIM = "32", "31", "33", "1", "2"
_HARMLESS = (Verdict.CANCELLED, Verdict.SKIPPED)


class Paint:
    """Colours text, or leaves it alone."""

    def __init__(self, color: bool) -> None:
        self._color = color

    def verdict(self, verdict: Verdict, width: int = 0) -> str:
        """The verdict in its colour, padded to `width` columns."""
        code = _GREEN if verdict is Verdict.OK else _YELLOW if verdict in _HARMLESS else _RED
        return self._in(code, verdict.value) + " " * (width - len(verdict.value))

    def bold(self, text: str) -> str:
        """A heading."""
        return self._in(_BOLD, text)

    def dim(self, text: str) -> str:
        """Text that matters less."""
        return self._in(_DIM, text)

    def _in(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color and text.strip() else text


def use_color(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Colours only on a terminal that has them, and not where NO_COLOR (no-color.org) is set."""
    return stream.isatty() and not env.get("NO_COLOR") and env.get("TERM", "dumb") != "dumb"


def printable(text: str) -> str:
    r"""The text with control and invisible characters as escapes (\x1b, \u202e), fit for a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def explained(result: Result) -> str:
    """Why a run is not ok, for people: its reason, a limit it ran into, and the last it said on stderr.

    Not yet printable()."""
    parts = [result.reason or ""]
    if result.verdict in (Verdict.EXIT, Verdict.SIGNAL):
        if result.pids_limit_hits:
            parts.append("limits.pids was reached")
        lines = result.stderr[-400:].decode("utf-8", "replace").strip().splitlines()
        parts += lines[-1:]
    return ": ".join(part for part in parts if part)


def run_name(job: str, index: int, attempt: int = 1) -> str:
    """How a run is called in text: sum[3], and sum[3]#2 for its second attempt."""
    name = f"{printable(job)}[{index}]"
    return name if attempt == 1 else f"{name}#{attempt}"


def cells(text: str) -> int:
    """The terminal columns that printable text takes."""
    if text.isascii():
        return len(text)
    return sum(_char_cells(char) for char in text)


def _char_cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0  # a mark over the character before
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def pad(text: str, width: int) -> str:
    """The text with spaces after it up to `width` columns."""
    return text + " " * (width - cells(text))


def fit(text: str, width: int) -> str:
    """The text, cut to `width` columns with "..." at its end where it is longer."""
    kept, used = "", 0
    for char in text:
        used += cells(char)
        if used > width:
            return _shortened(kept, width)
        kept += char
    return text


def _shortened(text: str, width: int) -> str:
    while text and cells(text) > width - 3:
        text = text[:-1]
    return text + "..."[:width]


def short_duration(seconds: float) -> str:
    """A measured time with three digits that matter: 0.8 ms, 12 ms, 1.23 s, 4 m 05 s, 2 h 03 m."""
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} m"


def rate(per_second: float) -> str:
    """Runs per second: 1,234 or 3.2."""
    return f"{per_second:,.0f}" if per_second >= 99.95 else f"{per_second:.1f}"


def verdict_counts(verdicts: Mapping[Verdict, int], paint: Paint) -> str:
    """One line such as `498 ok, 2 exit`."""
    return ", ".join(f"{verdicts[v]:,} {paint.verdict(v)}" for v in Verdict if verdicts.get(v))
