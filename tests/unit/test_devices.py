"""Which device nodes are allowed: the BPF program run by a small interpreter here, and the lines for v1."""

from __future__ import annotations

import struct

import pytest

from diyc.cgroups.devices import ALLOWED, v1_rules, v2_program

BLOCK, CHARACTER = 1, 2
MKNOD, READ, WRITE = 1, 2, 4
ALL = MKNOD | READ | WRITE


def allowed(kind: int, access: int, major: int, minor: int) -> bool:
    """What the program says, by the rules of BPF for the instructions it has."""
    context = struct.pack("=3I", access << 16 | kind, major, minor)
    program = list(struct.iter_unpack("=BBhi", v2_program()))
    registers = [0] * 11
    at = 0
    while True:
        code, both, offset, value = program[at]
        target, source = both & 15, both >> 4
        at += 1
        match code:
            case 0x61:
                assert source == 1, "register 1 is the context"
                registers[target] = struct.unpack_from("=I", context, offset)[0]
            case 0x57:
                registers[target] &= value
            case 0xB7:
                registers[target] = value
            case 0x15:
                at += offset if registers[target] == value else 0
            case 0x55:
                at += offset if registers[target] != value else 0
            case 0x95:
                assert registers[0] in (0, 1)
                return registers[0] == 1
            case _:
                raise AssertionError(f"no such instruction here: {code:#x}")


@pytest.mark.parametrize(("major", "minor"), [(major, minor) for major, minor in ALLOWED if minor is not None])
def test_each_device_of_a_jobs_own_dev_is_allowed_as_a_character_device(major: int, minor: int) -> None:
    for access in (READ, WRITE, READ | WRITE, MKNOD, ALL):
        assert allowed(CHARACTER, access, major, minor)
        assert not allowed(BLOCK, access, major, minor)


def test_every_pseudo_terminal_is_allowed() -> None:
    assert all(allowed(CHARACTER, ALL, 136, minor) for minor in (0, 1, 255, 2**20 - 1))
    assert not any(allowed(CHARACTER, ALL, major, 0) for major in (135, 137, 143))


def test_every_other_device_is_refused() -> None:
    """All of the low numbers, where the memory, the kernel's log, disks and consoles are."""
    wanted = {(major, minor) for major, minor in ALLOWED if minor is not None}
    found = {
        (major, minor)
        for major in range(260)
        for minor in range(260)
        if major != 136 and allowed(CHARACTER, READ, major, minor)
    }
    assert found == wanted
    assert not any(allowed(BLOCK, READ, major, minor) for major in range(260) for minor in range(20))


def test_v1_refuses_everything_first_and_then_allows_the_same() -> None:
    first, *rest = v1_rules()
    assert first == ("devices.deny", "a")
    assert rest == [("devices.allow", f"c {a}:{'*' if b is None else b} rwm") for a, b in ALLOWED]
    assert ("devices.allow", "c 136:* rwm") in rest
