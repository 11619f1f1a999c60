"""The image `host`, built from a fake host: what a job needs of /etc is there, and no secret is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from diyc.errors import HostError, ImageError
from diyc.images.host import HostImage

FILES = {
    "etc/ld.so.cache": "cache",
    "etc/ld.so.conf": "include /etc/ld.so.conf.d/*.conf\n",
    "etc/ld.so.conf.d/libc.conf": "/usr/local/lib\n",
    "etc/mime.types": "text/plain txt\n",
    "etc/protocols": "tcp 6 TCP\n",
    "etc/services": "http 80/tcp\n",
    "etc/shells": "/bin/sh\n",
    "etc/ssl/certs/ca-certificates.crt": "bundle",
    "etc/ssl/certs/Own.pem": "own",
    "etc/ssl/private/key.pem": "SECRET",
    "etc/shadow": "root:SECRET",
    "etc/passwd": "root:x:0:0::/root:/bin/sh\nSECRET:x:1000:1000::/:/bin/sh\n",
    "etc/group": "SECRET:x:1000:\n",
    "etc/hosts": "10.0.0.1 SECRET\n",
    "etc/hostname": "SECRET\n",
    "etc/resolv.conf": "nameserver 10.0.0.1 # SECRET\n",
    "etc/machine-id": "SECRET",
    "etc/ssh/ssh_host_key": "SECRET",
    "etc/alternatives/README": "text",
    "usr/lib/os-release": "ID=fake\n",
    "usr/share/zoneinfo/UTC": "TZif",
}
LINKS = {
    "etc/localtime": "/usr/share/zoneinfo/UTC",
    "etc/os-release": "../usr/lib/os-release",
    "etc/ssl/certs/Mozilla.pem": "/usr/share/ca-certificates/mozilla/Mozilla.crt",
    "etc/ssl/certs/0a1b2c3d.0": "Mozilla.pem",
    "etc/alternatives/awk": "/usr/bin/mawk",
    "etc/alternatives/java": "/usr/lib/jvm/java/bin/java",
    "etc/alternatives/awk.1.gz": "/usr/share/man/man1/mawk.1.gz",
    "etc/alternatives/elsewhere": "/opt/product/bin/tool",
}
MERGED = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}


def add_links(host: Path, links: dict[str, str]) -> None:
    for name, target in links.items():
        (host / name).symlink_to(target)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A fake merged-/usr host."""
    root = tmp_path / "fake-host"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(0o644)
    (root / "library-of-somebody").mkdir()
    add_links(root, LINKS | MERGED)
    return root


def build(host: Path, tmp_path: Path) -> Path:
    return Path(HostImage(str(tmp_path / "run"), str(host)).tree().path)


def test_merged_usr_host_gives_its_links_and_one_bind(host: Path, tmp_path: Path) -> None:
    tree = HostImage(str(tmp_path / "run"), str(host)).tree()
    assert tree.binds == ((str(host / "usr"), "/usr"),)
    assert {name: os.readlink(Path(tree.path, name)) for name in MERGED} == MERGED


def test_other_host_gives_mount_points_and_a_bind_each(host: Path, tmp_path: Path) -> None:
    for name in MERGED:
        (host / name).unlink()
        (host / name).mkdir()
    tree = HostImage(str(tmp_path / "run"), str(host)).tree()
    assert set(tree.binds) == {(str(host / name), f"/{name}") for name in ("usr", *MERGED)}
    assert all(Path(tree.path, name).is_dir() and not Path(tree.path, name).is_symlink() for name in MERGED)
    assert "library-of-somebody" not in os.listdir(tree.path)


