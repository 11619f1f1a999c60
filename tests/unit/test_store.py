"""The image store: each archive unpacked once, by its content, and never seen half done."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import stat
import tarfile
import time
from pathlib import Path

import pytest

from diyc.errors import HostError, ImageError
from diyc.images.archive import ArchiveSummary, unpack
from diyc.images.store import ImageStore, RootTree
from diyc.images.tarstream import UnpackLimits
from diyc.jobs import ImageSpec

LATER = 3600.0


def archive(path: Path, text: str = "hello") -> ImageSpec:
    """A tar image with one file; returns the spec that asks for it."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("etc/motd")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text.encode()))
    return ImageSpec(name="small", kind="tar", source=str(path))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def later() -> float:
    """A clock an hour ahead, for which no file is too fresh to be remembered."""
    return time.time() + LATER


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was unpacked since the start of the test."""
    calls: list[str] = []

    def counted(source: io.BufferedReader, target: str, *, limits: UnpackLimits, chown: bool | None) -> ArchiveSummary:
        calls.append(source.name)
        return unpack(source, target, limits=limits, chown=chown)

    monkeypatch.setattr("diyc.images.store.unpack", counted)
    return calls


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = hashlib.file_digest

    def counted(file: io.BufferedReader, name: str) -> object:
        calls.append(file.name)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return calls


def test_tar_is_unpacked_below_its_hash(tmp_path: Path, state: Path) -> None:
    spec = archive(tmp_path / "a.tar")
    tree = ImageStore(str(state)).ensure(spec)
    expected = state / "images" / f"sha256-{digest(tmp_path / 'a.tar')}" / "rootfs"
    assert tree == RootTree(path=str(expected), binds=(), image="small")
    assert (expected / "etc/motd").read_text() == "hello"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (state, state / "images", expected.parent, expected)]
    assert modes == [0o700, 0o700, 0o700, 0o755]


def test_tar_is_unpacked_once(tmp_path: Path, state: Path, unpacked: list[str]) -> None:
    spec = archive(tmp_path / "a.tar")
    trees = {ImageStore(str(state)).ensure(spec) for _ in range(3)}
    assert len(trees) == 1
    assert len(unpacked) == 1


def test_same_content_under_two_names_shares_a_tree(tmp_path: Path, state: Path, unpacked: list[str]) -> None:
    one = archive(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    two = ImageSpec(name="other", kind="tar", source=str(tmp_path / "b.tar"))
    images = ImageStore(str(state))
    assert images.ensure(one).path == images.ensure(two).path
    assert len(unpacked) == 1


def test_known_archive_is_not_read_again(tmp_path: Path, state: Path, hashed: list[str]) -> None:
    spec = archive(tmp_path / "a.tar")
    for _ in range(3):
        ImageStore(str(state), clock=later).ensure(spec)
    assert len(hashed) == 1


def test_archive_changed_a_moment_ago_is_read_again(tmp_path: Path, state: Path, hashed: list[str]) -> None:
    spec = archive(tmp_path / "a.tar")
    for _ in range(2):
        ImageStore(str(state)).ensure(spec)
    assert len(hashed) == 2


def test_changed_archive_gives_a_new_tree_also_with_its_old_time(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state), clock=later)
    spec = archive(tmp_path / "a.tar", "one")
    old = images.ensure(spec).path
    times = (tmp_path / "a.tar").stat()
    archive(tmp_path / "a.tar", "two")
    os.utime(tmp_path / "a.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    new = images.ensure(spec).path
    assert (Path(old, "etc/motd").read_text(), Path(new, "etc/motd").read_text()) == ("one", "two")


@pytest.mark.parametrize("note", [b"", b"{", b"[1]", b'{"stamp": 1}', b"\xff"], ids=repr)
def test_damaged_index_is_ignored(note: bytes, tmp_path: Path, state: Path, hashed: list[str]) -> None:
    images = ImageStore(str(state), clock=later)
    spec = archive(tmp_path / "a.tar")
    path = images.ensure(spec).path
    for index in (state / "images/index").iterdir():
        index.write_bytes(note)
    assert images.ensure(spec).path == path
    assert len(hashed) == 2


def test_hash_in_the_index_that_is_a_path_is_ignored(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state), clock=later)
    spec = archive(tmp_path / "a.tar")
    path = images.ensure(spec).path
    (index,) = (state / "images/index").iterdir()
    index.write_text(json.dumps(json.loads(index.read_text()) | {"sha256": "../../../etc"}))
    assert images.ensure(spec).path == path


def test_removed_tree_is_unpacked_again(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state), clock=later)
    spec = archive(tmp_path / "a.tar")
    tree = Path(images.ensure(spec).path)
    (tree / "etc/motd").unlink()
    (tree / "etc").rmdir()
    tree.rmdir()
    tree.parent.rmdir()
    assert Path(images.ensure(spec).path, "etc/motd").exists()


@pytest.mark.parametrize("prefix", ["", "sha256:"])
def test_right_hash_is_accepted(prefix: str, tmp_path: Path, state: Path) -> None:
    spec = archive(tmp_path / "a.tar")
    asked = ImageSpec("small", "tar", spec.source, sha256=prefix + digest(tmp_path / "a.tar"))
    assert ImageStore(str(state)).ensure(asked).image == "small"


def test_wrong_hash_is_refused_with_both_before_anything_is_unpacked(
    tmp_path: Path, state: Path, unpacked: list[str]
) -> None:
    spec = archive(tmp_path / "a.tar")
    asked = ImageSpec("small", "tar", spec.source, sha256="0" * 64)
    with pytest.raises(ImageError) as caught:
        ImageStore(str(state)).ensure(asked)
    assert "0" * 64 in str(caught.value)
    assert digest(tmp_path / "a.tar") in str(caught.value)
    assert unpacked == []


def test_wrong_hash_is_refused_also_when_the_tree_is_there(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state), clock=later)
    spec = archive(tmp_path / "a.tar")
    images.ensure(spec)
    with pytest.raises(ImageError, match="0" * 64):
        images.ensure(ImageSpec("small", "tar", spec.source, sha256="0" * 64))


@pytest.mark.parametrize("wrong", ["../../x", "sha256:../../x", "", "g" * 64, "0" * 63, "0" * 64 + "\n"])
def test_hash_that_is_none_is_refused(wrong: str, tmp_path: Path, state: Path) -> None:
    spec = archive(tmp_path / "a.tar")
    with pytest.raises(ImageError, match="64 hexadecimal digits"):
        ImageStore(str(state)).ensure(ImageSpec("small", "tar", spec.source, sha256=wrong))


def test_refused_archive_leaves_nothing_in_the_store(tmp_path: Path, state: Path) -> None:
    spec = archive(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:600])
    with pytest.raises(ImageError, match=r"a\.tar"):
        ImageStore(str(state)).ensure(spec)
    assert sorted(os.listdir(state / "images")) == ["index", "lock"]


def test_empty_archive_is_refused(tmp_path: Path, state: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(ImageError, match="nothing in it"):
        ImageStore(str(state)).ensure(ImageSpec("small", "tar", str(tmp_path / "a.tar")))


def test_leftovers_of_a_killed_unpack_are_removed(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state))
    leftover = state / "images/.unpacking-0123/rootfs/closed"
    leftover.mkdir(parents=True)
    (leftover / "file").write_text("half")
    leftover.chmod(0o500)
    images.ensure(archive(tmp_path / "a.tar"))
    assert not (state / "images/.unpacking-0123").exists()


def test_archive_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = archive(tmp_path / "a.tar")

    def touched(source: io.BufferedReader, target: str, *, limits: UnpackLimits, chown: bool | None) -> ArchiveSummary:
        with open(tmp_path / "a.tar", "ab") as file:
            file.write(b"more")
        return unpack(source, target, limits=limits, chown=chown)

    monkeypatch.setattr("diyc.images.store.unpack", touched)
    with pytest.raises(ImageError, match="changed while"):
        ImageStore(str(state)).ensure(spec)
    assert sorted(os.listdir(state / "images")) == ["index", "lock"]


def _ensure_and_tell(state: str, spec: ImageSpec, told: multiprocessing.SimpleQueue[tuple[str, int]]) -> None:
    path = ImageStore(state).ensure(spec).path
    told.put((path, os.stat(path).st_ino))


def test_supervisors_at_the_same_time_unpack_once(tmp_path: Path, state: Path) -> None:
    context = multiprocessing.get_context("fork")
    spec, told = archive(tmp_path / "a.tar"), context.SimpleQueue()
    others = [context.Process(target=_ensure_and_tell, args=(str(state), spec, told)) for _ in range(4)]
    for process in others:
        process.start()
    answers = {told.get() for _ in others}
    for process in others:
        process.join()
    assert len(answers) == 1, "every process got the same directory, and nobody replaced it"


def test_directory_is_used_in_place(tmp_path: Path, state: Path) -> None:
    (tmp_path / "rootfs/bin").mkdir(parents=True)
    tree = ImageStore(str(state)).ensure(ImageSpec("mine", "dir", str(tmp_path / "rootfs")))
    assert tree == RootTree(path=str(tmp_path / "rootfs"), binds=(), image="mine")


def test_directory_must_be_one_with_something_in_it(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, reason in {"empty": "is empty", "file": "Not a directory", "gone": "No such file"}.items():
        with pytest.raises(ImageError, match=reason):
            images.ensure(ImageSpec("mine", "dir", str(tmp_path / name)))


def test_fifo_in_the_place_of_an_archive_is_refused_at_once(tmp_path: Path, state: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ImageError, match="not a regular file"):
        ImageStore(str(state)).ensure(ImageSpec("small", "tar", str(tmp_path / "a.tar")))


def test_directory_in_the_place_of_an_archive_is_refused(tmp_path: Path, state: Path) -> None:
    with pytest.raises(ImageError, match="Is a directory"):
        ImageStore(str(state)).ensure(ImageSpec("small", "tar", str(tmp_path)))


def test_unknown_kinds_and_misplaced_keys_are_refused(tmp_path: Path, state: Path) -> None:
    images = ImageStore(str(state))
    for spec in (ImageSpec("x", "oci", "/x"), ImageSpec("x", "tar"), ImageSpec("x", "dir", str(tmp_path), "0" * 64)):
        with pytest.raises(ImageError, match="image 'x'"):
            images.ensure(spec)


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_state_dir_that_others_may_write_to_is_refused(mode: int, state: Path) -> None:
    state.mkdir()
    state.chmod(mode)
    with pytest.raises(HostError, match="chmod go-w"):
        ImageStore(str(state))


def test_images_directory_that_others_may_write_to_is_refused(state: Path) -> None:
    (state / "images").mkdir(parents=True)
    state.chmod(0o700)
    (state / "images").chmod(0o777)
    with pytest.raises(HostError, match="chmod go-w"):
        ImageStore(str(state))


def test_state_dir_of_somebody_else_is_refused(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(HostError, match="belongs to user"):
        ImageStore(str(state))


def test_state_dir_that_is_a_file_is_refused(state: Path) -> None:
    state.write_text("")
    with pytest.raises(HostError, match="cannot use"):
        ImageStore(str(state))


def test_new_state_dir_is_private_whatever_the_umask(state: Path) -> None:
    old = os.umask(0)
    try:
        ImageStore(str(state))
    finally:
        os.umask(old)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / "images/index").stat().st_mode) == 0o700


def test_host_image_goes_to_the_runtime_dir_and_away_again(tmp_path: Path, state: Path) -> None:
    (tmp_path / "host/usr").mkdir(parents=True)
    images = ImageStore(str(state), str(tmp_path / "run"), host=str(tmp_path / "host"))
    tree = images.ensure(ImageSpec())
    assert tree.image == "host"
    assert Path(tree.path).parent == tmp_path / "run"
    assert images.ensure(ImageSpec()) == tree
    images.close()
    assert not Path(tree.path).exists()
