"""Root filesystems: what vanishes, what is refused, what a mount gives, and what a hostile image gets."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diyc.results import Result
from needs import require
from system.helpers import MIB, Facts, Jobs, on_uvloop

pytestmark = pytest.mark.privileged


def fingerprint(directory: Path) -> str:
    """A hash over the names, owners, modes, times and contents of everything below."""
    digest = hashlib.sha256()
    for where, names, files in os.walk(directory):
        names.sort()
        for name in sorted(files) + names:
            path = os.path.join(where, name)
            found = os.lstat(path)
            digest.update(f"{path} {found.st_mode} {found.st_uid}:{found.st_gid} {found.st_mtime_ns}\n".encode())
            if stat.S_ISREG(found.st_mode):
                digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def created(jobs: Jobs, *paths: str, **keys: Any) -> dict[str, int]:
    """For each path the errno of making a file there."""
    facts = Facts.of(jobs.run(jobs.probe("create", *paths, **keys)))
    return {path: int(facts.one(path)) for path in paths}


@pytest.fixture
def image(jobs: Jobs) -> Path:
    """An image of this test's own."""
    return Path(shutil.copytree(jobs.image, jobs.path / "image"))


# ---- the three kinds of image ----


def test_image_host_has_the_hosts_programs_and_none_of_its_files(jobs: Jobs) -> None:
    canary = jobs.path / "canary"
    canary.touch()
    script = f"grep -q root /etc/passwd && ls / && test ! -e {canary} && test ! -e /etc/shadow && test ! -e /boot"
    result = jobs.run(jobs.of("host", "sh", "-c", script))
    assert result.verdict == "ok", result.stderr
    names = set(result.stdout.decode().split())
    programs = {"bin", "lib", "lib32", "lib64", "libx32", "sbin"}
    assert names - programs == {
        *("dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var"),
    }


def test_image_host_cannot_be_written_to_where_it_is_the_hosts(jobs: Jobs) -> None:
    script = "touch /usr/made /usr/bin/made /bin/made; touch /tmp/made /etc/made /var/made && echo own"
    result = jobs.run(jobs.of("host", "sh", "-c", script))
    assert result.stdout == b"own\n"
    assert result.stderr.count(b"Read-only file system") == 3
    assert not os.path.exists("/usr/made")


def archive(image: Path, directory: Path, compression: str) -> Path:
    """The image as a tarball."""
    suffix = {"none": "", "gz": ".gz", "xz": ".xz", "zst": ".zst"}[compression]
    path = directory / f"image.tar{suffix}"
    mode = {"none": "w", "gz": "w:gz", "xz": "w:xz", "zst": "w"}[compression]
    plain = path.with_suffix("") if compression == "zst" else path
    with tarfile.open(plain, mode) as tar:
        tar.add(image, arcname=".")
    if compression == "zst":
        if not shutil.which("zstd"):
            pytest.skip("needs the program zstd")
        subprocess.run(["zstd", "-q", "--rm", plain, "-o", path], check=True)
    return path


@pytest.mark.parametrize("compression", ["none", "gz", "xz", "zst"])
def test_image_tar_is_unpacked_once_and_run_from(jobs: Jobs, compression: str) -> None:
    tar = archive(jobs.image, jobs.path, compression)
    spec = jobs.probe("report", image=tar, user="worker")

    async def main() -> list[Result]:
        async with jobs.supervisor() as supervisor:
            return [await supervisor.run(spec) for _ in range(2)]

    for result in on_uvloop(main()):
        assert Facts.of(result).one("uid") == "1000 1000 1000"
    (unpacked,) = (jobs.path / "state/images").glob("sha256-*")
    before = fingerprint(unpacked)
    moved = tar.rename(tar.with_name("moved-" + tar.name))
    assert created(jobs, "/made", "/probe", image=moved) == {"/made": 0, "/probe": errno.ETXTBSY}
    assert fingerprint(unpacked) == before
    assert len(list((jobs.path / "state/images").glob("sha256-*"))) == 1


def test_image_tar_keeps_owners_and_modes(jobs: Jobs, image: Path) -> None:
    file = image / "owned"
    file.touch()
    os.chown(file, 1000, 44)
    file.chmod(0o640)
    tar = archive(image, jobs.path, "none")
    assert Facts.of(jobs.run(jobs.probe("look", "/owned", image=tar))).one("/owned") == "1000:44 640"


# ---- writing ----


