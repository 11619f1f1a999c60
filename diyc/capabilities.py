"""Capabilities by name: the numbers of linux/capability.h, and which ones a job may be given.

The list is the one that Docker grants by default; all others reach beyond the container. In diyc a job has none
unless `cap_add` names it, and what it has counts only inside its own user namespace (capabilities(7))."""

from __future__ import annotations

NUMBERS = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_BIND_SERVICE": 10,
    "NET_RAW": 13,
    "SYS_CHROOT": 18,
    "MKNOD": 27,
    "AUDIT_WRITE": 29,
    "SETFCAP": 31,
}


def mask(names: tuple[str, ...]) -> int:
    """The bit mask of these capabilities (names without CAP_). Raises KeyError for one that is not grantable."""
    return sum(1 << NUMBERS[name] for name in set(names))
