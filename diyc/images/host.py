"""The image `host`: the host's own /usr, read-only, under a small skeleton with a minimal /etc.

The skeleton is built once for each start of the supervisor. Nothing that says who the host is goes into it
(no machine-id, no host names) and nothing that not everybody may read on the host."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
import threading
from dataclasses import dataclass

from diyc.errors import ImageError
from diyc.images.directories import locked, private_directory, remove_tree

PREFIX = "host-root-"
MAX_FILE = 4 * 1024**2
MAX_LINKS = 8

# What a fresh system's base files say, reduced to the ids a program may reasonably ask for.
GENERATED = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nnogroup:x:65534:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"
    "networks: files\nprotocols: files\nservices: files\nethers: files\nrpc: files\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "hostname": "",
    "resolv.conf": "",
    "profile": "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PATH\numask 022\n",
}
COPIED = ("ld.so.cache", "ld.so.conf", "localtime", "mime.types", "protocols", "services", "shells", "os-release")
COPIED_WHOLE = ("ld.so.conf.d", "ssl/certs")

# Mount points and directories every program expects, with their modes (hier(7)).
DIRECTORIES = {
    "usr": 0o755,
    "proc": 0o755,
    "sys": 0o755,
    "dev": 0o755,
    "run": 0o755,
    "home": 0o755,
    "mnt": 0o755,
    "srv": 0o755,
    "opt": 0o755,
    "root": 0o700,
    "tmp": 0o1777,
    "var": 0o755,
    "var/tmp": 0o1777,
    "etc": 0o755,
    "etc/alternatives": 0o755,
    "etc/ld.so.conf.d": 0o755,
    "etc/ssl": 0o755,
    "etc/ssl/certs": 0o755,
}
PROGRAMS = re.compile(r"s?bin|lib(?:32|64|x32|o32)?")  # what merged-/usr hosts link into /usr (file-hierarchy(7))
MANUALS = re.compile(r"/(?:share/|local/)?man/")


@dataclass(frozen=True, slots=True)
class RootTree:
    """A root filesystem ready for use: `path` is the directory that is the lowest layer.

    `binds` are (host source, absolute target) pairs to be mounted over it, read-only."""

    path: str
    binds: tuple[tuple[str, str], ...] = ()
    image: str = ""


class HostImage:
    """The skeleton of one supervisor in `runtime_dir`, built when first asked for; close() removes it.

    Its directory is kept locked, so that the next start can tell one that a killed supervisor left from one
    in use. `host` is the root of the host's file system."""

    def __init__(self, runtime_dir: str, host: str = "/") -> None:
        self._runtime_dir = runtime_dir
        self._host = host
        self._tree: RootTree | None = None
        self._path: str | None = None
        self._lock: int | None = None
        self._guard = threading.Lock()

    def tree(self) -> RootTree:
        """Build the skeleton, or give the one built before. Raises ImageError, HostError."""
        with self._guard:
            if self._tree is None:
                self._tree = self._built()
            return self._tree

    def close(self) -> None:
        """Remove the skeleton; call it when no run uses it any more."""
        with self._guard:
            if self._path is not None:
                remove_tree(self._path)
            if self._lock is not None:
                os.close(self._lock)
            self._tree = self._path = self._lock = None

    def _built(self) -> RootTree:
        private_directory(self._runtime_dir, "runtime_dir")
        try:
            path = self._new_directory()
            binds = _top_level(path, self._host)
            _etc(os.path.join(path, "etc"), self._host)
            os.chmod(path, 0o755)
        except OSError as error:
            raise ImageError(f"cannot build the image 'host' in {self._runtime_dir}: {error}") from error
        return RootTree(path=path, binds=binds, image="host")

    def _new_directory(self) -> str:
        """A locked directory of our own; those of dead supervisors go."""
        with locked(os.path.join(self._runtime_dir, f"{PREFIX}lock")):
            _remove_abandoned(self._runtime_dir)
            path = tempfile.mkdtemp(prefix=PREFIX, dir=self._runtime_dir)
            self._path = path
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return path


