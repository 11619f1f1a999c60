"""What this kernel and this user can do, read once and never guessed: the facts behind `diyc doctor` and exit status 3.

Everything is read below given roots, so that a test can show other hosts. What can only be known by trying (a
user namespace, an idmapped mount of this very file system) is tried by the supervisor's own start."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from diyc import rootless
from diyc.errors import HostError

NAMESPACES = ("mnt", "pid", "uts", "ipc", "net", "user", "cgroup")
MINIMUM_KERNEL = (5, 19)  # overlayfs takes idmapped layers; older ones have all else since 5.12
_CAP_SYS_ADMIN = 21


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


def read_host(proc: Path = Path("/proc"), sys: Path = Path("/sys"), *, euid: int | None = None) -> HostFacts:
    """Read the facts of this host."""
    uid = os.geteuid() if euid is None else euid
    return HostFacts(
        (
            _root(proc, uid),
            _kernel(proc),
            *(_namespace(proc, name) for name in NAMESPACES),
            _filesystem(proc, "overlay", needed=True),
            _file("pressure", proc / "pressure/cpu", "PSI figures", "boot with psi=1"),
            _file(
                "seccomp", proc / "sys/kernel/seccomp/actions_avail", "filters can be loaded", "CONFIG_SECCOMP_FILTER"
            ),
            _lsm(sys, "landlock"),
            _lsm(sys, "apparmor"),
            _lsm(sys, "selinux"),
            _swap(proc),
        )
    )


def _root(proc: Path, uid: int) -> Feature:
    remedy = "start it with sudo, or let diyc-supervisor or diyc enter a user namespace (`diyc unshare`)"
    if uid != 0:
        return Feature("root", False, f"running as uid {uid}", needed=True, remedy=remedy)
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(proc / "self/status"), re.MULTILINE)
    mask = int(match.group(1), 16) if match else 0
    if not mask >> _CAP_SYS_ADMIN & 1:
        detail = "root without CAP_SYS_ADMIN (an unprivileged container?)"
        return Feature("root", False, detail, needed=True, remedy="run on the host, or in a privileged container")
    if (mapped := rootless.mapped_ids(proc)) is not None:
        ids = f"{mapped.count} id{'s' if mapped.count > 1 else ''}"
        return Feature("root", True, f"of a user namespace with {ids}: jobs share them", needed=True)
    return Feature("root", True, "uid 0 with CAP_SYS_ADMIN", needed=True)


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


def _lsm(sys: Path, name: str) -> Feature:
    active = _read(sys / "kernel/security/lsm").strip().split(",")
    present = name in active or (name == "apparmor" and (sys / "module/apparmor/parameters/enabled").exists())
    return Feature(name, present, "active" if present else "not active", remedy=f"boot with lsm=...,{name}")


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
