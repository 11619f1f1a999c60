"""Python steps to C memory: whatever comes in, it is a Plan or a clear Python error, and the child is never trusted
with a value that it would index by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diyc import _core

KINDS = {name: number for number, name in enumerate(_core.STEP_NAMES)}
EXEC = (KINDS["exec"], -1, -1, 0, None, None, None, None)


def row(kind: str, fd: int = -1, out: int = -1, flags: int = 0, **texts: object) -> tuple[object, ...]:
    return (KINDS[kind], fd, out, flags, *(texts.get(name) for name in ("source", "target", "type", "data")))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "ends in one exec step"),
        ([row("umask")], "ends in one exec step"),
        ([EXEC, EXEC], "ends in one exec step"),
        ([(999, *EXEC[1:])], "no such kind"),
        ([row("cgroup_join", fd=2), EXEC], "register 2 of 2"),
        ([row("cgroup_join", fd=-2), EXEC], "register -2 of 2"),
        ([row("open_tree", out=7, source="/x"), EXEC], "register 7 of 2"),
        ([row("cgroup_join"), EXEC], "lacks fd"),
        ([row("open_tree", out=0), EXEC], "lacks source"),
        ([row("open_tree", source="/x"), EXEC], "lacks out"),
        ([row("chdir"), EXEC], "lacks target"),
        ([row("sethostname"), EXEC], "lacks data"),
        ([row("fsmount", out=0, data=b""), EXEC], "lacks type"),
        ([row("fsmount", out=0, type="tmpfs", data=b"odd\0"), EXEC], "pairs"),
        ([row("fsmount", out=0, type="tmpfs", data=b"a\0b"), EXEC], "pairs"),
        ([row("mark", flags=_core.MARK_COUNT), EXEC], "number of a mark"),
        ([row("rlimit", data=b"short"), EXEC], "rlimit64"),
        ([row("setgroups", data=b"abc"), EXEC], "array"),
        ([row("chdir", target="/a\0b"), EXEC], "NUL"),
        ([row("chdir", target=b"/a\0b"), EXEC], "NUL"),
    ],
)
def test_a_plan_that_the_child_could_not_walk_is_refused(steps: list[tuple[object, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Plan(steps, 0, 2)


@pytest.mark.parametrize("count", [1, 2, 2**32 - 1])
def test_the_spawner_cannot_be_given_every_step(count: int) -> None:
    with pytest.raises(ValueError, match="leave none for the child"):
        _core.Plan([EXEC], 0, 0, count)


@pytest.mark.parametrize(
    "steps",
    [
        None,
        7,
        [None],
        [()],
        [(1, 2, 3)],
        [("mark", *EXEC[1:])],
        [row("chdir", target=7), EXEC],
        [row("mount", data="x")],
    ],
)
def test_a_step_of_the_wrong_type_is_refused(steps: object) -> None:
    with pytest.raises(TypeError):
        _core.Plan(steps, 0, 2)  # type: ignore[arg-type]


texts = st.none() | st.text(max_size=20) | st.binary(max_size=20)
numbers = st.integers(min_value=-(2**70), max_value=2**70) | st.integers(-3, 40)
rows = st.tuples(numbers, numbers, numbers, numbers, texts, texts, texts, texts)


@given(st.lists(rows | st.tuples(texts, numbers), max_size=6), numbers, numbers)
def test_any_steps_make_a_plan_or_a_python_error(steps: list[tuple[object, ...]], flags: int, registers: int) -> None:
    try:
        _core.Plan([*steps, EXEC], flags, registers)
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError):
        return


def test_step_names_are_those_that_are_documented() -> None:
    from diyc.plan import STEP_DOCS

    assert set(STEP_DOCS) == set(_core.STEP_NAMES)
    assert len(set(_core.STEP_NAMES)) == len(_core.STEP_NAMES)
