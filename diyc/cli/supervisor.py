"""diyc-supervisor: run every job of a jobs.toml and report. Stdout is data, stderr is progress."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click

from diyc import __version__
from diyc.cli import common
from diyc.errors import ConfigError, DiycError, Problem
from diyc.notify import Notifier

if TYPE_CHECKING:
    import asyncio
    from io import RawIOBase

    from diyc.cli.progress import Progress
    from diyc.cli.relay import Relay
    from diyc.cli.reload import Work
    from diyc.cli.service import Service
    from diyc.cli.summary import Tally
    from diyc.config import Config
    from diyc.jobs import Run
    from diyc.results import Result
    from diyc.supervisor import Supervisor

PROGRAM = "diyc-supervisor"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    config: str
    overrides: tuple[str, ...]
    only: tuple[str, ...]
    serve: bool
    max_parallel: int | None
    metrics_listen: str | None
    state_dir: str | None
    json: bool
    joblog: str | None
    progress: str
    verbosity: int


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--config", "config", metavar="FILE", required=True, help="The jobs.toml to run.")
@click.option("-j", "--max-parallel", type=click.IntRange(min=1), metavar="N", help="Runs at once.")
@click.option("--only", multiple=True, metavar="NAME", help="Run this job; may be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as jobs.NAME.timeout=5s.")
@click.option("--check", is_flag=True, help="Read and validate the file, print the expansion, run nothing.")
@click.option("--dry-run", is_flag=True, help="--check, and each run's resolved plan.")
@click.option("--serve", is_flag=True, help="Stay when all runs have ended, for HUP. (No submissions yet.)")
@click.option("--json", "as_json", is_flag=True, help="Stdout: one result object a line, then the summary.")
@click.option("--joblog", metavar="FILE", help="Append the same lines to a file.")
@click.option("--metrics-listen", metavar="ADDR", help="host:port or unix:/path for /metrics.")
@click.option("--state-dir", metavar="DIR", help="Where images and logs are kept.")
@click.option("--progress", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)
@click.option("-v", "--verbose", count=True, help="A line for every event.")
@click.option("-q", "--quiet", count=True, help="No progress.")
@click.version_option(__version__, prog_name=PROGRAM)
def main(
    config: str,
    max_parallel: int | None,
    only: tuple[str, ...],
    overrides: tuple[str, ...],
    check: bool,
    dry_run: bool,
    serve: bool,
    as_json: bool,
    joblog: str | None,
    metrics_listen: str | None,
    state_dir: str | None,
    progress: str,
    verbose: int,
    quiet: int,
) -> None:
    """Run every job of FILE, each run in a container of its own, then exit.

    Signals: TERM and INT stop what runs and exit, a second one kills; HUP reads FILE again: jobs that are new or
    changed are run, those that are equal go on untouched, and a file with mistakes changes nothing.

    Exit status: 0 every run ok; 1 some run not ok; 2 command line or configuration; 3 this host cannot run the
    jobs; 4 internal error; 128+N stopped by signal N."""
    common.open_standard_streams()
    options = Options(
        config,
        overrides,
        only,
        serve,
        max_parallel,
        metrics_listen,
        state_dir,
        as_json,
        joblog,
        progress,
        verbose - quiet,
    )
    notifier = Notifier()
    try:
        notifier = Notifier.from_environment(os.environ)
        settings = _load(options)
        if check or dry_run:
            from diyc.cli.expansion import print_expansion

            print_expansion(settings, plans=dry_run, as_json=as_json)
            status = common.OK
        else:
            common.enter_host()
            common.settle_process()
            status = common.run_loop(lambda: _Session(settings, options, notifier).run())
        sys.stdout.flush()
    except BrokenPipeError:
        common.reader_gone()
    except DiycError as error:
        notifier.status(f"failed: {error}")
        common.fail(PROGRAM, error)
    raise SystemExit(status)


def _load(options: Options) -> Config:
    """The file with the command line's own keys over it."""
    from diyc.config import load_config

    flags = {
        "max_parallel": options.max_parallel,
        "metrics_listen": options.metrics_listen,
        "state_dir": options.state_dir and os.path.abspath(options.state_dir),
    }
    extra = tuple(f"supervisor.{key}={json.dumps(value)}" for key, value in flags.items() if value is not None)
    return load_config(options.config, overrides=options.overrides + extra, only=options.only)


