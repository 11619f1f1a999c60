"""Run ids are ULIDs: 26 characters that sort by the time they were made and never come twice."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from diyc.ids import new_id

MOMENTS = st.floats(min_value=0, max_value=(2**48 - 1) / 1000)
ENTROPY = st.binary(min_size=10, max_size=10)


def test_an_id_is_26_characters_of_crockfords_base_32() -> None:
    assert re.fullmatch("[0-7][0-9A-HJKMNP-TV-Z]{25}", new_id())


def test_ids_of_the_same_millisecond_differ() -> None:
    assert len({new_id(now=1_700_000_000.0) for _ in range(1000)}) == 1000


def test_the_id_of_known_time_and_entropy_is_known() -> None:
    # The specification's own example time, 1469918176385, is written 01ARYZ6S41.
    assert new_id(1469918176.385, bytes(10)) == "01ARYZ6S41" + "0" * 16
    assert new_id(0.0, b"\xff" * 10) == "0" * 10 + "Z" * 16


@given(MOMENTS, MOMENTS, ENTROPY, ENTROPY)
def test_ids_sort_by_the_time_they_were_made(first: float, second: float, some: bytes, other: bytes) -> None:
    if int(first * 1000) < int(second * 1000):
        assert new_id(first, some) < new_id(second, other)
