"""Labels of security modules (AppArmor, SELinux) that a job asks for: can this host give them? Asked before it runs.

The kernel itself is asked, in the way in which the job's child will: a thread writes the label to its own attr file
(proc_pid_attr(5)). It never calls execve, so nothing changes, and what was written goes with the thread."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from diyc import host
from diyc.errors import HostError
from diyc.jobs import JobSpec


def attempt(file: str, text: str) -> int:
    """Write to the attr file of a thread that then ends: the errno, 0 for none."""
    numbers: list[int] = []

    def write() -> None:
        try:
            with open(f"/proc/thread-self/attr/{file}", "wb", buffering=0) as attr:
                attr.write(text.encode())
        except OSError as error:
            numbers.append(error.errno or errno.EIO)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    return numbers[0] if numbers else 0


def check_labels(
    spec: JobSpec,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    attempt: Callable[[str, str], int] = attempt,
) -> list[str]:
    """Warnings about the labels of a job. HostError: the module is not active, or it does not take the label."""
    if spec.apparmor:
        _check_apparmor(spec.name, spec.apparmor, host.apparmor(sys), attempt)
    for key, label in (("selinux", spec.selinux), ("selinux_mount", spec.selinux_mount)):
        if label:
            _check_selinux(f"job {spec.name}: security.{key} = {label!r}", label, host.selinux(proc), attempt)
    if spec.selinux and _is_permissive(sys):
        return [f"job {spec.name}: security.selinux: SELinux is permissive here: it denies nothing (setenforce 1)"]
    return []


def _check_apparmor(job: str, profile: str, module: host.Feature, attempt: Callable[[str, str], int]) -> None:
    asked = f"job {job}: security.apparmor = {profile!r}"
    if not module.present:
        raise HostError("apparmor", f"{asked}: AppArmor is {module.detail}: {module.remedy}")
    number = attempt("apparmor/exec", f"exec {profile}")
    if number == errno.ENOENT:
        advice = "load it with `apparmor_parser --replace FILE`; `aa-status` lists those that are"
        raise HostError("apparmor", f"{asked}: no such profile is loaded: {advice}")
    if number:
        why = f"our own profile does not let us change to it ({os.strerror(number)})"
        raise HostError("apparmor", f"{asked}: {why}: give it a rule change_profile -> {profile}")


def _check_selinux(asked: str, label: str, module: host.Feature, attempt: Callable[[str, str], int]) -> None:
    if not module.present:
        raise HostError("selinux", f"{asked}: SELinux is {module.detail}: {module.remedy}")
    number = attempt("exec", label)
    if number == errno.EINVAL:
        advice = "its user, role, type and level must be known and go together (seinfo lists them)"
        raise HostError("selinux", f"{asked}: the loaded policy has no such label: {advice}")
    if number:
        why = f"our own label may not set one for execve ({os.strerror(number)})"
        raise HostError("selinux", f"{asked}: {why}: allow it process {{ setexec }}")


def _is_permissive(sys: Path) -> bool:
    enforce = sys / "fs/selinux/enforce"
    return enforce.exists() and enforce.read_text().strip() == "0"
