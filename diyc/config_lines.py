"""Where in a TOML text each key stands: tomllib gives values without places, and errors need lines.

This scanner runs only when something is wrong, on text that tomllib has already accepted; so it need not
judge the syntax, only follow it."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right

from diyc.units import quoted

Path = tuple[str | int, ...]

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY = re.compile(r"[A-Za-z0-9_-]+|\"(?:[^\"\\]|\\.)*\"|'[^']*'")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
# Longest delimiter first; a multi-line string may end in up to two quotes of its own.
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{1,2})?|\'\'\'.*?\'\'\'(?:\'{1,2})?|"(?:[^"\\]|\\.)*"|\'[^\']*\'',
    re.DOTALL,
)
_BARE = re.compile(r"[^,\]}\n#]+")


class Lines:
    """The 1-based line of each key, array element and table header of a TOML text."""

    def __init__(self, text: str) -> None:
        self._lines = _Scanner(text).scan()

    def of(self, path: Path) -> int | None:
        """The line of `path`, or of the nearest thing around it that was written; None for the file as a whole."""
        for length in range(len(path), 0, -1):
            if (line := self._lines.get(path[:length])) is not None:
                return line
        return None


def parse_key(text: str) -> tuple[str, ...]:
    """The parts of a dotted key as TOML writes it (jobs."a b".timeout). ValueError if `text` is anything else."""
    text = text.strip()
    parts: list[str] = []
    position = 0
    while match := _KEY.match(text, position):
        parts.append(_unquoted(match[0]))
        position = match.end()
        if position == len(text):
            return tuple(parts)
        if (dot := _DOT.match(text, position)) is None:
            break
        position = dot.end()
    raise ValueError(f"{quoted(text)} is not a dotted key")


def _unquoted(key: str) -> str:
    """A key as tomllib reads it. tomllib.TOMLDecodeError (a ValueError) if an escape in it is wrong."""
    return str(tomllib.loads(f"key = {key}")["key"]) if key[0] in "\"'" else key


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._lines: dict[Path, int] = {}
        self._elements: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        """Read the whole text: headers set the table that the keys after them belong to."""
        table: Path = ()
        while self._next() != "":
            if self._text.startswith("[[", self._position):
                table = self._header("[[", "]]")
                table = self._element_of(table)
            elif self._next() == "[":
                table = self._header("[", "]")
            else:
                self._pair(table)
        return self._lines

    def _header(self, opening: str, closing: str) -> Path:
        self._position += len(opening)
        table: Path = ()
        keys = self._keys()
        for depth, (key, line) in enumerate(keys, start=1):
            table = (*table, key)
            self._lines.setdefault(table, line)
            # A header that passes through an array of tables means its last element.
            if table in self._elements and depth < len(keys):
                table = (*table, self._elements[table])
        self._skip()
        self._position += len(closing)
        return table

    def _element_of(self, array: Path) -> Path:
        index = self._elements.get(array, -1) + 1
        self._elements[array] = index
        self._mark((*array, index))
        return (*array, index)

    def _pair(self, table: Path) -> None:
        path = table
        for key, line in self._keys():
            path = (*path, key)
            self._lines.setdefault(path, line)
        self._skip()
        self._position += len("=")
        self._value(path)

    def _keys(self) -> list[tuple[str, int]]:
        """A dotted key: its parts, each with its line."""
        keys = []
        self._skip()
        while match := _KEY.match(self._text, self._position):
            keys.append((_unquoted(match[0]), self._line()))
            self._position = match.end()
            if (dot := _DOT.match(self._text, self._position)) is None:
                break
            self._position = dot.end()
        return keys

    def _value(self, path: Path) -> None:
        """One value; arrays and inline tables descend. One frame a level, so that what tomllib could read
        within the interpreter's recursion limit, this can too."""
        opening = self._next()
        if opening not in "[{":
            match = _STRING.match(self._text, self._position) or _BARE.match(self._text, self._position)
            self._position = match.end() if match else len(self._text)
            return
        self._position += 1
        index = 0
        while (char := self._next()) not in "]}":
            if char == ",":
                self._position += 1
            elif opening == "[":
                self._mark((*path, index))
                self._value((*path, index))
                index += 1
            else:
                self._pair(path)
        self._position += 1

    def _next(self) -> str:
        """The next character that is neither space nor comment; "" at the end."""
        self._skip()
        return self._text[self._position : self._position + 1]

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._position)
        if match is not None:
            self._position = match.end()

    def _mark(self, path: Path) -> None:
        self._lines.setdefault(path, self._line())

    def _line(self) -> int:
        return bisect_right(self._starts, self._position)
