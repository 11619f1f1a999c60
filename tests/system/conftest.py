"""The probe, compiled once, in a tiny image; `jobs` runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from diyc import process
from needs import require
from system.helpers import Jobs, make_image


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe as a static program."""
    require("program.gcc")
    made = tmp_path_factory.mktemp("probe") / "probe"
    source = Path(__file__).with_name("probe.c")
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-o", made, source], check=True, capture_output=True)
    return made


@pytest.fixture(scope="session")
def probe_image(probe: Path) -> Path:
    """An image directory with the probe in it. Tests look at it and leave it as it is."""
    image = make_image(probe.parent / "image", probe)
    if not _takes_idmapped_mounts(image):
        pytest.skip(f"the file system of {image} takes no idmapped mounts: set TMPDIR to another")
    return image


@pytest.fixture
def jobs(tmp_path: Path, probe_image: Path) -> Jobs:
    return Jobs(tmp_path, probe_image)


def _takes_idmapped_mounts(path: Path) -> bool:
    userns = process.user_namespace("0 524288 65536\n")
    try:
        return process.can_idmap(str(path), userns)
    finally:
        os.close(userns)
