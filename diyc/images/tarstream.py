"""Reads a tar archive (plain, gzip, xz or zstd) as a stream of entries, in bounded memory.

Nothing here touches the file system but the archive itself. The compression is known by its first bytes,
never by the file's name; whatever is wrong becomes an ImageError that names the file, the entry and the offset."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any, BinaryIO, Protocol

from diyc.errors import ImageError

BLOCK = 512
CHUNK = 1024 * 1024
METADATA = 1024 * 1024  # one extended header; GNU tar and Go write a few KiB, ACLs at most 64 KiB each
TRAILER = 1024 * 1024  # read after the end marker, so that the checksum of the compression is verified
XZ_MEMORY = 256 * 1024 * 1024  # `xz -9` needs 65 MiB; a header may ask for 4 GiB
MTIME = 2**40  # seconds either side of 1970 that every file system's time_t can be asked for


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """What an archive may cost. `max_bytes` counts the decompressed archive, its headers included."""

    max_bytes: int = 32 * 1024**3
    max_entries: int = 1_000_000
    max_path: int = 4096
    max_name: int = 255
    max_depth: int = 256
    max_id: int = 65535


class Kind(Enum):
    """What an entry is. DEVICE is known only to be counted."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    FIFO = "FIFO"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member as the archive says it; `path` and `link` are the archive's own bytes, not yet trusted."""

    number: int
    kind: Kind
    path: bytes
    link: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int


KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.FIFOTYPE: Kind.FIFO,
    tarfile.CHRTYPE: Kind.DEVICE,
    tarfile.BLKTYPE: Kind.DEVICE,
}
GNU_LONG = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
PAX_OWN = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
PAX_KEYS = frozenset({b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"})


class TarStream:
    """The entries of one open archive, in order. Take an entry's data before asking for the next one.

    `tarfile` parses single header blocks only. Its TarFile takes a damaged header in mid-archive for a clean
    end, reads extended headers of any size into memory, recurses over chains of them and keeps every member;
    none of that is bearable for an archive from a stranger. Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax,
    and GNU's long names and base-256 numbers (tar(5))."""

    def __init__(self, file: BinaryIO, name: str, limits: UnpackLimits) -> None:
        self.name = name
        self.number = 0
        self.path = b""
        self.offset = 0
        self._limits = limits
        self._left = 0
        self._shared: dict[bytes, bytes] = {}
        self._file, error = _decompressed(file, name)
        self._errors = (EOFError, OSError, error)

    def __iter__(self) -> Iterator[Entry]:
        pending: dict[bytes, bytes] = {}
        while (header := self._header()) is not None:
            if header.type in GNU_LONG:
                pending[GNU_LONG[header.type]] = self._metadata(header.size).rstrip(b"\0")
            elif header.type in PAX_OWN:
                pending |= self._pax(header.size)
            elif header.type == tarfile.XGLTYPE:
                self._shared |= self._pax(header.size)
            else:
                yield self._entry(header, self._shared | pending)
                pending = {}
                self._skip_data()

    def data(self) -> Iterator[bytes]:
        """The current entry's content in chunks of at most 1 MiB."""
        padding = -self._left % BLOCK
        while self._left > 0:
            chunk = self._exactly(min(self._left, CHUNK))
            self._left -= len(chunk)
            yield chunk
        self._exactly(padding)

    def refusal(self, reason: str) -> ImageError:
        """The error for the current entry."""
        at = f"entry {self.number}" + (f" ({show(self.path)})" if self.path else "")
        return ImageError(f"cannot unpack {self.name}: {at}, byte {self.offset} of the archive: {reason}")

    def _header(self) -> tarfile.TarInfo | None:
        """The next header block; None at the end marker. A lone zero block counts as one, as in GNU tar."""
        block = self._exactly(BLOCK, what="end marker")
        self.path = b""
        if not block.strip(b"\0"):
            self._verify_trailer()
            return None
        self.number += 1
        if self.number > self._limits.max_entries:
            raise self.refusal(f"more than {self._limits.max_entries} entries")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            if self.number == 1:
                raise ImageError(f"cannot unpack {self.name}: not a tar archive (plain, gzip, xz or zstd)") from error
            raise self.refusal(f"damaged header: {error}") from error

    def _entry(self, header: tarfile.TarInfo, pax: dict[bytes, bytes]) -> Entry:
        self.path = pax.get(b"path") or _bytes(header.name)
        kind = KINDS.get(header.type)
        if kind is None:
            raise self.refusal(_unsupported(header.type))
        size = self._number(pax, b"size", header.size, sys.maxsize)
        self._left = size if kind is Kind.FILE else 0
        self._check_size(self.offset + self._left)
        return Entry(
            number=self.number,
            kind=kind,
            path=self.path,
            link=pax.get(b"linkpath") or _bytes(header.linkname),
            size=self._left,
            mode=header.mode & 0o7777,
            uid=self._number(pax, b"uid", header.uid, self._limits.max_id),
            gid=self._number(pax, b"gid", header.gid, self._limits.max_id),
            mtime_ns=self._mtime(pax.get(b"mtime"), header.mtime),
        )

    def _number(self, pax: dict[bytes, bytes], key: bytes, plain: int | float, maximum: int) -> int:
        text = pax.get(key)
        if text and not re.fullmatch(rb"[0-9]{1,20}", text):
            raise self.refusal(f"{key.decode()} is {show(text)}, not a number")
        value = int(text) if text else int(plain)
        if not 0 <= value <= maximum:
            raise self.refusal(f"{key.decode()} {value} is outside 0 to {maximum}")
        return value

    def _mtime(self, text: bytes | None, plain: int | float) -> int:
        match = re.fullmatch(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?", text or str(int(plain)).encode())
        if match is None:
            raise self.refusal(f"mtime is {show(text or b'')}, not a time")
        sign, seconds, fraction = match.groups(b"")
        if int(seconds) > MTIME:
            raise self.refusal(f"mtime {sign.decode()}{seconds.decode()} is too far away")
        return (-1 if sign else 1) * (int(seconds) * 10**9 + int(fraction[:9].ljust(9, b"0")))

    def _pax(self, size: int) -> dict[bytes, bytes]:
        """The records of one extended header, `length key=value\\n` each; unknown keys are left out."""
        records: dict[bytes, bytes] = {}
        rest = memoryview(self._metadata(size))
        while rest and rest[0]:
            match = re.match(rb"([0-9]{1,7}) ([^=]+)=", rest[:512])
            length = int(match[1]) if match else 0
            if match is None or not match.end() < length <= len(rest) or rest[length - 1] != ord("\n"):
                raise self.refusal("damaged extended header")
            key = bytes(match[2])
            if key.startswith(b"GNU.sparse."):
                raise self.refusal(_unsupported(tarfile.GNUTYPE_SPARSE))
            if key in PAX_KEYS:
                records[key] = bytes(rest[match.end() : length - 1])
            rest = rest[length:]
        return records

    def _metadata(self, size: int) -> bytes:
        if not 0 <= size <= METADATA:
            raise self.refusal(f"an extended header of {size} bytes (at most {METADATA})")
        content = self._exactly(size)
        self._exactly(-size % BLOCK)
        return content

    def _skip_data(self) -> None:
        if self._left:
            for _ in self.data():
                pass

    def _verify_trailer(self) -> None:
        left = TRAILER
        while left > 0 and (chunk := self._read(min(left, CHUNK))):
            left -= len(chunk)

    def _exactly(self, size: int, what: str = "data") -> bytes:
        content = self._read(size) if size else b""
        if len(content) < size:
            raise self.refusal(f"the archive ends here, before its {what}: is the file complete?")
        return content

    def _read(self, size: int) -> bytes:
        try:
            content = self._file.read(size)
        except self._errors as error:
            raise self.refusal(f"cannot read or decompress: {error}") from error
        self.offset += len(content)
        self._check_size(self.offset)
        return content

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            raise self.refusal(f"the archive unpacks to more than the limit of {self._limits.max_bytes} bytes")


def show(name: bytes) -> str:
    """A path from an archive, safe to print: quoted, control characters escaped, at most 200 characters."""
    text = ascii(name)[1:]
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _unsupported(kind: bytes) -> str:
    if kind == tarfile.GNUTYPE_SPARSE:
        return "sparse files are not supported: make the archive without --sparse"
    return f"entries of type {ascii(kind)[1:]} are not supported"


class _Decompressor(Protocol):
    """What lzma's and zstd's decompressor objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Frames(io.RawIOBase):
    """Concatenated compressed frames as one file. lzma.open() would do, but lets the archive choose its memory."""

    def __init__(self, file: BinaryIO, make: Callable[[], _Decompressor]) -> None:
        self._file = file
        self._make = make
        self._frame = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (content := self._next(len(buffer))):
            if content is None:
                return 0
        buffer[: len(content)] = content
        return len(content)

    def _next(self, size: int) -> bytes | None:
        """Some bytes, maybe none yet; None at the end of the last frame."""
        data = b""
        if self._frame.eof:
            data = self._frame.unused_data.lstrip(b"\0") or self._file.read(CHUNK).lstrip(b"\0")
            if not data:
                return None
            self._frame = self._make()
        elif self._frame.needs_input:
            data = self._file.read(CHUNK)
            if not data:
                raise EOFError("the compressed data ends too early")
        return self._frame.decompress(data, size)


def _decompressed(file: BinaryIO, name: str) -> tuple[BinaryIO, type[Exception]]:
    """The archive's content, and the error that decompressing it may raise beside OSError and EOFError."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return _buffered(gzip.GzipFile(fileobj=file)), zlib.error
    if start.startswith(b"\xfd7zXZ\0"):
        return _buffered(_Frames(file, _xz)), lzma.LZMAError
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        zstd = _zstd(name)
        return _buffered(_Frames(file, zstd.ZstdDecompressor)), zstd.ZstdError
    if start.startswith(b"BZh"):
        raise ImageError(f"cannot unpack {name}: bzip2 is not supported; compress it with gzip, xz or zstd")
    return file, OSError


def _buffered(raw: Any) -> BinaryIO:
    return io.BufferedReader(raw, 128 * 1024)


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)


def _zstd(name: str) -> Any:
    """The zstd module: in the standard library from Python 3.14 on, else the package backports.zstd."""
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return import_module(module)
    except ImportError as error:
        raise ImageError(f"cannot unpack {name}: it is zstd-compressed and the module {module} is missing") from error
