"""What the machines are made of, as data: the hosts by name, their kernels, the packages of their userland."""

from __future__ import annotations

from dataclasses import dataclass

SUITE = "bookworm"
# The newest package whose name matches is taken: Debian's generic kernels, neither cloud nor real-time.
KERNELS = {
    "6.1": r"linux-image-6\.1\.0-[0-9]+-amd64",
    "6.12": r"linux-image-6\.12\.[0-9]+\+deb12-amd64",
}
PACKAGES = (
    "apparmor attr btrfs-progs bubblewrap busybox-static checkpolicy crun dbus dbus-user-session e2fsprogs "
    "fuse-overlayfs fuse3 gcc iproute2 kmod libc6-dev libpam-systemd libselinux1 make nftables passt policycoreutils "
    "procps python3 python3-dev python3-venv secilc slirp4netns strace sudo systemd systemd-sysv uidmap util-linux"
).split()
# Parts of the kernel package that a guest gets; the rest is drivers of hardware that it has not.
MODULES = (
    "crypto fs lib net security drivers/block drivers/char drivers/md drivers/net/bonding drivers/net/dummy.ko* "
    "drivers/net/ifb.ko* drivers/net/macvlan.ko* drivers/net/tap.ko* drivers/net/tun.ko* drivers/net/veth.ko* "
    "drivers/net/virtio_net.ko* drivers/net/net_failover.ko* drivers/virtio net/core/failover.ko* arch/x86/crypto"
).split()
# What the first program needs to get at the disks and to say something, in this order with what each of them needs.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "overlay")

GUEST = "/opt/diyc"  # where the project lies in a guest
RESULTS = "/run/vm-bench/results"  # what a command leaves there comes back
USER = "diyc"  # the ordinary user with subordinate ids; "plain" is one without


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of machine. `init` is what runs as PID 1: "bench" (a script of ours) or "systemd".

    `cgroup` says where the command runs: "top" (the root cgroup), or "delegated" (a subtree marked as systemd marks
    what it delegates; the command sits in a leaf of it)."""

    name: str
    title: str
    kernel: str
    init: str = "bench"
    user: str = "root"
    cgroup: str = "top"
    cmdline: str = "apparmor=0"
    swap: bool = False


_HOSTS = (
    Host("v2-6.1", "cgroup v2, Linux 6.1", "6.1"),
    Host("v2-6.12", "cgroup v2, Linux 6.12", "6.12", cgroup="delegated", swap=True),
    Host("systemd", "systemd, root", "6.1", init="systemd", cgroup="delegated", cmdline=""),
    Host("rootless", "systemd, ordinary user", "6.1", init="systemd", user=USER, cgroup="delegated", cmdline=""),
    Host("apparmor", "AppArmor", "6.1", cmdline="apparmor=1 security=apparmor"),
    Host("selinux", "SELinux", "6.1", cmdline="security=selinux selinux=1"),
)
HOSTS = {host.name: host for host in _HOSTS}
