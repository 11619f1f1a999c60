"""What this kernel and this user can do, read once and never guessed: the facts behind `diyc doctor` and exit status 3.

Everything is read below given roots, so that a test can show other hosts. What can only be known by trying (a
user namespace, an idmapped mount of this very file system) is tried by the supervisor's own start."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diyc import rootless
from diyc.errors import HostError

NAMESPACES = ("mnt", "pid", "uts", "ipc", "net", "user", "cgroup")
MINIMUM_KERNEL = (5, 19)  # overlayfs takes idmapped layers; older ones have all else since 5.12
_CAP_SYS_ADMIN = 21

# System calls that may be missing: the Linux they came with, whether no job can do without, and what for, or what then.
_MOUNTS = "needed to mount an image without showing the host's paths"
_KERNEL_MOUNTS = "needed to make a new /proc and /sys"
_PIDFDS = "needed to wait for processes and to signal them by descriptors"
SYSTEM_CALLS: dict[str, tuple[str, bool, str]] = {
    "clone3": ("5.3", False, "children are made with clone(2) and join their v2 cgroup themselves"),
    "openat2": ("5.6", True, "needed to open paths in an image without following links"),
    "close_range": ("5.9", True, "needed to keep the supervisor's descriptors from jobs"),
    "open_tree": ("5.2", True, _MOUNTS),
    "move_mount": ("5.2", True, _MOUNTS),
    "mount_setattr": ("5.12", True, "needed to show an image's files as root's inside (idmapped mounts)"),
    "fsopen": ("5.2", True, _KERNEL_MOUNTS),
    "fsconfig": ("5.2", True, _KERNEL_MOUNTS),
    "fsmount": ("5.2", True, _KERNEL_MOUNTS),
    "pidfd_open": ("5.3", True, _PIDFDS),
    "pidfd_send_signal": ("5.1", True, _PIDFDS),
    "keyctl": ("2.6", False, "a job can reach no keyring, so it needs none of its own"),
    "bpf": ("3.18", False, "no device policy on cgroup v2"),
}
_FILTERED = (
    "a seccomp filter of a container or service around diyc is the likely reason: let it pass the call "
    "(docker: --security-opt seccomp=unconfined, or a newer engine; systemd: SystemCallFilter=)"
)


@dataclass(frozen=True, slots=True)
class Feature:
    """One fact: present or not, needed to run any job at all or not, and how to get it where it is missing."""

    name: str
    present: bool
    detail: str
    needed: bool = False
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """All features in the order in which they are shown."""

    features: tuple[Feature, ...]

    def missing(self) -> tuple[Feature, ...]:
        """The features without which no job can run here."""
        return tuple(feature for feature in self.features if feature.needed and not feature.present)

    def require(self) -> None:
        """Raise HostError for the first needed feature that is missing."""
        for feature in self.missing():
            remedy = f"; {feature.remedy}" if feature.remedy else ""
            raise HostError(feature.name, f"{feature.detail}{remedy}")


def read_host(
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    *,
    euid: int | None = None,
    calls: Mapping[str, int] | None = None,
) -> HostFacts:
    """Read the facts of this host. `calls` is what process.system_calls() gives: -errno of each, by name."""
    answers = calls or {}
    uid = os.geteuid() if euid is None else euid
    return HostFacts(
        (
            _root(proc, uid),
            _kernel(proc),
            *_system_calls(proc, answers),
            *(_namespace(proc, name) for name in NAMESPACES),
            _filesystem(proc, "overlay", needed=True),
            _file("pressure", proc / "pressure/cpu", "PSI figures", "boot with psi=1"),
            _file(
                "seccomp", proc / "sys/kernel/seccomp/actions_avail", "filters can be loaded", "CONFIG_SECCOMP_FILTER"
            ),
            _landlock(sys, answers),
            apparmor(sys),
            selinux(proc),
            _swap(proc),
        )
    )


def _root(proc: Path, uid: int) -> Feature:
    remedy = "start it with sudo, or let diyc-supervisor or diyc enter a user namespace (`diyc unshare`)"
    if uid != 0:
        return Feature("root", False, f"running as uid {uid}", needed=True, remedy=remedy)
    if not _has_sys_admin(proc):
        detail = "root without CAP_SYS_ADMIN (an unprivileged container?)"
        return Feature("root", False, detail, needed=True, remedy="run on the host, or in a privileged container")
    if (mapped := rootless.mapped_ids(proc)) is not None:
        ids = f"{mapped.count} id{'s' if mapped.count > 1 else ''}"
        return Feature("root", True, f"of a user namespace with {ids}: jobs share them", needed=True)
    return Feature("root", True, "uid 0 with CAP_SYS_ADMIN", needed=True)


def _has_sys_admin(proc: Path) -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(proc / "self/status"), re.MULTILINE)
    return bool(match and int(match.group(1), 16) >> _CAP_SYS_ADMIN & 1)


def is_initial_root(proc: Path = Path("/proc")) -> bool:
    """Whether this is root of the host, not of a user namespace: only that one can limit devices by cgroup."""
    return os.geteuid() == 0 and _read(proc / "self/uid_map").split() == ["0", "0", "4294967295"]


def _system_calls(proc: Path, answers: Mapping[str, int]) -> Iterator[Feature]:
    """EPERM is a filter's answer only where the kernel itself has no reason for it: it wants CAP_SYS_ADMIN for some."""
    refusals = {errno.ENOSYS: "ENOSYS"}
    if _has_sys_admin(proc):
        refusals[errno.EPERM] = "EPERM"
    for name, (since, needed, purpose) in SYSTEM_CALLS.items():
        if name not in answers:
            continue
        refusal = refusals.get(-answers[name])
        if refusal is None:
            yield Feature(name, True, f"system call, since Linux {since}", needed)
        elif (name, refusal) == ("clone3", "EPERM"):  # glibc falls back to clone only at ENOSYS
            yield Feature(name, False, "refused with EPERM, so that the C library can start no thread", True, _FILTERED)
        else:
            detail = f"this system call (since Linux {since}) is refused with {refusal}: {purpose}"
            yield Feature(name, False, detail, needed, _FILTERED)


