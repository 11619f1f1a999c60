"""jobs.toml to Config: read, check, merge [defaults] under every job, translate to frozen values.

    text ──tomllib──▶ tables ──overrides──▶ models (config_models) ──rules──▶ Config

Every stage reports into one Report, so that all mistakes come at once, each with its line. After this file nothing
reads jobs.toml again."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diyc.config_build import Machine, SupervisorConfig, build_jobs, build_supervisor
from diyc.config_checks import Context, suggestion
from diyc.config_lines import parse_key
from diyc.config_models import Document, json_schema
from diyc.config_report import Report, path_text
from diyc.config_rules import EnvFiles, check_rules
from diyc.errors import ConfigError, Problem
from diyc.jobs import JobSpec
from diyc.units import parse_size, quoted


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration: `jobs` in the order of the file, `file` as it was named."""

    file: str
    supervisor: SupervisorConfig
    jobs: tuple[JobSpec, ...]


def load_config(
    path: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    only: Iterable[str] = (),
    machine: Machine | None = None,
    check_devices: bool = True,
) -> Config:
    """The configuration in a file. `overrides` are KEY=VALUE as given to --set, `only` the names of the jobs to keep.

    Raises ConfigError with every problem of the file, of the files it names and of the overrides."""
    file = os.fspath(path)
    return parse_config(
        _read_text(file),
        file,
        os.path.dirname(os.path.abspath(file)),
        overrides=overrides,
        only=only,
        machine=machine,
        check_devices=check_devices,
    )


def parse_config(
    text: str,
    file: str,
    base_dir: str,
    *,
    overrides: Iterable[str] = (),
    only: Iterable[str] = (),
    machine: Machine | None = None,
    check_devices: bool = True,
) -> Config:
    """As load_config, of a text. `file` is the name that errors carry; relative paths start at `base_dir`."""
    machine = machine or Machine.here()
    tables = _parse_toml(text, file)
    report = Report(file, text)
    for override in overrides:
        _apply_override(override, tables, report)
    if not tables.get("jobs"):
        what = "the file is empty" if not text.strip() else "no job is defined"
        report.add((), f"{what}: add a [jobs.NAME] table with a `command`")
    document, env_files = _validated(tables, _context(tables, base_dir, machine, check_devices), report)
    keep = _kept_jobs(only, tables, report)
    report.raise_if_any()
    return Config(file, build_supervisor(document, machine), build_jobs(document, env_files, keep))


def job_from_mapping(
    name: str,
    job: Mapping[str, Any],
    *,
    images: Mapping[str, Mapping[str, Any]] | None = None,
    base_dir: str | None = None,
    max_memory: int | None = None,
    machine: Machine | None = None,
    check_devices: bool = True,
) -> JobSpec:
    """One job from a mapping with the keys of a [jobs.NAME] table (`images` as the [images] table), for `diyc run`
    and the Python class Job. Raises ConfigError; its problems have the file "job" and no line."""
    machine = machine or Machine.here()
    tables = {"jobs": {name: _plain(job)}, "images": _plain(images or {})}
    report = Report("job", None, hidden_prefix=("jobs", name))
    context = Context(
        base_dir=base_dir or os.getcwd(),
        cpus=machine.cpus,
        max_memory=machine.memory_budget if max_memory is None else max_memory,
        images=frozenset(tables["images"]),
        check_devices=check_devices,
    )
    document, env_files = _validated(tables, context, report)
    report.raise_if_any()
    return build_jobs(document, env_files, lambda _: True)[0]


def supervisor_from_mapping(settings: Mapping[str, Any], *, machine: Machine | None = None) -> SupervisorConfig:
    """The settings of a supervisor from a mapping with the keys of [supervisor]. Raises ConfigError."""
    machine = machine or Machine.here()
    tables = {"supervisor": _plain(settings)}
    report = Report("supervisor", None, hidden_prefix=("supervisor",))
    document, _ = _validated(tables, _context(tables, os.getcwd(), machine, True), report)
    report.raise_if_any()
    return build_supervisor(document, machine)


