"""The metrics endpoint as a scraper meets it, over loopback and over a unix socket, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from diyc.errors import DiycError, HostError
from diyc.metrics import LiveContainer, Metrics
from diyc.results import CgroupFigures, Result, Verdict
from diyc.server import Listen, MetricsServer, parse_listen, wants_openmetrics

Runner = Callable[[Coroutine[Any, Any, Any]], Any]
PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


def _on_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    if request.param == "asyncio":
        return asyncio.run
    if find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return _on_uvloop


def metrics_of_one_run() -> Metrics:
    metrics = Metrics(CollectorRegistry())
    metrics.observe(Result("01J", 'odd "name"', 0, 1, Verdict.OK, wall_s=0.5))
    return metrics


async def served(
    listen: str, talk: Callable[[aiohttp.ClientSession, str], Awaitable[None]], metrics: Metrics | None = None
) -> None:
    """Start a server, talk to it, stop it."""
    server = MetricsServer(listen, metrics or metrics_of_one_run())
    await server.start()
    try:
        path = parse_listen(server.address).path
        connector = aiohttp.UnixConnector(path) if path else None
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            await talk(session, "http://localhost" if path else f"http://{server.address}")
    finally:
        await server.stop()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_metrics_are_served_as_text_by_default(run: Runner, tmp_path: Path, kind: str) -> None:
    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(f"{url}/metrics") as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert "Content-Encoding" not in answer.headers or answer.headers["Content-Encoding"] == "gzip"
            body = await answer.read()
        page = gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
        [family] = [family for family in parse_text(page.decode()) if family.name == "diyc_job_runs"]
        assert family.samples[0].labels == {"job_name": 'odd "name"', "verdict": "ok"}

    run(served("127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/m.sock", talk))


def test_prometheus_gets_openmetrics(run: Runner) -> None:
    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        headers = {"Accept": PROMETHEUS_ACCEPT, "Accept-Encoding": "identity"}
        async with session.get(f"{url}/metrics", headers=headers) as answer:
            assert answer.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
            page = await answer.text()
        assert page.endswith("# EOF\n")
        assert "diyc_job_runs" in {family.name for family in parse_openmetrics(page)}

    run(served("127.0.0.1:0", talk))


@pytest.mark.parametrize("size", [1, 400])
def test_gzip_is_used_where_it_is_accepted_and_only_there(run: Runner, size: int) -> None:
    metrics = Metrics(CollectorRegistry())
    for index in range(size):
        metrics.observe(Result("01J", f"job-{index}", 0, 1, Verdict.OK, wall_s=0.5))

    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        async def fetch(encoding: str) -> tuple[str | None, bytes]:
            async with session.get(f"{url}/metrics", headers={"Accept-Encoding": encoding}) as answer:
                return answer.headers.get("Content-Encoding"), await answer.read()

        plain_encoding, plain = await fetch("identity")
        refused_encoding, refused = await fetch("gzip;q=0, br")
        zipped_encoding, zipped = await fetch("deflate, gzip;q=0.5")
        assert (plain_encoding, refused_encoding, zipped_encoding) == (None, None, "gzip")
        assert gzip.decompress(zipped) == plain == refused
        assert len(zipped) < len(plain)

    run(served("127.0.0.1:0", talk, metrics))


def test_health_index_head_and_errors(run: Runner) -> None:
    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(f"{url}/healthz") as answer:
            assert (answer.status, (await answer.text()).strip()) == (200, "ok")
        async with session.get(f"{url}/") as answer:
            assert answer.content_type == "text/html"
            assert 'href="/metrics"' in await answer.text()
        async with session.head(f"{url}/metrics") as answer:
            assert (answer.status, await answer.read()) == (200, b"")
            assert int(answer.headers["Content-Length"]) > 100
        async with session.get(f"{url}/nothing") as answer:
            assert answer.status == 404
        async with session.post(f"{url}/metrics") as answer:
            assert answer.status == 405
            assert "GET" in answer.headers["Allow"]

    run(served("127.0.0.1:0", talk))


def test_a_big_scrape_leaves_the_loop_its_turns(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diyc.server._TURN", 0.0)  # a turn after each piece, however fast the machine
    figures = CgroupFigures(cpu_usage_s=1.0, memory_current_bytes=1, memory_working_set_bytes=1, pids_current=1)

    def live() -> Iterator[LiveContainer]:
        for at in range(1000):
            yield LiveContainer(f"01R{at}", "serve", "host", 1.0, 9.0, 1, figures)

    metrics = Metrics(CollectorRegistry())
    metrics.watch(running=lambda: 1, queued=lambda: 0, slots=lambda: 1, live=live)
    turns = 0

    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        nonlocal turns
        async with session.get(f"{url}/healthz"):
            pass
        scrape = asyncio.ensure_future(_read(session, f"{url}/metrics"))
        while not scrape.done():
            turns += 1
            await asyncio.sleep(0)
        assert scrape.result().count(b"container_processes{") == 1000

    run(served("127.0.0.1:0", talk, metrics))
    assert turns > 1000


async def _read(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.get(url, headers={"Accept-Encoding": "identity"}) as answer:
        return await answer.read()


def test_the_writer_gives_up_its_turn_whenever_its_time_is_over() -> None:
    from diyc import server

    now, turns = 0.0, []

    def pieces() -> Iterator[str]:
        nonlocal now
        for _ in range(10):
            now += 0.0011
            yield "x" * 1000

    async def give_turn() -> None:
        turns.append(now)

    page = asyncio.run(server._page(pieces(), zipped=False, clock=lambda: now, give_turn=give_turn))
    assert page == b"x" * 10_000
    assert len(turns) == 5


def test_ipv6_is_served_and_named_in_brackets(run: Runner) -> None:
    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        assert url.startswith("http://[::1]:")
        async with session.get(f"{url}/healthz") as answer:
            assert answer.status == 200

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    run(served("[::1]:0", talk))


def test_a_taken_port_is_a_host_error_that_says_what_to_do(run: Runner) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            server = MetricsServer(listen, metrics_of_one_run())
            with pytest.raises(HostError) as caught:
                await server.start()
        assert isinstance(caught.value, DiycError)
        assert caught.value.feature == "metrics endpoint"
        assert f"cannot listen on {listen}: Address already in use; stop the process" in str(caught.value)
        await server.stop()

    run(main())


@pytest.mark.parametrize(
    "listen,advice",
    [("192.0.2.1:0", "no interface"), ("unix:/nonexistent-dir/m.sock", "create the directory"),
     ("[::1%no-such]:1", "choose another"), ("x" * 70 + ":1", "choose another")],
)  # fmt: skip
def test_an_address_that_cannot_be_had_is_explained(run: Runner, listen: str, advice: str) -> None:
    with pytest.raises(HostError, match=f"cannot listen on {re.escape(listen)}: .*{advice}"):
        run(MetricsServer(listen, metrics_of_one_run()).start())


def test_the_address_tells_the_real_port_until_stop(run: Runner) -> None:
    async def main() -> None:
        server = MetricsServer("127.0.0.1:0", metrics_of_one_run())
        await server.start()
        port = parse_listen(server.address).port
        assert port > 0
        await server.stop()
        await server.stop()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)

    run(main())


def test_a_unix_socket_is_removed_on_stop(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"

    async def talk(_session: aiohttp.ClientSession, _url: str) -> None:
        assert stat.S_ISSOCK(path.stat().st_mode)

    run(served(f"unix:{path}", talk))
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(f"{url}/healthz") as answer:
            assert answer.status == 200

    run(served(f"unix:{path}", talk))


def test_a_unix_socket_in_use_is_left_to_its_owner(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"

    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        second = MetricsServer(f"unix:{path}", metrics_of_one_run())
        with pytest.raises(HostError, match="Address already in use"):
            await second.start()
        await second.stop()
        async with session.get(f"{url}/healthz") as answer:
            assert answer.status == 200

    run(served(f"unix:{path}", talk))


def test_a_file_that_is_no_socket_is_never_replaced(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(HostError, match="not a socket"):
        run(MetricsServer(f"unix:{path}", metrics_of_one_run()).start())
    assert path.read_text() == "data"


def test_stop_leaves_a_socket_that_another_server_put_there(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"

    async def main() -> None:
        first = MetricsServer(f"unix:{path}", metrics_of_one_run())
        await first.start()
        path.rename(tmp_path / "moved.sock")
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            await first.stop()
        assert path.exists()

    run(main())


def test_no_descriptor_is_left_after_stop_or_a_failed_start(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        async def nothing(_session: aiohttp.ClientSession, _url: str) -> None: ...

        await served("127.0.0.1:0", nothing)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await served(f"unix:{tmp_path}/m.sock", nothing)
            with pytest.raises(HostError):
                await MetricsServer(f"unix:{tmp_path}", metrics_of_one_run()).start()
        await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) == before

    run(main())


def test_a_request_is_not_logged(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def talk(session: aiohttp.ClientSession, url: str) -> None:
        async with session.get(f"{url}/healthz"):
            pass

    with caplog.at_level("DEBUG", logger="aiohttp"):
        run(served("127.0.0.1:0", talk))
    assert not caplog.records


@pytest.mark.parametrize(
    "text,expected",
    [
        ("127.0.0.1:9464", Listen("127.0.0.1", 9464)),
        ("localhost:0", Listen("localhost", 0)),
        ("[::1]:9464", Listen("::1", 9464)),
        ("[fe80::1%eth0]:1", Listen("fe80::1%eth0", 1)),
        ("unix:/run/diyc/m.sock", Listen(path="/run/diyc/m.sock")),
    ],
)
def test_listen_addresses_are_read_and_written_alike(text: str, expected: Listen) -> None:
    assert parse_listen(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text,hint",
    [
        ("", "127.0.0.1:9464"),
        ("9464", "127.0.0.1:9464"),
        (":9464", "127.0.0.1:9464"),
        ("127.0.0.1", "127.0.0.1:9464"),
        ("127.0.0.1:", "127.0.0.1:9464"),
        ("127.0.0.1:65536", "127.0.0.1:9464"),
        ("127.0.0.1:-1", "127.0.0.1:9464"),
        ("127.0.0.1:\u0661", "127.0.0.1:9464"),
        ("::1:9464", "[::1]:9464"),
        ("[::1]", "not an address"),
        ("http://localhost:9464", "localhost"),
        ("a host:80", "127.0.0.1:80"),
        ("unix:", "absolute path"),
        ("unix:run/m.sock", "absolute path"),
        ("unix:/run/", "absolute path"),
        ("unix:/a\0b", "absolute path"),
        ("unix:/" + "x" * 107, "107 bytes"),
    ],
)
def test_a_bad_listen_address_is_refused_with_a_suggestion(text: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_listen(text)
    assert hint in str(caught.value)


def test_a_server_cannot_be_made_for_a_bad_address() -> None:
    with pytest.raises(HostError, match=r"metrics endpoint: .* is not an address to listen on"):
        MetricsServer("9464", metrics_of_one_run())


@pytest.mark.parametrize(
    "accept,expected",
    [
        (PROMETHEUS_ACCEPT, True),
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.3, text/plain;q=0.4", False),
        ("Application/OpenMetrics-Text; version=1.0.0; Q=0.5", True),
        ("application/openmetrics-text;q=nonsense,,;", False),
    ],
)
def test_the_format_follows_the_accept_header(accept: str, expected: bool) -> None:
    assert wants_openmetrics(accept) is expected
