"""Run ids: ULIDs, 26 characters that sort by the time they were made (github.com/ulid/spec)."""

from __future__ import annotations

import os
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32: no I, L, O, U


def new_id(now: float | None = None, entropy: bytes | None = None) -> str:
    """A new ULID: 48 bits of milliseconds since the epoch, then 80 random bits (10 bytes)."""
    milliseconds = int((time.time() if now is None else now) * 1000)
    value = milliseconds << 80 | int.from_bytes(os.urandom(10) if entropy is None else entropy, "big")
    return "".join([_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5)])
