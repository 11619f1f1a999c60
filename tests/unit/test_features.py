"""The features that the tests show of a host: from marks, outcomes and reasons to the cells of docs/hosts.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from features import cell

TESTS = Path(__file__).resolve().parents[1]
EXAMPLE = """
import pytest
from features import refused

@pytest.mark.feature("works")
def test_works(): pass

@pytest.mark.feature("works")
def test_does_not_apply(): pytest.skip("not here")

@pytest.mark.feature("absent")
def test_absent(): pytest.skip("needs a thing")

@pytest.mark.feature("refusal")
def test_refusal(request): refused(request, "no such thing")

@pytest.mark.feature("always refused", refused="never built")
def test_always(): pass

@pytest.mark.feature("broken")
@pytest.mark.feature("works too")
def test_two(): pass

@pytest.mark.feature("broken")
def test_broken(): assert False

def test_of_no_feature(): pass
"""


def test_each_feature_gets_its_state_and_reason(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(EXAMPLE)
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", str(TESTS.parent / "pyproject.toml")]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")],
        env=os.environ | {"PYTHONPATH": str(TESTS), "DIYC_FEATURES": str(tmp_path / "features.json")},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert json.loads((tmp_path / "features.json").read_text()) == {
        "absent": "n/a: needs a thing",
        "always refused": "refused: never built",
        "broken": "failed: test_it.py::test_broken",
        "refusal": "refused: no such thing",
        "works": "passed",
        "works too": "passed",
    }


@pytest.mark.parametrize(
    "states, text",
    [
        ({"n/a": "not here", "passed": ""}, "passed"),
        ({"n/a": "not here", "refused": "why"}, "refused: why"),
        ({"passed": "", "refused": "why"}, "passed; in part refused: why"),
        ({"passed": "", "failed": "test_x"}, "failed: test_x"),
    ],
)
def test_what_says_more_wins(states: dict[str, str], text: str) -> None:
    assert cell(states) == text
