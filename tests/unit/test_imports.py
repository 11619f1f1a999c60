"""Imports run downwards only: one table says who may know whom, and the tests hold the sources to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sources import MODULES, ROOT, imported

VALUES = {"errors", "units", "jobs", "results"}
TOP = {"api", "server", "cli"}
# What a module or package of diyc may import from diyc, beside itself. A new one is given its place here.
KNOWS: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "jobs": {"errors", "units"},
    "results": {"errors", "units", "jobs"},
    "rootless": {"errors"},
    "config": VALUES | {"rootless"},
    "host": {"errors", "units", "rootless"},
    "notify": {"errors"},
    "plan": {"errors", "units", "jobs", "host"},
    "process": {"errors", "units", "plan", "_core"},
    **dict.fromkeys(["cgroups", "images", "rootfs", "network", "metrics", "record"], VALUES),
    "security": VALUES | {"host"},
}
ONLY_IN = {"diyc._core": {"process"}, "prometheus_client": {"metrics"}, "pyroute2": {"network"}}
FILES = [path for path in MODULES if path.name not in ("__init__.py", "__main__.py")]


def place(name: str) -> str:
    """The part of diyc that a dotted name below it belongs to: config_lines is of config, as cgroups.v1 of cgroups."""
    first = name.split(".")[0]
    return first if first.startswith("_") else first.split("_")[0]


def home(path: Path) -> str:
    return place(path.relative_to(ROOT / "diyc").parts[0].removesuffix(".py"))


PARTS = {home(path) for path in FILES} | {"_core"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards_only(path: Path) -> None:
    here = home(path)
    used = {place(name.removeprefix("diyc.")) for name in imported(path) if name.startswith("diyc.")}
    allowed = KNOWS.get(here, PARTS if here == "cli" else PARTS - TOP)
    wrong = (used & PARTS) - {here} - allowed
    assert not wrong, f"{path.name} may not import {sorted(wrong)}"


@pytest.mark.parametrize("name, places", ONLY_IN.items())
def test_one_place_alone_imports(name: str, places: set[str]) -> None:
    found = {home(path) for path in FILES if any(f"{used}.".startswith(f"{name}.") for used in imported(path))}
    assert found <= places


def test_only_the_cgroups_package_knows_where_cgroups_are_mounted() -> None:
    found = {home(path) for path in FILES if "/sys/fs/cgroup" in path.read_text()}
    assert found <= {"cgroups"}


def test_only_two_c_files_know_python() -> None:
    found = {path.name for path in (ROOT / "csrc").glob("*.c") if "Python.h" in included(path)}
    assert found == {"plan.c", "module.c"}


def included(path: Path) -> set[str]:
    """The headers that a C file includes, and those that ours among them include."""
    headers = set(re.findall(r'^#\s*include\s*[<"](.+)[>"]', path.read_text(), re.MULTILINE))
    ours = [path.parent / header for header in headers if (path.parent / header).exists()]
    return headers.union(*(included(header) for header in ours))