def test_writable_root_takes_writes_everywhere_and_they_vanish(jobs: Jobs, image: Path) -> None:
    before = fingerprint(image)
    paths = ("/made", "/etc/made", "/etc/passwd", "/probe2")
    script = [created(jobs, *paths, image=image), created(jobs, *paths, image=image)]
    assert script == [dict.fromkeys(paths, 0)] * 2
    assert fingerprint(image) == before
    seen = jobs.report(image=image)
    assert "made" not in seen["root"]


def test_removing_and_overwriting_the_image_changes_only_the_run(jobs: Jobs) -> None:
    image = jobs.path / "busybox"
    require("program.busybox")
    image.joinpath("bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", image / "bin/busybox")
    image.joinpath("bin/sh").symlink_to("busybox")
    image.joinpath("data/deep").mkdir(parents=True)
    image.joinpath("data/file").write_text("as it was")
    before = fingerprint(image)
    script = "echo x > /data/file; chmod 777 /data; /bin/busybox rm -r /data /bin/sh; /bin/busybox ls /"
    result = jobs.run(jobs.of(image, "/bin/sh", "-c", script))
    assert (result.verdict, result.stdout.split()) == ("ok", [b"bin", b"dev", b"etc", b"proc", b"sys"]), result.stderr
    assert fingerprint(image) == before


def test_read_only_root_refuses_writes_everywhere(jobs: Jobs) -> None:
    jobs.path.joinpath("given").mkdir()
    mounts = [
        {"type": "bind", "source": str(jobs.path / "given"), "target": "/given/deep"},
        {"type": "tmpfs", "target": "/scratch"},
    ]
    paths = ("/made", "/etc/made", "/etc/hosts", "/etc/passwd", "/given/made")
    assert created(jobs, *paths, writable=False, mounts=mounts) == dict.fromkeys(paths, errno.EROFS)


def test_read_only_root_leaves_bind_and_tmpfs_mounts_writable(jobs: Jobs) -> None:
    given = jobs.path / "given"
    given.mkdir()
    mounts = [
        {"type": "bind", "source": str(given), "target": "/given/deep"},
        {"type": "tmpfs", "target": "/scratch"},
    ]
    paths = ("/given/deep/made", "/scratch/made", "/dev/shm/made")
    assert created(jobs, *paths, writable=False, mounts=mounts) == dict.fromkeys(paths, 0)
    assert os.listdir(given) == ["made"]


def test_concurrent_runs_do_not_see_each_others_writes(jobs: Jobs) -> None:
    script = "test ! -e /tmp/made && echo mine > /tmp/made && sleep 0.2"
    results = list(on_uvloop(jobs.repeated(jobs.of("host", "sh", "-c", script))))
    assert {result.verdict for result in results} == {"ok"}


# ---- mounts ----


def test_bind_mount_shows_the_hosts_directory_as_roots(jobs: Jobs) -> None:
    given = jobs.path / "given"
    given.mkdir()
    given.joinpath("file").touch(mode=0o600)
    mount = {"type": "bind", "source": str(given), "target": "/given"}
    facts = Facts.of(jobs.run(jobs.probe("look", "/given", "/given/file", mounts=[mount])))
    assert facts.one("/given").startswith("0:0 ")
    assert facts.one("/given/file") == "0:0 600"
    assert created(jobs, "/given/new", "/given/file", mounts=[mount]) == {"/given/new": 0, "/given/file": 0}
    assert (given / "new").stat().st_uid == os.getuid()


def test_bind_mount_gives_ids_of_the_container_to_what_users_make(jobs: Jobs) -> None:
    given = jobs.path / "given"
    given.mkdir()
    given.chmod(0o777)
    mount = {"type": "bind", "source": str(given), "target": "/given"}
    assert created(jobs, "/given/new", mounts=[mount], user="1000:44") == {"/given/new": 0}
    assert ((given / "new").stat().st_uid, (given / "new").stat().st_gid) == (1000, 44)


def test_bind_mount_of_a_file(jobs: Jobs) -> None:
    file = jobs.path / "file"
    file.write_text("from the host")
    mount = {"type": "bind", "source": str(file), "target": "/deep/file"}
    result = jobs.run(jobs.of("host", "sh", "-c", "cat /deep/file; echo changed > /deep/file", mounts=[mount]))
    assert (result.verdict, result.stdout) == ("ok", b"from the host")
    assert file.read_text() == "changed\n"


