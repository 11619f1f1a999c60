"""Sizes, durations and CPU sets: what people write ("64MiB", "1h30m", "0-3,5") to numbers, and back.

Every parser raises ValueError with a sentence fit for the user; where a likely meaning is known, it is suggested."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

# Digits are bounded so that no text, however long, costs more than a glance.
_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?"

SIZE_PATTERN = rf"^ *{_NUMBER} *([KMGT]i?)?B? *$"
DURATION_PATTERN = rf"^( *{_NUMBER}|( *{_NUMBER} *(d|h|m|s|ms|us))+) *$"
CPUSET_PATTERN = r"^ *[0-9]{1,4}(-[0-9]{1,4})?( *, *[0-9]{1,4}(-[0-9]{1,4})?)* *$"

_SIZE = re.compile(rf" *({_NUMBER}) *([A-Za-z]*) *")
_BINARY = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_DECIMAL = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_SIZE_UNITS = {"": 1, "B": 1} | {
    spelling: factor for unit, factor in (_BINARY | _DECIMAL).items() for spelling in (unit, unit[:-1])
}
_LARGEST_SIZE = 2**63 - 1  # the kernel's own ceiling for a size (loff_t)
_LONGEST_DURATION = 10**9  # 31 years: more overflows a timer somewhere

_BARE_NUMBER = re.compile(f" *{_NUMBER} *")
_TERM = re.compile(rf" *({_NUMBER}) *([A-Za-z]+) *")
_MICROSECONDS = {"d": 86_400_000_000, "h": 3_600_000_000, "m": 60_000_000, "s": 1_000_000, "ms": 1000, "us": 1}
_DURATION_WORDS = {
    "d": ("day", "days"),
    "h": ("hr", "hrs", "hour", "hours"),
    "m": ("min", "mins", "minute", "minutes"),
    "s": ("sec", "secs", "second", "seconds"),
    "ms": ("msec", "msecs", "millis", "millisecond", "milliseconds"),
    "us": ("usec", "usecs", "micros", "microsecond", "microseconds"),
}
_DURATION_UNIT = {word: unit for unit, words in _DURATION_WORDS.items() for word in (unit, *words)}

_HIGHEST_CPU = 8191  # CONFIG_NR_CPUS has never been offered above 8192


def parse_size(value: str | int) -> int:
    """Bytes from an integer of bytes or from a string: "64MiB", "10MB", "1.5G", "4096".

    K, M, G, T are powers of 1000; Ki, Mi, Gi, Ti powers of 1024; a B may follow. Fractions of a byte are dropped."""
    match value:
        case str():
            size = _size_of(value)
        case int() if value is not True and value is not False:
            size = value
        case _:
            raise ValueError(f'{quoted(value)} is not a size (try a number of bytes or "64MiB")')
    if size < 0:
        raise ValueError(f"{quoted(value)} is not a size: it is negative")
    if size > _LARGEST_SIZE:
        raise ValueError(f"{quoted(value)} is larger than any size the kernel knows (8 EiB)")
    return size


def _size_of(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _SIZE_UNITS:
        raise ValueError(f"{quoted(text)} is not a size (try {_size_suggestion(match)})")
    number, unit = match.groups()
    if "." in number and _SIZE_UNITS[unit] == 1:
        raise ValueError(f'{quoted(text)} is not a size: bytes come whole (try "{number}MiB" if that is meant)')
    return _scaled(number, _SIZE_UNITS[unit])


def _scaled(number: str, factor: int) -> int:
    """number * factor without the error of a float; what is left of one is dropped."""
    return int(Fraction(number) * factor) if "." in number else int(number) * factor


def _size_suggestion(match: re.Match[str] | None) -> str:
    if match is None:
        return '"64MiB" or "64MB"'
    number, unit = match.groups()
    known = {spelling.lower(): spelling for spelling in _SIZE_UNITS}
    return f'"{number}{known.get(unit.lower(), "MiB")}"'


def format_size(size: int) -> str:
    """A size for people: "64 MiB", "10 MB", "1.5 GiB", "999 B".

    A size that a binary or a decimal unit gives exactly within two decimals is written exactly (parse_size reads
    it back); any other is rounded to a tenth of its binary unit."""
    if size < 1000:
        return f"{size} B"
    for units in (_BINARY, _DECIMAL):
        if (exact := _exact(size, units)) is not None:
            return exact
    if size < 1024:
        return f"{size} B"
    unit = _unit_for(size, _BINARY)
    return f"{size / _BINARY[unit]:.1f} {unit}"


def _exact(size: int, units: dict[str, int]) -> str | None:
    unit = _unit_for(size, units)
    hundredths, rest = divmod(size * 100, units[unit])
    if rest:
        return None
    return f"{_trimmed(hundredths // 100, hundredths % 100, 2)} {unit}"


def _unit_for(size: int, units: dict[str, int]) -> str:
    """The largest unit that `size` reaches, counting what would round up to a full next one."""
    reached = [unit for unit, factor in units.items() if size >= factor * 0.99996]
    return reached[-1] if reached else next(iter(units))


def _trimmed(whole: int, part: int, digits: int) -> str:
    return f"{whole}.{part:0{digits}d}".rstrip("0").rstrip(".")


def parse_duration(value: str | float) -> float:
    """Seconds from a number of seconds or from a string: "250ms", "10s", "2m", "1h30m", "1 h 30 m"."""
    match value:
        case str():
            seconds = _duration_of(value)
        case int() | float() if value is not True and value is not False:
            seconds = value
        case _:
            raise ValueError(f'{quoted(value)} is not a duration (try a number of seconds or "10s")')
    if seconds < 0:
        raise ValueError(f"{quoted(value)} is not a duration: it is negative")
    if not seconds <= _LONGEST_DURATION:  # so that NaN is caught too
        raise ValueError(f"{quoted(value)} is not a duration of at most 31 years")
    return float(seconds)


def _duration_of(text: str) -> float:
    if _BARE_NUMBER.fullmatch(text):
        return float(text)
    total, position, seen = 0, 0, list[str]()
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or match[2] not in _MICROSECONDS or match[2] in seen:
            break
        total += _scaled(match[1], _MICROSECONDS[match[2]])
        seen.append(match[2])
        position = match.end()
    if position < len(text) or not seen:
        raise ValueError(f"{quoted(text)} is not a duration (try {_duration_suggestion(text)})")
    return total / 10**6


def _duration_suggestion(text: str) -> str:
    terms = [(number, _DURATION_UNIT.get(word.lower())) for number, word in _TERM.findall(text)]
    if not terms or len(terms) > len(_MICROSECONDS) or any(unit is None for _, unit in terms):
        return '"10s", "250ms" or "1h30m"'
    if len({unit for _, unit in terms}) < len(terms):
        return "each unit once"
    return '"' + "".join(f"{number}{unit}" for number, unit in terms) + '"'


def format_duration(seconds: float) -> str:
    """A duration for people: "10 s", "250 ms", "1 h 30 m", "2 m 0.5 s"; rounded to the millisecond,
    below one to the microsecond."""
    microseconds = round(seconds * 1e6)
    if microseconds < 1000:
        return f"{_trimmed(0, microseconds, 3)} ms" if microseconds else "0 s"
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds} ms"
    parts = []
    for unit, factor in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000)):
        count, milliseconds = divmod(milliseconds, factor)
        if count:
            parts.append(f"{count} {unit}")
    if milliseconds:
        parts.append(f"{_trimmed(milliseconds // 1000, milliseconds % 1000, 3)} s")
    return " ".join(parts)


def parse_cpuset(text: str) -> tuple[int, ...]:
    """The CPU numbers of a list as the kernel writes it ("0-3,5"), sorted, each once."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r" *([0-9]{1,9})(?:-([0-9]{1,9}))? *", part)
        if match is None:
            raise ValueError(f'{quoted(text)} is not a CPU set (try "0-3" or "0,2")')
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f'{quoted(text)} is not a CPU set: {part.strip()} runs backwards (try "{last}-{first}")')
        if last > _HIGHEST_CPU:
            raise ValueError(f"{quoted(text)} is not a CPU set: CPU {last} is above {_HIGHEST_CPU}")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def format_cpuset(cpus: Iterable[int]) -> str:
    """CPU numbers as the kernel writes them: "0-3,5"."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def quoted(value: object) -> str:
    """A value as messages show it: on one line, as TOML writes it, its end left out where it is long."""
    match value:
        case str():
            return f'"{printable(value)}"' if len(value) <= 60 else f'"{printable(value[:50])}..."'
        case bool():
            return str(value).lower()
        case int() if value.bit_length() > 256:  # str() of an integer beyond 4,300 digits raises
            return "the number"
        case list() | tuple():
            return "an array"
        case dict():
            return "a table"
    return str(value)


def printable(text: str) -> str:
    """Text for one line of a terminal: control characters, line ends and lone surrogates become U+FFFD."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
