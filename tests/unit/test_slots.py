"""Slots: no two running jobs share host ids, namespaces are kept or closed as asked, and none is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diyc.slots import RANGE, RangeLocks, Slots

FIRST = 524288


class Namespaces:
    """Stands in for the kernel: makes descriptors, or refuses to."""

    def __init__(self) -> None:
        self.maps: list[str] = []
        self.made: list[int] = []
        self.refuse = False

    def __call__(self, id_map: str) -> int:
        if self.refuse:
            raise OSError(28, "user_namespaces")
        self.maps.append(id_map)
        self.made.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        return self.made[-1]

    def open(self) -> int:
        return sum(is_open(fd) for fd in set(self.made))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_ranges_of_slots_in_use_do_not_overlap_and_lie_in_the_id_range() -> None:
    slots = Slots((FIRST, 5 * RANGE), Namespaces())
    taken = [slots.take() for _ in range(5)]
    assert [slot.first for slot in taken] == [FIRST + i * RANGE for i in range(5)]
    assert taken[-1].first + RANGE == FIRST + 5 * RANGE
    for slot in taken:
        slots.give(slot)
    slots.close()


def test_id_map_is_one_line_as_the_kernel_wants_it() -> None:
    make = Namespaces()
    slots = Slots((FIRST, RANGE), make)
    slot = slots.take()
    assert slot.id_map == f"0 {FIRST} 65536\n" == make.maps[0]
    slots.give(slot)
    slots.close()


def test_a_range_that_is_not_a_multiple_loses_the_rest() -> None:
    assert Slots((FIRST, 2 * RANGE + RANGE - 1), Namespaces()).size == 2


def test_a_slot_too_many_is_refused_and_says_what_to_do() -> None:
    slots = Slots((FIRST, 2 * RANGE), Namespaces())
    first, second = slots.take(), slots.take()
    with pytest.raises(ValueError, match="holds 2 slots, all taken: raise its count or lower max_parallel"):
        slots.take()
    slots.give(first)
    assert slots.take().index == first.index
    slots.give(first)
    slots.give(second)
    slots.close()


def test_the_lowest_free_slot_is_taken() -> None:
    slots = Slots((FIRST, 4 * RANGE), Namespaces())
    taken = [slots.take() for _ in range(4)]
    for index in (2, 0, 3):
        slots.give(taken[index])
    assert [slots.take().index for _ in range(3)] == [0, 2, 3]


@pytest.mark.parametrize("reuse, made", [(True, 1), (False, 3)])
def test_reuse_keeps_a_namespace_and_without_it_every_run_has_its_own(reuse: bool, made: int) -> None:
    make = Namespaces()
    slots = Slots((FIRST, RANGE), make, reuse=reuse)
    for _ in range(3):
        slots.give(slots.take())
    assert len(make.maps) == made
    slots.close()
    assert make.open() == 0


def test_a_slot_survives_a_kernel_that_refuses_a_namespace() -> None:
    make = Namespaces()
    slots = Slots((FIRST, RANGE), make)
    make.refuse = True
    for _ in range(3):
        with pytest.raises(OSError, match="user_namespaces"):
            slots.take()
    make.refuse = False
    slot = slots.take()
    assert slot.index == 0
    slots.give(slot)
    slots.close()
    assert make.open() == 0


@given(st.lists(st.booleans(), max_size=60), st.booleans())
def test_no_order_of_taking_and_giving_shares_a_slot_or_leaks_a_namespace(takes: list[bool], reuse: bool) -> None:
    make = Namespaces()
    slots = Slots((FIRST, 6 * RANGE), make, reuse=reuse)
    held = []
    for take in takes:
        if take and len(held) < 6:
            held.append(slots.take())
        elif held:
            slots.give(held.pop(len(held) // 2))
        assert len({slot.first for slot in held}) == len(held)
        assert all(is_open(slot.userns) for slot in held)
    for slot in held:
        slots.give(slot)
    slots.close()
    assert make.open() == 0


def test_a_range_that_another_supervisor_uses_is_passed_over(tmp_path: Path) -> None:
    ids = (RANGE * 8, RANGE * 3)
    one, two = (RangeLocks(str(tmp_path / "ids")) for _ in range(2))
    first, second = (Slots(ids, lambda _: os.open("/dev/null", os.O_RDONLY), lock=locks.take) for locks in (one, two))
    taken = [first.take(), second.take(), first.take()]
    assert [slot.index for slot in taken] == [0, 1, 2]
    with pytest.raises(ValueError, match="all taken"):
        second.take()
    one.close()
    for slot in taken:
        os.close(slot.userns)
    third = RangeLocks(str(tmp_path / "ids"))
    assert [third.take(ids[0] + RANGE * index) for index in range(3)] == [True, False, True]
    two.close()
    third.close()
