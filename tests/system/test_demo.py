"""`make demo` as a person sees it: the examples, prepared and run, with every verdict and result as the file says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from needs import require
from sources import ROOT
from system.commands import SOAK, Place, finish

pytestmark = pytest.mark.privileged


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of the examples with the image they need, made by their own script."""
    require("program.busybox")
    copy = tmp_path / "examples"
    shutil.copytree(ROOT / "examples", copy, ignore=shutil.ignore_patterns("rootfs", "work", "__pycache__"))
    subprocess.run([copy / "prepare"], check=True, timeout=60)
    return copy


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"] if SOAK else ["uvloop"])
def test_every_run_of_the_demo_ends_as_the_file_says(loop: str, examples: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, {"DIYC_EVENT_LOOP": loop})
    keep = ["--set", f'supervisor.runtime_dir="{tmp_path}/run"', "--state-dir", f"{tmp_path}/state"]
    done = finish(place.spawn(sys.executable, str(examples / "check-demo.py"), *keep))
    assert done.status == 0, done.stderr
    assert "WRONG" not in done.stderr
    assert "Every one of 530 runs ended as it must" in done.stdout
    for word in ("oom", "timeout", "output_limit", "signal", "exit", "530 runs"):
        assert word in done.stderr


def test_preparing_again_changes_nothing(examples: Path) -> None:
    archive = examples / "rootfs/busybox.tar.gz"
    before = (archive.read_bytes(), archive.stat().st_mtime_ns)
    subprocess.run([examples / "prepare"], check=True, timeout=60)
    assert (archive.read_bytes(), archive.stat().st_mtime_ns) == before
    os.utime(archive, (0, 0))  # older than the script: made anew, and the same to the byte
    subprocess.run([examples / "prepare"], check=True, timeout=60)
    assert archive.read_bytes() == before[0]
