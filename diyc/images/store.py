"""Gives each image a directory to run from: in place for `dir`, a skeleton for `host`, and for `tar` a tree
that is unpacked once, named by the archive's SHA-256, and shared by every job and supervisor that uses it.

    state_dir/images/sha256-HEX/rootfs    an unpacked archive (complete, or it would not have this name)
    state_dir/images/.unpacking-HEX       one being unpacked; left by a killed supervisor if nobody holds the lock
    state_dir/images/index/HEX.json       the hash of an archive as it was last seen, so as not to read it again
    state_dir/images/lock                 held while hashing and unpacking"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from io import BufferedReader, FileIO

from diyc.errors import ImageError
from diyc.images.archive import DEFAULT_LIMITS, unpack
from diyc.images.directories import locked, private_directory, remove_tree
from diyc.images.host import HostImage, RootTree
from diyc.images.tarstream import UnpackLimits
from diyc.jobs import ImageSpec

__all__ = ["ImageStore", "RootTree"]

SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
SCRATCH = ".unpacking-"
SETTLED = 2.0  # seconds; a file changed twice within one tick of the kernel's clock looks unchanged


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file's content does."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class ImageStore:
    """The images below `state_dir`. ensure() may block for as long as an archive takes to unpack: call it from
    a thread. Safe to use from several threads and several supervisors at once."""

    def __init__(
        self,
        state_dir: str,
        runtime_dir: str | None = None,
        *,
        host: str = "/",
        limits: UnpackLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.time,
        chown: bool | None = None,
    ) -> None:
        """Make the directories; `runtime_dir` (for the image `host`) is by default one in state_dir. `chown`: whether
        unpacked files get the owners that the archive names, by default where we are root.

        Raises HostError for a directory that others could write to."""
        private_directory(state_dir, "state_dir")
        self._images = private_directory(os.path.join(state_dir, "images"), "state_dir")
        self._index = private_directory(os.path.join(self._images, "index"), "state_dir")
        self._lock = os.path.join(self._images, "lock")
        self._host = HostImage(runtime_dir or os.path.join(state_dir, "run"), host)
        self._limits = limits
        self._chown = chown
        self._clock = clock

    def ensure(self, spec: ImageSpec) -> RootTree:
        """The root filesystem of an image, ready for use. Raises ImageError."""
        if spec.kind == "tar":
            return RootTree(path=self._unpacked(spec), image=spec.name)
        if spec.sha256 is not None:
            raise ImageError(f"image {spec.name!r}: sha256 can be given for a tar image only")
        if spec.kind == "host":
            return self._host.tree()
        if spec.kind == "dir":
            return RootTree(path=_used_in_place(spec), image=spec.name)
        raise ImageError(f"image {spec.name!r}: unknown kind {spec.kind!r}")

    def close(self) -> None:
        """Remove what was made for this supervisor alone; unpacked archives stay."""
        self._host.close()

    def _unpacked(self, spec: ImageSpec) -> str:
        source = os.path.abspath(_source(spec))
        with _open(source, spec) as file, _as_image_error(spec, self._images):
            stamp = _stamp(file)
            known = self._recall(source, stamp)
            if known is None or not os.path.isdir(self._path(known)):
                with locked(self._lock):
                    known = self._unpack(file, source, stamp, spec)
        _verify(known, spec)
        return self._path(known)

    def _path(self, digest: str) -> str:
        return os.path.join(self._images, f"sha256-{digest}", "rootfs")

    def _unpack(self, file: BufferedReader, source: str, stamp: Stamp, spec: ImageSpec) -> str:
        """Hash the archive, and unpack it unless its tree is there already. Called with the lock held."""
        self._remove_leftovers()
        started = self._clock()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _verify(digest, spec)
        if not os.path.isdir(self._path(digest)):
            scratch = os.path.join(self._images, SCRATCH + digest)
            try:
                self._fill(scratch, file, stamp, spec)
                os.rename(scratch, os.path.dirname(self._path(digest)))
            except BaseException:
                with suppress(OSError):  # the next ensure() removes what is left, and says why it cannot
                    remove_tree(scratch)
                raise
        elif _stamp(file) != stamp:
            raise _changed(spec)
        if started - stamp.ctime_ns / 1e9 > SETTLED:
            self._remember(source, stamp, digest)
        return digest

    def _fill(self, scratch: str, file: BufferedReader, stamp: Stamp, spec: ImageSpec) -> None:
        os.mkdir(scratch, 0o700)
        rootfs = os.path.join(scratch, "rootfs")
        os.mkdir(rootfs, 0o700)
        file.seek(0)
        unpack(file, rootfs, limits=self._limits, chown=self._chown)
        if not os.listdir(rootfs):
            raise ImageError(f"image {spec.name!r}: {spec.source} has nothing in it")
        if _stamp(file) != stamp:
            raise _changed(spec)
        os.chmod(rootfs, 0o755)
        _sync(rootfs)

    def _remove_leftovers(self) -> None:
        for name in os.listdir(self._images):
            if name.startswith(SCRATCH):
                remove_tree(os.path.join(self._images, name))

    def _note(self, source: str) -> str:
        return os.path.join(self._index, hashlib.sha256(os.fsencode(source)).hexdigest() + ".json")

    def _recall(self, source: str, stamp: Stamp) -> str | None:
        """The archive's hash, if it was hashed before and has not changed since."""
        try:
            with open(self._note(source), "rb") as file:
                note = json.load(file)
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("stamp") != asdict(stamp):
            return None
        match = SHA256.fullmatch(str(note.get("sha256")))
        return match[1] if match else None

    def _remember(self, source: str, stamp: Stamp, digest: str) -> None:
        path = self._note(source)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump({"source": source, "stamp": asdict(stamp), "sha256": digest}, file)
        os.replace(f"{path}.new", path)


