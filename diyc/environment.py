"""What a run is called and what it finds around it: its host name, its environment, the paths its command may have."""

from __future__ import annotations

from diyc.jobs import Run

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def default_hostname(run: Run) -> str:
    """The run's host name; by default the job's name with what a host name cannot hold replaced."""
    if run.spec.hostname is not None:
        return run.expand(run.spec.hostname)
    return "".join(c if c.isalnum() else "-" for c in run.spec.name).strip("-")[:63] or "job"


def environment(run: Run, hostname: str, home: str) -> dict[str, str]:
    """PATH, HOME, HOSTNAME and DIYC_*, then the job's own."""
    return {
        "PATH": DEFAULT_PATH,
        "HOME": home,
        "HOSTNAME": hostname,
        "DIYC_JOB": run.spec.name,
        "DIYC_INDEX": str(run.index),
        "DIYC_RUN_ID": run.run_id,
        "DIYC_ATTEMPT": str(run.attempt),
        **{key: run.expand(value) for key, value in run.spec.env},
    }


def candidates(command: str, path: str) -> list[str]:
    """The paths that execve tries in turn for a command, as execvp(3) does."""
    if "/" in command:
        return [command]
    return [f"{directory or '.'}/{command}" for directory in path.split(":")]