class _Session:
    """One command: the supervisor, its metrics, its progress and its output."""

    def __init__(self, settings: Config, options: Options, notifier: Notifier) -> None:
        from diyc.cli.summary import Tally

        self._settings = settings
        self._options = options
        self._notifier = notifier
        self._work: Work | None = None
        self._reload_problem = ""
        self._tally: Tally = Tally()
        self._signal = 0
        self._error: Exception | None = None
        self._supervisor: Supervisor | None = None
        self._relay: Relay | None = None
        self._writers: list[Callable[[str], None]] = []
        self._closing = ExitStack()

    async def run(self) -> int:
        """Everything from the first check to the summary; the exit status."""
        import asyncio

        from diyc.cli.progress import make_progress
        from diyc.cli.reload import Reloads
        from diyc.cli.service import Service
        from diyc.metrics import Metrics
        from diyc.supervisor import Supervisor

        options = self._options
        total = sum(spec.count for spec in self._settings.jobs)
        self._ending = asyncio.Event()
        self._reloads = Reloads(self._reload)
        self._open_outputs()
        self._metrics = Metrics()
        self._progress: Progress = make_progress(options.progress, sys.stderr, os.environ, options.verbosity, total)
        self._notifier.on_failure = lambda reason: self._progress.message(f"warning: {reason}")
        self._service: Service = Service(self._notifier, self._describe, asyncio.get_running_loop())
        self._service.start()
        self._closing.callback(self._service.close)
        with self._closing:
            async with AsyncExitStack() as stack:
                supervisor = await stack.enter_async_context(
                    Supervisor(self._settings.supervisor, on_start=self._started)
                )
                self._supervisor = supervisor
                asyncio.get_running_loop().set_exception_handler(self._unexpected)
                self._report_leftovers(supervisor)
                await self._serve_metrics(supervisor, stack)
                self._watch_signals(supervisor)
                await self._run_jobs(supervisor)
            self._progress.close()
            if self._error is None:
                self._finish(self._work.total if self._work else total)
                await self._flush()
        if self._error is not None:
            raise self._error
        return 128 + self._signal if self._signal else self._tally.exit_status

    async def _run_jobs(self, supervisor: Supervisor) -> None:
        """Prepare all jobs first: what cannot work is said before anything runs."""
        from diyc.cli.reload import Work

        work = self._work = Work(supervisor, self._settings, self._ended)
        try:
            prepared = await work.prepare()
            self._tell_warnings(supervisor)
            self._tell_memory_bound(self._settings)
            work.submit(prepared)
        except DiycError:
            if not self._ending.is_set():  # else it says no more than that it was stopped
                raise
        if not self._ending.is_set():
            self._service.ready()
        self._reloads.open()
        await self._until_done(supervisor)
        self._tell_warnings(supervisor)

    async def _until_done(self, supervisor: Supervisor) -> None:
        """Return when nothing runs, no reload can bring more, and nobody wants us to stay."""
        if self._options.serve:
            await self._ending.wait()
        await supervisor.wait()
        while not self._reloads.idle.is_set():
            await self._reloads.idle.wait()
            await supervisor.wait()

    async def _reload(self) -> None:
        """Read the file again and put it into force, or say why not and go on as before."""
        if self._ending.is_set() or self._work is None or self._supervisor is None:
            return
        self._service.reloading()
        try:
            lines = await self._exchange(self._work)
            self._reload_problem = ""
        except DiycError as error:
            problems = str(error).splitlines()
            lines = [*problems, f"not reloaded: {len(problems)} problems, told above; all goes on as before"]
            self._reload_problem = f"; last reload failed: {problems[0]}"
        self._tell_warnings(self._supervisor)
        for line in lines:
            self._progress.message(line)
        if not self._ending.is_set():
            self._service.ready()

    async def _exchange(self, work: Work) -> list[str]:
        import asyncio

        if os.path.exists(self._options.config) and not os.path.isfile(self._options.config):
            raise DiycError(f"{self._options.config} is not a file that can be read again")  # a pipe, as /dev/stdin
        new = await asyncio.get_running_loop().run_in_executor(None, _load, self._options)
        lines = await work.exchange(new)
        self._tell_memory_bound(work.settings)
        self._progress.total = work.total - work.dropped
        self._progress.queued = self._supervisor.queued if self._supervisor else 0
        return lines

    def _describe(self) -> str:
        """The status line of the service."""
        from diyc.results import Verdict

        if self._work is None or not self._work.begun:
            return f"getting {len(self._settings.jobs)} jobs ready"
        ok = self._tally.verdicts[Verdict.OK]
        running, queued = (self._supervisor.running, self._supervisor.queued) if self._supervisor else (0, 0)
        counts = f"{running} running, {queued} queued, {ok} ok, {self._tally.runs - ok} not ok"
        return counts + self._reload_problem

    def _started(self, run: Run) -> None:
        if self._supervisor is not None:
            self._progress.queued = self._supervisor.queued
        self._progress.started(run.run_id, run.spec.name, run.index)

    def _ended(self, result: Result) -> None:
        self._tally.add(result)
        self._metrics.observe(result)
        self._progress.finished(result)
        if self._writers:
            self._write(result.record())

    # -- output ----------------------------------------------------------------------------------------------------

    def _open_outputs(self) -> None:
        import asyncio

        from diyc.cli.relay import Relay

        options = self._options
        if options.joblog is not None:
            try:
                log = open(options.joblog, "ab", buffering=0)  # noqa: SIM115  closed by the ExitStack
            except OSError as error:
                raise ConfigError(
                    [Problem("--joblog", None, options.joblog, f"cannot be opened: {error.strerror}")]
                ) from error
            self._writers.append(_line_writer(self._closing.enter_context(log)))
        if options.json:
            self._relay = Relay(asyncio.get_running_loop(), self._output_error)
            self._writers.append(self._write_stdout)

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        for write in list(self._writers):
            try:
                write(line)
            except OSError as error:
                self._writers.remove(write)
                self._output_error(error)

    def _finish(self, total: int) -> None:
        summary = {**self._tally.to_json(), "not_started": total - self._tally.runs, "stopped_by": self._signal or None}
        if self._signal:
            summary["exit_status"] = 128 + self._signal
        self._write(summary)
        if self._options.verbosity >= 0 or not self._options.json:
            from diyc.cli.text import use_color

            width = _width(sys.stderr)
            print(self._tally.render(width, use_color(sys.stderr, os.environ)), end="", file=sys.stderr)
            if total > self._tally.runs:
                print(f"{total - self._tally.runs} runs were not started", file=sys.stderr)

    def _report_leftovers(self, supervisor: Supervisor) -> None:
        for left in supervisor.leftovers:
            self._progress.message(
                f"removed what supervisor {left.instance} (pid {left.pid}) left when it was killed: "
                f"{left.cgroups} cgroups, {left.paths} directories"
            )
        self._metrics.leaked("cgroup", sum(left.cgroups for left in supervisor.leftovers))
        self._metrics.leaked("directory", sum(left.paths for left in supervisor.leftovers))

    def _tell_memory_bound(self, settings: Config) -> None:
        """Say so where memory, not max_parallel, decides how many run at once: else it looks like a slow machine."""
        from diyc.units import format_size

        config = settings.supervisor
        for spec in settings.jobs:
            wanted = min(config.max_parallel, spec.max_parallel or config.max_parallel, spec.count)
            fitting = config.max_memory // spec.limits.memory if spec.limits.memory else wanted
            if fitting < wanted:
                each, sum_ = format_size(spec.limits.memory or 0), format_size(config.max_memory)
                self._progress.message(
                    f"{spec.name}: {fitting} runs at once, not {wanted}: "
                    f"limits.memory of {each} each within supervisor.max_memory of {sum_}"
                )

    def _tell_warnings(self, supervisor: Supervisor) -> None:
        for warning in supervisor.warnings:
            self._progress.message(f"warning: {warning}")
        supervisor.warnings.clear()

    def _write_stdout(self, line: str) -> None:
        if self._relay is not None:
            self._relay.write(1, line.encode())

    async def _flush(self) -> None:
        """Wait for the reader of stdout, with the loop running: signals and errors still count."""
        import asyncio

        if self._relay is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._relay.close)
            await asyncio.sleep(0)

    def _output_error(self, error: OSError) -> None:
        self._give_up(DiycError(f"cannot write results: {error.strerror}"))

    def _give_up(self, error: Exception) -> None:
        """Something that cannot be mended while running: stop, and leave with this error."""
        self._error = self._error or error
        self._ending.set()
        if self._supervisor is not None:
            self._supervisor.drain()
            self._supervisor.kill()

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception in a callback is a defect of diyc: say all about it, stop, exit with status 4."""
        loop.default_exception_handler(context)
        self._give_up(DiycError(f"internal error: {context.get('exception') or context.get('message')}"))

    # -- the world around --------------------------------------------------------------------------------------------

    async def _serve_metrics(self, supervisor: Supervisor, stack: AsyncExitStack) -> None:
        self._metrics.watch(
            running=lambda: supervisor.running,
            queued=lambda: supervisor.queued,
            slots=lambda: supervisor.slots,
            live=supervisor.live,
        )
        listen = self._settings.supervisor.metrics_listen
        if listen is None:
            return
        from diyc.server import MetricsServer

        server = MetricsServer(listen, self._metrics)
        await server.start()
        stack.push_async_callback(server.stop)
        shown = server.address if listen.startswith("unix:") else f"http://{server.address}/metrics"
        self._progress.message(f"metrics at {shown}")

    def _watch_signals(self, supervisor: Supervisor) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, supervisor, number)
            self._closing.callback(loop.remove_signal_handler, number)
        loop.add_signal_handler(signal.SIGHUP, self._reloads.request)
        self._closing.callback(loop.remove_signal_handler, signal.SIGHUP)

    def _stop(self, supervisor: Supervisor, number: int) -> None:
        """The first signal drains, the second kills."""
        if self._signal:
            self._progress.message("killing what still runs")
            supervisor.kill()
            return
        self._signal = number
        self._ending.set()
        self._service.stopping(supervisor.config.shutdown_grace)
        name = signal.Signals(number).name
        self._progress.message(f"{name}: stopping {supervisor.running} running jobs; once more kills them")
        supervisor.drain()


def _line_writer(log: RawIOBase) -> Callable[[str], None]:
    """Whole lines at once and unbuffered: closing has nothing left to write, and so nothing to fail with."""

    def write(line: str) -> None:
        rest = line.encode()
        while rest:
            rest = rest[log.write(rest) or 0 :]

    return write


def _width(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 100