def require_threads(calls: Mapping[str, int], proc: Path = Path("/proc")) -> None:
    """Raise HostError where a filter keeps the C library from starting threads: to be asked before the first."""
    HostFacts(tuple(_system_calls(proc, {"clone3": calls["clone3"]}))).require()


def _kernel(proc: Path) -> Feature:
    release = _read(proc / "sys/kernel/osrelease").strip()
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    wanted = ".".join(map(str, MINIMUM_KERNEL))
    detail = f"Linux {release}" + ("" if version >= MINIMUM_KERNEL else f", older than {wanted}")
    return Feature(
        "kernel", version >= MINIMUM_KERNEL, detail, needed=True, remedy=f"Linux {wanted} or later is needed"
    )


def _namespace(proc: Path, name: str) -> Feature:
    title = f"{name} namespace"
    if not (proc / "self/ns" / name).exists():
        return Feature(
            title, False, "not in this kernel", needed=True, remedy="a kernel with CONFIG_NAMESPACES and all its kinds"
        )
    limit_file = proc / f"sys/user/max_{name}_namespaces"
    limit = _read(limit_file).strip()
    if limit == "0":
        return Feature(
            title, False, f"{limit_file} is 0", needed=True, remedy=f"sysctl user.max_{name}_namespaces=10000"
        )
    return Feature(title, True, f"at most {limit}" if limit else "present", needed=True)


def _filesystem(proc: Path, name: str, *, needed: bool) -> Feature:
    known = {line.split()[-1] for line in _read(proc / "filesystems").splitlines() if line.strip()}
    return Feature(
        name, name in known, "in /proc/filesystems" if name in known else "not loaded", needed, f"modprobe {name}"
    )


def _file(name: str, path: Path, detail: str, remedy: str) -> Feature:
    return Feature(name, path.exists(), detail if path.exists() else f"no {path}", remedy=remedy)


def _landlock(sys: Path, answers: Mapping[str, int]) -> Feature:
    """The kernel tells by a system call; the list of modules is there only where securityfs is mounted."""
    version = answers.get("landlock_create_ruleset", 0)
    present = version > 0 or "landlock" in _active_modules(sys)
    return Feature("landlock", present, "active" if present else "not active", remedy="boot with lsm=...,landlock")


def apparmor(sys: Path = Path("/sys")) -> Feature:
    """Whether AppArmor is on."""
    present = _read(sys / "module/apparmor/parameters/enabled").strip() == "Y" or "apparmor" in _active_modules(sys)
    return Feature("apparmor", present, "active" if present else "not active", remedy="boot with apparmor=1")


def selinux(proc: Path = Path("/proc")) -> Feature:
    """Whether SELinux is on, with a policy: only then the kernel has selinuxfs, and our own label has colons."""
    if "selinuxfs" not in _read(proc / "filesystems").split():
        return Feature("selinux", False, "not active", remedy="boot with security=selinux selinux=1")
    label = _read(proc / "self/attr/current").rstrip("\0\n")
    loaded = ":" in label
    detail = f"active, we are {label}" if loaded else "active, but no policy is loaded"
    return Feature("selinux", loaded, detail, remedy="load_policy")


def _active_modules(sys: Path) -> list[str]:
    return _read(sys / "kernel/security/lsm").strip().split(",")


def _swap(proc: Path) -> Feature:
    devices = _read(proc / "swaps").splitlines()[1:]
    return Feature("swap", bool(devices), f"{len(devices)} device(s)" if devices else "none", remedy="not needed")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # a file that is not there is the fact that was asked for


def load_overlay(proc: Path = Path("/proc")) -> None:
    """Ask for the overlay module where it is not loaded yet; read_host() tells whether that helped."""
    if "overlay" not in _read(proc / "filesystems") and shutil.which("modprobe"):
        subprocess.run(["modprobe", "--quiet", "overlay"], check=False, stdin=subprocess.DEVNULL)


def tmpfs_keeps_user_attributes() -> bool:
    """Whether a tmpfs of this kernel has user.* attributes (Linux 6.6): an overlay in a user namespace needs them."""
    memory = os.memfd_create("diyc-probe", os.MFD_CLOEXEC)  # a file on the kernel's own tmpfs
    try:
        os.setxattr(memory, "user.diyc", b"probe")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    finally:
        os.close(memory)
    return True
