"""Checked models to the frozen values that the rest of diyc works with: defaults filled in, [defaults] merged.

What a model leaves out takes its default here: from the machine for the supervisor, from JobSpec for a job."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diyc.config_models import Document, ImageTable, LimitsTable, MountTable, NetworkTable, SecurityTable, Table
from diyc.config_rules import EnvFiles
from diyc.jobs import ImageSpec, JobSpec, Limits, Mount
from diyc.rootless import owner

_ID_RANGE = (524288, 1878523904)  # what systemd documents for containers (UIDS-GIDS.md)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the defaults and the checks of a configuration depend on besides the file."""

    cpus: tuple[int, ...]
    total_memory: int
    euid: int
    home: str
    state_home: str | None = None
    runtime_home: str | None = None

    @classmethod
    def here(cls) -> Machine:
        """This host, as this process may use it."""
        return cls(
            cpus=tuple(sorted(os.sched_getaffinity(0))),
            total_memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            euid=owner(),
            home=os.path.expanduser("~"),
            state_home=os.environ.get("XDG_STATE_HOME"),
            runtime_home=os.environ.get("XDG_RUNTIME_DIR"),
        )

    @property
    def memory_budget(self) -> int:
        """The default of max_memory: 80 % of RAM, in bytes."""
        return self.total_memory * 80 // 100

    def directories(self) -> tuple[str, str]:
        """The default state and runtime directory: the system's for root, the XDG ones for others."""
        if self.euid == 0:
            return "/var/lib/diyc", "/run/diyc"
        # The XDG specification has relative paths ignored.
        state_home = self.state_home if self.state_home and os.path.isabs(self.state_home) else None
        state = os.path.join(state_home or os.path.join(self.home, ".local/state"), "diyc")
        if self.runtime_home and os.path.isabs(self.runtime_home):
            return state, os.path.join(self.runtime_home, "diyc")
        return state, os.path.join(state, "run")


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """The supervisor's own settings. Sizes are bytes, times seconds, paths absolute; id_range is (first, count)."""

    max_parallel: int
    max_memory: int
    state_dir: str
    runtime_dir: str
    cgroup_parent: str = "diyc"
    metrics_listen: str | None = None
    shutdown_grace: float = 10.0
    enforce: str = "strict"
    reuse: bool = True
    rootfs_driver: str = "auto"
    id_range: tuple[int, int] = _ID_RANGE


def build_supervisor(document: Document, machine: Machine) -> SupervisorConfig:
    """The supervisor's settings: what the file says over what this machine suggests."""
    state_dir, runtime_dir = machine.directories()
    settings = {
        "max_parallel": 4 * len(machine.cpus),
        "max_memory": machine.memory_budget,
        "state_dir": state_dir,
        "runtime_dir": runtime_dir,
    }
    return SupervisorConfig(**(settings | (_fields(document.supervisor) if document.supervisor else {})))


def build_jobs(document: Document, env_files: EnvFiles, keep: Callable[[str], bool]) -> tuple[JobSpec, ...]:
    """The jobs of the file that `keep` wants, in its order, with [defaults] merged under each."""
    images = {name: _image(name, image) for name, image in (document.images or {}).items()}
    images["host"] = ImageSpec()
    shared = _fields(document.defaults) if document.defaults else {}
    return tuple(
        _spec(name, _merged(shared, _fields(job)), images, env_files)
        for name, job in (document.jobs or {}).items()
        if keep(name)
    )


def _fields(table: Table) -> dict[str, Any]:
    """What a table of the file sets, and nothing else; tables that are merged key by key as dicts too."""
    values = ((key, getattr(table, key)) for key in table.model_fields_set)
    return {
        key: _fields(value) if isinstance(value, (LimitsTable, NetworkTable, SecurityTable)) else value
        for key, value in values
    }


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A job's own keys over those of [defaults]: tables key by key, everything else whole."""
    merged = {**shared, **own}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(shared.get(key), dict):
            merged[key] = {**shared[key], **value}
    # A job that says how it is run does not inherit the other way to say it.
    for key, other in (("command", "shell"), ("shell", "command")):
        if key in own and other not in own:
            merged.pop(other, None)
    return merged


# Keys whose checked value goes into the JobSpec as it is.
_DIRECT = (
    "shell",
    "workdir",
    "user",
    "hostname",
    "stdin",
    "writable",
    "timeout",
    "stop_signal",
    "stop_timeout",
    "count",
    "max_parallel",
    "priority",
)


def _spec(name: str, job: dict[str, Any], images: dict[str, ImageSpec], env_files: EnvFiles) -> JobSpec:
    env = {**env_files.get(job.get("env_file", ""), {}), **job.get("env", {})}
    return JobSpec(
        name=name,
        command=tuple(job.get("command", ())),
        image=images[job.get("image", "host")],
        env=tuple(env.items()),
        labels=tuple(job.get("labels", {}).items()),
        limits=_limits(job.get("limits", {})),
        network=job.get("network", {}).get("mode", "none"),
        mounts=tuple(_mount(mount) for mount in job.get("mounts", ())),
        cap_add=_capabilities(job.get("security", {})),
        **_labels(job.get("security", {})),
        **{key: job[key] for key in _DIRECT if key in job},
    )


def _image(name: str, image: ImageTable) -> ImageSpec:
    kind = "tar" if image.tar is not None else "dir"
    return ImageSpec(name=name, kind=kind, source=getattr(image, kind), sha256=image.sha256)


def _limits(limits: dict[str, Any]) -> Limits:
    fields: dict[str, Any] = {
        key: tuple(value.items()) if isinstance(value, dict) else value for key, value in limits.items()
    }
    fields.pop("cpu_time", None)  # accepted as "none" only
    return Limits(**fields)


def _mount(mount: MountTable) -> Mount:
    return Mount(**_fields(mount))


def _capabilities(security: dict[str, Any]) -> tuple[str, ...]:
    """What the job keeps: cap_add, less what cap_drop names. "ALL" there, the default, means to start from none."""
    dropped = frozenset(security.get("cap_drop", ()))
    return tuple(sorted(frozenset(security.get("cap_add", ())) - dropped))


def _labels(security: dict[str, Any]) -> dict[str, Any]:
    """The labels of security modules; an empty one is none, and lifts that of [defaults]."""
    return {key: security.get(key) or None for key in ("apparmor", "selinux", "selinux_mount")}