def _source(spec: ImageSpec) -> str:
    if not spec.source:
        raise ImageError(f"image {spec.name!r}: no {spec.kind} is given")
    return spec.source


def _used_in_place(spec: ImageSpec) -> str:
    path = os.path.realpath(_source(spec))
    try:
        names = os.listdir(path)
    except OSError as error:
        raise ImageError(f"image {spec.name!r}: cannot read the directory {path}: {error.strerror}") from error
    if not names:
        raise ImageError(f"image {spec.name!r}: the directory {path} is empty: unpack a root filesystem there")
    return path


def _open(source: str, spec: ImageSpec) -> BufferedReader:
    """Open the archive; a FIFO or a device in its place is refused without waiting for it."""
    try:
        with ExitStack() as stack:
            file = stack.enter_context(FileIO(source, opener=_open_at_once))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(f"image {spec.name!r}: {source} is not a regular file")
            stack.pop_all()
            return BufferedReader(file, 128 * 1024)
    except OSError as error:
        raise ImageError(f"image {spec.name!r}: cannot open {source}: {error.strerror}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def _as_image_error(spec: ImageSpec, where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageError(f"image {spec.name!r}: cannot keep {spec.source} in {where}: {error}") from error


def _stamp(file: BufferedReader) -> Stamp:
    found = os.fstat(file.fileno())
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _verify(digest: str, spec: ImageSpec) -> None:
    if spec.sha256 is None:
        return
    match = SHA256.fullmatch(spec.sha256.lower())
    if match is None:
        raise ImageError(f"image {spec.name!r}: sha256 {spec.sha256!r} is not 64 hexadecimal digits")
    if match[1] != digest:
        raise ImageError(f"image {spec.name!r}: {spec.source} has the SHA-256 {digest}, but {match[1]} was asked for")


def _changed(spec: ImageSpec) -> ImageError:
    return ImageError(f"image {spec.name!r}: {spec.source} changed while it was being read; try again")


def _sync(path: str) -> None:
    """Write the file system of `path` to disk: after a power cut, a tree with its final name is complete."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    finally:
        os.close(fd)