def _read_text(file: str) -> str:
    def refused(message: str, line: int | None = None) -> ConfigError:
        return ConfigError([Problem(file, line, "", message)])

    try:
        with open(file, "rb") as stream:
            data = stream.read()
    except IsADirectoryError as error:
        raise refused("is a directory; name the jobs.toml inside it") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise refused(f"cannot read the configuration: {reason}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refused("is not UTF-8 text, which TOML must be; convert it", line) from error


def _parse_toml(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError([Problem(file, None, "", "arrays or tables are nested too deeply to be read")]) from error
    except ValueError as error:
        # TOMLDecodeError; or int() refusing a number of more than 4,300 digits, which has no place.
        raise ConfigError([_syntax_problem(str(error), text, file)]) from error


def _syntax_problem(message: str, text: str, file: str) -> Problem:
    place = re.search(r" \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)$", message)
    if place is None:
        digits = re.search(r"[0-9_]{4300}", text)
        line = text.count("\n", 0, digits.start()) + 1 if digits else None
        return Problem(file, line, "", "a number has more digits than any key can take")
    what = message[: place.start()]
    twice = re.fullmatch(r"Cannot declare \((.*?),?\) twice", what)
    if twice:
        what = f"[{twice[1].replace(chr(39), '').replace(', ', '.')}] stands here a second time"
    what = what[0].lower() + what[1:]
    if place[1] is None:
        line = text.count("\n") + (not text.endswith("\n"))
        return Problem(file, line, "", f"not valid TOML: the file ends too early: {what}", "is a ] or a quote missing?")
    hint = next((hint for start, hint in _SYNTAX_HINTS if what.startswith(start)), None)
    rest_of_line = text.split("\n")[int(place[1]) - 1][int(place[2]) - 1 :].strip()
    if what.startswith("invalid initial character for a key") and rest_of_line[:1] in ("", "#"):
        hint = "a { } table must end on the line it starts on; a [table] header may take many lines"
    return Problem(file, int(place[1]), "", f"not valid TOML in column {place[2]}: {what}", hint)


_SYNTAX_HINTS = (
    ("invalid value", "a string needs quotes"),
    ("expected newline or end of document after a statement", "a string needs quotes"),
    ("cannot overwrite a value", "the key is set a second time"),
    ("illegal character '\\n'", "is a closing quote missing?"),
)


def _apply_override(override: str, tables: dict[str, Any], report: Report) -> None:
    """Put one KEY=VALUE into the tables, as if the file had said so."""
    text, equals, value = override.partition("=")
    try:
        if not equals:
            raise ValueError("expected KEY=VALUE, such as jobs.build.timeout=10s")
        path = parse_key(text)
        _descend(path, tables)[path[-1]] = _override_value(value)
        report.override(path, "--set")
    except ValueError as error:
        report.add_elsewhere(Problem("--set", None, text, str(error)))


def _descend(path: tuple[str, ...], tables: dict[str, Any]) -> dict[str, Any]:
    """The table that the last part of `path` goes into. ValueError where there can be none."""
    here = tables
    for depth, part in enumerate(path[:-1]):
        if depth == 1 and path[0] in ("jobs", "images") and part not in here:
            hint = suggestion(part, here)
            raise ValueError(f"the file defines no {path_text(path[:2])}" + (f" ({hint})" if hint else ""))
        inner = here.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{path_text(path[: depth + 1])} is not a table")
        here = inner
    return here


def _override_value(text: str) -> Any:
    """A value as TOML writes it, or the text itself: 64MiB needs no quotes on the command line."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _context(tables: dict[str, Any], base_dir: str, machine: Machine, check_devices: bool) -> Context:
    images = tables.get("images")
    return Context(
        base_dir=base_dir,
        cpus=machine.cpus,
        max_memory=_memory_budget(tables.get("supervisor"), machine),
        images=frozenset(images) if isinstance(images, dict) else frozenset(),
        check_devices=check_devices,
    )


def _memory_budget(supervisor: Any, machine: Machine) -> int | None:
    """supervisor.max_memory before the models are made; None where it is wrong, which they will report."""
    if not isinstance(supervisor, dict) or "max_memory" not in supervisor:
        return machine.memory_budget
    try:
        return parse_size(supervisor["max_memory"])
    except ValueError:
        return None


def _validated(tables: dict[str, Any], context: Context, report: Report) -> tuple[Document, EnvFiles]:
    """The tables as models. Where they are wrong, problems are in the report and the models stay empty."""
    try:
        document = Document.model_validate(tables, context=context)
    except ValidationError as invalid:
        document = Document()
        for error in invalid.errors(include_url=False):
            report.add_invalid(error)
    return document, check_rules(tables, context, report)


def _kept_jobs(only: Iterable[str], tables: dict[str, Any], report: Report) -> Callable[[str], bool]:
    chosen = frozenset(only)
    jobs = tables.get("jobs")
    if isinstance(jobs, dict):
        for name in sorted(chosen - jobs.keys()):
            report.add_elsewhere(
                Problem(
                    "--only",
                    None,
                    "",
                    f"no job is named {quoted(name)}",
                    suggestion(name, jobs) or f"there are: {', '.join(sorted(jobs)[:20])}",
                )
            )
    return lambda name: not chosen or name in chosen


def _plain(value: Any) -> Any:
    """A Python caller's value as TOML would have given it: mappings as dicts, sequences as lists, paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


__all__ = [
    "Config",
    "Machine",
    "SupervisorConfig",
    "job_from_mapping",
    "json_schema",
    "load_config",
    "parse_config",
    "supervisor_from_mapping",
]
