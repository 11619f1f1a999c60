"""Makes the disks of the machines: kernels, userland, the project with an environment of its own.

Nothing is installed on this host. Programs of the guest run in a mount namespace where /usr is the guest's and all
the rest this host's: so apt, pip and git are configured as here, whatever that is."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm.cache import Cache, digest, tree_digest
from vm.recipe import BOOT_MODULES, KERNELS, MODULES, PACKAGES, SUITE, Host

PROJECT = Path(__file__).resolve().parents[2]
GUEST_FILES = Path(__file__).with_name("guest")
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "mkswap": "util-linux",
    "depmod": "kmod",
    "busybox": "busybox-static",
    "apt-get": "apt",
    "git": "git",
}
MINUTE = 60


class Unavailable(Exception):
    """The bench cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Images:
    """Files that one machine boots from."""

    kernel: Path
    initramfs: Path
    disks: tuple[Path, ...]
    swap: Path


def missing() -> str | None:
    """Why no machine can be made here; None if one can."""
    if os.geteuid() != 0:
        return "the virtual machine bench needs root, to build its disks"
    wanted = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    return f"the virtual machine bench needs the Debian packages: {' '.join(wanted)}" if wanted else None


def images(host: Host, cache: Cache) -> Images:
    """All that `host` boots from, made where it is not in the cache."""
    if why := missing():
        raise Unavailable(why)
    kernel = _kernel(host.kernel, cache)
    root = _root(cache)
    blank = cache.entry("blank", digest("data 1G", "swap 256M"), _make_blank)
    project = _project(root, cache)
    disks = (root / "image", kernel / "modules.image", project / "image", blank / "data.image")
    return Images(kernel / "vmlinuz", kernel / "initramfs", disks, blank / "swap.image")


