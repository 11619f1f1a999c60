"""The checks of single values in jobs.toml: is it a user, a mount target, a signal, a file that exists?

A check raises ValueError with a fragment that reads well after the key ("must be an absolute path"); what it
needs to know about the surroundings (the file's directory, the host's CPUs) is its validation context."""

from __future__ import annotations

import os
import posixpath
import re
import signal
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationInfo

from diyc.jobs import PLACEHOLDERS, placeholders
from diyc.units import format_cpuset, format_duration, format_size, parse_cpuset, parse_duration, parse_size, quoted

# Docker's default set: what a job may keep inside its own user namespace.
ALLOWED_CAPABILITIES = frozenset(
    """AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP
    SETUID SYS_CHROOT""".split()
)
# capabilities(7), as of Linux 5.9, which added the last.
CAPABILITIES = ALLOWED_CAPABILITIES | frozenset(
    """AUDIT_CONTROL AUDIT_READ BLOCK_SUSPEND BPF CHECKPOINT_RESTORE DAC_READ_SEARCH IPC_LOCK IPC_OWNER LEASE
    LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE NET_ADMIN NET_BROADCAST PERFMON SYSLOG SYS_ADMIN SYS_BOOT SYS_MODULE
    SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM""".split()
)

_LONGEST_ARGUMENT = 128 * 1024  # MAX_ARG_STRLEN with its closing NUL: execve refuses more in one string
NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
_NAME = re.compile(NAME_PATTERN)
_USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?")
_USER_IDS = re.compile(r"([0-9]{1,10})(?::([0-9]{1,10}))?")
_SIGNALS = {name.removeprefix("SIG"): int(number) for name, number in signal.Signals.__members__.items()}
_LONGEST_LABEL = 1024
_SELINUX_LABEL = re.compile(r"[A-Za-z0-9_.-]+(:[A-Za-z0-9_.-]+){2}(:[A-Za-z0-9_.:,-]+)?")
LAST_ID = 65535  # a run maps 0..65535 and no more
MOST_PIDS = 2**22  # PID_MAX_LIMIT
_LAST_HOST_ID = 2**32 - 2  # the one above means "no id"


@dataclass(frozen=True, slots=True)
class Context:
    """What a value is checked against besides itself. `max_memory` is None where it is not known."""

    base_dir: str
    cpus: tuple[int, ...]
    max_memory: int | None = None
    images: Collection[str] = field(default_factory=frozenset)
    check_devices: bool = True


def context_of(info: ValidationInfo) -> Context:
    """The Context that a model is validated with."""
    context = info.context
    if not isinstance(context, Context):
        raise RuntimeError("a configuration model was validated without its Context")
    return context


