"""The HTTP endpoint that Prometheus scrapes: /metrics, /healthz and a page that says so, on TCP or a unix socket.

It lives on the supervisor's own loop, so a page of any size is written in pieces that leave the loop its turns.
aiohttp is imported when an endpoint is started: most runs have none."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import stat
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from diyc.errors import HostError

if TYPE_CHECKING:
    from aiohttp import web

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_TURN = 0.002  # seconds of work before the loop gets its turn
_CHUNK = 32 * 1024  # bytes compressed in one go: about a millisecond

_INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>diyc</title></head>
<body><h1>diyc</h1><p><a href="/metrics">Metrics</a></p></body></html>
"""

_ADVICE = {
    errno.EADDRINUSE: "stop the process that listens there, or choose another address (port 0 takes a free one)",
    errno.EADDRNOTAVAIL: "no interface of this host has that address",
    errno.EACCES: "ports below 1024 and some directories need root",
    errno.EEXIST: "what is there is not a socket: remove it, or choose another path",
    errno.ENOENT: "create the directory of the socket first",
}


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen: a unix socket at `path`, or else TCP on `host` and `port` (0: any free one)."""

    host: str = ""
    port: int = 0
    path: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str) -> Listen:
    """Read "host:port", "[ipv6]:port" or "unix:/path"; ValueError says what is wrong with it."""
    if text.startswith("unix:"):
        return Listen(path=_socket_path(text))
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f'{text!r} is not an address to listen on (try "127.0.0.1:9464" or "unix:/run/diyc/metrics")')
    if bracketed := re.fullmatch(r"\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]", host):
        return Listen(bracketed[1], int(port))
    if re.fullmatch("[0-9A-Fa-f:]*:[0-9A-Fa-f:]*", host):
        raise ValueError(f'{text!r}: an IPv6 address is written in brackets (try "[{host}]:{port}")')
    if not re.fullmatch(r"[^:\[\]/\s\0]{1,253}", host):
        raise ValueError(f'{text!r}: {host!r} is not a host name or address (try "127.0.0.1:{port}")')
    return Listen(host, int(port))


def _socket_path(text: str) -> str:
    path = text.removeprefix("unix:")
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ValueError(f'{text!r}: a unix socket is given by its absolute path (try "unix:/run/diyc/metrics.sock")')
    if len(os.fsencode(path)) > 107:
        raise ValueError(f"{text!r}: the path of a unix socket has at most 107 bytes (unix(7))")
    return path


class Pages(Protocol):
    """What is served: Metrics."""

    def text(self, openmetrics: bool = False) -> Iterator[str]:
        """The page in pieces of whole lines."""


class MetricsServer:
    """Serves `metrics` at `listen` ("host:port" or "unix:/path") between start() and stop().

    HostError where `listen` is no such address."""

    def __init__(self, listen: str, metrics: Pages) -> None:
        try:
            self._listen = parse_listen(listen)
        except ValueError as error:
            raise HostError("metrics endpoint", str(error)) from error
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self._socket_file: tuple[int, int] | None = None

    @property
    def address(self) -> str:
        """Where it listens, with the real port where 0 was asked for."""
        if self._runner is None or self._listen.path is not None:
            return str(self._listen)
        host, port = self._runner.addresses[0][:2]
        return str(Listen(host, port))

    async def start(self) -> None:
        """Listen on the running loop. HostError where the address cannot be had."""
        from aiohttp import web

        app = web.Application()
        app.add_routes(
            [web.get("/metrics", self._serve_metrics), web.get("/healthz", _serve_health), web.get("/", _serve_index)]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await self._site(runner).start()
        except (OSError, UnicodeError) as error:  # the latter from names that IDNA cannot encode
            await runner.cleanup()
            raise _refusal(self._listen, error) from error
        self._runner = runner

    async def stop(self) -> None:
        """Stop listening, give requests under way a second, and remove the unix socket."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
            self._remove_socket_file()

    def _site(self, runner: web.AppRunner) -> web.BaseSite:
        from aiohttp import web

        if self._listen.path is None:
            return web.TCPSite(runner, self._listen.host, self._listen.port)
        listener = _bind_unix(self._listen.path)
        self._socket_file = _identity(self._listen.path)
        return web.SockSite(runner, listener)

    def _remove_socket_file(self) -> None:
        # A server started later may have put its own socket there.
        path = self._listen.path
        if path is not None and self._socket_file == _identity(path):
            with suppress(FileNotFoundError):  # newer Pythons remove it themselves
                os.unlink(path)

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web

        openmetrics = wants_openmetrics(request.headers.get("Accept", ""))
        zipped = _quality(request.headers.get("Accept-Encoding", ""), "gzip") > 0
        body = await _page(self._metrics.text(openmetrics), zipped)
        headers = {"Content-Type": _OPENMETRICS if openmetrics else _TEXT, "Vary": "Accept, Accept-Encoding"}
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)