def remove_abandoned_skeletons(runtime_dir: str) -> int:
    """Remove the skeletons that killed supervisors left in `runtime_dir`; how many there were."""
    if not os.path.isdir(runtime_dir):
        return 0
    with locked(os.path.join(runtime_dir, f"{PREFIX}lock")):
        return _remove_abandoned(runtime_dir)


def _remove_abandoned(runtime_dir: str) -> int:
    paths = _abandoned(runtime_dir)
    for path in paths:
        remove_tree(path)
    return len(paths)


def _abandoned(runtime_dir: str) -> list[str]:
    """Skeletons whose supervisor is gone: nobody holds their lock."""
    with os.scandir(runtime_dir) as found:
        paths = [item.path for item in found if item.name.startswith(PREFIX) and item.is_dir(follow_symlinks=False)]
    return [path for path in paths if not _in_use(path)]


def _in_use(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _top_level(root: str, host: str) -> tuple[tuple[str, str], ...]:
    """Make the directories of `root`; return what of the host is to be mounted there.

    On a merged-/usr host /bin, /lib and so on are links into /usr and are copied as links; elsewhere each is a
    mount point of its own."""
    usr = os.path.join(host, "usr")
    if not os.path.isdir(usr):
        raise ImageError(f"the image 'host' needs {usr}, and there is none: use a dir or tar image")
    for name, mode in DIRECTORIES.items():
        _make_directory(os.path.join(root, name), mode)
    binds = [(usr, "/usr")]
    for name in sorted(filter(PROGRAMS.fullmatch, os.listdir(host))):
        source = os.path.join(host, name)
        if os.path.islink(source):
            os.symlink(os.readlink(source), os.path.join(root, name))
        elif os.path.isdir(source):
            _make_directory(os.path.join(root, name), 0o755)
            binds.append((source, f"/{name}"))
    return tuple(binds)


def _etc(etc: str, host: str) -> None:
    for name, text in GENERATED.items():
        _write(os.path.join(etc, name), text.encode())
    for name in COPIED:
        _copy(host, f"/etc/{name}", os.path.join(etc, name))
    for directory in COPIED_WHOLE:
        for name in _names(os.path.join(host, "etc", directory)):
            _copy(host, f"/etc/{directory}/{name}", os.path.join(etc, directory, name), beside=True)
    for name in _names(os.path.join(host, "etc/alternatives")):
        _copy_alternative(os.path.join(host, "etc/alternatives", name), os.path.join(etc, "alternatives", name))


def _copy_alternative(source: str, target: str) -> None:
    """Copy a link that update-alternatives(1) keeps, if it is for a program: /usr/bin/awk is a link to one."""
    if os.path.islink(source):
        text = os.readlink(source)
        if _visible(text, "/etc/alternatives/") and not MANUALS.search(text):
            os.symlink(text, target)


def _copy(host: str, path: str, target: str, beside: bool = False) -> None:
    """Copy one file of the host that everybody may read, if it is there.

    A link to something the job will see too stays a link (`beside`: also one to a file in the same directory,
    which is copied as well); any other is followed, inside `host`."""
    for _ in range(MAX_LINKS):
        real = os.path.join(host, path.lstrip("/"))
        if not os.path.islink(real):
            content = _public_content(real)
            if content is not None:
                _write(target, content)
            return
        text = os.readlink(real)
        if _visible(text, path) or (beside and "/" not in text):
            os.symlink(text, target)
            return
        path = os.path.normpath(os.path.join(os.path.dirname(path), text))


def _visible(link: str, path: str) -> bool:
    """Whether the target of a link found at `path` lies in what the job sees of the host."""
    first = os.path.normpath(os.path.join(os.path.dirname(path), link)).lstrip("/").split("/")[0]
    return first == "usr" or PROGRAMS.fullmatch(first) is not None


def _public_content(path: str) -> bytes | None:
    """A regular file's content; None if there is none, or it is huge or not for everybody to read."""
    try:
        with open(path, "rb", opener=_open_unfollowed) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or not found.st_mode & stat.S_IROTH or found.st_size > MAX_FILE:
                return None
            return file.read(MAX_FILE)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None


def _open_unfollowed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_directory(path: str, mode: int) -> None:
    os.mkdir(path)
    os.chmod(path, mode)  # mkdir's own mode would be cut by the umask


def _write(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
