"""Archives made to harm: whatever one holds, nothing outside the target changes.

Each case is written header by header, since tarfile refuses to write most of them. A full snapshot of
everything around the target (paths, contents, modes, owners, times, link counts) is compared."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import stat
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diyc.errors import ImageError
from diyc.images.archive import unpack
from diyc.images.tarstream import UnpackLimits

END = bytes(1024)
LIMITS = UnpackLimits(max_bytes=64 * 1024**2, max_entries=20_000)


def number(value: int, width: int) -> bytes:
    """Octal if it fits, else GNU's base-256."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    modulus: int = 256 ** (width - 1)
    return (b"\x80" if value >= 0 else b"\xff") + (value % modulus).to_bytes(width - 1, "big")


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    link: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_000_000_000,
    prefix: bytes = b"",
) -> bytes:
    block = bytearray(512)
    fields = {
        0: name[:100],
        100: number(mode, 8),
        108: number(uid, 8),
        116: number(gid, 8),
        124: number(size, 12),
        136: number(mtime, 12),
        148: b" " * 8,
        156: kind,
        157: link[:100],
        257: b"ustar\x0000",
        345: prefix,
    }
    for offset, value in fields.items():
        block[offset : offset + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def extended(kind: bytes, content: bytes) -> bytes:
    return header(b"././@LongLink", kind, size=len(content)) + padded(content)


def pax(kind: bytes = b"x", **fields: bytes) -> bytes:
    return extended(kind, b"".join(record(key.encode(), value) for key, value in fields.items()))


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while length != (total := len(str(length)) + len(key) + len(value) + 3):
        length = total
    return b"%d %s=%s\n" % (length, key, value)


def file(name: bytes, content: bytes = b"evil", **fields: int | bytes) -> bytes:
    """A regular file; names that do not fit go through a pax header, as GNU and BSD tar write them."""
    long = pax(path=name) if len(name) > 100 else b""
    return long + header(name, size=len(content), **fields) + padded(content)  # type: ignore[arg-type]


def folder(name: bytes, mode: int = 0o755) -> bytes:
    long = pax(path=name) if len(name) > 100 else b""
    return long + header(name, b"5", mode=mode)


def symlink(name: bytes, target: bytes, uid: int = 0) -> bytes:
    long = pax(linkpath=target) if len(target) > 100 else b""
    return long + header(name, b"2", link=target, mode=0o777, uid=uid)


def hardlink(name: bytes, target: bytes, **fields: int) -> bytes:
    long = pax(linkpath=target) if len(target) > 100 else b""
    return long + header(name, b"1", link=target, **fields)  # type: ignore[arg-type]


def overwritten(block: bytes, offset: int, content: bytes) -> bytes:
    """A header with one field replaced and its checksum made right again."""
    changed = bytearray(block)
    changed[offset : offset + len(content)] = content
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def gzip_bomb(mebibytes: int) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = squeeze.compress(header(b"bomb", size=mebibytes * 1024**2))
    return start + b"".join(squeeze.compress(bytes(1024**2)) for _ in range(mebibytes)) + squeeze.flush()


def greedy_xz() -> bytes:
    """A small archive whose xz header asks for a dictionary of 2 GiB."""
    plain = lzma.compress(file(b"f") + END, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    # The dictionary's size is one byte of the block header (38: 2 GiB); the header ends with its CRC32.
    start = 12
    size = (plain[start] + 1) * 4
    block = bytearray(plain[start : start + size])
    block[block.index(b"\x21\x01") + 2] = 38
    block[-4:] = zlib.crc32(bytes(block[:-4])).to_bytes(4, "little")
    return plain[:start] + bytes(block) + plain[start + size :]


@dataclass(frozen=True)
class Case:
    """`expect`: a pattern of the refusal, or the names that must be in the target afterwards.

    `build` gets the absolute path of the directory to attack."""

    build: Callable[[bytes], bytes]
    expect: str | frozenset[bytes]


CASES: dict[str, Case] = {}
X_OUT = symlink(b"x", b"../outside")
S_OUT = symlink(b"s", b"../outside")


def refused(name: str, pattern: str, *parts: bytes | Callable[[bytes], bytes]) -> None:
    _add(name, pattern, parts)


def inside(name: str, names: tuple[bytes, ...], *parts: bytes | Callable[[bytes], bytes]) -> None:
    _add(name, frozenset(names), parts)


def _add(name: str, expect: str | frozenset[bytes], parts: tuple[bytes | Callable[[bytes], bytes], ...]) -> None:
    def build(outside: bytes) -> bytes:
        built = b"".join(part if isinstance(part, bytes) else part(outside) for part in parts)
        return built if built[:1] in (b"\x1f", b"\xfd", b"\x28") else built + END

    assert name not in CASES
    CASES[name] = Case(build, expect)


# Names
inside("absolute path", (), lambda out: file(out + b"/canary"))
inside("absolute path with two slashes", (), lambda out: file(b"/" + out + b"/canary"))
inside("absolute directory", (), lambda out: folder(out, 0o777))
refused("dotdot file", r"'\.\.' in", file(b"../outside/canary"))
refused("dotdot in the middle", r"'\.\.' in", folder(b"a"), file(b"a/../../outside/canary"))
refused("dotdot within the target", r"'\.\.' in", folder(b"a"), file(b"a/../b"))
refused("dotdot after dot", r"'\.\.' in", file(b"./../outside/canary"))
refused("dotdot after double slash", r"'\.\.' in", file(b"a//../..//outside/canary"))
refused("dotdot at the end", r"'\.\.' in", folder(b"a/.."))
refused("dotdot alone as a directory", r"'\.\.' in", folder(b"..", 0o777))
refused("dotdot alone as a link", r"'\.\.' in", symlink(b"..", b"x"))
refused("dotdot after a leading slash", r"'\.\.' in", file(b"/../outside/canary"))
refused("dotdot in the ustar prefix", r"'\.\.' in", file(b"canary", prefix=b"../outside"))
refused("dotdot in a pax path", r"'\.\.' in", pax(path=b"../outside/canary"), file(b"fine"))
refused("dotdot in a global pax path", r"'\.\.' in", pax(b"g", path=b"../outside/canary"), file(b"fine"))
refused("dotdot in a GNU long name", r"'\.\.' in", extended(b"L", b"../outside/canary\0"), file(b"fine"))
refused("dotdot directory to change a mode", r"'\.\.' in", folder(b"../outside", 0o777))
inside("three dots", (b"...",), file(b"..."))
inside("backslashes", (b"..\\outside\\canary",), file(b"..\\outside\\canary"))
refused("empty name", "root of the image", file(b""))
refused("dot as a file", "root of the image", file(b"."))
refused("slash as a link", "root of the image", symlink(b"/", b"../outside"))
refused("dot as a hard link", "root of the image", file(b"f"), hardlink(b"./", b"f"))
inside("dot as a directory without permissions", (b"f",), folder(b"./", 0o000), file(b"./f"))
inside("empty directory name", (b"f",), folder(b"", 0o777), file(b"f"))
refused("zero byte in a pax path", "zero byte", pax(path=b"a\0/../../outside/canary"), file(b"fine"))
inside("control characters", (b"a\n\x1b[2Jb",), file(b"a\n\x1b[2Jb"))
inside("not UTF-8", (b"\xff\xfe\x80",), file(b"\xff\xfe\x80"))
inside("not UTF-8 in pax", (b"\xc3\x28",), pax(path=b"\xc3\x28"), file(b"x"))
inside("longest name", (b"n" * 255,), file(b"n" * 255))
refused("name too long", "longer than 255", file(b"n" * 256))
refused("path too long", "longer than 4096", file(b"a/" * 2048 + b"b"))
refused("too deep", "256 deep", file(b"a/" * 300 + b"b"))
inside("regular file with a trailing slash", (b"f",), header(b"f/", b"0", size=4) + padded(b"evil"))
inside("old directory: a file with a trailing slash", (b"d",), header(b"d/", b"\0"))

# Symbolic links as ancestors, and in the place of what is written
refused("file through an absolute link", "is in the way", lambda out: symlink(b"x", out) + file(b"x/canary"))
refused("file through a relative link", "leaves the target", X_OUT, file(b"x/canary"))
refused("new file through a link", "leaves the target", X_OUT, file(b"x/new"))
refused("directory through a link", "leaves the target", X_OUT, folder(b"x/new"))
refused("link through a link", "leaves the target", X_OUT, symlink(b"x/new", b"y"))
refused("FIFO through a link", "leaves the target", X_OUT, header(b"x/new", b"6"))
refused("implicit directories through a link", "leaves", X_OUT, file(b"x/a/b/c"))
refused("through two links", "leaves", symlink(b"a", b"b"), symlink(b"b", b"../outside"), file(b"a/canary"))
refused(
    "through a link that climbs inside", "leaves", folder(b"a"), symlink(b"x", b"a/../../outside"), file(b"x/canary")
)
refused(
    "through a deep link", "leaves", folder(b"a/b/c"), symlink(b"a/b/c/x", b"../../../../outside"), file(b"a/b/c/x/c")
)
refused("through a link to the parent", "leaves", symlink(b"x", b".."), file(b"x/outside/canary"))
refused("through a link to the root", "is in the way", lambda out: symlink(b"x", b"/") + file(b"x" + out + b"/new"))
refused("through a magic link", "is in the way", symlink(b"x", b"/proc/self/cwd"), file(b"x/new"))
refused("through a link to itself", "too many", symlink(b"a", b"a"), file(b"a/x"))
refused("through a loop", "too many", symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/x"))
refused("link with a trailing slash", "leaves", symlink(b"x/", b"../outside"), file(b"x/canary"))
refused("climbing merged-usr link", "leaves", symlink(b"lib", b"../outside/dir"), file(b"lib/libc.so"))
refused(
    "through a long chain",
    "too many",
    b"".join(symlink(b"l%d" % i, b"l%d" % (i + 1)) for i in range(50)),
    folder(b"l50"),
    file(b"l0/x"),
)
refused("link into the depth", "256 deep", symlink(b"x", b"/".join([b"d"] * 300)), file(b"x/f"))
inside("merged usr", (b"usr/bin/sh", b"bin"), folder(b"usr/bin"), symlink(b"bin", b"usr/bin"), file(b"bin/sh"))
inside("merged usr, link first", (b"usr/bin/sh",), symlink(b"bin", b"usr/bin"), file(b"bin/sh"))
inside("link that turns back inside", (b"f", b"d"), folder(b"d"), symlink(b"x", b"d/../."), file(b"x/f"))
inside("file over a link", (b"x",), lambda out: symlink(b"x", out + b"/canary") + file(b"x"))
inside("file over a relative link", (b"x",), symlink(b"x", b"../outside/canary"), file(b"x"))
inside("file over a dangling link", (b"x",), symlink(b"x", b"../outside/new"), file(b"x"))
inside("directory over a link", (b"x",), X_OUT, folder(b"x", 0o777))
inside("directory over a link, then a file", (b"x/canary",), X_OUT, folder(b"x"), file(b"x/canary"))
inside("FIFO over a link", (b"x",), symlink(b"x", b"../outside/canary"), header(b"x", b"6", mode=0o777))
inside("link with an owner and a time", (b"x",), symlink(b"x", b"../outside/canary", uid=1234))
inside("link over a link", (b"x",), X_OUT, symlink(b"x", b"../outside/canary"))
inside("directory swapped for a link before its mode is set", (b"x",), folder(b"x", 0o777), X_OUT)
refused("directory swapped for a link, then a file", "leaves", folder(b"x"), X_OUT, file(b"x/canary"))
refused(
    "nested directory swapped while it is the current one",
    "something in it",
    file(b"x/y/f"),
    X_OUT,
    file(b"x/y/g"),
)
refused("empty link", "empty", symlink(b"x", b""))
refused("link target too long", "too long", symlink(b"x", b"a/" * 3000))
refused("zero byte in a link target", "zero byte", pax(linkpath=b"a\0b"), symlink(b"x", b"y"))

# Hard links
refused("hard link to an absolute path", "No such file", lambda out: hardlink(b"h", out + b"/canary"))
refused("hard link upwards", r"'\.\.' in", hardlink(b"h", b"../outside/canary"))
refused("hard link through a link", "leaves", S_OUT, hardlink(b"h", b"s/canary"))
refused(
    "hard link through an absolute link", "in the way", lambda out: symlink(b"s", out) + hardlink(b"h", b"s/canary")
)
refused("hard link made through a link", "leaves", file(b"f"), S_OUT, hardlink(b"s/new", b"f"))
refused("hard link to a directory", "hard link to the directory", folder(b"d"), hardlink(b"h", b"d"))
refused("hard link to the root", "hard link to the root", hardlink(b"h", b"."))
refused("hard link to nothing", "No such file", hardlink(b"h", b"gone"))
refused("hard link with an empty target", "hard link to the root", hardlink(b"h", b""))
refused("hard link named upwards", r"'\.\.' in", file(b"f"), hardlink(b"../outside/new", b"f"))
refused(
    "hard link to a removed directory's file",
    "No such",
    folder(b"d"),
    file(b"d2/f"),
    folder(b"d2"),
    hardlink(b"h", b"d/f"),
)
inside(
    "hard link to a link, then written", (b"h",), symlink(b"s", b"../outside/canary"), hardlink(b"h", b"s"), file(b"h")
)
refused(
    "hard link to a link, then through it",
    "leaves",
    S_OUT,
    hardlink(b"h", b"s"),
    file(b"h/canary"),
)
inside(
    "hard link to a link, with a mode and an owner",
    (b"h",),
    symlink(b"s", b"../outside/canary"),
    hardlink(b"h", b"s", mode=0o4777, uid=1234),
)
inside("hard link to itself", (b"f",), file(b"f"), hardlink(b"f", b"f"))
inside("hard link with a size but no data", (b"h", b"g"), file(b"f"), hardlink(b"h", b"f", size=512), file(b"g"))

# Devices, FIFOs and other types
inside("character device", (), header(b"null", b"3", mode=0o666))
inside("block device", (), header(b"sda", b"4", mode=0o666))
inside("overlay whiteout device", (b"f",), file(b"f"), header(b"f", b"3"))
refused("device with dots", r"'\.\.' in", header(b"../outside/null", b"3"))
inside("device, then a file", (b"null",), header(b"null", b"3"), file(b"null"))
inside("FIFO", (b"p",), header(b"p", b"6", mode=0o666))
inside("FIFO, then a file", (b"p",), header(b"p", b"6"), file(b"p"))
refused("FIFO as a directory", "not a directory", header(b"p", b"6"), file(b"p/f"))
refused("file as a directory", "not a directory", file(b"f"), file(b"f/g"))
inside("contiguous file", (b"f",), header(b"f", b"7", size=4) + padded(b"evil"))
refused("unknown type", "type 'Z'", header(b"f", b"Z"))
refused("continued from another volume", "type 'M'", header(b"f", b"M"))
refused("GNU sparse file", "sparse", header(b"f", b"S", size=8**11 - 1))
refused("pax sparse file", "sparse", extended(b"x", record(b"GNU.sparse.major", b"1")), file(b"f"))
refused("pax sparse bomb", "sparse", extended(b"x", record(b"GNU.sparse.realsize", b"9" * 18)), file(b"f"))
refused("AUFS whiteout through a link", "leaves", S_OUT, file(b"s/.wh.canary", b""))
refused("opaque whiteout through a link", "leaves", S_OUT, file(b"s/.wh..wh..opq", b""))

# Numbers
refused("uid beyond 16 bits", "uid 65536", file(b"f", uid=65536))
refused("uid of 40 bits", "uid 1099511627776", file(b"f", uid=2**40))
refused("negative uid", "uid -1", file(b"f", uid=-1))
refused("negative gid", "gid -1", file(b"f", gid=-1))
refused("negative uid in pax", "not a number", pax(uid=b"-1"), file(b"f"))
refused("uid of 32 bits in pax", "uid 4294967296", pax(uid=b"4294967296"), file(b"f"))
refused("uid with a sign", "not a number", pax(uid=b"+0"), file(b"f"))
refused("uid of a million digits", "not a number", pax(uid=b"1" * 900_000), file(b"f"))
refused("negative size", "size -512", header(b"f", size=-512))
refused("negative size in octal", "size -", overwritten(header(b"f"), 124, b"-0000000777\0"))
refused("huge size", "more than the limit", header(b"f", size=2**62))
refused("size beyond 64 bits", "outside 0 to", header(b"f", size=2**80))
refused("negative size in pax", "not a number", pax(size=b"-1024"), file(b"f"))
refused("size in floating point", "not a number", pax(size=b"1e3"), file(b"f"))
refused("size that is no number", "damaged header", file(b"f"), overwritten(header(b"f"), 124, b"zzzzzzzzzzz\0"))
refused("mtime nan", "not a time", pax(mtime=b"nan"), file(b"f"))
refused("mtime infinite", "not a time", pax(mtime=b"inf"), file(b"f"))
refused("mtime with an exponent", "not a time", pax(mtime=b"1e400"), file(b"f"))
refused("mtime far away", "too far away", pax(mtime=b"9" * 20), file(b"f"))
refused("mtime far away in base 256", "too far away|not a time", file(b"f", mtime=2**80))
inside("mtime before 1970", (b"f",), pax(mtime=b"-1.5"), file(b"f"))
inside("mode of 50 bits", (b"f",), file(b"f", mode=2**50 + 0o644))
inside("negative mode", (b"f",), file(b"f", mode=-1))
inside("mode of all ones", (b"f",), file(b"f", mode=0o7777777))

# Extended headers
refused("pax record too long", "damaged extended", extended(b"x", b"99 path=x\n"), file(b"f"))
refused("pax record of length zero", "damaged extended", extended(b"x", b"0 path=x\n"), file(b"f"))
refused("pax record of negative length", "damaged extended", extended(b"x", b"-9 path=x\n"), file(b"f"))
refused("pax record without an end", "damaged extended", extended(b"x", b"9 path=xy"), file(b"f"))
refused("pax record without a value", "damaged extended", extended(b"x", b"8 pathx\n"), file(b"f"))
refused("pax record of text", "damaged extended", extended(b"x", b"hello world\n"), file(b"f"))
refused("pax header of 8 GiB", "extended header of", header(b"x", b"x", size=8**11 - 1))
refused("GNU long name of 8 GiB", "extended header of", header(b"x", b"L", size=8**11 - 1))
refused("GNU long name of negative size", "extended header of", header(b"x", b"L", size=-1))
inside("empty pax path", (b"f",), pax(path=b""), file(b"f"))
inside("a chain of 5,000 pax headers", (b"f",), pax(comment=b"c") * 5000, file(b"f"))
inside("a chain of 5,000 long names", (b"f",), extended(b"L", b"f\0") * 5000, file(b"x"))
inside(
    "overlay and capability attributes",
    (b"d/f",),
    extended(
        b"x",
        record(b"SCHILY.xattr.trusted.overlay.opaque", b"y")
        + record(b"SCHILY.xattr.user.overlay.opaque", b"y")
        + record(b"LIBARCHIVE.xattr.user.overlay.redirect", b"Li4v")
        + record(b"SCHILY.xattr.security.capability", b"\1\0\0\2\xff\xff\xff\xff"),
    ),
    folder(b"d"),
    extended(b"x", record(b"SCHILY.xattr.user.overlay.whiteout", b"y")),
    file(b"d/f"),
)

# Bombs and damage
refused("too many entries", "more than 20000 entries", pax() * 20_001)
refused("gzip bomb", "more than the limit", lambda _: gzip_bomb(65))
refused("xz that asks for 2 GiB of memory", "Memory usage limit", lambda _: greedy_xz())
refused("damaged header in the middle", "damaged header", file(b"a"), b"x" + header(b"b")[1:], file(b"c"))
refused("header of noise", "damaged header", file(b"a"), b"\xa5" * 512)

# Later entries win
inside("file twice", (b"f",), file(b"f", b"one"), file(b"f", b"two"))
inside("file, then a directory", (b"f/g",), file(b"f"), folder(b"f"), file(b"f/g"))
inside("empty directory, then a file", (b"d",), folder(b"d"), file(b"d"))
refused("full directory, then a file", "something in it", file(b"d/f"), file(b"d"))
refused("full directory, then a link", "something in it", file(b"d/f"), symlink(b"d", b"../outside"))
inside("directory twice", (b"d/f",), folder(b"d", 0o700), file(b"d/f"), folder(b"d", 0o755))


@dataclass(frozen=True)
class Arena:
    """A target directory with canaries around it."""

    around: Path
    target: Path
    outside: Path

    def snapshot(self) -> dict[str, tuple[object, ...]]:
        """All there is to know about everything outside the target."""
        found = {str(self.around): _facts(self.around)}
        for directory, names, files in os.walk(self.around):
            if Path(directory) == self.around:
                names.remove(self.target.name)
            for name in names + files:
                path = Path(directory, name)
                found[str(path)] = _facts(path)
        return found


def _facts(path: Path) -> tuple[object, ...]:
    seen = path.lstat()
    content: object = None
    if stat.S_ISLNK(seen.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(seen.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    links = 0 if stat.S_ISDIR(seen.st_mode) else seen.st_nlink
    return seen.st_mode, seen.st_uid, seen.st_gid, links, seen.st_mtime_ns, content


def make_arena(around: Path) -> Arena:
    """`around` holds target/ and outside/, the latter with files worth attacking."""
    target, outside = around / "target", around / "outside"
    (outside / "dir").mkdir(parents=True)
    (outside / "canary").write_text("alive\n")
    (outside / "dir" / "file").write_text("alive too\n")
    (outside / "script").write_text("#!/bin/sh\n")
    (outside / "script").chmod(0o755)
    (outside / "link").symlink_to("canary")
    (around / "canary").write_text("beside the target\n")
    target.mkdir(mode=0o755)
    for path in (outside / "canary", outside / "dir", outside, around):
        os.utime(path, (946_684_800, 946_684_800))
    return Arena(around, target, outside)


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return make_arena(tmp_path / "arena")


@pytest.mark.parametrize("name", CASES)
def test_hostile_archive_changes_nothing_outside(name: str, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(arena.outside)
    case = CASES[name]
    archive = case.build(os.fsencode(arena.outside))
    before, own = arena.snapshot(), arena.target.stat()
    descriptors = len(os.listdir("/proc/self/fd"))

    error = None
    try:
        unpack(io.BytesIO(archive), arena.target, limits=LIMITS)
    except ImageError as caught:
        error = str(caught)

    assert arena.snapshot() == before
    assert (arena.target.stat().st_mode, arena.target.stat().st_uid) == (own.st_mode, own.st_uid)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    if isinstance(case.expect, str):
        assert error is not None, "the archive was accepted"
        assert re.search(case.expect, error), error
    else:
        assert error is None
        assert all(os.path.lexists(os.path.join(os.fsencode(arena.target), path)) for path in case.expect)


def test_there_are_at_least_sixty_hostile_archives() -> None:
    assert len(CASES) >= 60


def test_canaries_see_an_unpacker_that_trusts_the_archive(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: tarfile without a filter does write outside, and the snapshot shows it."""
    escaped = []
    for index, (name, case) in enumerate(sorted(CASES.items())):
        one = make_arena(arena.around.parent / f"control-{index}")
        monkeypatch.chdir(one.outside)
        archive = case.build(os.fsencode(one.outside))
        before = one.snapshot()
        if len(archive) < 1024**2:
            _trusting_unpack(archive, one.target)
        if _is_changed(one, before):
            escaped.append(name)
    assert {"dotdot file", "file through a relative link", "file over a relative link", "absolute path"} <= set(escaped)
    assert len(escaped) >= 20, escaped


def _is_changed(arena: Arena, before: dict[str, tuple[object, ...]]) -> bool:
    try:
        return arena.snapshot() != before
    except PermissionError:  # an attack took the permission to look away
        return True


def _trusting_unpack(archive: bytes, target: Path) -> None:
    """What `tar.extractall()` did before Python 3.14, in every version; its failures do not matter here."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            vars(tar)["extraction_filter"] = getattr(tarfile, "fully_trusted_filter", None)
            members = [member for member in tar if member.type in (b"0", b"1", b"2", b"5") and member.size <= 4096]
            tar.extractall(target, members)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, KeyError):
        return


def test_file_through_a_merged_usr_link_lands_in_usr(arena: Arena) -> None:
    archive = symlink(b"bin", b"usr/bin") + file(b"bin/sh", b"shell") + END
    unpack(io.BytesIO(archive), arena.target)
    assert (arena.target / "bin").is_symlink()
    assert (arena.target / "usr/bin/sh").read_bytes() == b"shell"


def test_file_over_a_link_replaces_the_link(arena: Arena) -> None:
    unpack(io.BytesIO(symlink(b"x", b"../outside/canary") + file(b"x", b"new") + END), arena.target)
    assert not (arena.target / "x").is_symlink()
    assert (arena.target / "x").read_bytes() == b"new"


def test_extended_attributes_of_the_archive_are_never_set(arena: Arena) -> None:
    unpack(io.BytesIO(CASES["overlay and capability attributes"].build(b"")), arena.target)
    for name in ("d", "d/f"):
        unwanted = [key for key in os.listxattr(arena.target / name) if "overlay" in key or "capability" in key]
        assert unwanted == []


def test_bomb_is_refused_before_its_limit_is_on_disk(arena: Arena) -> None:
    limits = UnpackLimits(max_bytes=1024**2)
    with pytest.raises(ImageError, match="more than the limit"):
        unpack(io.BytesIO(gzip_bomb(8)), arena.target, limits=limits)
    assert sum(path.stat().st_size for path in arena.target.rglob("*")) <= limits.max_bytes


def test_headers_nobody_asked_for_take_no_memory(arena: Arena) -> None:
    chain = b"".join(extended(b"g", record(b"key.%d" % index, bytes(500_000))) for index in range(30))
    archive = io.BytesIO(chain + file(b"f") + END)
    tracemalloc.start()
    try:
        unpack(archive, arena.target)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()


def test_devices_are_counted_and_never_made(arena: Arena) -> None:
    archive = header(b"null", b"3", mode=0o666) + header(b"sda", b"4") + header(b"f", b"0") + END
    assert unpack(io.BytesIO(archive), arena.target).devices_skipped == 2
    assert os.listdir(arena.target) == ["f"]


# OUT stands for the absolute path of the directory under attack.
NAMES = st.sampled_from(
    b"a b a/b a/b/c b/a s s/canary s/dir/file s/s a/s a/s/new h h/new ./a //b a/ b/./c .. ../outside ../outside/canary "
    b"a/../../outside/canary . / OUT OUT/canary".split()
    + [b""]
)
TARGETS = st.sampled_from(
    b"a b a/b b/s ./b s s/.. s/canary h . .. ../../arena ../outside ../outside/canary ../../outside OUT OUT/canary "
    b"OUT/dir a/../.. a/../../outside".split()
)
ENTRIES = st.one_of(
    st.tuples(st.just(b"0"), NAMES, st.just(b"")),
    st.tuples(st.just(b"5"), NAMES, st.just(b"")),
    st.tuples(st.just(b"2"), NAMES, TARGETS),
    st.tuples(st.just(b"1"), NAMES, st.one_of(NAMES, TARGETS)),
    st.tuples(st.just(b"6"), NAMES, st.just(b"")),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(ENTRIES, min_size=1, max_size=12))
def test_random_entries_change_nothing_outside(
    entries: list[tuple[bytes, bytes, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    arena = make_arena(tmp_path_factory.mktemp("random") / "arena")
    before = arena.snapshot()
    for kind, name, link in entries:
        # One archive an entry, so that a refused entry does not end the attack.
        name, link = (text.replace(b"OUT", os.fsencode(arena.outside)) for text in (name, link))
        content = b"evil" if kind == b"0" else b""
        long = pax(path=name, linkpath=link)
        archive = long + header(name, kind, link=link, size=len(content), mode=0o777) + padded(content) + END
        with suppress(ImageError):
            unpack(io.BytesIO(archive), arena.target, limits=LIMITS)
    assert arena.snapshot() == before


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(ENTRIES, min_size=1, max_size=12), data=st.data())
def test_damaged_archives_end_in_an_image_error_or_a_tree_inside(
    entries: list[tuple[bytes, bytes, bytes]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arena = make_arena(tmp_path_factory.mktemp("damaged") / "arena")
    before = arena.snapshot()
    archive = bytearray(b"".join(header(name, kind, link=link) for kind, name, link in entries) + END)
    for _ in range(data.draw(st.integers(0, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    del archive[data.draw(st.integers(0, len(archive))) :]
    with suppress(ImageError):
        unpack(io.BytesIO(archive), arena.target, limits=LIMITS)
    assert arena.snapshot() == before
