"""The rules of jobs.toml that look at more than one key: what excludes what, what needs what, what is built.

They read the plain tables, not the models, so that they also run where some value is wrong: a value that has
been reported, or that has the wrong type, is passed over."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from diyc.config_checks import Context, check_env_name, check_template
from diyc.config_lines import Path
from diyc.config_models import BUILT
from diyc.config_report import Report, path_text
from diyc.errors import Problem
from diyc.jobs import Limits, expand
from diyc.units import format_size, quoted

EnvFiles = dict[str, dict[str, str]]
"""The variables of each env_file, by its absolute path."""

_IMAGE_SOURCES = ("tar", "dir", "oci", "docker", "pull")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LONGEST_HOST_NAME = 64  # __NEW_UTS_LEN
_EXAMPLE_RUN_ID = "0" * 26  # as long as every run id


def check_rules(tables: dict[str, Any], context: Context, report: Report) -> EnvFiles:
    """Report what breaks a rule; return what the env_files hold."""
    _check_built(tables, BUILT_TREE, (), report)
    for path, image in _tables(tables, "images"):
        _check_image(path, image, report)
    defaults = _table(tables, "defaults")
    jobs = list(_tables(tables, "jobs"))
    env_files: EnvFiles = {}
    for path, job in [(("defaults",), defaults), *jobs]:
        _check_command(path, job, defaults, report)
        _check_hostname(path, job, defaults, report)
        _check_default_memory(path, job, defaults, context, report)
        _check_mounts(path, job, report)
        _check_env_file((*path, "env_file"), job, context, env_files, report)
    return env_files


def _table(tables: dict[str, Any], key: str) -> dict[str, Any]:
    table = tables.get(key)
    return table if isinstance(table, dict) else {}


def _tables(tables: dict[str, Any], key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name, table in _table(tables, key).items():
        if isinstance(table, dict):
            yield (key, name), table


def _tree(built: dict[str, tuple[object, ...]]) -> dict[str, Any]:
    """The table of what is built, nested as the file is."""
    tree: dict[str, Any] = {}
    for path, values in built.items():
        *outer, last = path.split(".")
        here = tree
        for part in outer:
            here = here.setdefault(part, {})
        here[last] = values
    tree["defaults"] = tree["jobs"]["*"]
    return tree


BUILT_TREE = _tree(BUILT)


def _check_built(table: dict[str, Any], tree: dict[str, Any], path: Path, report: Report) -> None:
    for key, value in table.items():
        known = tree.get("*") if "*" in tree else tree.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            _check_built(value, known, (*path, key), report)
        elif isinstance(known, tuple) and value not in known and not report.touches((*path, key)):
            report.add((*path, key), _not_built(value, known))


def _not_built(value: object, built: tuple[object, ...]) -> str:
    what = "" if isinstance(value, (dict, list)) or not built else f"{quoted(value)} "
    instead = " or ".join(quoted(other) for other in built if not isinstance(other, (dict, list)) and other != "")
    return f"{what}is not built yet in this version; remove it" + (f" or use {instead}" if instead and what else "")


def _check_image(path: Path, image: dict[str, Any], report: Report) -> None:
    if path[-1] == "host":
        report.add(path, 'the image "host" is built in; choose another name')
    sources = [key for key in image if key in _IMAGE_SOURCES]
    if not sources:
        report.add_missing(path, "tar", "dir")
    for extra in sources[1:]:
        report.add((*path, extra), f"excludes `{sources[0]}`: an image has exactly one source")
    if sources[:1] == ["dir"] and "sha256" in image:
        report.add((*path, "sha256"), "is the digest of a tarball; a directory has none")


def _check_command(path: Path, job: dict[str, Any], defaults: dict[str, Any], report: Report) -> None:
    command = job.get("command")
    if isinstance(command, list) and command[:1] == [""]:
        report.add((*path, "command", 0), "must name a program, and is empty")
    if "command" in job and "shell" in job:
        report.add((*path, "shell"), "excludes `command`: a job has exactly one of the two")
    elif path != ("defaults",) and not {"command", "shell"} & (job.keys() | defaults.keys()):
        report.add_missing(path, "command", "shell")


def _check_hostname(path: Path, job: dict[str, Any], defaults: dict[str, Any], report: Report) -> None:
    """The longest name that the template can expand to must be one that sethostname takes."""
    if path == ("defaults",):
        return
    origin = (*path, "hostname") if "hostname" in job else ("defaults", "hostname")
    template = job.get("hostname", defaults.get("hostname"))
    count = job.get("count", defaults.get("count", 1))
    if not isinstance(template, str) or not isinstance(count, int) or report.touches(origin):
        return
    fields = {"job": str(path[-1]), "index": str(count - 1), "run_id": _EXAMPLE_RUN_ID, "attempt": "1"}
    name = expand(template, fields)
    if len(name) > _LONGEST_HOST_NAME:
        report.add(origin, f"{quoted(name)} is longer than {_LONGEST_HOST_NAME} characters, the longest host name")
    elif not all(_HOST_LABEL.fullmatch(label) for label in name.split(".")):
        report.add(origin, f"{quoted(name)} is not a host name: use letters, digits, - and _ between dots")


def _check_default_memory(
    path: Path, job: dict[str, Any], defaults: dict[str, Any], context: Context, report: Report
) -> None:
    """A job without a limit of its own gets the usual one, which must fit the supervisor's budget as well."""
    usual, budget = Limits().memory or 0, context.max_memory
    written = any("memory" in _table(table, "limits") for table in (job, defaults))
    if path != ("defaults",) and not written and budget is not None and usual > budget:
        report.add(
            ("supervisor", "max_memory"),
            f"{format_size(budget)} is less than the {format_size(usual)} that {path_text(path)} gets by default: "
            "set its limits.memory",
        )


