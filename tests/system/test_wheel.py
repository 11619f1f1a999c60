"""The wheel as it is published: what it holds, and that it runs by itself in an empty virtual environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import diyc
from sources import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ as `make wheel` fills it: the wheel is built from the source archive alone."""
    directory = tmp_path_factory.mktemp("dist")
    tree = tmp_path_factory.mktemp("tree") / "diyc"
    made = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "*_cache", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*made))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(tree)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a virtual environment with the wheel and, from this one, the packages it depends on."""
    directory = tmp_path_factory.mktemp("empty")
    venv.create(directory, with_pip=True, symlinks=True)
    python = directory / "bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], check=True, timeout=120
    )
    # A path in a .pth file does not run the .pth files found there, so the source tree stays out.
    libraries = directory / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (libraries / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(command, cwd="/", env=clean, capture_output=True, text=True, timeout=60, check=False)


def test_one_wheel_serves_every_python_from_3_11(wheel: Path) -> None:
    assert wheel.name.startswith(f"diyc-{diyc.__version__}-cp311-abi3-linux_")


def test_wheel_holds_the_package_and_nothing_of_the_tree(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"diyc/_core.abi3.so", "diyc/_core.pyi", "diyc/py.typed", "diyc/jobs.schema.json"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"diyc", f"diyc-{diyc.__version__}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "diyc").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert [name for name in names if name.endswith((".c", ".h"))] == []


def test_wheel_carries_its_license(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    information = f"diyc-{diyc.__version__}.dist-info"
    assert archive.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"License-Expression: Apache-2.0" in archive.read(f"{information}/METADATA")


def test_shipped_schema_is_the_one_of_the_models(wheel: Path) -> None:
    from diyc.config import json_schema

    assert json.loads(zipfile.ZipFile(wheel).read("diyc/jobs.schema.json")) == json_schema()


def test_source_archive_holds_what_git_does(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "LICENSE",
        "Makefile",
        "csrc/child.c",
        "csrc/plan.h",
        "packaging/diyc-supervisor.service",
        "scripts/setup.sh",
        "tests/conftest.py",
        ".ci/run",
    ):
        assert name in held
    assert [name for name in held if name.endswith((".so", ".pyc")) or "_cache" in name] == []


def test_installed_wheel_runs_outside_the_source_tree(installed: Path) -> None:
    where = run(installed / "python", "-c", "import diyc._core; print(diyc._core.__file__)")
    assert where.stdout.strip() == f"{installed.parent}/lib/" + where.stdout.strip().partition("/lib/")[2], where.stderr
    version = run(installed / "diyc", "--version")
    assert diyc.__version__ in version.stdout, version.stderr
    assert run(installed / "python", "-m", "diyc", "--version").stdout == version.stdout
    assert run(installed / "diyc-supervisor", "--help").returncode == 0


@pytest.mark.privileged
def test_installed_wheel_runs_a_job(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text(
        f'[supervisor]\nstate_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\n'
        '[jobs.hello]\nimage = "host"\ncommand = ["echo", "hello"]\n'
    )
    done = run(installed / "diyc-supervisor", "--config", tmp_path / "jobs.toml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[0])
    assert (result["verdict"], result["stdout"]) == ("ok", "hello\n")


@pytest.mark.privileged
def test_installed_wheel_runs_one_job_at_once(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "diyc", "run", "--state-dir", tmp_path / "state", "host", "sh", "-c", "echo hello; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello\n", "")