async def _serve_health(_request: web.Request) -> web.Response:
    from aiohttp import web

    return web.Response(text="ok\n")


async def _serve_index(_request: web.Request) -> web.Response:
    from aiohttp import web

    return web.Response(text=_INDEX, content_type="text/html")


async def _page(
    pieces: Iterator[str],
    zipped: bool,
    clock: Callable[[], float] = time.perf_counter,
    give_turn: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0),
) -> bytes:
    """Join and maybe compress the pieces, giving the loop its turn every few milliseconds."""
    body, pending, size = bytearray(), [], 0
    packer = zlib.compressobj(level=1, wbits=31) if zipped else None  # 31: a gzip header and trailer
    turn_ends = clock() + _TURN
    for piece in pieces:
        pending.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            body += _packed(pending, packer)
            pending, size = [], 0
        if clock() >= turn_ends:
            await give_turn()
            turn_ends = clock() + _TURN
    body += _packed(pending, packer)
    return bytes(body) if packer is None else bytes(body) + packer.flush()


def _packed(pieces: list[str], packer: zlib._Compress | None) -> bytes:
    data = "".join(pieces).encode()
    return data if packer is None else packer.compress(data)


def wants_openmetrics(accept: str) -> bool:
    """True where an Accept header prefers OpenMetrics to plain text (RFC 9110, 12.5.1)."""
    openmetrics = _quality(accept, "application/openmetrics-text")
    return openmetrics > 0 and openmetrics >= _quality(accept, "text/plain")


def _quality(header: str, name: str) -> float:
    """The highest weight that an Accept or Accept-Encoding header gives to `name`; 0 where it does not name it."""
    best = 0.0
    for choice in header.lower().split(","):
        kind, *parameters = (part.strip() for part in choice.split(";"))
        weights = [value for key, _, value in (part.partition("=") for part in parameters) if key.strip() == "q"]
        if kind == name:
            best = max(best, _weight(weights[0]) if weights else 1.0)
    return best


def _weight(text: str) -> float:
    return float(text) if re.fullmatch(r"\s*[01](\.[0-9]{0,3})?\s*", text) else 0.0


def _bind_unix(path: str) -> socket.socket:
    """A socket bound to `path`; a file that a dead server left there is replaced."""
    if _is_socket(path):
        if _is_deserted(path):
            os.unlink(path)
    elif os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    return listener


def _is_socket(path: str) -> bool:
    return os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode)


def _is_deserted(path: str) -> bool:
    """True for a unix socket on which nobody listens: connect is refused at once (unix(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _refusal(listen: Listen, error: OSError | UnicodeError) -> HostError:
    number = (error.errno or 0) if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else 0
    # asyncio's text repeats the address before the reason: that of the errno is shorter.
    reason = os.strerror(number) if number else (getattr(error, "strerror", None) or str(error))
    advice = _ADVICE.get(number, "choose another address")
    return HostError("metrics endpoint", f"cannot listen on {listen}: {reason}; {advice}")
