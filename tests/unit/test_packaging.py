"""What is shipped and how it is built: metadata, Makefile, Dockerfile.build and the source tree agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest

import diyc
from sources import MODULES, ROOT, imported

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("target", PROJECT["project"]["scripts"].values())
def test_each_script_names_a_function_that_exists(target: str) -> None:
    module, function = target.split(":")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in defined


def test_version_stands_in_one_place_and_in_the_changelog() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert f"## [{diyc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_directory_of_the_package_is_a_package() -> None:
    directories = {path.parent for path in (ROOT / "diyc").rglob("*.py")}
    assert [str(path) for path in directories if not (path / "__init__.py").exists()] == []


def test_every_import_of_others_is_a_declared_dependency() -> None:
    declared = {re.split(r"[<>=;\[ ]", entry)[0].replace("-", "_") for entry in PROJECT["project"]["dependencies"]}
    names = {name for path in MODULES for name in imported(path)}
    packages = {name if name == "backports.zstd" else name.split(".")[0] for name in names}
    # pydantic documents its errors under pydantic_core, which it pins; compression.zstd is in Python from 3.14.
    assert packages - set(sys.stdlib_module_names) - {"diyc", "pydantic_core", "compression"} <= declared


def test_importing_diyc_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import diyc; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["diyc"]


def test_names_of_the_package_load_on_first_use() -> None:
    for name in diyc.__all__:
        assert getattr(diyc, name)
    assert set(diyc.__all__) == set(dir(diyc))
    with pytest.raises(AttributeError, match="no attribute 'Jobs'"):
        getattr(diyc, "Jobs")  # noqa: B009


def test_everything_dockerfile_copies_exists() -> None:
    text = (ROOT / "Dockerfile.build").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"setup.py", "csrc", "diyc", "README.md"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_dockerfile_copies_everything_the_source_archive_names() -> None:
    copied = (ROOT / "Dockerfile.build").read_text()
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = {word for line in re.findall(r"^include (.+)$", manifest, re.MULTILINE) for word in line.split()}
    named |= set(re.findall(r"^(?:graft|recursive-include) (\S+)", manifest, re.MULTILINE))
    assert [name for name in named if not re.search(rf"^COPY .*(?<!\S){re.escape(name)} ", copied, re.MULTILINE)] == []


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "unit", "lint", "format", "bench", "soak", "wheel", "sanitize", "clean"):
        assert f"  make {target} " in shown


def test_make_has_a_recipe_for_every_target_it_lists() -> None:
    listed = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    run = subprocess.run(["make", "--dry-run", "--always-make", *listed], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_setup_script_and_ci_are_valid_shell() -> None:
    for shell, script in (("sh", "scripts/setup.sh"), ("bash", ".ci/run")):
        subprocess.run([shell, "-n", script], cwd=ROOT, check=True)


def test_ci_runs_make_test_and_nothing_else() -> None:
    commands = [
        line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith(("#", "echo"))
    ]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test"]