def suggestion(word: str, known: Collection[str]) -> str | None:
    """`did you mean X?` for a misspelt word, None where nothing known is close."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = get_close_matches(word.lower()[:64], lowered, n=1, cutoff=0.6)
    return f"did you mean `{lowered[close[0]]}`?" if close else None


def with_suggestion(message: str, word: str, known: Collection[str]) -> ValueError:
    """A ValueError of `message`, and in brackets what `word` may have meant."""
    hint = suggestion(word, known)
    return ValueError(f"{message} ({hint})" if hint else message)


def in_base(path: str, info: ValidationInfo) -> str:
    """`path` as an absolute one: relative paths start at the directory of the file that names them."""
    return os.path.normpath(os.path.join(context_of(info).base_dir, path))


def check_name(name: str) -> str:
    """Names of jobs, images, networks and queues: they become cgroup names, labels and file names."""
    if not _NAME.fullmatch(name):
        raise ValueError("is not a valid name: use up to 63 letters, digits, _ . -, a letter or digit first")
    return name


def check_template(text: str) -> str:
    """A string that placeholders expand in and that execve takes: its names must be known, its length bearable."""
    if len(text) >= _LONGEST_ARGUMENT // 4 and len(text.encode()) >= _LONGEST_ARGUMENT:
        raise ValueError("is 128 KiB or longer, which Linux refuses as one string (pass it through stdin or a file)")
    if "{" in text:
        for name in placeholders(text):
            check_placeholder(name, text)
    return text


def check_placeholder(name: str, text: str) -> None:
    if name in PLACEHOLDERS:
        return
    if name.startswith(("matrix.", "row.")):
        raise ValueError(f"{{{name}}} is not built yet in this version; remove it")
    close = get_close_matches(name.lower(), PLACEHOLDERS, n=1, cutoff=0.75)
    # ${jobs} is a shell variable more likely than a misspelt {job}.
    if close and "${" + name + "}" not in text:
        raise ValueError(
            f"{{{name}}} is not a placeholder (did you mean {{{close[0]}}}? write {{{{{name}}}}} for the text itself)"
        )


def check_not_empty(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def check_absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(f'must be an absolute path inside the container (try "/{path.removeprefix("./")}")')
    return path


def check_mount_target(path: str) -> str:
    check_absolute(path)
    if ".." in path.split("/"):
        raise ValueError('must not contain ".."')
    target = "/" + posixpath.normpath(path).lstrip("/")
    if target == "/":
        raise ValueError("must not be the root itself (set `image` instead)")
    if target.split("/")[1] in ("proc", "sys"):
        raise ValueError(f"must not lie in /{target.split('/')[1]}: the kernel's own files stay as they are")
    return target


def existing(kind: str, test: Callable[[str], bool]) -> Callable[[str, ValidationInfo], str]:
    """A check that a host path exists and passes `test`; it returns the path as an absolute one."""

    def check(path: str, info: ValidationInfo) -> str:
        check_not_empty(path)
        absolute = in_base(path, info)
        if not os.path.exists(absolute):
            raise ValueError(f"{absolute} does not exist")
        if not test(absolute):
            raise ValueError(f"{absolute} is not {kind}")
        return absolute

    return check


def check_device(path: str, info: ValidationInfo) -> str:
    if not path.startswith("/"):
        raise ValueError('must be the path of a block device (such as "/dev/vda")')
    if not context_of(info).check_devices:
        return path
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"cannot look at this device: {error.strerror}") from error
    if not stat.S_ISBLK(mode):
        raise ValueError('is not a block device (limits apply to disks, such as "/dev/vda")')
    return path


def check_hugetlb_size(name: str) -> str:
    if not re.fullmatch(r"[0-9]{1,9}(KB|MB|GB)", name):
        raise ValueError('is not a huge page size as the kernel names it (try "2MB" or "1GB")')
    return name


def check_env_name(name: str) -> str:
    """Names of variables that a job may set itself."""
    if not name or "=" in name:
        raise ValueError("is not a name for an environment variable: it must not be empty nor contain =")
    if name.startswith("DIYC_"):
        raise ValueError("is reserved: diyc itself sets the variables that start with DIYC_")
    return name


def check_label(text: str) -> str:
    if "\n" in text or "\r" in text or len(text) > 1024:
        raise ValueError("must be one line of at most 1024 characters")
    return text


def check_image_ref(name: str, info: ValidationInfo) -> str:
    known = {"host", *context_of(info).images}
    if name not in known:
        raise with_suggestion(
            f'no image is named {quoted(name)}: define it as [images.NAME] or use "host"', name, known
        )
    return name


def check_cpuset(text: str, info: ValidationInfo) -> str:
    cpus, host = parse_cpuset(text), context_of(info).cpus
    missing = sorted(set(cpus) - set(host))
    if missing:
        raise ValueError(f"this host has the CPUs {format_cpuset(host)}, not {format_cpuset(missing)}")
    return format_cpuset(cpus)


def check_memory(size: int | None, info: ValidationInfo) -> int | None:
    budget = context_of(info).max_memory
    if size is not None and budget is not None and size > budget:
        raise ValueError(
            f"{format_size(size)} is more than supervisor.max_memory ({format_size(budget)}): it could never start"
        )
    return size


def check_sha256(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ValueError("is not a SHA-256 digest: it has 64 hexadecimal digits")
    return digest.lower()


def check_cgroup_parent(path: str) -> str:
    parts = path.split("/")
    if any(part in (".", "..") or not re.fullmatch(r"[A-Za-z0-9_.@:-]{1,255}", part) for part in parts):
        raise ValueError('is not a cgroup below the delegated root (try "diyc")')
    return path


def check_listen_address(address: str, info: ValidationInfo) -> str:
    if address.startswith("unix:"):
        if address == "unix:":
            raise ValueError('names no socket (try "unix:/run/diyc/metrics.sock")')
        return "unix:" + in_base(address.removeprefix("unix:"), info)
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/\s]+):([0-9]{1,5})", address)
    if match is None or int(match[2]) > 65535:
        raise ValueError('is not an address to listen on (try "127.0.0.1:9464" or "unix:/path")')
    return address


def parse_signal(value: object) -> int:
    """The number of a signal given by number or by name, with or without SIG, in any case."""
    if isinstance(value, str):
        name = value.upper().removeprefix("SIG")
        if name not in _SIGNALS:
            raise with_suggestion(f"{quoted(value)} is not a signal", name, _SIGNALS)
        return _SIGNALS[name]
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= signal.SIGRTMAX:
        return value
    raise ValueError(f'{quoted(value)} is not a signal (try "TERM" or a number from 1 to {int(signal.SIGRTMAX)})')


def parse_user(value: object) -> str:
    """A user inside the container as "name", "uid" or "uid:gid"."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        ids = _USER_IDS.fullmatch(text)
        if ids and all(int(number) <= LAST_ID for number in ids.groups("0")):
            return ":".join(str(int(number)) for number in ids.groups() if number is not None)
        if _USER_NAME.fullmatch(text):
            return text
    raise ValueError(f'{quoted(value)} is not a user: give a name, a uid or "uid:gid", ids from 0 to {LAST_ID}')