def _check_mounts(path: Path, job: dict[str, Any], report: Report) -> None:
    mounts = job.get("mounts")
    seen: dict[str, int] = {}
    for index, mount in enumerate(mounts if isinstance(mounts, list) else ()):
        if not isinstance(mount, dict):
            continue
        here = (*path, "mounts", index)
        _check_mount_type(here, mount, report)
        target = mount.get("target")
        if isinstance(target, str):
            first = seen.setdefault(posixpath.normpath(target), index)
            if first != index:
                report.add((*here, "target"), f"{quoted(target)} is the target of mounts[{first}] already")


def _check_mount_type(path: Path, mount: dict[str, Any], report: Report) -> None:
    match mount.get("type"):
        case "bind":
            if "source" not in mount:
                report.add_missing(path, "source")
            if "size" in mount:
                report.add((*path, "size"), "belongs to a tmpfs; a bind mount is as large as its source")
        case "tmpfs":
            if "source" in mount:
                report.add((*path, "source"), "belongs to a bind mount; a tmpfs starts empty")


def _check_env_file(path: Path, job: dict[str, Any], context: Context, read: EnvFiles, report: Report) -> None:
    name = job.get("env_file")
    if not isinstance(name, str) or report.touches(path):
        return
    file = os.path.normpath(os.path.join(context.base_dir, name))
    if file in read:
        return
    read[file] = {}
    try:
        with open(file, encoding="utf-8-sig") as stream:
            lines = stream.read().split("\n")
    except OSError as error:
        report.add(path, f"cannot read {file}: {error.strerror}")
    except UnicodeDecodeError:
        report.add(path, f"{file} is not UTF-8 text")
    else:
        read[file] = _env_of(lines, file, report)


def _env_of(lines: list[str], file: str, report: Report) -> dict[str, str]:
    """The KEY=VALUE lines of an env_file; lines that are empty or start with # mean nothing."""
    env: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        try:
            env[_env_name(name, equals)] = check_template(_unquoted(value))
        except ValueError as error:
            report.add_elsewhere(Problem(file, number, name if equals else "", str(error)))
    return env


def _env_name(name: str, equals: str) -> str:
    if not equals:
        raise ValueError(f"{quoted(name)} is not KEY=VALUE")
    return check_env_name(name)


def _unquoted(value: str) -> str:
    if "\0" in value:
        raise ValueError("contains a NUL character, which nothing in a job can carry")
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'" else value
