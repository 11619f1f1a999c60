"""Capabilities by name have the kernel's numbers; only those that cannot reach beyond a container can be given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diyc.capabilities import NUMBERS, mask
from diyc.config_checks import ALLOWED_CAPABILITIES

HEADER = Path("/usr/include/linux/capability.h")
# With one of these over the host's own objects a job could leave its container.
DANGEROUS = {
    "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "SYS_RAWIO", "SYS_BOOT", "SYS_TIME", "SYS_RESOURCE", "SYS_NICE",
    "NET_ADMIN", "DAC_READ_SEARCH", "MAC_ADMIN", "MAC_OVERRIDE", "SYSLOG", "BPF", "PERFMON", "CHECKPOINT_RESTORE",
    "AUDIT_CONTROL", "LINUX_IMMUTABLE", "IPC_OWNER", "WAKE_ALARM", "BLOCK_SUSPEND", "LEASE",
}  # fmt: skip


@pytest.mark.skipif(not HEADER.exists(), reason="needs linux/capability.h (linux-libc-dev)")
def test_numbers_are_those_of_the_kernels_header() -> None:
    header = dict(re.findall(r"^#define\s+CAP_([A-Z_]+)\s+(\d+)\s*$", HEADER.read_text(), re.MULTILINE))
    assert {name: int(header[name]) for name in NUMBERS} == NUMBERS


def test_what_the_configuration_allows_is_what_has_a_number_here() -> None:
    assert set(NUMBERS) == set(ALLOWED_CAPABILITIES)


def test_nothing_that_reaches_beyond_a_container_can_be_given() -> None:
    assert not DANGEROUS & set(NUMBERS)


def test_mask_has_one_bit_for_each_name_whatever_is_repeated() -> None:
    assert mask(()) == 0
    assert mask(("CHOWN",)) == 1
    assert mask(("NET_RAW", "CHOWN", "NET_RAW")) == 1 << 13 | 1


def test_an_unknown_capability_has_no_mask() -> None:
    with pytest.raises(KeyError):
        mask(("SYS_ADMIN",))
