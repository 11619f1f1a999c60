"""A container as data: the ordered steps that the child takes between clone and execve.

Pure: a job, the shape of its root and the host's facts go in, a frozen Plan comes out. `diyc explain` prints
it, process.py hands it to the C core, and csrc/child.c has one small function for each kind of step."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from diyc.jobs import JobSpec, Mount

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

CLONE_FLAGS = {
    "CLONE_NEWUSER": CLONE_NEWUSER,
    "CLONE_NEWNS": CLONE_NEWNS,
    "CLONE_NEWPID": CLONE_NEWPID,
    "CLONE_NEWUTS": CLONE_NEWUTS,
    "CLONE_NEWIPC": CLONE_NEWIPC,
    "CLONE_NEWNET": CLONE_NEWNET,
}

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
OPEN_TREE_CLONE, AT_RECURSIVE, O_CLOEXEC = 0x1, 0x8000, 0o2000000
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 0x2, 0x4
RLIMIT_CORE, RLIMIT_NOFILE = 4, 7
SIGKILL = 9
RLIM_INFINITY = 2**64 - 1
SHM_SIZE = 64 * 1024**2
SUPERVISOR_FD, LABEL_FD = 3, 4
TTY_GROUP = 5  # of terminals, in every distribution (devpts documentation of the kernel)
O_WRONLY = 1
OOM_SCORE_ADJ = 500  # the kernel takes jobs first

# Positions in the marks that the child takes; the differences are a result's steps_s.
MARK_CLONED, MARK_JOINED, MARK_MOUNTED, MARK_EXEC = range(4)


class StepDoc(NamedTuple):
    """How a kind of step is shown: its system call with the step's fields, and where that is described."""

    call: str
    source: str


STEP_DOCS: dict[str, StepDoc] = {
    "mark": StepDoc("clock_gettime(CLOCK_MONOTONIC)", "clock_gettime(2)"),
    "await_parent": StepDoc("futex(parent_ready, FUTEX_WAIT)", "user_namespaces(7)"),
    "pdeathsig": StepDoc("prctl(PR_SET_PDEATHSIG, {flags})", "PR_SET_PDEATHSIG(2const)"),
    "cgroup_join": StepDoc('write({fd}, "0")', "cgroups(7)"),
    "unshare": StepDoc("unshare({flags})", "cgroup_namespaces(7)"),
    "setsid": StepDoc("setsid()", "setsid(2)"),
    "umask": StepDoc("umask({flags})", "umask(2)"),
    "setgroups": StepDoc("setgroups({data})", "setgroups(2)"),
    "setresgid": StepDoc("setresgid({flags}, {flags}, {flags})", "setresgid(2)"),
    "setresuid": StepDoc("setresuid({flags}, {flags}, {flags})", "setresuid(2)"),
    "mkdir": StepDoc("mkdirat({target}, {flags})", "mkdir(2)"),
    "mknod_file": StepDoc("mknodat({target}, S_IFREG)", "mknod(2)"),
    "chown": StepDoc("fchownat({target}, FIRST, FIRST)", "chown(2)"),
    "keyring": StepDoc("keyctl(KEYCTL_JOIN_SESSION_KEYRING, NULL)", "session-keyring(7)"),
    "sysctl": StepDoc("write({target}, {data})", "namespaces(7), proc_sys_user(5)"),
    "write_file": StepDoc("openat2({target}, O_CREAT|O_EXCL|O_NOFOLLOW) + write({data})", "openat2(2)"),
    "symlink": StepDoc("symlinkat({source}, {target})", "symlink(2)"),
    "mount": StepDoc("mount({source}, {target}, {type}, {flags}, {data})", "mount(2)"),
    "open_file": StepDoc("{out} = openat2({source}, {flags})", "openat2(2)"),
    "open_tree": StepDoc("{out} = open_tree({source}, OPEN_TREE_CLONE)", "open_tree(2)"),
    "fsmount": StepDoc("{out} = fsmount(fsopen({type}), {flags}) {data}", "fsopen(2), fsmount(2)"),
    "move_mount": StepDoc("move_mount({fd}, {target})", "move_mount(2)"),
    "mount_setattr": StepDoc("mount_setattr({target}, {flags})", "mount_setattr(2)"),
    "pivot_root": StepDoc('chdir({target}) + pivot_root(".", ".") + umount2(".", MNT_DETACH)', "pivot_root(2)"),
    "sethostname": StepDoc("sethostname({data})", "sethostname(2), uts_namespaces(7)"),
    "setdomainname": StepDoc("setdomainname({data})", "setdomainname(2)"),
    "link_up": StepDoc("ioctl(SIOCSIFFLAGS, {target}, IFF_UP)", "netdevice(7)"),
    "dup": StepDoc("dup3({fd}, {flags})", "dup(2)"),
    "close_from": StepDoc("close_range({flags}, ~0)", "close_range(2)"),
    "chdir": StepDoc("chdir({target})", "chdir(2)"),
    "rlimit": StepDoc("prlimit64({flags}, {data})", "getrlimit(2)"),
    "bounding_set": StepDoc("prctl(PR_CAPBSET_DROP, all but {flags})", "capabilities(7)"),
    "clear_ambient": StepDoc("prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)", "capabilities(7)"),
    "capset": StepDoc("capset(permitted = effective = {flags}, inheritable = 0)", "capset(2)"),
    "no_new_privs": StepDoc("prctl(PR_SET_NO_NEW_PRIVS, 1)", "PR_SET_NO_NEW_PRIVS(2const)"),
    "exec_label": StepDoc("write({fd}, {data})", "proc_pid_attr(5)"),
    "signals": StepDoc("rt_sigaction(every signal, SIG_DFL) + rt_sigprocmask(none blocked)", "signal(7)"),
    "exec": StepDoc("execve(command)", "execve(2)"),
}