@pytest.mark.parametrize("target", ["/given", "/etc"])
def test_read_only_bind_mount_cannot_be_written_to(jobs: Jobs, target: str) -> None:
    given = jobs.path / "given"
    given.mkdir()
    given.joinpath("file").touch(mode=0o666)
    mount = {"type": "bind", "source": str(given), "target": target, "read_only": True}
    paths = (f"{target}/new", f"{target}/file")
    assert created(jobs, *paths, mounts=[mount]) == dict.fromkeys(paths, errno.EROFS)
    assert os.listdir(given) == ["file"]


def test_read_only_bind_mount_of_a_file_cannot_be_written_to(jobs: Jobs) -> None:
    file = jobs.path / "file"
    file.touch(mode=0o666)
    mount = {"type": "bind", "source": str(file), "target": "/file", "read_only": True}
    assert created(jobs, "/file", mounts=[mount]) == {"/file": errno.EROFS}


def test_tmpfs_mount_holds_its_size_and_no_more(jobs: Jobs) -> None:
    mount = {"type": "tmpfs", "target": "/scratch", "size": "1MiB"}
    facts = Facts.of(jobs.run(jobs.probe("write", "/scratch/file", str(2 * MIB), mounts=[mount])))
    assert (facts.number("errno"), facts.number("written")) == (errno.ENOSPC, MIB)


def test_read_only_tmpfs_mount_cannot_be_written_to(jobs: Jobs) -> None:
    mount = {"type": "tmpfs", "target": "/empty", "read_only": True}
    assert created(jobs, "/empty/made", mounts=[mount]) == {"/empty/made": errno.EROFS}


def test_mounts_within_mounts_show_whatever_their_order(jobs: Jobs) -> None:
    given = jobs.path / "given"
    given.mkdir()
    given.joinpath("file").touch()
    outer = {"type": "tmpfs", "target": "/outer"}
    inner = {"type": "bind", "source": str(given), "target": "/outer/in"}
    for mounts in ([outer, inner], [inner, outer]):
        facts = Facts.of(jobs.run(jobs.probe("look", "/outer/in/file", mounts=mounts)))
        assert facts.one("/outer/in/file").startswith("0:0"), [mount["type"] for mount in mounts]


def test_mount_upon_a_directory_of_the_image_covers_it(jobs: Jobs, image: Path) -> None:
    image.joinpath("data").mkdir()
    image.joinpath("data/file").touch()
    mount = {"type": "tmpfs", "target": "/data"}
    facts = Facts.of(jobs.run(jobs.probe("look", "/data/file", image=image, mounts=[mount])))
    assert facts.one("/data/file") == f"errno {errno.ENOENT}"


# ---- images that lack something, and hostile ones ----


def test_image_without_any_directory_works(jobs: Jobs, probe: Path) -> None:
    image = jobs.path / "bare"
    image.mkdir()
    shutil.copy(probe, image / "probe")
    facts = Facts.of(jobs.run(jobs.probe("report", image=image)))
    assert sorted(facts["root"]) == ["dev", "etc", "probe", "proc", "sys"]
    assert facts.one("etc_hostname") == "test"
    assert os.listdir(image) == ["probe"]


def test_image_that_only_root_may_enter_works(jobs: Jobs, image: Path) -> None:
    image.chmod(0o700)
    assert jobs.report(image=image).one("uid") == "0 0 0"


@pytest.fixture
def canaries(jobs: Jobs) -> Path:
    """A directory of the host that everybody may write to: look at it with unchanged()."""
    directory = jobs.path / "canaries"
    for name in ("", "proc", "sys", "dev", "etc", "etc/nested", "dev/pts", "dev/shm"):
        directory.joinpath(name).mkdir()
        directory.joinpath(name).chmod(0o777)
    for name in ("hostname", "hosts", "resolv.conf"):
        directory.joinpath("etc", name).write_text("canary")
        directory.joinpath("etc", name).chmod(0o666)
    return directory


@contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Neither a directory nor the host's mounts may be changed by what happens inside."""
    before, mounts = fingerprint(directory), Path("/proc/self/mountinfo").read_text()
    yield
    assert fingerprint(directory) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
@pytest.mark.parametrize("kind", ["absolute", "relative", "inside", "dangling"])
def test_image_whose_mount_points_are_links_is_refused(
    jobs: Jobs, image: Path, canaries: Path, name: str, kind: str
) -> None:
    image.joinpath("elsewhere").mkdir()
    targets = {
        "absolute": f"{canaries}/{name}",
        "relative": f"../../../../../../../..{canaries}/{name}",
        "inside": "elsewhere",
        "dangling": "/nowhere",
    }
    image.joinpath(name).symlink_to(targets[kind])
    with unchanged(canaries):
        result = jobs.run(jobs.probe("report", image=image))
    assert result.verdict == "infra", result.stdout
    assert result.error is not None
    assert (result.error["errno"], result.error["target"]) == (errno.ELOOP, f"/{name}")


