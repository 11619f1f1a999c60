"""Unpacks a tar archive into one directory, and cannot write anywhere else whatever the archive holds.

Every path is walked component by component on open directory descriptors, so the kernel is never handed a
path with a `/` in it; nothing in the target is ever followed, and nothing existing is ever opened for writing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from diyc.errors import ImageError
from diyc.images.tarstream import Entry, Kind, TarStream, UnpackLimits, show

T = TypeVar("T")
LINKS = 40  # symbolic links followed in one path, the kernel's own limit (path_resolution(7))
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FIFO = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ArchiveSummary:
    """What was unpacked. `data_bytes` is the content of regular files; devices are counted, never made."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    hardlinks: int = 0
    fifos: int = 0
    devices_skipped: int = 0
    data_bytes: int = 0


COUNTER = {
    Kind.FILE: "files",
    Kind.DIRECTORY: "directories",
    Kind.SYMLINK: "symlinks",
    Kind.HARDLINK: "hardlinks",
    Kind.FIFO: "fifos",
    Kind.DEVICE: "devices_skipped",
}
DEFAULT_LIMITS = UnpackLimits()


def unpack(
    source: str | os.PathLike[str] | BinaryIO,
    target: str | os.PathLike[str] | int,
    *,
    limits: UnpackLimits = DEFAULT_LIMITS,
    chown: bool | None = None,
) -> ArchiveSummary:
    """Unpack `source` (a path, or a seekable file at its start) below `target` (a path or a directory descriptor).

    Later entries replace earlier ones, but a directory with something in it is never replaced by anything else.
    Absolute names mean the image's root, as for GNU tar; `..` in a name is refused. An entry below a symbolic
    link is written where the link points if the link is relative and stays inside the target (`bin -> usr/bin`,
    then `bin/sh`, as merged-/usr images have it); any other link in the way is refused. A hard link's target
    is an earlier entry by the same rules. Devices are counted and left out: every root is mounted nodev.
    Extended attributes, overlay's and security ones among them, are never set. Setuid bits are kept: every root is
    mounted nosuid. The target's own mode and owner stay the caller's.

    `chown` gives files the archive's uid and gid; by default where we are root. Nothing is fsynced, and after an
    error the target is left half filled: unpack into a scratch directory and rename it.
    Raises ImageError, with the entry and the offset."""
    with ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            source = stack.enter_context(_open(source))
        if not isinstance(target, int):
            target = _open_target(target)
            stack.callback(os.close, target)
        stream = TarStream(source, str(getattr(source, "name", "archive")), limits)
        tree = stack.enter_context(_Tree(target, limits, os.geteuid() == 0 if chown is None else chown))
        return _unpack(stream, tree)