_MOUNT_FLAGS = {
    MS_RDONLY: "MS_RDONLY",
    MS_NOSUID: "MS_NOSUID",
    MS_NODEV: "MS_NODEV",
    MS_NOEXEC: "MS_NOEXEC",
    MS_REC: "MS_REC",
    MS_PRIVATE: "MS_PRIVATE",
}
_ATTR_FLAGS = {
    ATTR_RDONLY: "MOUNT_ATTR_RDONLY",
    ATTR_NOSUID: "MOUNT_ATTR_NOSUID",
    ATTR_NODEV: "MOUNT_ATTR_NODEV",
    ATTR_NOEXEC: "MOUNT_ATTR_NOEXEC",
}
_FLAG_NAMES = {
    "mount": _MOUNT_FLAGS,
    "fsmount": _ATTR_FLAGS,
    "mount_setattr": _ATTR_FLAGS,
    "unshare": {CLONE_NEWCGROUP: "CLONE_NEWCGROUP"},
    "pdeathsig": {SIGKILL: "SIGKILL"},
    "open_file": {O_WRONLY: "O_WRONLY"},
}


_NO_FLAG = {"open_file": "O_RDONLY"}


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `fd` and `out` name registers: descriptors given by the supervisor or made by the child."""

    kind: str
    why: str = ""
    fd: str | None = None
    out: str | None = None
    flags: int = 0
    source: str | None = None
    target: str | None = None
    type: str | None = None
    data: bytes | None = None

    def call(self) -> str:
        """The system call as `diyc explain` shows it, with this step's arguments."""
        return STEP_DOCS[self.kind].call.format(
            fd=self.fd,
            out=self.out,
            flags=self._flags(),
            source=_quote(self.source),
            target=_quote(self.target),
            type=_quote(self.type),
            data=self._data(),
        )

    def _flags(self) -> str:
        if self.kind in ("umask", "mkdir"):
            return f"{self.flags:#05o}"
        if self.kind in ("capset", "bounding_set"):
            return f"{self.flags:#x}"
        if self.kind == "rlimit":
            return {RLIMIT_CORE: "RLIMIT_CORE", RLIMIT_NOFILE: "RLIMIT_NOFILE"}.get(self.flags, str(self.flags))
        names = _FLAG_NAMES.get(self.kind)
        if names is None:
            return str(self.flags)
        return "|".join(name for bit, name in names.items() if self.flags & bit) or _NO_FLAG.get(self.kind, "0")

    def _data(self) -> str:
        if self.data is None:
            return "NULL"
        if self.kind == "rlimit":
            return str(struct.unpack("<2Q", self.data)[0])
        if self.kind == "setgroups":
            return str(list(struct.unpack(f"<{len(self.data) // 4}I", self.data)))
        if self.kind == "fsmount":
            words = self.data.decode().split("\0")[:-1]
            return " ".join(f"{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True))
        text = self.data.decode("utf-8", "replace")
        return f'"{text}"' if self.kind == "mount" else repr(text)


def _quote(text: str | None) -> str:
    return "NULL" if text is None else f'"{text}"'


@dataclass(frozen=True, slots=True)
class Bind:
    """A mount that the supervisor prepares: where it goes, whether its source is a directory, and whether its file
    system can show its ids shifted; where it cannot, its files belong to nobody inside."""

    source: str
    target: str
    read_only: bool = False
    directory: bool = True
    idmapped: bool = True


@dataclass(frozen=True, slots=True)
class User:
    """Who the command runs as, inside the container."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/root"


@dataclass(frozen=True, slots=True)
class Box:
    """What a plan needs to know beyond the job: its root, its mounts and how it enters its cgroups.

    `binds` are the image's own and the job's; `joins` counts the descriptors to join a cgroup by. Before Linux 6.6 a
    tmpfs has no user.* attributes, which an overlay mounted in a user namespace needs: there the spawner mounts it.
    `supervisor` is the pid that the child must find as its parent. `may_set_groups` is False where an ordinary user
    has no subordinate groups (user_namespaces(7)); `ids` is how many ids there are inside."""

    hostname: str
    user: User = User()
    binds: tuple[Bind, ...] = ()
    joins: int = 0
    into_cgroup: bool = False
    clone3: bool = True
    capabilities: int = 0
    overlay_by_spawner: bool = False
    supervisor: int = 0
    may_set_groups: bool = True
    ids: int = 65536


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in the order in which the kernel sees them, the first `spawner_steps` of them before clone3.

    `given` names the registers that the supervisor fills, `registers` all of them."""

    steps: tuple[Step, ...]
    clone_flags: int
    given: tuple[str, ...]
    registers: tuple[str, ...] = field(default=())
    spawner_steps: int = 0

    def rows(self, kinds: dict[str, int]) -> list[tuple[object, ...]]:
        """The steps as csrc/plan.c wants them; `kinds` maps names to the C enum."""
        number = {name: index for index, name in enumerate(self.registers)}
        return [
            (
                kinds[step.kind],
                number[step.fd] if step.fd else -1,
                number[step.out] if step.out else -1,
                step.flags,
                step.source,
                step.target,
                step.type,
                step.data,
            )
            for step in self.steps
        ]

    def clone_call(self, into_cgroup: bool, clone3: bool = True) -> str:
        """The call that makes the child, without clone3 the older one."""
        names = [name for name, bit in CLONE_FLAGS.items() if self.clone_flags & bit]
        if not clone3:
            return f"clone({'|'.join(names)}|CLONE_VM|CLONE_VFORK) + pidfd_open()"
        extra = ["CLONE_INTO_CGROUP"] if into_cgroup else []
        return f"clone3({'|'.join(names + extra)}|CLONE_PIDFD|CLONE_VM|CLONE_VFORK)"


def build_plan(spec: JobSpec, box: Box) -> Plan:
    """Every step of one run of `spec`, first to last. Pure; equal arguments give equal plans."""
    before = _overlay(spec, "", by_spawner=True) if box.overlay_by_spawner else ()
    steps = (
        *before,
        *_identity(box),
        *_label_file(spec),
        *(_root_from_spawner() if box.overlay_by_spawner else _root(spec)),
        *_kernel_filesystems(spec, box),
        *_etc(box),
        *_mounts(spec, box),
        *_proc(),
        *_read_only(spec),
        *_names(spec, box),
        *_descriptors(spec),
        *_confinement(spec, box),
    )
    given = (
        "stdin",
        "stdout",
        "stderr",
        "supervisor_kept",
        *(("label_kept",) if _label(spec) else ()),
        *(f"tasks{i}" for i in range(box.joins)),
        "layer",
        *(f"bind{i}" for i in range(len(box.binds))),
    )
    made = tuple(step.out for step in steps if step.out)
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET
    return Plan(steps, flags, given, given + made, len(before))


def _identity(box: Box) -> tuple[Step, ...]:
    joins = tuple(
        Step(
            "cgroup_join",
            "the child enters a cgroup itself: moved from outside it would wait for RCU",
            fd=f"tasks{i}",
        )
        for i in range(box.joins)
    )
    return (
        Step("mark", "how long the clone took", flags=MARK_CLONED),
        *joins,
        Step(
            "open_file",
            "tells who the parent is, also when its own /proc is out of sight",
            out="supervisor",
            source="/proc/self/stat",
        ),
        Step(
            "pdeathsig",
            "the job dies with the supervisor",
            fd="supervisor",
            flags=SIGKILL,
            data=f"{box.supervisor} ".encode(),
        ),
        Step("await_parent", "the parent writes uid_map, gid_map and oom_score_adj: the child may not"),
        Step("setsid", "a session of its own: no controlling terminal, no signal from the host's"),
        Step("umask", "the usual default, whatever the supervisor's is", flags=0o022),
        *((Step("setgroups", "none of the supervisor's groups", data=b""),) if box.may_set_groups else ()),
        Step("setresgid", "group 0 of the new user namespace", flags=0),
        Step("setresuid", "user 0 of the new user namespace: unmapped ids can create nothing", flags=0),
        Step("keyring", "none of the supervisor's keys"),
        Step(
            "sysctl",
            "no user namespaces inside: each would come with every capability over itself",
            target="/proc/sys/user/max_user_namespaces",
            data=b"0",
        ),
        Step(
            "sysctl",
            "these count as root's on the host: one job must not take them all",
            target="/proc/sys/user/max_inotify_instances",
            data=b"16",
        ),
        Step(
            "unshare", "after joining, so that /proc/self/cgroup shows the job's own cgroup as /", flags=CLONE_NEWCGROUP
        ),
        Step("mark", "how long the cgroups took", flags=MARK_JOINED),
    )


def _label(spec: JobSpec) -> tuple[str, bytes] | None:
    """What tells the security module the label of the next execve: its file in /proc/PID/attr, and what to write."""
    if spec.apparmor:
        return "apparmor/exec", b"exec " + spec.apparmor.encode()  # Linux 5.8; the file of older ones is the next
    return ("exec", spec.selinux.encode()) if spec.selinux else None


def _label_file(spec: JobSpec) -> tuple[Step, ...]:
    label = _label(spec)
    if label is None:
        return ()
    why = "written last of all; a task may label only itself, and the container's own /proc is not needed so"
    return (Step("open_file", why, out="label", flags=O_WRONLY, source=f"/proc/thread-self/attr/{label[0]}"),)


def _labelled(spec: JobSpec, options: str) -> bytes:
    """Mount options with the job's label for files. It may have commas, hence the quotes (mount(8), context=)."""
    more = f',context="{spec.selinux_mount}"' if spec.selinux_mount else ""
    return f"{options}{more}".encode()


_PRIVATE = Step("mount", "no mount made here shows on the host", target="/", flags=MS_REC | MS_PRIVATE)


def _root(spec: JobSpec) -> tuple[Step, ...]:
    return (_PRIVATE, *_overlay(spec, ",userxattr"))


def _overlay(spec: JobSpec, options: str, *, by_spawner: bool = False) -> tuple[Step, ...]:
    """The image below, a tmpfs of limits.disk bytes for what the job writes above."""
    size = f"size={spec.limits.disk or 0},mode=0755"
    return (
        Step(
            "mount",
            "all that the job writes to its root; " + ("limits.disk" if spec.limits.disk else "no limit"),
            source="scratch",
            target="/scratch",
            type="tmpfs",
            flags=MS_NOSUID | MS_NODEV,
            data=_labelled(spec, size),
        ),
        *(
            Step("mkdir", why, target=f"/scratch/{name}", flags=0o755)
            for name, why in (
                ("lower", "where the image's idmapped mount goes"),
                ("upper", "overlay keeps what is written here"),
                ("work", "overlay prepares its renames here"),
                ("root", "the new root"),
            )
        ),
        *((Step("chown", "root inside owns the new root", target="/scratch/upper"),) if by_spawner else ()),
        Step("move_mount", "the image, prepared by the supervisor", fd="layer", target="/scratch/lower"),
        Step(
            "mount",
            "the image below, the job's writes above; they vanish with the namespace",
            source="overlay",
            target="/scratch/root",
            type="overlay",
            flags=MS_NOSUID | MS_NODEV,
            data=_labelled(spec, f"lowerdir=/scratch/lower,upperdir=/scratch/upper,workdir=/scratch/work{options}"),
        ),
    )


def _root_from_spawner() -> tuple[Step, ...]:
    """The child's copy of the spawner's mounts is locked and no root to pivot to; a clone of it is."""
    return (
        _PRIVATE,
        Step(
            "open_tree",
            "the root that the spawner mounted",
            out="root",
            source="/scratch/root",
            flags=OPEN_TREE_CLONE | O_CLOEXEC,
        ),
        Step("move_mount", "over the spawner's own", fd="root", target="/scratch/root"),
    )


def _kernel_filesystems(spec: JobSpec, box: Box) -> tuple[Step, ...]:
    tty_group = f",gid={TTY_GROUP}" if box.ids > TTY_GROUP else ""
    safe = ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC
    shm = min(SHM_SIZE, spec.limits.memory or SHM_SIZE)
    attach = (
        ("sys", "read-only, its own network only"),
        ("dev", "six harmless devices, read-only"),
    )
    return (
        Step(
            "fsmount",
            "made while the old /proc is in sight, as the kernel demands",
            out="proc",
            type="proc",
            flags=safe,
            data=b"",
        ),
        Step(
            "fsmount", "sysfs of the new network namespace", out="sys", type="sysfs", flags=safe | ATTR_RDONLY, data=b""
        ),
        Step(
            "open_tree",
            "a clone of the /dev that the spawner prepared",
            out="dev",
            source="/dev",
            flags=OPEN_TREE_CLONE | AT_RECURSIVE | O_CLOEXEC,
        ),
        Step("pivot_root", "from here on every path is the container's; the host's are gone", target="/scratch/root"),
        *(
            step
            for name, why in attach
            for step in (
                Step("mkdir", "the image may lack it", target=f"/{name}", flags=0o755),
                Step("move_mount", why, fd=name, target=f"/{name}", flags=RESOLVE_NO_SYMLINKS),
            )
        ),
        Step(
            "mount",
            "terminals of its own",
            source="devpts",
            target="/dev/pts",
            type="devpts",
            flags=MS_NOSUID | MS_NOEXEC,
            data=_labelled(spec, f"newinstance,ptmxmode=0666,mode=0620{tty_group}"),
        ),
        Step(
            "mount",
            "POSIX shared memory, counted as the job's memory",
            source="shm",
            target="/dev/shm",
            type="tmpfs",
            flags=MS_NOSUID | MS_NODEV | MS_NOEXEC,
            data=_labelled(spec, f"mode=1777,size={shm}"),
        ),
    )


def _etc(box: Box) -> tuple[Step, ...]:
    name = box.hostname.split(".")[0]
    names = box.hostname if name == box.hostname else f"{box.hostname} {name}"
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n127.0.1.1\t{names}\n"
    files = (("hostname", f"{box.hostname}\n"), ("hosts", hosts), ("resolv.conf", "# no network, no name servers\n"))
    return (
        Step("mkdir", "the image may lack it", target="/etc", flags=0o755),
        *(
            Step("write_file", "generated, never the host's", target=f"/etc/{file}", flags=0o644, data=text.encode())
            for file, text in files
        ),
    )


def _mounts(spec: JobSpec, box: Box) -> tuple[Step, ...]:
    """Parents before what is mounted inside them."""
    made = [(bind.target, _bind(i, bind)) for i, bind in enumerate(box.binds)]
    made += [(m.target, _tmpfs_at(spec, m)) for m in spec.mounts if m.type == "tmpfs"]
    made.sort(key=lambda one: one[0].rstrip("/").count("/"))
    return tuple(step for _, steps in made for step in steps)


def _bind(i: int, bind: Bind) -> list[Step]:
    why = f"{bind.source} of the host, {'read-only' if bind.read_only else 'writable'}"
    move = Step("move_mount", why, fd=f"bind{i}", target=bind.target, flags=RESOLVE_NO_MAGICLINKS)
    return [*_mount_point(bind.target, directory=bind.directory), move]


def _tmpfs_at(spec: JobSpec, mount: Mount) -> list[Step]:
    return [*_mount_point(mount.target, directory=True), _tmpfs(spec, mount)]


def _proc() -> tuple[Step, ...]:
    """Last of all mounts: with it come links to every descriptor that is still open, which no path may follow."""
    return (
        Step("mkdir", "the image may lack it", target="/proc", flags=0o755),
        Step("move_mount", "only the job's own processes", fd="proc", target="/proc", flags=RESOLVE_NO_SYMLINKS),
    )


def _read_only(spec: JobSpec) -> tuple[Step, ...]:
    return () if spec.writable else (Step("mount_setattr", "writable = false", target="/", flags=ATTR_RDONLY),)


def _tmpfs(spec: JobSpec, mount: Mount) -> Step:
    return Step(
        "mount",
        "memory of the job, gone with it",
        source="tmpfs",
        target=mount.target,
        type="tmpfs",
        flags=MS_NOSUID | MS_NODEV | (MS_RDONLY if mount.read_only else 0),
        data=_labelled(spec, f"mode=1777,size={mount.size or 0}"),
    )


def _mount_point(target: str, *, directory: bool) -> list[Step]:
    parts = target.strip("/").split("/")
    parents = ["/" + "/".join(parts[:i]) for i in range(1, len(parts) + (1 if directory else 0))]
    steps = [Step("mkdir", "a mount needs something to cover", target=path, flags=0o755) for path in parents]
    if not directory:
        steps.append(Step("mknod_file", "a file is mounted upon a file", target=target))
    return steps


def _names(spec: JobSpec, box: Box) -> tuple[Step, ...]:
    domain = box.hostname.partition(".")[2]
    steps = [
        Step("sethostname", "in its own UTS namespace", data=box.hostname.encode()),
        Step("setdomainname", "not the host's NIS domain", data=(domain or "localdomain").encode()),
    ]
    if spec.network == "loopback":
        steps.append(Step("link_up", "network.mode = loopback: 127.0.0.1 and ::1, nothing else", target="lo"))
    return (*steps, Step("mark", "how long the root and the mounts took", flags=MARK_MOUNTED))


def _descriptors(spec: JobSpec) -> tuple[Step, ...]:
    kept = Step("dup", "closed by execve too", fd="label", flags=LABEL_FD, data=b"cloexec")
    label = (kept,) if _label(spec) else ()
    return (
        Step("dup", "standard input", fd="stdin", flags=0),
        Step("dup", "standard output", fd="stdout", flags=1),
        Step("dup", "standard error", fd="stderr", flags=2),
        Step(
            "dup",
            "closed by execve; until then it tells whether the supervisor lives",
            fd="supervisor",
            flags=SUPERVISOR_FD,
            data=b"cloexec",
        ),
        *label,
        Step("close_from", "no descriptor of the supervisor reaches the job", flags=SUPERVISOR_FD + 1 + len(label)),
    )


def _rlimit(resource: int, value: int | None, why: str) -> Step:
    number = RLIM_INFINITY if value is None else value
    return Step("rlimit", why, flags=resource, data=struct.pack("<2Q", number, number))


def _confinement(spec: JobSpec, box: Box) -> tuple[Step, ...]:
    user = box.user
    groups = struct.pack(f"<{len(user.groups)}I", *user.groups)
    return (
        Step(
            "chdir",
            "after the descriptors are closed: none can lead out of the root (CVE-2024-21626)",
            target=spec.workdir,
        ),
        _rlimit(RLIMIT_NOFILE, spec.limits.nofile, "limits.nofile"),
        _rlimit(RLIMIT_CORE, spec.limits.core, "limits.core"),
        Step("bounding_set", "execve can give back no other capability", flags=box.capabilities),
        *((Step("setgroups", "the user's groups in the image", data=groups),) if box.may_set_groups else ()),
        Step("setresgid", "the job's group", flags=user.gid),
        Step("setresuid", "the job's user", flags=user.uid),
        Step("clear_ambient", "nothing is inherited by way of the ambient set"),
        Step(
            "capset", "cap_add" if box.capabilities else "no capability", flags=box.capabilities if user.uid == 0 else 0
        ),
        Step("no_new_privs", "setuid and file capabilities of the image have no effect"),
        Step(
            "pdeathsig",
            "again: a change of credentials clears it",
            fd="supervisor_kept",
            flags=SIGKILL,
            data=f"{box.supervisor} ".encode(),
        ),
        *_exec_label(spec),
        Step("signals", "what the supervisor ignores or blocks is not inherited"),
        Step("mark", "how long confinement took", flags=MARK_EXEC),
        Step("exec", "the command: the first of its candidates on PATH that can be run"),
    )


def _exec_label(spec: JobSpec) -> tuple[Step, ...]:
    """Late: nothing of the set-up needs to be allowed by the job's profile, and any task may confine itself further."""
    label = _label(spec)
    if label is None:
        return ()
    why = f"security.{'apparmor' if spec.apparmor else 'selinux'}: execve changes to it, or fails"
    return (Step("exec_label", why, fd="label_kept", data=label[1]),)
