"""Who `user` means inside an image: names are looked up in the image's own passwd and group files.

The image is not trusted: its files are opened without following links out of it, and only so much is read."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from diyc.errors import ImageError

MAX_FILE = 4 * 1024**2
MAX_ID = 65535
_ID = re.compile("[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Account:
    """A user of an image with its primary group, its other groups and its home."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve_user(root: str, user: str) -> Account:
    """`user` is "name", "uid", "name:group" or "uid:gid"; an id without an entry gets group 0 and home "/".

    "root" is 0 also in an image that has no passwd file. Raises ImageError for another name that it does not know."""
    who, _, group = user.partition(":")
    if who == "root" and not _entries(root, "passwd", 7):
        who = "0"
    passwd = _entries(root, "passwd", 7)
    entry = next((e for e in passwd if who in (e[0], e[2])), None)
    if entry is None and not who.isdigit():
        known = ", ".join(e[0] for e in passwd[:8]) or "none"
        raise ImageError(f'user "{who}" is not in the image\'s /etc/passwd (known: {known}); give a number instead')
    uid = int(entry[2]) if entry else int(who)
    groups = _entries(root, "group", 4)
    gid = _group(group, groups) if group else int(entry[3]) if entry else 0
    others = tuple(int(g[2]) for g in groups if entry and entry[0] in g[3].split(",") and int(g[2]) != gid)
    for number in (uid, gid, *others):
        if number > MAX_ID:
            raise ImageError(f"id {number} of user {user!r} is above {MAX_ID}, the last id of a container")
    return Account(uid, gid, others[:64], _home(entry[5]) if entry else "/")


def _home(path: str) -> str:
    return path if path.startswith("/") and "\0" not in path else "/"


def _group(group: str, groups: list[list[str]]) -> int:
    if group.isdigit():
        return int(group)
    for entry in groups:
        if entry[0] == group:
            return int(entry[2])
    raise ImageError(f'group "{group}" is not in the image\'s /etc/group; give a number instead')


def _entries(root: str, name: str, fields: int) -> list[list[str]]:
    rows = (line.split(":") for line in _read(root, name).decode("utf-8", "replace").split("\n"))
    ids = (2, 3) if fields == 7 else (2,)
    return [row for row in rows if len(row) == fields and all(_ID.fullmatch(row[i]) for i in ids)]


def _read(root: str, name: str) -> bytes:
    """At most MAX_FILE bytes of /etc/NAME of the image; nothing where it is a link, a device or not there."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"cannot open image directory {root}: {error.strerror}") from error
    opened = [top]
    try:
        opened.append(os.open("etc", flags | os.O_DIRECTORY, dir_fd=top))
        opened.append(os.open(name, flags, dir_fd=opened[-1]))
        if not stat.S_ISREG(os.fstat(opened[-1]).st_mode):
            return b""
        return os.pread(opened[-1], MAX_FILE, 0)
    except OSError:  # not there, or a link: then the image knows no names
        return b""
    finally:
        for fd in opened:
            os.close(fd)