@pytest.mark.parametrize(
    "target", ["{canaries}/etc", "../../../../../../../..{canaries}/etc", "/proc/self/cwd", "/dev"]
)
def test_image_whose_etc_is_a_link_writes_nothing_outside(jobs: Jobs, image: Path, canaries: Path, target: str) -> None:
    shutil.rmtree(image / "etc")
    image.joinpath("etc").symlink_to(target.format(canaries=canaries))
    with unchanged(canaries):
        assert jobs.run(jobs.probe("exit", "0", image=image)).verdict in ("ok", "infra")


def test_image_whose_etc_files_are_links_writes_nothing_outside(jobs: Jobs, image: Path, canaries: Path) -> None:
    for name in ("hostname", "hosts", "resolv.conf"):
        image.joinpath("etc", name).symlink_to(canaries / "etc" / name)
    with unchanged(canaries):
        assert jobs.report(image=image).one("etc_hostname") == "test"


@pytest.mark.parametrize("name", ["etc", "target"])
def test_image_cannot_reach_the_supervisors_open_directories(
    jobs: Jobs, image: Path, canaries: Path, name: str
) -> None:
    """A link to /proc/self/fd/N leads to where the supervisor has it open, as long as the child has not closed it."""
    shutil.rmtree(image / "etc")
    opened = os.open(canaries / "etc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        image.joinpath(name).symlink_to(f"/proc/self/fd/{opened}")
        mounts = [{"type": "tmpfs", "target": "/target/made"}, {"type": "tmpfs", "target": "/target/nested"}]
        with unchanged(canaries):
            jobs.run(jobs.probe("exit", "0", image=image, mounts=mounts if name == "target" else []))
    finally:
        os.close(opened)


@pytest.mark.parametrize("link", ["{canaries}/etc", "/etc", "../../../../../../../..{canaries}/etc"])
def test_mount_target_that_is_a_link_stays_inside(jobs: Jobs, image: Path, canaries: Path, link: str) -> None:
    image.joinpath("target").symlink_to(link.format(canaries=canaries))
    given = jobs.path / "given"
    given.mkdir()
    for mount in ({"type": "bind", "source": str(given), "target": "/target"}, {"type": "tmpfs", "target": "/target"}):
        with unchanged(canaries):
            result = jobs.run(jobs.probe("create", "/target/made", image=image, mounts=[mount]))
        assert result.verdict in ("ok", "infra")


def test_image_with_devices_gives_none(jobs: Jobs, image: Path) -> None:
    os.mknod(image / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(image / "disk", 0o666 | stat.S_IFBLK, os.makedev(254, 0))
    paths = ("/null", "/disk")
    assert created(jobs, *paths, image=image) == dict.fromkeys(paths, errno.EACCES)


def test_bind_mount_with_devices_gives_none(jobs: Jobs) -> None:
    given = jobs.path / "given"
    given.mkdir()
    os.mknod(given / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    mount = {"type": "bind", "source": str(given), "target": "/given"}
    assert created(jobs, "/given/null", mounts=[mount]) == {"/given/null": errno.EACCES}


EVERY_CAPABILITY = struct.pack("<5I", 0x02000001, 0xFFFFFFFF, 0, 0x1FF, 0)  # VFS_CAP_REVISION_2, effective


def privileged_copy(probe: Path, at: Path) -> None:
    """The probe as a setuid and setgid root program with file capabilities."""
    shutil.copy(probe, at)
    os.chown(at, 0, 0)
    at.chmod(0o6755)
    os.setxattr(at, "security.capability", EVERY_CAPABILITY)


@pytest.mark.parametrize("where", ["image", "bind"])
def test_setuid_program_gives_nothing(jobs: Jobs, image: Path, probe: Path, where: str) -> None:
    given = jobs.path / "given"
    given.mkdir()
    privileged_copy(probe, image / "privileged")
    privileged_copy(probe, given / "privileged")
    command = "/privileged" if where == "image" else "/given/privileged"
    mounts = [{"type": "bind", "source": str(given), "target": "/given"}]
    facts = Facts.of(jobs.run(jobs.of(image, command, "report", user="1000:1000", mounts=mounts)))
    assert (facts.one("uid"), facts.one("gid")) == ("1000 1000 1000", "1000 1000 1000")
    assert {facts.one(f"status.{name}") for name in ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd")} == {"0" * 16}
