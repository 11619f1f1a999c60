"""The unpacker on honest archives: what is packed comes out the same, and damage is told with its place."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import random
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diyc.errors import ImageError
from diyc.images.archive import ArchiveSummary, unpack
from diyc.images.tarstream import UnpackLimits, _zstd

Member = tuple[str, bytes, dict[str, Any]]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda content: content,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": lambda content: bytes(_zstd("test").compress(content)),
}


def pack(*members: Member, kind: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of (name, content, TarInfo attributes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content, attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def directory(name: str, **attributes: Any) -> Member:
    return name, b"", {"type": tarfile.DIRTYPE, "mode": 0o755, **attributes}


SMALL_SYSTEM = (
    directory("./", mode=0o700),
    directory("./etc", mtime=1_000_000_001),
    ("./etc/passwd", b"root:x:0:0::/:/bin/sh\n", {"mode": 0o644, "mtime": 1_000_000_002}),
    directory("./usr/bin", mode=0o555, mtime=1_000_000_003),
    ("./usr/bin/su", b"\x7fELF" + bytes(3000), {"mode": 0o4755}),
    ("./usr/bin/sudo", b"", {"type": tarfile.LNKTYPE, "linkname": "./usr/bin/su"}),
    ("./bin", b"", {"type": tarfile.SYMTYPE, "linkname": "usr/bin"}),
    ("./run/fifo", b"", {"type": tarfile.FIFOTYPE, "mode": 0o622}),
    ("./dev/null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    directory("./tmp", mode=0o1777),
)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_tree_comes_out_as_it_was_packed(compression: str, tmp_path: Path) -> None:
    (tmp_path / "misnamed.zip").write_bytes(COMPRESSIONS[compression](pack(*SMALL_SYSTEM)))
    target = tmp_path / "root"
    target.mkdir()

    summary = unpack(tmp_path / "misnamed.zip", target)

    assert summary == ArchiveSummary(
        files=2, directories=4, symlinks=1, hardlinks=1, fifos=1, devices_skipped=1, data_bytes=3026
    )
    assert (target / "etc/passwd").read_text() == "root:x:0:0::/:/bin/sh\n"
    assert (target / "bin/su").read_bytes() == b"\x7fELF" + bytes(3000)
    assert os.readlink(target / "bin") == "usr/bin"
    assert (target / "usr/bin/su").samefile(target / "usr/bin/sudo")
    assert stat.S_ISFIFO((target / "run/fifo").stat().st_mode)
    assert not (target / "dev").exists() or os.listdir(target / "dev") == []


def test_modes_and_times_are_the_archives_also_of_filled_directories(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    unpack(io.BytesIO(pack(*SMALL_SYSTEM)), tmp_path)
    modes = {"usr/bin": 0o555, "usr/bin/su": 0o4755, "tmp": 0o1777, "etc/passwd": 0o644, "run/fifo": 0o622}
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in modes} == modes
    times = {"etc": 1_000_000_001, "etc/passwd": 1_000_000_002, "usr/bin": 1_000_000_003}
    assert {name: (tmp_path / name).stat().st_mtime for name in times} == times
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o711, "the target itself stays as the caller made it"
    os.chmod(tmp_path / "usr/bin", 0o755)


def test_implicit_directories_are_open_to_all_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        unpack(io.BytesIO(pack(("a/b/c", b"x", {}))), tmp_path)
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")] == [0o755, 0o755, 0o644]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "GNU"])
def test_long_names_and_links_come_out_whole(kind: int, tmp_path: Path) -> None:
    name = "/".join([f"directory-{depth:02}" for depth in range(30)]) + "/file"
    link = ("s", b"", {"type": tarfile.SYMTYPE, "linkname": name})
    unpack(io.BytesIO(pack((name, b"deep", {}), link, kind=kind)), tmp_path)
    assert (tmp_path / name).read_bytes() == b"deep"
    assert (tmp_path / "s").read_bytes() == b"deep"


@pytest.mark.parametrize(
    "text, expected",
    [("1234567890.123456789", 1234567890_123456789), ("-1.5", -1_500_000_000), ("7.25", 7_250_000_000)],
)
def test_times_keep_their_sign_and_nanoseconds(text: str, expected: int, tmp_path: Path) -> None:
    unpack(io.BytesIO(pack(("f", b"", {"mtime": 1, "pax_headers": {"mtime": text}}))), tmp_path)
    assert (tmp_path / "f").stat().st_mtime_ns == expected


def test_directories_that_shut_their_owner_out_are_filled_all_the_same(tmp_path: Path) -> None:
    archive = pack(directory("a", mode=0o000), directory("a/b", mode=0o111), ("a/b/f", b"x", {}))
    unpack(io.BytesIO(archive), tmp_path)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o000
    (tmp_path / "a").chmod(0o755)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o111
    (tmp_path / "a/b").chmod(0o755)
    assert (tmp_path / "a/b/f").read_bytes() == b"x"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, bytes(content[:100])))
    unpack(io.BytesIO(pack(("f", bytes(range(256)) * 4, {}))), tmp_path)
    assert (tmp_path / "f").read_bytes() == bytes(range(256)) * 4


def test_name_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    unpack(io.BytesIO(pack(("caf\udce9", b"x", {}), kind=tarfile.GNU_FORMAT)), tmp_path)
    assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9"]


def test_content_of_every_length_around_a_block_is_exact(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(3 * 1024**2)
    sizes = [0, 1, 511, 512, 513, 1024, 1024**2 - 1, 1024**2, 1024**2 + 1, 2 * 1024**2 + 511]
    unpack(io.BytesIO(pack(*((f"f{size}", noise[:size], {}) for size in sizes))), tmp_path)
    assert all((tmp_path / f"f{size}").read_bytes() == noise[:size] for size in sizes)


def test_entry_over_an_earlier_hard_link_leaves_the_other_name_alone(tmp_path: Path) -> None:
    link = ("b", b"", {"type": tarfile.LNKTYPE, "linkname": "a"})
    unpack(io.BytesIO(pack(("a", b"old", {}), link, ("a", b"new", {}))), tmp_path)
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"new", b"old")


def test_target_can_be_a_descriptor_and_stays_open(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        unpack(io.BytesIO(pack(("a/f", b"x", {}))), fd)
        assert os.listdir(fd) == ["a"]
    finally:
        os.close(fd)


def test_own_ids_are_kept_without_chown(tmp_path: Path) -> None:
    unpack(io.BytesIO(pack(("f", b"x", {"uid": 1234, "gid": 1234}))), tmp_path, chown=False)
    assert (tmp_path / "f").stat().st_uid == os.geteuid()


@pytest.mark.privileged
def test_root_gives_files_their_owners_and_keeps_setuid(tmp_path: Path) -> None:
    owner = {"uid": 1234, "gid": 65535}
    link = ("s", b"", {"type": tarfile.SYMTYPE, "linkname": "d/f", **owner})
    fifo = ("p", b"", {"type": tarfile.FIFOTYPE, **owner})
    unpack(io.BytesIO(pack(directory("d", **owner), ("d/f", b"x", {"mode": 0o6755, **owner}), link, fifo)), tmp_path)
    for name in ("d", "d/f", "s", "p"):
        seen = (tmp_path / name).lstat()
        assert (seen.st_uid, seen.st_gid) == (1234, 65535), name
    assert stat.S_IMODE((tmp_path / "d/f").stat().st_mode) == 0o6755


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_archive_cut_anywhere_is_refused_with_its_name(compression: str, tmp_path: Path) -> None:
    noise = random.Random(2).randbytes(2000)
    # Up to the first block of the end marker; compressed, also without the last byte of the checksum.
    archive = pack(("a", b"1" * 600, {}), ("b", noise, {}))[: 4096 + 512]
    whole = COMPRESSIONS[compression](archive)
    shorter = len(whole) - (512 if compression == "plain" else 1)
    for cut in {1, 100, 511, 512, 700, 1500, len(whole) // 2, shorter} & set(range(shorter + 1)):
        source, target = tmp_path / f"cut-{cut}.tar", tmp_path / f"root-{cut}"
        source.write_bytes(whole[:cut])
        target.mkdir()
        with pytest.raises(ImageError, match=str(source)):
            unpack(source, target)


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_flipped_bits_in_compressed_content_are_noticed(compression: str, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(50_000)
    if compression == "zstd":
        zstd = _zstd("test")
        options = {zstd.CompressionParameter.checksum_flag: 1}
        whole = bytearray(zstd.compress(pack(("a", content, {})), options=options))
    else:
        whole = bytearray(COMPRESSIONS[compression](pack(("a", content, {}))))
    whole[len(whole) // 2] ^= 0x10
    with pytest.raises(ImageError, match=r"entry 1 \('a'\).*|cannot read or decompress"):
        unpack(io.BytesIO(whole), tmp_path)


def test_error_names_the_entry_and_the_offset(tmp_path: Path) -> None:
    archive = pack(("first", b"1" * 600, {}), ("second", b"2" * 600, {}))[: 512 + 1024 + 512 + 100]
    with pytest.raises(ImageError, match=r"entry 2 \('second'\), byte 2148 of the archive: .*complete"):
        unpack(io.BytesIO(archive), tmp_path)


def test_frames_one_after_the_other_are_one_archive(tmp_path: Path) -> None:
    archive = pack(("a", random.Random(4).randbytes(5000), {}))
    for name in ("gzip", "xz", "zstd"):
        compress = COMPRESSIONS[name]
        (tmp_path / name).mkdir()
        unpack(io.BytesIO(compress(archive[:3000]) + compress(archive[3000:])), tmp_path / name)
        assert (tmp_path / name / "a").stat().st_size == 5000


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(600), b"hello " * 200], ids=["empty", "zip", "text"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"not a tar archive|is the file complete"):
        unpack(io.BytesIO(content), tmp_path)


def test_bzip2_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="bzip2"):
        unpack(io.BytesIO(b"BZh91AY&SY"), tmp_path)


def test_missing_archive_and_missing_target_are_image_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.tar: No such file"):
        unpack(tmp_path / "gone.tar", tmp_path)
    with pytest.raises(ImageError, match="nowhere: No such file"):
        unpack(io.BytesIO(pack()), tmp_path / "nowhere")


def test_target_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="cannot unpack into"):
        unpack(io.BytesIO(pack(("f", b"", {}))), tmp_path / "link")


def test_missing_zstd_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = COMPRESSIONS["zstd"](pack(("f", b"", {})))

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("diyc.images.tarstream.import_module", missing)
    with pytest.raises(ImageError, match=r"zstd-compressed and the module \S+zstd is missing"):
        unpack(io.BytesIO(archive), tmp_path)


def test_limits_are_the_callers(tmp_path: Path) -> None:
    archive = pack(("a/b/c", b"x" * 2000, {}), ("d", b"", {}))
    unpack(io.BytesIO(archive), tmp_path, limits=UnpackLimits(max_bytes=len(archive), max_entries=2, max_depth=2))
    for limits in (UnpackLimits(max_bytes=2400), UnpackLimits(max_entries=1), UnpackLimits(max_depth=1)):
        with pytest.raises(ImageError, match=r"limit of 2400|more than 1 entries|more than 1 deep"):
            unpack(io.BytesIO(archive), tmp_path, limits=limits)
