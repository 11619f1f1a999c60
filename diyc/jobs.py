"""A job as it was asked for (JobSpec) and each run of it (Run): plain values without behaviour.

The configuration makes JobSpecs; expansion makes Runs; nothing after this reads jobs.toml again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

# An escaped name, an escaped brace, or a name: other braces (awk '{print $1}', JSON) are left alone.
_FIELD = re.compile(r"\{\{([\w.]+)\}\}|\{\{|\{([\w.]+)\}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use. Sizes are bytes, times seconds; None means no limit.

    Device maps are tuples of (host device path, value), so that a spec stays hashable."""

    memory: int | None = 256 * 1024**2
    swap: int | None = 0
    cpus: float | None = None
    cpu_weight: int | None = None
    cpuset: str | None = None
    pids: int | None = 64
    disk: int | None = 64 * 1024**2
    output: int = 1024**2
    inline: int = 1024**2
    nofile: int = 1024
    core: int = 0
    io_read_bps: tuple[tuple[str, int], ...] = ()
    io_write_bps: tuple[tuple[str, int], ...] = ()
    io_read_iops: tuple[tuple[str, int], ...] = ()
    io_write_iops: tuple[tuple[str, int], ...] = ()
    io_weight: int | None = None
    hugetlb: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Mount:
    """One entry of `mounts`: a bind of a host path, or a tmpfs of `size` bytes."""

    type: str
    target: str
    source: str | None = None
    read_only: bool = False
    size: int | None = None


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Where a root filesystem comes from: kind is "host", "dir" or "tar"; source is an absolute path."""

    name: str = "host"
    kind: str = "host"
    source: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job. Exactly one of `command` and `shell` is set; host paths are absolute."""

    name: str
    command: tuple[str, ...] = ()
    shell: str | None = None
    image: ImageSpec = ImageSpec()
    env: tuple[tuple[str, str], ...] = ()
    workdir: str = "/"
    user: str = "root"
    hostname: str | None = None
    stdin: str | None = None
    writable: bool = True
    timeout: float | None = None
    stop_signal: int = 15
    stop_timeout: float = 2.0
    count: int = 1
    max_parallel: int | None = None
    priority: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    limits: Limits = field(default_factory=Limits)
    network: str = "none"
    mounts: tuple[Mount, ...] = ()
    cap_add: tuple[str, ...] = ()
    apparmor: str | None = None
    selinux: str | None = None
    selinux_mount: str | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        """The command as execve will see it; `shell` becomes /bin/sh -c."""
        return self.command if self.shell is None else ("/bin/sh", "-c", self.shell)


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of a job: `index` tells the runs of an array apart, `attempt` counts from 1."""

    run_id: str
    spec: JobSpec
    index: int = 0
    attempt: int = 1

    def expand(self, text: str) -> str:
        """Replace {index}, {job}, {run_id} and {attempt}; `{{` is a literal brace."""
        return expand(text, self.fields())

    def fields(self) -> dict[str, str]:
        """The values that placeholders of this run stand for."""
        return {
            "index": str(self.index),
            "job": self.spec.name,
            "run_id": self.run_id,
            "attempt": str(self.attempt),
        }


PLACEHOLDERS = frozenset({"index", "job", "run_id", "attempt"})


def placeholders(text: str) -> Iterator[str]:
    """The names between single braces in `text`, in order, known or not."""
    return (match.group(2) for match in _FIELD.finditer(text) if match.group(2))


def expand(text: str, fields: dict[str, str]) -> str:
    """Replace each known `{name}` in `text`; `{{` is a brace; anything else stays as it is written."""

    def one(match: re.Match[str]) -> str:
        escaped, name = match.group(1), match.group(2)
        if name is not None:
            return fields.get(name, match.group(0))
        return "{" + escaped + "}" if escaped else "{"

    return _FIELD.sub(one, text) if "{" in text else text


def escape(text: str) -> str:
    """The text that expand() turns into `text`, whatever braces it has."""
    return re.sub(r"\{([\w.]+\})?", lambda match: "{{" + (match.group(1) + "}" if match.group(1) else ""), text)


__all__ = [
    "PLACEHOLDERS",
    "ImageSpec",
    "JobSpec",
    "Limits",
    "Mount",
    "Run",
    "escape",
    "expand",
    "placeholders",
    "replace",
]