def test_directories_have_their_modes_whatever_the_umask(host: Path, tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        root = build(host, tmp_path)
    finally:
        os.umask(old)
    modes = {"": 0o755, "tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "etc": 0o755, "etc/ssl/certs": 0o755}
    assert {name: stat.S_IMODE((root / name).stat().st_mode) for name in modes} == modes
    for name in ("usr", "proc", "sys", "dev", "run", "home", "mnt", "srv", "opt"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o755
        assert os.listdir(root / name) == []
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in (root / "etc").iterdir() if _is_file(path))


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def test_nothing_secret_is_in_it(host: Path, tmp_path: Path) -> None:
    root = build(host, tmp_path)
    assert [path for path in root.rglob("*") if _is_file(path) and "SECRET" in path.read_text()] == []
    assert not {"shadow", "ssh", "machine-id", "gshadow"} & set(os.listdir(root / "etc"))
    assert not (root / "etc/ssl/private").exists()


def test_users_and_groups_are_the_minimal_ones(host: Path, tmp_path: Path) -> None:
    root = build(host, tmp_path)
    users = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    groups = [line.split(":") for line in (root / "etc/group").read_text().splitlines()]
    assert {user[0]: int(user[2]) for user in users} == {"root": 0, "daemon": 1, "nobody": 65534}
    assert {group[0]: int(group[2]) for group in groups} == {"root": 0, "daemon": 1, "tty": 5, "nogroup": 65534}
    assert {len(user) for user in users} == {7}
    assert {len(group) for group in groups} == {4}


def test_files_that_a_run_gets_its_own_of_are_there_to_be_mounted_over(host: Path, tmp_path: Path) -> None:
    root = build(host, tmp_path)
    assert [(root / "etc" / name).read_text() for name in ("hostname", "resolv.conf")] == ["", ""]
    assert "127.0.0.1 localhost" in (root / "etc/hosts").read_text()


def test_files_and_links_that_programs_need_are_copied(host: Path, tmp_path: Path) -> None:
    root = build(host, tmp_path)
    copied = ["etc/ld.so.cache", "etc/ld.so.conf.d/libc.conf", "etc/services", "etc/shells", "etc/mime.types"]
    copied += ["etc/protocols", "etc/ssl/certs/ca-certificates.crt", "etc/ssl/certs/Own.pem"]
    assert {name: (root / name).read_text() for name in copied} == {name: FILES[name] for name in copied}
    kept = ["etc/localtime", "etc/os-release", "etc/ssl/certs/Mozilla.pem", "etc/ssl/certs/0a1b2c3d.0"]
    assert {name: os.readlink(root / name) for name in kept} == {name: LINKS[name] for name in kept}


def test_alternatives_of_programs_are_copied_and_of_manuals_not(host: Path, tmp_path: Path) -> None:
    assert sorted(os.listdir(build(host, tmp_path) / "etc/alternatives")) == ["awk", "java"]


def test_link_to_what_the_job_cannot_see_is_copied_as_a_file(host: Path, tmp_path: Path) -> None:
    (host / "etc/ssl/certs/ca-certificates.crt").unlink()
    (host / "etc/pki").mkdir()
    (host / "etc/pki/bundle.pem").write_text("bundle of elsewhere")
    add_links(host, {"etc/ssl/certs/ca-certificates.crt": "/etc/pki/bundle.pem"})
    copy = build(host, tmp_path) / "etc/ssl/certs/ca-certificates.crt"
    assert not copy.is_symlink()
    assert copy.read_text() == "bundle of elsewhere"


def test_file_that_not_everybody_may_read_is_left_out(host: Path, tmp_path: Path) -> None:
    (host / "etc/services").chmod(0o640)
    (host / "etc/shells").unlink()
    add_links(host, {"etc/shells": "/etc/shadow"})
    (host / "etc/shadow").chmod(0o640)
    assert not {"services", "shells"} & set(os.listdir(build(host, tmp_path) / "etc"))


@pytest.mark.parametrize("odd", ["loop", "FIFO", "directory", "huge"])
def test_odd_file_is_left_out(odd: str, host: Path, tmp_path: Path) -> None:
    path = host / "etc/services"
    path.unlink()
    if odd == "loop":
        add_links(host, {"etc/services": "services"})
    elif odd == "FIFO":
        os.mkfifo(path, 0o644)
    elif odd == "directory":
        path.mkdir()
    else:
        path.touch(0o644)
        os.truncate(path, 1024**3)
    assert "services" not in os.listdir(build(host, tmp_path) / "etc")


def test_host_with_nothing_but_usr_is_enough(tmp_path: Path) -> None:
    (tmp_path / "bare/usr").mkdir(parents=True)
    root = build(tmp_path / "bare", tmp_path)
    assert "passwd" in os.listdir(root / "etc")


def test_host_without_usr_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    image = HostImage(str(tmp_path / "run"), str(tmp_path))
    with pytest.raises(ImageError, match="use a dir or tar image"):
        image.tree()
    image.close()
    assert os.listdir(tmp_path / "run") == ["host-root-lock"]


def test_it_is_built_once_and_close_removes_it(host: Path, tmp_path: Path) -> None:
    image = HostImage(str(tmp_path / "run"), str(host))
    descriptors = len(os.listdir("/proc/self/fd"))
    tree = image.tree()
    assert image.tree() is tree
    image.close()
    image.close()
    assert os.listdir(tmp_path / "run") == ["host-root-lock"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_next_start_removes_what_a_killed_supervisor_left_but_nothing_in_use(host: Path, tmp_path: Path) -> None:
    in_use = HostImage(str(tmp_path / "run"), str(host))
    used = Path(in_use.tree().path)
    left = tmp_path / "run/host-root-left"
    (left / "etc").mkdir(parents=True)
    new = HostImage(str(tmp_path / "run"), str(host))
    path = Path(new.tree().path)
    assert not left.exists()
    assert {used.name, path.name, "host-root-lock"} == set(os.listdir(tmp_path / "run"))
    in_use.close()
    new.close()


def test_runtime_dir_that_others_may_write_to_is_refused(host: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(HostError, match="runtime_dir"):
        HostImage(str(tmp_path / "run"), str(host)).tree()