def parse_id_range(value: object) -> tuple[int, int]:
    """(first, count) of host ids set aside for containers, from "first:count"."""
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{quoted(value)} is not a range of ids (try "524288:1878523904": the first, how many)')
    first, count = int(match[1]), int(match[2])
    if first < 65536 or count < 65536 or first + count - 1 > _LAST_HOST_ID:
        raise ValueError(f"must begin at 65536 or above, hold 65536 ids or more and end by {_LAST_HOST_ID}")
    return first, count


def parse_capability(value: object) -> str:
    """A capability's name without CAP_, in upper case; one of those that Linux has."""
    name = value.upper().removeprefix("CAP_") if isinstance(value, str) else ""
    if name not in CAPABILITIES:
        raise with_suggestion(f"{quoted(value)} is not a capability", name, CAPABILITIES)
    return name


def parse_added_capability(value: object) -> str:
    name = parse_capability(value)
    if name not in ALLOWED_CAPABILITIES:
        raise ValueError(f"{name} may not be given to a job; allowed are {', '.join(sorted(ALLOWED_CAPABILITIES))}")
    return name


def parse_dropped_capability(value: object) -> str:
    return "ALL" if isinstance(value, str) and value.upper() == "ALL" else parse_capability(value)


def check_apparmor(name: str) -> str:
    """A profile's name, as aa-status shows it; empty for none."""
    if name != name.strip() or len(name) > _LONGEST_LABEL or not name.isprintable():
        raise ValueError("is not the name of an AppArmor profile (aa-status lists those that are loaded)")
    return name


def check_selinux(label: str) -> str:
    """A label, which is also put between quotes into mount options; empty for none."""
    if label and (len(label) > _LONGEST_LABEL or not _SELINUX_LABEL.fullmatch(label)):
        raise ValueError('is not an SELinux label (try "system_u:system_r:container_t:s0")')
    return label


def parse_time_offset(value: Any) -> float:
    if isinstance(value, str) and value.startswith("-"):
        return -parse_duration(value[1:])
    return -parse_duration(-value) if isinstance(value, (int, float)) and value < 0 else parse_duration(value)


def parse_path_list(value: object) -> object:
    if value in ("default", "none") or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError(f'{quoted(value)} is neither "default", "none" nor an array of paths')


def or_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`parse`, but None for the word "none", which lifts a limit."""
    return lambda value: None if value == "none" else parse(value)


def size_from(least: int = 0) -> Callable[[Any], int]:
    """A parser of sizes of at least that many bytes."""

    def parse(value: Any) -> int:
        size = parse_size(value)
        if size < least:
            raise ValueError(f"must be at least {format_size(least)}, not {quoted(value)}")
        return size

    return parse


def duration_from(least: float = 0.0) -> Callable[[Any], float]:
    """A parser of durations of at least that many seconds."""

    def parse(value: Any) -> float:
        seconds = parse_duration(value)
        if seconds < least:
            raise ValueError(f"must be at least {format_duration(least)}, not {quoted(value)}")
        return seconds

    return parse


def parse_cpus(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f'{quoted(value)} is not a number of CPUs (try 1.5, or "none")')
    if not 0.01 <= value <= 8192:
        raise ValueError(f"must be from 0.01 to 8192 CPUs, not {quoted(value)}")
    return float(value)


def parse_pids(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f'{quoted(value)} is not a number of processes (try 64, or "none")')
    if not 1 <= value <= MOST_PIDS:
        raise ValueError(f"must be from 1 to {MOST_PIDS}, not {quoted(value)}")
    return value
