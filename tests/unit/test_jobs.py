"""Placeholders expand, braces stay, and `{{` is the way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diyc.jobs import PLACEHOLDERS, JobSpec, Run, expand, placeholders

FIELDS = {"index": "3", "job": "web", "run_id": "01ABC", "attempt": "2"}


@pytest.mark.parametrize(
    "text, expanded",
    [
        ("{index}", "3"),
        ("{job}-{index}.{attempt}", "web-3.2"),
        ("/out/{run_id}.json", "/out/01ABC.json"),
        ("{{index}}", "{index}"),
        ("a {{ b", "a { b"),
        ("{unknown}", "{unknown}"),
        ("{matrix.seed}", "{matrix.seed}"),
        ("awk '{print $1}'", "awk '{print $1}'"),
        ('{"a": 1}', '{"a": 1}'),
        ("{}", "{}"),
        ("{index", "{index"),
        ("index}", "index}"),
        ("", ""),
    ],
)
def test_known_names_expand_and_other_braces_stay(text: str, expanded: str) -> None:
    assert expand(text, FIELDS) == expanded


def test_a_value_is_not_expanded_again() -> None:
    assert expand("{job}", {"job": "{index}", "index": "3"}) == "{index}"


@given(st.text(alphabet=st.characters(exclude_characters="{")))
def test_text_without_an_opening_brace_stays_as_it_is(text: str) -> None:
    assert expand(text, FIELDS) == text


@given(st.sampled_from(sorted(PLACEHOLDERS)), st.text(alphabet="ab }"), st.text(alphabet="ab }"))
def test_a_doubled_brace_keeps_a_name_from_expanding(name: str, before: str, after: str) -> None:
    assert expand(f"{before}{{{{{name}}}}}{after}", FIELDS) == f"{before}{{{name}}}{after}"


def test_placeholders_names_what_single_braces_hold() -> None:
    assert list(placeholders("{index} {{job}} {matrix.seed} {print $1} {x}")) == ["index", "matrix.seed", "x"]


def test_run_expands_its_own_values() -> None:
    run = Run(run_id="01ABC", spec=JobSpec(name="web", command=("true",)), index=3, attempt=2)
    assert run.expand("{job} {index} {run_id} {attempt}") == "web 3 01ABC 2"
    assert run.fields().keys() == PLACEHOLDERS


def test_shell_runs_under_sh() -> None:
    assert JobSpec(name="a", shell="echo hi | wc").argv == ("/bin/sh", "-c", "echo hi | wc")
    assert JobSpec(name="a", command=("echo", "hi")).argv == ("echo", "hi")
