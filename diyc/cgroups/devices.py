"""Which device nodes a job may make or open: those of its own /dev, and no other one.

On v2 the rule is a BPF program (BPF_PROG_TYPE_CGROUP_DEVICE, Linux 4.15), written here instruction by instruction; on
v1 it is lines for devices.allow. Either is set once, on the directory above all runs of a supervisor.

Source: Documentation/admin-guide/cgroup-v2.rst ("Device controller"), cgroup-v1/devices.rst, bpf/standardization/."""

from __future__ import annotations

import struct
from collections.abc import Iterator

# (major, minor) of character devices (Documentation/admin-guide/devices.txt); None for every minor.
ALLOWED: tuple[tuple[int, int | None], ...] = (
    (1, 3),  # null
    (1, 5),  # zero
    (1, 7),  # full
    (1, 8),  # random
    (1, 9),  # urandom
    (5, 0),  # tty: the process's own terminal
    (5, 2),  # ptmx
    (136, None),  # pts/N
)

# struct bpf_cgroup_dev_ctx of linux/bpf.h, which register 1 points at: three numbers of 32 bits.
_ACCESS, _MAJOR, _MINOR = 0, 4, 8
_KIND_MASK, _CHARACTER = 0xFFFF, 2  # the lower half of `access` is the kind of device: BPF_DEVCG_DEV_CHAR

# Codes of instructions (RFC 9669).
_LOAD_WORD, _AND, _MOVE, _IF_EQUAL, _IF_DIFFERENT, _EXIT = 0x61, 0x57, 0xB7, 0x15, 0x55, 0x95
_RESULT, _CONTEXT, _KIND, _MAJOR_OF, _MINOR_OF = range(5)  # registers


def v1_rules() -> Iterator[tuple[str, str]]:
    """(file, value) pairs to write in order: nothing is allowed, then these are."""
    yield "devices.deny", "a"
    for major, minor in ALLOWED:
        yield "devices.allow", f"c {major}:{'*' if minor is None else minor} rwm"


def v2_program() -> bytes:
    """The same as instructions. The program's result is 1 to allow and 0 to refuse, which the caller sees as EPERM."""
    rules = [_rule(major, minor) for major, minor in ALLOWED]
    size = sum(len(rule) for rule in rules)
    refuse, allow = size, size + 2  # where the two endings are, counted from the first rule
    head = [
        _instruction(_LOAD_WORD, _KIND, _CONTEXT, offset=_ACCESS),  # kind = access...
        _instruction(_AND, _KIND, value=_KIND_MASK),  # ... & 0xffff
        _instruction(_LOAD_WORD, _MAJOR_OF, _CONTEXT, offset=_MAJOR),
        _instruction(_LOAD_WORD, _MINOR_OF, _CONTEXT, offset=_MINOR),
        _instruction(_IF_DIFFERENT, _KIND, value=_CHARACTER, offset=refuse),  # block devices: none
    ]
    body, at = [], 0
    for rule in rules:
        *tests, last = rule
        body += [_instruction(_IF_DIFFERENT, register, value=value, offset=1) for register, value in tests]
        at += len(rule)
        body.append(_instruction(_IF_EQUAL, last[0], value=last[1], offset=allow - at))
    endings = [_instruction(_MOVE, _RESULT, value=0), _instruction(_EXIT)]
    endings += [_instruction(_MOVE, _RESULT, value=1), _instruction(_EXIT)]
    return b"".join(head + body + endings)


def _rule(major: int, minor: int | None) -> list[tuple[int, int]]:
    """What must hold for a device to be this one: (register, value) pairs. All but the last skip it otherwise."""
    return [(_MAJOR_OF, major)] if minor is None else [(_MAJOR_OF, major), (_MINOR_OF, minor)]


def _instruction(code: int, target: int = 0, source: int = 0, *, offset: int = 0, value: int = 0) -> bytes:
    """struct bpf_insn: a jump's offset counts from the next instruction."""
    return struct.pack("=BBhi", code, source << 4 | target, offset, value)
