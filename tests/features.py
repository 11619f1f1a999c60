"""What this host can do, found by the tests: {feature: state and reason} as JSON, the source of docs/hosts.md.

A test says what it shows by `@pytest.mark.feature("memory limit")`; several may show one, and a module may with
`pytestmark`. One that shows a refusal calls `refused(request, reason)`, or says so in the mark: `refused="..."`.
With DIYC_FEATURES=FILE in the environment the file is written at the end of the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STATES = ("failed", "passed", "refused", "n/a")
REFUSED = "refused"


def refused(request: pytest.FixtureRequest, reason: str) -> None:
    """The running test shows that the host refuses its features, by name and for this reason."""
    request.node.user_properties.append((REFUSED, reason))


def plugin() -> Features | None:
    """The plugin, if the environment asks for it."""
    path = os.environ.get("DIYC_FEATURES")
    return Features(Path(path)) if path else None


@dataclass(slots=True)
class Features:
    """Collects a state for each feature from the tests' reports. `path` gets the JSON."""

    path: Path
    named: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # a test's features and static refusals
    states: dict[str, dict[str, str]] = field(default_factory=dict)  # feature: state: reason

    def pytest_collection_modifyitems(self, items: Iterable[pytest.Item]) -> None:
        for item in items:
            marks = item.iter_markers("feature")
            if found := [(mark.args[0], mark.kwargs.get(REFUSED, "")) for mark in marks]:
                self.named[item.nodeid] = found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = next((str(value) for name, value in report.user_properties if name == REFUSED), "")
        for feature, always in self.named.get(report.nodeid, ()):
            if (state := _state(report, said or always)) is not None:
                self.states.setdefault(feature, {}).setdefault(state[0], state[1])

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({name: cell(states) for name, states in sorted(self.states.items())}, indent=1))


def _state(report: pytest.TestReport, reason: str) -> tuple[str, str] | None:
    """State and reason by one phase of a test; None where the phase says nothing."""
    if report.failed:
        return "failed", report.nodeid
    if report.skipped:
        return "n/a", _skip_reason(report)
    if report.when == "call":
        return (REFUSED, reason) if reason else ("passed", "")
    return None


def _skip_reason(report: pytest.TestReport) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def cell(states: dict[str, str]) -> str:
    """What the table says of one feature: the first state in the order of STATES, and a refusal of a part with it.
    A test that does not apply here says nothing where another did."""
    first = next(state for state in STATES if state in states)
    if first == "passed" and REFUSED in states:
        return f"passed; in part refused: {states[REFUSED]}"
    return f"{first}: {states[first]}" if states[first] else first
