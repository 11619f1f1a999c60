"""How a run ended: the closed list of verdicts, the result record, and classify(), which decides.

Pure: facts in, verdict and reason out. A verdict rests on evidence (the cgroup's counters, what the
supervisor itself did, the wait status), never on a guess from an exit code such as 137."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from diyc.units import format_duration, format_size


class Verdict(StrEnum):
    """The ways a run can end. `infra` means that the sandbox failed, not the job."""

    OK = "ok"
    EXIT = "exit"
    SIGNAL = "signal"
    TIMEOUT = "timeout"
    CPU_TIME = "cpu_time"
    OOM = "oom"
    OUTPUT_LIMIT = "output_limit"
    DISK_LIMIT = "disk_limit"
    SECCOMP = "seccomp"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"
    INFRA = "infra"


@dataclass(frozen=True, slots=True)
class CgroupFigures:
    """A run's counters as its cgroups give them at one moment; None where the layout cannot supply one.

    Sizes are bytes, times seconds. `memory_limit_hits` counts how often the limit stopped an allocation;
    `pressure_s` maps cpu, memory, io to the total time that some task of the run was stalled."""

    cpu_user_s: float | None = None
    cpu_system_s: float | None = None
    cpu_usage_s: float | None = None
    throttled_s: float | None = None
    throttled_periods: int | None = None
    memory_current_bytes: int | None = None
    memory_working_set_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_limit_hits: int | None = None
    oom_kills: int | None = None
    pids_current: int | None = None
    pids_peak: int | None = None
    pids_limit_hits: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pressure_s: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """The facts classify() decides on.

    `stopped_for` is why the supervisor itself ended the run ("timeout", "output_limit", "cancelled") or None;
    `wait_status` is (exit code, signal), one of them None; both None where the run never reached its command."""

    exit_code: int | None = None
    signal: int | None = None
    stopped_for: str | None = None
    setup_error: str | None = None
    oom_kills: int | None = None
    memory_limit_hits: int | None = None
    memory_limit: int | None = None
    timeout: float | None = None
    output_limit: int | None = None
    output_stream: str | None = None


def classify(end: Ending) -> tuple[Verdict, str | None]:
    """Decide the verdict of an ended run and say why in a few words (None for ok).

    What the supervisor did comes first (it ended the run, whatever the job then exited with); then the memory
    controller's own count of kills, also when a grandchild was killed and the command went on; then a failed
    set-up; then the exit itself."""
    if end.stopped_for == "cancelled":
        return Verdict.CANCELLED, "cancelled"
    if end.stopped_for == "timeout":
        return Verdict.TIMEOUT, f"timeout of {format_duration(end.timeout or 0.0)} reached"
    if end.stopped_for == "output_limit":
        return Verdict.OUTPUT_LIMIT, f"{end.output_stream} passed its limit of {format_size(end.output_limit or 0)}"
    if end.oom_kills:
        return Verdict.OOM, _oom_reason(end)
    if end.setup_error is not None:
        return Verdict.INFRA, end.setup_error
    if end.signal is not None:
        return Verdict.SIGNAL, f"killed by {signal_name(end.signal)}"
    if end.exit_code == 0:
        return Verdict.OK, None
    return Verdict.EXIT, f"exit status {end.exit_code}"


def _oom_reason(end: Ending) -> str:
    kills = f"{end.oom_kills} kill{'' if end.oom_kills == 1 else 's'}"
    if end.memory_limit is not None and end.memory_limit_hits != 0:
        return f"memory limit {format_size(end.memory_limit)} reached ({kills})"
    return f"killed by the kernel for lack of memory outside the run's own limit ({kills})"


def signal_name(number: int) -> str:
    """SIGKILL for 9; `signal 64` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(slots=True)
class Result:
    """One run's record (schema 1). A field that the kernel cannot supply is None, never 0."""

    run_id: str
    job: str
    index: int
    attempt: int
    verdict: Verdict
    reason: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    queued_s: float = 0.0
    setup_s: float | None = None
    wall_s: float | None = None
    cpu_user_s: float | None = None
    cpu_system_s: float | None = None
    memory_peak_bytes: int | None = None
    pids_peak: int | None = None
    oom_kills: int | None = None
    pids_limit_hits: int | None = None
    throttled_s: float | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    net_rx_bytes: int | None = None
    net_tx_bytes: int | None = None
    pressure_s: dict[str, float] | None = None
    started_at: float | None = None
    finished_at: float | None = None
    steps_s: dict[str, float] = field(default_factory=dict)
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_path: str | None = None
    stderr_path: str | None = None
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    matrix: dict[str, Any] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """the JSON object; output bytes that are not UTF-8 become U+FFFD."""
        fields = asdict(self)
        fields["started_at"] = timestamp(self.started_at)
        fields["finished_at"] = timestamp(self.finished_at)
        fields["stdout"] = self.stdout.decode("utf-8", "replace")
        fields["stderr"] = self.stderr.decode("utf-8", "replace")
        return {"type": "result", "schema": 1, **fields}


def timestamp(seconds: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339 UTC with microseconds."""
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
