"""diyc beside its peers, in one run on one machine: `true` in a container with the same limits, as often as it goes.

Rounds are interleaved, so that a machine that drifts drifts for all; medians and the ratios to diyc are printed.
Absolute figures say little about another machine, ratios do. Peers that are not installed are left out by name.

    sudo .venv/bin/python benchmarks/peers.py [--runs 400] [--rounds 5] [--json FILE]"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPERVISOR = Path(sys.executable).with_name("diyc-supervisor")
MEMORY, PIDS = 256 * 1024**2, 64


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to run `true`: `batch(runs, parallel)` does so many and returns when all are over."""

    name: str
    differs: str
    batch: Callable[[int, int], None]


def make_root(where: Path) -> Path:
    """A root filesystem of busybox alone."""
    root = where / "rootfs"
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", root / "bin/busybox")
    (root / "bin/true").symlink_to("busybox")
    return root


def quietly(command: list[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed ({done.returncode}): {done.stderr.decode()[-500:]}")


def many(command: str, runs: int, parallel: int) -> list[str]:
    """A shell line that calls `command` so many times, NAME being another word each time."""
    return ["sh", "-c", f"seq {runs} | xargs -P {parallel} -I NAME {command}"]


def diyc(where: Path, root: Path) -> Peer:
    def batch(runs: int, parallel: int) -> None:
        config = where / "jobs.toml"
        config.write_text(
            f"""[supervisor]
state_dir = "{where}/state"
runtime_dir = "{where}/run"
max_parallel = {parallel}
[images.busybox]
dir = "{root}"
[jobs.true]
image = "busybox"
command = ["/bin/true"]
count = {runs}
limits = {{ memory = {MEMORY}, pids = {PIDS}, cpus = 1.0 }}
"""
        )
        quietly([str(SUPERVISOR), "--config", str(config), "--progress", "never", "-q"])

    return Peer("diyc", "user namespace, overlay root, output captured, verdict and figures for each run", batch)


def oci_config(root: Path) -> dict[str, Any]:
    """An OCI runtime configuration with the namespaces and limits that diyc's job has."""
    kinds = ("pid", "mount", "uts", "ipc", "network", "cgroup", "user")
    maps = [{"containerID": 0, "hostID": 524288, "size": 65536}]
    mounts = [
        ("/proc", "proc", "proc", []),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "mode=755", "size=64k"]),
        ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
        ("/dev/shm", "tmpfs", "shm", ["nosuid", "nodev", "noexec", "size=64m"]),
        ("/sys", "sysfs", "sysfs", ["nosuid", "nodev", "noexec", "ro"]),
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/true"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "hostname": "bench",
        "mounts": [{"destination": d, "type": t, "source": s, "options": o} for d, t, s, o in mounts],
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "uidMappings": maps,
            "gidMappings": maps,
            "resources": {
                "memory": {"limit": MEMORY, "swap": MEMORY},
                "pids": {"limit": PIDS},
                "cpu": {"quota": 100000, "period": 100000},
            },
        },
    }


def crun(where: Path, root: Path) -> Peer:
    bundle = where / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(oci_config(root)))
    shown = where / "crun-root"
    os.chmod(where, 0o755)

    def batch(runs: int, parallel: int) -> None:
        # crun refuses a hybrid host with a controller on the v2 mount: that is hidden, for it alone
        hide = "mountpoint -q /sys/fs/cgroup/unified && umount /sys/fs/cgroup/unified; "
        loop = many(f"crun --root {shown} run --bundle {bundle} diyc-bench-NAME", runs, parallel)[2]
        quietly(["unshare", "--mount", "sh", "-c", hide + loop])

    return Peer("crun", "read-only root instead of overlay; nothing captured or measured", batch)


def bubblewrap(root: Path) -> Peer:
    views = f"--ro-bind {root} / --proc /proc --dev /dev --tmpfs /tmp"
    command = f"bwrap --unshare-all {views} --cap-drop ALL --die-with-parent /bin/true"
    return Peer(
        "bwrap", "no limits, no cgroups; read-only root", lambda runs, parallel: quietly(many(command, runs, parallel))
    )


def bare() -> Peer:
    return Peer(
        "xargs", "no sandbox at all", lambda runs, parallel: quietly(many("/usr/bin/busybox true", runs, parallel))
    )


def measure(peers: list[Peer], runs: int, rounds: int, parallel: int) -> dict[str, list[float]]:
    """Runs per second of each peer, round by round."""
    rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            started = time.perf_counter()
            peer.batch(runs, parallel)
            rates[peer.name].append(runs / (time.perf_counter() - started))
    return rates


def report(peers: list[Peer], rates: dict[str, list[float]], parallel: int) -> list[dict[str, Any]]:
    own = statistics.median(rates["diyc"])
    rows = []
    print(f"\n{parallel} at once" if parallel > 1 else "\none after another")
    for peer in peers:
        rate = statistics.median(rates[peer.name])
        row = {
            "peer": peer.name,
            "runs_per_s": round(rate, 1),
            "diyc_is": round(own / rate, 2),
            "differs": peer.differs,
        }
        rows.append({**row, "rounds": [round(r, 1) for r in rates[peer.name]]})
        print(f"  {peer.name:<6} {rate:8.0f} runs/s   diyc is {own / rate:5.2f}x   {peer.differs}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="diyc-bench-", dir="/var/tmp") as scratch:
        where = Path(scratch)
        root = make_root(where)
        peers = [diyc(where, root)]
        for program, make in (
            ("crun", lambda: crun(where, root)),
            ("bwrap", lambda: bubblewrap(root)),
            ("xargs", bare),
        ):
            if shutil.which(program):
                peers.append(make())
            else:
                print(f"{program} is not installed: left out")
        figures = {
            parallel: report(peers, measure(peers, options.runs, options.rounds, parallel), parallel)
            for parallel in (4, 1)
        }
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine, "parallel": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
