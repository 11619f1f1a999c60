"""Collects what is wrong with a configuration and says it: each problem once, at its own line, all together.

A problem is known by the path of the key it is about; files and lines are looked up only when there is one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from diyc.config_checks import suggestion
from diyc.config_lines import Lines, Path
from diyc.config_models import Document
from diyc.errors import ConfigError, Problem
from diyc.units import printable, quoted

# What people who come from Compose, systemd or GitHub Actions may write.
_OTHER_NAMES = {
    "args": "command",
    "argv": "command",
    "cmd": "command",
    "cwd": "workdir",
    "cpu": "limits.cpus",
    "depends": "depends_on",
    "entrypoint": "command",
    "environment": "env",
    "exec": "command",
    "mem": "limits.memory",
    "mem_limit": "limits.memory",
    "needs": "depends_on",
    "parallel": "max_parallel",
    "replicas": "count",
    "run": "shell",
    "script": "shell",
    "volumes": "mounts",
    "working_dir": "workdir",
}


@dataclass(frozen=True, slots=True)
class _Finding:
    """`suggests` is the key that an unknown one may have meant; `lacks` the keys of which one is missing."""

    path: Path
    message: str
    hint: str | None = None
    suggests: str | None = None
    lacks: tuple[str, ...] = ()


class Report:
    """The problems found so far. `text` is None where the configuration did not come from a file."""

    def __init__(self, file: str, text: str | None, hidden_prefix: Path = ()) -> None:
        self._file = file
        self._text = text
        self._hidden_prefix = hidden_prefix
        self._findings: dict[Path, _Finding] = {}
        self._elsewhere: list[Problem] = []
        self._overridden: dict[Path, str] = {}

    def add(self, path: Path, message: str, hint: str | None = None) -> None:
        """Report a problem of the value at `path`. Only the first one at a path is kept."""
        self._findings.setdefault(path, _Finding(path, message, hint))

    def add_missing(self, path: Path, *keys: str) -> None:
        """Report that the table at `path` needs one of `keys`, unless a misspelt one of them is reported anyway."""
        wanted = " or ".join(f"`{key}`" for key in keys)
        self._findings.setdefault((*path, ""), _Finding(path, f"needs {wanted}", lacks=keys))

    def add_unknown(self, path: Path) -> None:
        """Report a key that does not exist, and what it may have meant."""
        meant = _meant_key(path)
        hint = f"did you mean `{meant}`?" if meant else None
        self._findings.setdefault(path, _Finding(path, "unknown key", hint, suggests=meant))

    def add_invalid(self, error: ErrorDetails) -> None:
        """Report one of pydantic's errors."""
        path = error["loc"][:-1] if error["loc"][-1:] == ("[key]",) else error["loc"]
        match error["type"]:
            case "extra_forbidden":
                self.add_unknown(path)
            case "missing":
                self.add_missing(path[:-1], str(path[-1]))
            case _:
                self.add(path, *_explain(error))

    def add_elsewhere(self, problem: Problem) -> None:
        """Report a problem that lies outside the file itself: in an env_file, on the command line."""
        key, message = printable(problem.key), printable(problem.message)
        self._elsewhere.append(replace(problem, key=key, message=message))

    def override(self, path: Path, source: str) -> None:
        """Note that the value at `path` came from `source` and not from the file."""
        self._overridden[path] = source

    def touches(self, path: Path) -> bool:
        """Whether a problem is known at `path`, inside it or around it."""
        return any(path[: len(known)] == known or known[: len(path)] == path for known in self._findings)

    def raise_if_any(self) -> None:
        """Raise ConfigError with all problems, those of the file first, by line."""
        findings = [finding for finding in self._findings.values() if not self._is_explained(finding)]
        if not findings and not self._elsewhere:
            return
        lines = Lines(self._text) if self._text is not None else None
        problems = [self._problem(finding, lines) for finding in findings] + self._elsewhere
        raise ConfigError(sorted(problems, key=lambda problem: (problem.file != self._file, problem.line or 0)))

    def _is_explained(self, finding: _Finding) -> bool:
        return any(
            other.path[:-1] == finding.path and other.suggests in finding.lacks for other in self._findings.values()
        )

    def _problem(self, finding: _Finding, lines: Lines | None) -> Problem:
        file, line = self._file, lines.of(finding.path) if lines else None
        for path, source in self._overridden.items():
            if finding.path[: len(path)] == path:
                file, line = source, None
        shown = finding.path
        if self._hidden_prefix and shown[: len(self._hidden_prefix)] == self._hidden_prefix:
            shown = shown[len(self._hidden_prefix) :]
        return Problem(file, line, path_text(shown), printable(finding.message), finding.hint)


def path_text(path: Sequence[str | int]) -> str:
    """A key path as TOML would write it, with indexes: jobs.build.mounts[1].source."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else quoted(part))
    return text


def _explain(error: ErrorDetails) -> tuple[str, str | None]:
    """A sentence and a hint for one of pydantic's errors."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        return str(context["error"]), None
    if kind == "literal_error":
        return _explain_choice(str(context["expected"]), value)
    if kind == "string_pattern_mismatch":
        return "contains a NUL character, which nothing in a job can carry", None
    if kind in _LEAST_AND_MOST:
        return f"must be {_LEAST_AND_MOST[kind]} {next(iter(context.values()))}, not {quoted(value)}", None
    if kind in ("too_short", "string_too_short"):
        return "must not be empty", None
    if kind in _EXPECTED:
        scalar = isinstance(value, (int, float)) and kind == "string_type"
        return f"expected {_EXPECTED[kind]}, not {quoted(value)}", f'write "{quoted(value)}"' if scalar else None
    return error["msg"][0].lower() + error["msg"][1:], None


_LEAST_AND_MOST = {"greater_than_equal": "at least", "less_than_equal": "at most"}
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "an array",
    "model_type": "a table",
    "string_type": "a string",
}


def _explain_choice(expected: str, value: object) -> tuple[str, str | None]:
    choices = re.findall(r"'([^']*)'", expected)
    listed = ", ".join(f'"{choice}"' for choice in choices)
    hint = suggestion(value, choices) if isinstance(value, str) else None
    return f"{quoted(value)} is not one of {listed}", hint


def _meant_key(path: Path) -> str | None:
    """What an unknown key may have meant: a near neighbour, a key of a table inside, another tool's word."""
    name, table = str(path[-1]), _table_at(path[:-1])
    if table is None:
        return None
    known = _keys_of(table)
    inside = {
        inner: f"{key}.{inner}"
        for key, annotation in known.items()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        for inner in _keys_of(annotation)
    }
    other = _OTHER_NAMES.get(name, "")
    if other.split(".")[0] in known:
        return other
    return inside.get(name) if name in inside and table is not Document else _closest(name, known)


def _closest(name: str, known: Collection[str]) -> str | None:
    hint = suggestion(name, known)
    return hint.split("`")[1] if hint else None


def _keys_of(table: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in table.model_fields.items()}


def _table_at(path: Path) -> type[BaseModel] | None:
    """The model that describes the table at `path`, None where the models leave a table open."""
    here: Any = Document
    for part in path:
        here = _keys_of(here).get(str(part)) if isinstance(here, type) else get_args(here)[-1]
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None
