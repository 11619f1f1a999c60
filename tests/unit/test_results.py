"""Verdicts from facts, as a table with its precedence; and the record that every result becomes."""

from __future__ import annotations

import itertools
import json
import re
import signal
from dataclasses import replace

import pytest

from diyc.results import Ending, Result, Verdict, classify, signal_name, timestamp

MIB = 1024**2
CASES: dict[str, tuple[Ending, Verdict, str | None]] = {
    "exit 0": (Ending(exit_code=0), Verdict.OK, None),
    "exit 1": (Ending(exit_code=1), Verdict.EXIT, "exit status 1"),
    "exit 137 is no signal": (Ending(exit_code=137), Verdict.EXIT, "exit status 137"),
    "exit 124 is no timeout": (Ending(exit_code=124, timeout=1.0), Verdict.EXIT, "exit status 124"),
    "exit 255": (Ending(exit_code=255), Verdict.EXIT, "exit status 255"),
    "killed from within": (Ending(signal=9), Verdict.SIGNAL, "killed by SIGKILL"),
    "segmentation fault": (Ending(signal=11), Verdict.SIGNAL, "killed by SIGSEGV"),
    "a signal without a name": (Ending(signal=40), Verdict.SIGNAL, "killed by signal 40"),
    "SIGKILL at the limit, but no kill counted": (
        Ending(signal=9, oom_kills=0, memory_limit_hits=3, memory_limit=MIB),
        Verdict.SIGNAL,
        "killed by SIGKILL",
    ),
    "SIGKILL where the layout counts no kills": (
        Ending(signal=9, oom_kills=None, memory_limit_hits=3),
        Verdict.SIGNAL,
        "killed by SIGKILL",
    ),
    "killed for its memory": (
        Ending(signal=9, oom_kills=1, memory_limit_hits=4, memory_limit=64 * MIB),
        Verdict.OOM,
        "memory limit 64 MiB reached (1 kill)",
    ),
    "a grandchild killed, the command went on": (
        Ending(exit_code=0, oom_kills=2, memory_limit_hits=9, memory_limit=64 * MIB),
        Verdict.OOM,
        "memory limit 64 MiB reached (2 kills)",
    ),
    "killed although its own limit was never reached": (
        Ending(signal=9, oom_kills=1, memory_limit_hits=0, memory_limit=64 * MIB),
        Verdict.OOM,
        "killed by the kernel for lack of memory outside the run's own limit (1 kill)",
    ),
    "killed for memory without a limit": (
        Ending(signal=9, oom_kills=1, memory_limit=None),
        Verdict.OOM,
        "killed by the kernel for lack of memory outside the run's own limit (1 kill)",
    ),
    "hits that the layout cannot count": (
        Ending(signal=9, oom_kills=1, memory_limit_hits=None, memory_limit=MIB),
        Verdict.OOM,
        "memory limit 1 MiB reached (1 kill)",
    ),
    "timeout by KILL": (
        Ending(signal=9, stopped_for="timeout", timeout=2.5),
        Verdict.TIMEOUT,
        "timeout of 2.5 s reached",
    ),
    "timeout, and it ended well after its stop_signal": (
        Ending(exit_code=0, stopped_for="timeout", timeout=10),
        Verdict.TIMEOUT,
        "timeout of 10 s reached",
    ),
    "flood": (
        Ending(signal=9, stopped_for="output_limit", output_limit=MIB, output_stream="stderr"),
        Verdict.OUTPUT_LIMIT,
        "stderr passed its limit of 1 MiB",
    ),
    "flood of one that ended by itself": (
        Ending(exit_code=0, stopped_for="output_limit", output_limit=65536, output_stream="stdout"),
        Verdict.OUTPUT_LIMIT,
        "stdout passed its limit of 64 KiB",
    ),
    "cancelled": (Ending(signal=15, stopped_for="cancelled"), Verdict.CANCELLED, "cancelled"),
    "cancelled, and it ended well": (Ending(exit_code=0, stopped_for="cancelled"), Verdict.CANCELLED, "cancelled"),
    "set-up failed": (
        Ending(setup_error="step 4 (mount) on '/proc' failed: Permission denied (EACCES)"),
        Verdict.INFRA,
        "step 4 (mount) on '/proc' failed: Permission denied (EACCES)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict_and_reason_follow_from_the_evidence(case: str) -> None:
    ending, verdict, reason = CASES[case]
    found = classify(ending)
    assert found[0] is verdict
    assert (found[1] is None) if reason is None else (reason in str(found[1]))


# Facts that can be true at once, the strongest first: each beats all that come after it.
PRECEDENCE = (
    (Verdict.CANCELLED, {"stopped_for": "cancelled"}),
    (Verdict.TIMEOUT, {"stopped_for": "timeout", "timeout": 1.0}),
    (Verdict.OUTPUT_LIMIT, {"stopped_for": "output_limit", "output_limit": 1, "output_stream": "stdout"}),
    (Verdict.OOM, {"oom_kills": 1, "memory_limit_hits": 1, "memory_limit": MIB}),
    (Verdict.INFRA, {"setup_error": "cannot"}),
    (Verdict.SIGNAL, {"signal": 9}),
)


@pytest.mark.parametrize("stronger, weaker", list(itertools.combinations(range(len(PRECEDENCE)), 2)))
def test_what_the_supervisor_did_comes_first_then_the_kernels_kill_then_setup_then_the_exit(
    stronger: int, weaker: int
) -> None:
    verdict, facts = PRECEDENCE[stronger]
    ending = replace(Ending(), **{**PRECEDENCE[weaker][1], **facts})  # type: ignore[arg-type]
    assert classify(ending)[0] is verdict


def test_a_timeout_is_never_reported_as_a_signal() -> None:
    for code, number in ((None, 9), (None, 15), (0, None), (143, None)):
        assert classify(Ending(code, number, "timeout", timeout=1))[0] is Verdict.TIMEOUT


def test_verdicts_are_the_closed_list() -> None:
    assert [verdict.value for verdict in Verdict] == (
        "ok exit signal timeout cpu_time oom output_limit disk_limit seccomp cancelled skipped infra".split()
    )


def test_signal_names_are_the_kernels() -> None:
    assert signal_name(signal.SIGTERM) == "SIGTERM"
    assert signal_name(64) == "SIGRTMAX"
    assert signal_name(63) == "signal 63"


# -- the record ------------------------------------------------------------------------------------------------------

# The record as the interface has it, in its order, and what has been added to it since.
FIELDS = """
type schema run_id job index matrix attempt verdict exit_code signal reason queued_s setup_s wall_s cpu_user_s
cpu_system_s memory_peak_bytes pids_peak oom_kills pids_limit_hits throttled_s io_read_bytes io_write_bytes
net_rx_bytes net_tx_bytes started_at finished_at steps_s stdout stderr stdout_path stdout_truncated error
""".split()
ADDED = {"pressure_s", "stderr_path", "stderr_truncated", "labels"}


def result(**fields: object) -> Result:
    return Result("01J", "test", 0, 1, Verdict.OK, **fields)  # type: ignore[arg-type]


def test_the_record_has_the_fields_of_the_interface_and_the_few_that_were_added() -> None:
    record = result().record()
    assert [name for name in FIELDS if name not in record] == []
    assert set(record) - set(FIELDS) == ADDED
    assert (record["type"], record["schema"]) == ("result", 1)


def test_figures_that_nobody_supplied_are_null_and_not_0() -> None:
    record = json.loads(json.dumps(result().record()))
    figures = [name for name in record if re.search("bytes|_kills|_hits|pids_|cpu_|throttled|pressure", name)]
    assert len(figures) >= 12
    assert [name for name in figures if record[name] is not None] == []
    for name in ("exit_code", "signal", "reason", "setup_s", "wall_s", "started_at", "finished_at", "error", "matrix"):
        assert record[name] is None


def test_figures_that_are_0_are_0() -> None:
    record = result(oom_kills=0, io_read_bytes=0, throttled_s=0.0, exit_code=0).record()
    assert (record["oom_kills"], record["io_read_bytes"], record["throttled_s"], record["exit_code"]) == (0, 0, 0.0, 0)


def test_the_record_is_json_whatever_the_job_wrote() -> None:
    wrote = bytes(range(256)) + "grün".encode() + b"\xc3"
    record = json.loads(json.dumps(result(stdout=wrote, stderr=b"\0\x1b[31m").record()))
    assert record["stdout"].endswith("grün\ufffd")
    assert record["stdout"].startswith("\0\x01")
    assert record["stderr"] == "\0\x1b[31m"
    assert "\n" not in json.dumps(record)


def test_times_are_rfc_3339_in_utc_with_microseconds() -> None:
    assert timestamp(0.0) == "1970-01-01T00:00:00.000000Z"
    assert timestamp(1_795_341_600.123456) == "2026-11-22T10:00:00.123456Z"
    assert timestamp(None) is None
    assert result(started_at=1.5).record()["started_at"] == "1970-01-01T00:00:01.500000Z"


def test_a_verdict_is_a_plain_word_in_json() -> None:
    assert '"verdict": "ok"' in json.dumps(result().record())