def _open(source: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(source, "rb", buffering=128 * 1024)
    except OSError as error:
        raise ImageError(f"cannot unpack {os.fspath(source)}: {error.strerror}") from error


def _open_target(target: str | os.PathLike[str]) -> int:
    try:
        return os.open(target, DIRECTORY)
    except OSError as error:
        raise ImageError(f"cannot unpack into {os.fspath(target)}: {error.strerror}") from error


def _unpack(stream: TarStream, tree: _Tree) -> ArchiveSummary:
    counts = dict.fromkeys(COUNTER.values(), 0)
    data_bytes = 0
    for entry in stream:
        try:
            tree.place(entry, stream.data())
        except _Refused as refused:
            raise stream.refusal(str(refused)) from refused
        except OSError as error:
            raise stream.refusal(f"cannot make this {entry.kind.value}: {error.strerror or error}") from error
        counts[COUNTER[entry.kind]] += 1
        data_bytes += entry.size
    try:
        tree.finish()
    except (OSError, _Refused) as error:
        raise stream.refusal(f"cannot set the mode, owner and time of the directories: {error}") from error
    return ArchiveSummary(data_bytes=data_bytes, **counts)


class _Refused(Exception):
    """An entry that must not be unpacked; _unpack() adds where it is."""


class _Walk:
    """The directory the unpacker stands in: one open descriptor for each component from the target down.

    Going to the next directory reuses the descriptors of the common ancestors. `names` are real directories
    only: a symbolic link is replaced by what it points at, and its `..` closes a descriptor instead of asking the
    kernel, so there is no way to climb above the first one."""

    def __init__(self, root: int, limits: UnpackLimits) -> None:
        self.names: list[bytes] = []
        self._fds = [root]
        self._limits = limits

    @property
    def fd(self) -> int:
        return self._fds[-1]

    def path(self, name: bytes) -> bytes:
        """The name in the target of something in this directory."""
        return b"/".join([*self.names, name])

    def leave(self, depth: int = 0) -> None:
        """Go up until `depth` components are left."""
        del self.names[depth:]
        while len(self._fds) > depth + 1:
            os.close(self._fds.pop())

    def enter(self, parts: list[bytes], missing: Callable[[bytes], None] | None = None) -> int:
        """Stand in the directory `parts` below the target; `missing` makes one that is not there."""
        depth = _common(parts, self.names)
        self.leave(depth)
        ahead = parts[depth:][::-1]
        links = 0
        while ahead:
            name = ahead.pop()
            if name == b"..":
                self._up()
            elif not self._down(name, missing):
                links += 1
                ahead += reversed(self._link(name, links))
        return self.fd

    def _up(self) -> None:
        if not self.names:
            raise _Refused("its path leaves the target through a symbolic link")
        self.leave(len(self.names) - 1)

    def _down(self, name: bytes, missing: Callable[[bytes], None] | None) -> bool:
        """Open one directory below; False where `name` is something else."""
        try:
            fd = os.open(name, DIRECTORY, dir_fd=self.fd)
        except NotADirectoryError:
            return False
        except FileNotFoundError:
            if missing is None:
                raise
            missing(name)
            fd = os.open(name, DIRECTORY, dir_fd=self.fd)
        self._fds.append(fd)
        self.names.append(name)
        if len(self.names) > self._limits.max_depth or len(self.path(b"")) > self._limits.max_path:
            raise _Refused(f"its directory is more than {self._limits.max_depth} deep or its path too long")
        return True

    def _link(self, name: bytes, links: int) -> list[bytes]:
        """The components of the link `name` in this directory, if it may be followed."""
        try:
            target = os.readlink(name, dir_fd=self.fd)
        except OSError as error:
            raise _Refused(f"{show(self.path(name))} is in the way: it is not a directory") from error
        if target.startswith(b"/"):
            raise _Refused(f"{show(self.path(name))} is in the way: it is a link to {show(target)}")
        if links > LINKS:
            raise _Refused("too many symbolic links in its path")
        return [part for part in target.split(b"/") if part not in (b"", b".")]


class _Tree:
    """Makes entries below one directory. Use as a context manager: it owns the descriptors it walks on."""

    def __init__(self, root: int, limits: UnpackLimits, chown: bool) -> None:
        self._limits = limits
        self._chown = chown
        self._here = _Walk(root, limits)
        self._source = _Walk(root, limits)
        self._directories: dict[bytes, Entry | None] = {}
        self._makers: dict[Kind, Callable[[bytes, Entry, Iterator[bytes]], None]] = {
            Kind.FILE: self._file,
            Kind.DIRECTORY: self._directory,
            Kind.SYMLINK: self._symlink,
            Kind.HARDLINK: self._hardlink,
            Kind.FIFO: self._fifo,
        }

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.leave()
        self._source.leave()

    def place(self, entry: Entry, data: Iterator[bytes]) -> None:
        """Make one entry; what is in its way goes. Raises _Refused or OSError."""
        parts = self._parts(entry.path)
        if entry.kind is Kind.DEVICE:
            return
        if not parts and entry.kind is not Kind.DIRECTORY:
            raise _Refused(f"the root of the image cannot be a {entry.kind.value}")
        if parts:
            self._here.enter(parts[:-1], self._implicit)
            self._makers[entry.kind](parts[-1], entry, data)

    def finish(self) -> None:
        """Give directories their mode, owner and time: last, since filling one needs write permission and
        changes its time, and the deepest first, since a mode may shut the way down."""
        for path in sorted(self._directories, reverse=True):
            entry = self._directories[path]
            fd = self._here.enter(path.split(b"/"))
            if entry is None:
                os.fchmod(fd, 0o755)
            else:
                self._set_metadata(fd, entry)

    def _parts(self, path: bytes) -> list[bytes]:
        """The components of a path in the archive; a leading `/` and `.` components mean nothing."""
        if b"\0" in path:
            raise _Refused("a zero byte in its path")
        if len(path) > self._limits.max_path:
            raise _Refused(f"its path is longer than {self._limits.max_path} bytes")
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise _Refused(f"'..' in {show(path)}")
        if any(len(part) > self._limits.max_name for part in parts):
            raise _Refused(f"a name in its path is longer than {self._limits.max_name} bytes")
        return parts

    def _file(self, name: bytes, entry: Entry, data: Iterator[bytes]) -> None:
        fd = self._replace(name, lambda: os.open(name, NEW_FILE, 0o600, dir_fd=self._here.fd))
        try:
            for chunk in data:
                _write(fd, chunk)
            self._set_metadata(fd, entry)
        finally:
            os.close(fd)

    def _directory(self, name: bytes, entry: Entry, _: Iterator[bytes]) -> None:
        if not self._is_directory(name):
            self._replace(name, lambda: os.mkdir(name, 0o700, dir_fd=self._here.fd))
        self._directories[self._here.path(name)] = entry

    def _implicit(self, name: bytes) -> None:
        """A directory that the archive uses without an entry for it."""
        os.mkdir(name, 0o700, dir_fd=self._here.fd)
        self._directories[self._here.path(name)] = None

    def _symlink(self, name: bytes, entry: Entry, _: Iterator[bytes]) -> None:
        if not entry.link or b"\0" in entry.link or len(entry.link) >= self._limits.max_path:
            raise _Refused("the target of the symbolic link is empty, too long or has a zero byte")
        here = self._here.fd
        self._replace(name, lambda: os.symlink(entry.link, name, dir_fd=here))
        if self._chown:
            os.chown(name, entry.uid, entry.gid, dir_fd=here, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=here, follow_symlinks=False)

    def _hardlink(self, name: bytes, entry: Entry, _: Iterator[bytes]) -> None:
        parts = self._parts(entry.link)
        if not parts:
            raise _Refused("a hard link to the root of the image")
        source, here = self._source.enter(parts[:-1]), self._here.fd
        old = parts[-1]
        found = os.stat(old, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            raise _Refused(f"a hard link to the directory {show(entry.link)}")
        if not self._is_same(name, found):
            self._replace(name, lambda: os.link(old, name, src_dir_fd=source, dst_dir_fd=here, follow_symlinks=False))

    def _fifo(self, name: bytes, entry: Entry, _: Iterator[bytes]) -> None:
        self._replace(name, lambda: os.mkfifo(name, 0o600, dir_fd=self._here.fd))
        fd = os.open(name, NEW_FIFO, dir_fd=self._here.fd)
        try:
            self._set_metadata(fd, entry)
        finally:
            os.close(fd)

    def _set_metadata(self, fd: int, entry: Entry) -> None:
        if self._chown:
            os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode)  # after the owner: a change of owner clears the setuid bit
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _is_directory(self, name: bytes) -> bool:
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=self._here.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    def _is_same(self, name: bytes, found: os.stat_result) -> bool:
        """Whether `name` is already that very file: removing it first would lose what is to be linked."""
        try:
            return os.path.samestat(os.stat(name, dir_fd=self._here.fd, follow_symlinks=False), found)
        except FileNotFoundError:
            return False

    def _replace(self, name: bytes, make: Callable[[], T]) -> T:
        """Make something new under `name`; if the name is taken, what has it is removed, never opened."""
        try:
            return make()
        except FileExistsError:
            self._remove(name)
            return make()

    def _remove(self, name: bytes) -> None:
        try:
            os.unlink(name, dir_fd=self._here.fd)
        except IsADirectoryError:
            try:
                os.rmdir(name, dir_fd=self._here.fd)
            except OSError as error:
                raise _Refused("it would replace a directory that has something in it") from error
            self._directories.pop(self._here.path(name), None)


def _common(one: list[bytes], other: list[bytes]) -> int:
    """How many leading components two paths share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def _write(fd: int, content: bytes) -> None:
    done = os.write(fd, content)
    while done < len(content):
        done += os.write(fd, memoryview(content)[done:])