def run(*command: str | Path, timeout: float = 5 * MINUTE, **options: Any) -> str:
    """What a program says; Unavailable with its words if it fails."""
    try:
        done = subprocess.run(command, check=True, timeout=timeout, text=True, capture_output=True, **options)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} failed ({error.returncode}): {error.stderr.strip()[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {timeout:.0f} s") from error
    return str(done.stdout)


def ext4(tree: Path, image: Path, size: str, *options: str) -> None:
    """An image with the files of `tree`; room that is not used takes none on this host."""
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", *options, "-d", tree, image, size)


# ---- the kernel and its modules ----


def _kernel(series: str, cache: Cache) -> Path:
    """The cache's entry with vmlinuz, initramfs and modules.image of the newest kernel of a series."""
    package, version = _newest_package(KERNELS[series])
    recipe = tree_digest(GUEST_FILES, ["initramfs"])
    key = digest(package, version, recipe, MODULES, BOOT_MODULES)
    return cache.entry(f"kernel{series}", key, functools.partial(_make_kernel, package, version))


@functools.cache
def _newest_package(pattern: str) -> tuple[str, str]:
    """Name and version of the newest package in apt's lists that the pattern matches."""
    text = run("apt-cache", "search", "--names-only", f"^{pattern}$")
    if not text:
        run("apt-get", "update", "-q")
        text = run("apt-cache", "search", "--names-only", f"^{pattern}$")
    names = sorted((line.split()[0] for line in text.splitlines()), key=_version_order)
    if not names:
        raise Unavailable(f"apt knows no package whose name matches {pattern}")
    policy = run("apt-cache", "policy", names[-1])
    (candidate,) = (line.split()[1] for line in policy.splitlines() if line.strip().startswith("Candidate:"))
    return names[-1], candidate


def _version_order(package: str) -> list[int]:
    numbers = package.removeprefix("linux-image-").replace("-", ".").replace("+", ".").split(".")
    return [int(number) for number in numbers if number.isdigit()]


def _make_kernel(package: str, version: str, entry: Path) -> None:
    with tempfile.TemporaryDirectory(dir=entry) as scratch:
        work = Path(scratch)
        run("apt-get", "download", "-q", f"{package}={version}", cwd=work)
        (archive,) = work.glob("*.deb")
        run("dpkg", "-x", archive, work / "all")
        (source,) = (work / "all/lib/modules").iterdir()
        shutil.move(next((work / "all/boot").glob("vmlinuz-*")), entry / "vmlinuz")
        target = work / "guest/lib/modules" / source.name
        _take_modules(source, target)
        run("depmod", "-b", work / "guest", source.name)
        _make_initramfs(work / "guest", source.name, work / "initramfs", entry / "initramfs")
        ext4(target.parent, entry / "modules.image", "600M")


def _take_modules(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / name, target)
    for pattern in MODULES:
        for path in (source / "kernel").glob(pattern):
            place = target / "kernel" / path.relative_to(source / "kernel")
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, place, dirs_exist_ok=True)
            else:
                shutil.copy(path, place)


def _make_initramfs(base: Path, version: str, tree: Path, archive: Path) -> None:
    """A static busybox, the first program, and the modules that it loads in their order."""
    for name in ("bin", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy(GUEST_FILES / "initramfs", tree / "init")
    shutil.copy(shutil.which("busybox") or "busybox", tree / "bin/busybox")
    order = list(dict.fromkeys(path for name in BOOT_MODULES for path in _module_files(base, version, name)))
    for path in order:
        _unpacked(path, tree / "modules" / path.name.removesuffix(".xz"))
    (tree / "modules/order").write_text("".join(f"{path.name.removesuffix('.xz')}\n" for path in order))
    run("sh", "-c", 'find . | busybox cpio -o -H newc >"$1"', "sh", archive, cwd=tree)


def _module_files(base: Path, version: str, name: str) -> Iterable[Path]:
    """A module after all that it needs; nothing for one that is built in."""
    shown = run("modprobe", "-d", base, "-S", version, "--show-depends", name)
    return [Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod ")]


def _unpacked(source: Path, target: Path) -> None:
    if source.suffix == ".xz":
        with open(target, "wb") as file:
            subprocess.run(["xz", "-dc", source], check=True, stdout=file, timeout=MINUTE)
    else:
        shutil.copy(source, target)


# ---- the userland ----


def _root(cache: Cache) -> Path:
    """The cache's entry with the userland as a tree and as an image."""
    sources = _apt_sources()
    customize = tree_digest(GUEST_FILES, ["customize"])
    key = digest(SUITE, PACKAGES, customize, *(path.read_bytes() for path in sources))
    return cache.entry("root", key, functools.partial(_make_root, sources))


def _apt_sources() -> list[Path]:
    """This host's sources of packages, if they offer the suite; without them mmdebstrap has its own idea."""
    found = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    found += sorted(Path("/etc/apt/sources.list.d").glob("*.list"))
    return [path for path in found if path.exists() and SUITE in path.read_text()]


def _make_root(sources: Sequence[Path], entry: Path) -> None:
    without = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
    run(
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(PACKAGES)}",
        f"--customize-hook={GUEST_FILES / 'customize'}",
        *without,
        SUITE,
        entry / "tree",
        *sources,
        timeout=10 * MINUTE,
    )
    ext4(entry / "tree", entry / "image", "2G")


def _make_blank(entry: Path) -> None:
    (entry / "empty").mkdir()
    ext4(entry / "empty", entry / "data.image", "1G")
    with open(entry / "swap.image", "wb") as file:
        file.truncate(256 * 1024**2)
    run("mkswap", "-q", entry / "swap.image")


# ---- the project ----

# Arguments: an empty directory, the guest's tree, the project's directory, then the command. What the guest's tree
# has in /usr is seen there, the project at its place in the guest, and everything else is this host's.
IN_GUEST = r"""
new=$1 tree=$2 project=$3; shift 3
take() {
    if [ -L "$1" ]; then cp -P "$1" "$2"
    elif [ -d "$1" ]; then mkdir "$2" && mount --rbind "$1" "$2"
    else : >"$2" && mount --bind "$1" "$2"; fi
}
mount -t tmpfs -o mode=755 none "$new"
for path in /*; do
    name=${path#/}
    case $name in
        usr|bin|sbin|lib*) ;;
        opt) ;;
        *) take "$path" "$new/$name" ;;
    esac
done
for name in usr bin sbin lib lib32 lib64 libx32; do [ ! -e "$tree/$name" ] || take "$tree/$name" "$new/$name"; done
mkdir "$new/opt"
for path in /opt/*; do [ ! -e "$path" ] || take "$path" "$new/opt/${path#/opt/}"; done
mkdir -p "$new/opt/diyc"
mount --bind "$project" "$new/opt/diyc"
exec chroot "$new" sh -c 'cd /opt/diyc && exec "$@"' sh "$@"
"""


def in_guest(root: Path, project: Path, *command: str, timeout: float = 5 * MINUTE) -> None:
    """Run a program of the guest's userland on this host's kernel, with `project` where the guest has it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PATH": "/usr/sbin:/usr/bin", "PYTHON": "/usr/bin/python3", "DIYC_VM": "off"}
    with tempfile.TemporaryDirectory() as new:
        run(
            *("unshare", "--mount", "--propagation=private", "sh", "-euc", IN_GUEST, "sh"),
            *(new, root / "tree", project),
            *command,
            timeout=timeout,
            env=environment,
        )


def project_files() -> list[str]:
    """The files of the working tree that git knows or would take."""
    listed = run("git", "-c", f"safe.directory={PROJECT}", "ls-files", "-cozd", "--exclude-standard", cwd=PROJECT)
    return sorted({name for name in listed.split("\0") if name and os.path.lexists(PROJECT / name)})


def _project(root: Path, cache: Cache) -> Path:
    """The cache's entry with the working tree and its environment as an image."""
    files = project_files()
    recipe = tree_digest(PROJECT, ["pyproject.toml", "setup.py", "scripts/setup.sh"])
    key = digest(root.name, recipe)
    environment = cache.entry("environment", key, functools.partial(_make_environment, root, files))
    key = digest(environment.name, tree_digest(PROJECT, files))
    return cache.entry("project", key, functools.partial(_make_project, root, environment, files))


def _make_environment(root: Path, files: Sequence[str], entry: Path) -> None:
    with _staged(files, entry) as stage:
        in_guest(root, stage, "scripts/setup.sh", "guest", timeout=10 * MINUTE)
        in_guest(root, stage, ".venv/bin/python", "-m", "compileall", "-q", "-j0", ".venv/lib")
        shutil.move(stage / ".venv", entry / "venv")


def _make_project(root: Path, environment: Path, files: Sequence[str], entry: Path) -> None:
    """The extension is built, and every module compiled as pytest wants it, before the slow machine sees them."""
    with _staged(files, entry) as stage:
        run("cp", "-a", environment / "venv", stage / ".venv")
        in_guest(root, stage, ".venv/bin/python", "setup.py", "-q", "build_ext", "--inplace")
        in_guest(root, stage, ".venv/bin/python", "-m", "compileall", "-q", "-j0", "diyc", "tests", "examples")
        in_guest(root, stage, ".venv/bin/pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests")
        (stage / ".venv/built").touch()
        run("chown", "-hR", "1000:1000", stage)
        ext4(stage, entry / "image", "1G", "-E", "root_owner=1000:1000")


class _staged:
    """A copy of the working tree's files, with their times; gone at the end."""

    def __init__(self, files: Sequence[str], place: Path) -> None:
        self._files = files
        self._scratch = tempfile.TemporaryDirectory(dir=place)

    def __enter__(self) -> Path:
        stage = Path(self._scratch.name, "diyc")
        for name in self._files:
            target = stage / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target, follow_symlinks=False)
        return stage

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()
