"""diyc: one job now (run), what a job comes to (explain), what this host offers (doctor), the file's schema."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from diyc import __version__, rootless
from diyc.cli import common
from diyc.errors import ConfigError, DiycError, Problem, SetupError

if TYPE_CHECKING:
    import asyncio

    from diyc.cli.relay import Relay
    from diyc.host import Feature
    from diyc.jobs import JobSpec
    from diyc.results import Result
    from diyc.supervisor import Batch, Supervisor

PROGRAM = "diyc"
RELAY_PATIENCE = 1.0  # for what a run said that was stopped: its reader may be what hangs
FAILED, NOT_EXECUTABLE, NOT_FOUND, TIMED_OUT = 125, 126, 127, 124
_EXEC_STATUS = {
    errno.ENOENT: NOT_FOUND,
    errno.ENOTDIR: NOT_FOUND,
    errno.EACCES: NOT_EXECUTABLE,
    errno.ENOEXEC: NOT_EXECUTABLE,
}

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name=PROGRAM)
def main() -> None:
    """Short-lived sandboxed jobs on Linux: this runs one and explains, diyc-supervisor runs many."""
    common.open_standard_streams()


class RunCommand(click.Command):
    """Mistakes in the command line are ours, 125: 2 may be the status of the command that is run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.show()
            raise SystemExit(FAILED) from error


# -- run -------------------------------------------------------------------------------------------------------------


@main.command(cls=RunCommand, context_settings={**_CONTEXT, "allow_interspersed_args": False})
@click.option("-m", "--memory", metavar="SIZE", help="Memory limit, as 64MiB.")
@click.option("--cpus", type=float, metavar="N", help="CPUs' worth of time.")
@click.option("--cpuset", metavar="LIST", help="CPUs to run on, as 0-1.")
@click.option("--pids", type=int, metavar="N", help="Processes at once.")
@click.option("--disk", metavar="SIZE", help="What the run may write to its root.")
@click.option("-t", "--timeout", metavar="DURATION", help="Stop it after this long.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Environment; may be repeated.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.option("-u", "--user", metavar="USER", help="Name, uid or uid:gid inside.")
@click.option("--hostname", metavar="NAME", help="Host name inside.")
@click.option("--network", type=click.Choice(["none", "loopback"]), help="Default: none.")
@click.option("-v", "--volume", multiple=True, metavar="SOURCE:TARGET[:ro]", help="Bind mount; may be repeated.")
@click.option("--tmpfs", multiple=True, metavar="TARGET[:SIZE]", help="Memory file system; may be repeated.")
@click.option("--cap-add", multiple=True, metavar="CAP", help="Capability inside its user namespace.")
@click.option("--security-opt", multiple=True, metavar="KEY=VALUE", help="apparmor=PROFILE or selinux=LABEL.")
@click.option("--read-only", is_flag=True, help="The root cannot be written to.")
@click.option("--state-dir", metavar="DIR", help="Where images are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the result object instead of the output.")
@click.argument("image")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(image: str, command: tuple[str, ...], state_dir: str | None, as_json: bool, **flags: Any) -> None:
    """Run COMMAND in a new container of IMAGE: "host", a directory, or a tar file.

    Standard input, output and error are the command's, without limits.output. Exit status: the command's own; 124
    timeout, 125 diyc failed, 126 not executable, 127 not found, 128+N killed by signal N."""
    try:
        spec = _spec(image, command, flags)
        common.enter_host()
        common.settle_process()
        got: list[int] = []
        result = common.run_loop(lambda: _run(spec, state_dir, as_json, got))
    except ReaderGone:
        raise SystemExit(128 + signal.SIGPIPE) from None
    except DiycError as error:
        common.fail(PROGRAM, error, FAILED)
    if as_json:
        print(json.dumps(result.record(), ensure_ascii=False))
    elif _status(result) != (result.exit_code or 0) and not got:
        print(f"diyc: {result.verdict}: {result.reason}", file=sys.stderr)
    raise SystemExit(128 + got[0] if got else _status(result))


def _spec(image: str, command: tuple[str, ...], flags: dict[str, Any]) -> JobSpec:
    """The flags as a job of jobs.toml, so that both have the same rules and the same messages."""
    from diyc.api import Job
    from diyc.jobs import escape

    if image != "host" and not os.path.exists(image):
        problem = f'"{image}" is neither "host", nor a directory, nor a tar file'
        raise ConfigError([Problem("command line", None, "IMAGE", problem)])
    limits = {key: flags[key] for key in ("memory", "cpus", "cpuset", "pids", "disk") if flags[key] is not None}
    job: dict[str, Any] = {
        "command": [escape(word) for word in command],
        "env": dict(_pair(text, "=", "--env NAME=VALUE") for text in flags["env"]),
        "limits": limits,
        "writable": not flags["read_only"],
        "mounts": [*map(_volume, flags["volume"]), *map(_tmpfs, flags["tmpfs"])],
        "security": {"cap_add": list(flags["cap_add"]), **dict(map(_security_opt, flags["security_opt"]))},
    }
    job |= {key: flags[key] for key in ("timeout", "workdir", "user", "hostname") if flags[key] is not None}
    if flags["network"]:
        job["network"] = {"mode": flags["network"]}
    return Job("run", image=image, **job)


def _pair(text: str, separator: str, form: str) -> tuple[str, str]:
    from diyc.jobs import escape

    name, found, value = text.partition(separator)
    if not found or not name:
        raise ConfigError([Problem("command line", None, form.split()[0], f"{text!r} is not {form.split()[1]}")])
    return name, escape(value)


def _security_opt(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    known = ("apparmor", "selinux", "selinux_mount")
    if key not in known:
        problem = f"{key!r} is not one of {', '.join(known)}"
        raise ConfigError([Problem("command line", None, "--security-opt", problem)])
    return key, value


def _volume(text: str) -> dict[str, Any]:
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not target or mode not in ("", "ro", "rw"):
        raise ConfigError([Problem("command line", None, "--volume", f"{text!r} is not SOURCE:TARGET[:ro]")])
    return {"type": "bind", "source": os.path.abspath(source), "target": target, "read_only": mode == "ro"}


def _tmpfs(text: str) -> dict[str, Any]:
    target, _, size = text.partition(":")
    return {"type": "tmpfs", "target": target, **({"size": size} if size else {})}


async def _run(spec: JobSpec, state_dir: str | None, as_json: bool, got: list[int]) -> Result:
    import asyncio

    from diyc.cli.relay import Relay
    from diyc.supervisor import Supervisor

    settings: dict[str, Any] = {"state_dir": os.path.abspath(state_dir)} if state_dir else {}
    async with Supervisor(max_parallel=1, **settings) as supervisor:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Result] = loop.create_future()
        loop.set_exception_handler(lambda loop, context: _defect(loop, context, ended))
        prepared = await supervisor.prepare(spec)
        relay = Relay(loop, lambda error: _output_error(error, ended))
        sink = None if as_json else _Output(relay)

        def on_result(result: Result) -> None:
            if not ended.done():  # else the command has failed already
                ended.set_result(result)

        batch = supervisor.submit(prepared, on_result, sink=sink, stdin=_stdin())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, _interrupt, supervisor, batch, number, got)
        if os.isatty(0):
            print("diyc: the job's standard input is empty: terminals are not passed on yet", file=sys.stderr)
        result = await ended
        relay.close(None if result.verdict in ("ok", "exit", "signal") else RELAY_PATIENCE)
        return result


def _interrupt(supervisor: Supervisor, batch: Batch, number: int, got: list[int]) -> None:
    """Cancel the run; the exit status then tells the signal that this command got, as a shell expects."""
    supervisor.cancel(batch)
    got.append(number)


def _defect(loop: asyncio.AbstractEventLoop, context: dict[str, Any], ended: asyncio.Future[Result]) -> None:
    """An exception in a callback ends the command: output that cannot be written, or a defect of diyc."""
    cause = context.get("exception")
    if not isinstance(cause, OutputError):
        loop.default_exception_handler(context)
        cause = DiycError(f"internal error: {cause or context.get('message')}")
    if not ended.done():
        ended.set_exception(cause)


class OutputError(DiycError):
    """The command's output cannot be passed on."""


class ReaderGone(OutputError):
    """Whoever read our output has had enough, as `head` does: no error to speak of."""


def _stdin() -> int | None:
    """Pass on a pipe or a file; a terminal stays the host's (a job with it could type on it), and so does a
    directory, which would lead out of the container."""
    import stat

    from diyc.process import open_read_only

    found = os.fstat(0)
    if not stat.S_ISREG(found.st_mode):
        return 0 if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode) else None
    if found.st_nlink == 0:
        return 0  # a here-document: nobody else can reach what the job might write there
    fd = open_read_only("/proc/self/fd/0", follow=True)
    os.lseek(fd, os.lseek(0, 0, os.SEEK_CUR), os.SEEK_SET)
    return fd


class _Output:
    """Passes a run's output on to our own, as fast as that is read."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.when_ready = relay.when_ready

    def __call__(self, name: str, chunk: bytes, /) -> bool:
        return self._relay.write(1 if name == "stdout" else 2, chunk)


def _output_error(error: OSError, ended: asyncio.Future[Result]) -> None:
    gone = error.errno == errno.EPIPE
    if not ended.done():
        ended.set_exception(ReaderGone() if gone else OutputError(f"cannot write the output: {error.strerror}"))


def _status(result: Result) -> int:
    if result.verdict == "infra":
        error = result.error or {}
        return _EXEC_STATUS.get(error["errno"], FAILED) if error.get("step") == "exec" else FAILED
    if result.verdict == "timeout":
        return TIMED_OUT
    if result.verdict in ("oom", "output_limit", "cancelled"):
        return 128 + (result.signal or signal.SIGKILL)
    return 128 + result.signal if result.signal else result.exit_code or 0


# -- explain -----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("job")
@click.option("--config", "config", metavar="FILE", default="jobs.toml", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(job: str, config: str, as_json: bool) -> None:
    """Print every system call that starts JOB, in order, each with its why and its manual page."""
    from diyc.cli.expansion import cgroups_here, plan_json, render_plan
    from diyc.cli.text import Paint, use_color
    from diyc.config import load_config

    try:
        (spec,) = load_config(config, only=(job,)).jobs
        cgroups = cgroups_here(spec)
    except DiycError as error:
        common.fail(PROGRAM, error)
    if as_json:
        print(json.dumps(plan_json(spec, cgroups), ensure_ascii=False))
    else:
        print(render_plan(spec, cgroups, Paint(use_color(sys.stdout, os.environ))))


# -- doctor ------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> None:
    """Say what this host offers and lacks, and run one job to prove it. Exit status 3 if no job can run here."""
    from diyc.cgroups import detect, open_cgroups
    from diyc.host import load_overlay, read_host
    from diyc.process import system_calls

    try:
        common.enter_host()
    except DiycError as error:
        print(f"diyc: {error}", file=sys.stderr)  # and yet all that can be known is shown
    load_overlay()
    facts = read_host(calls=system_calls())
    try:
        layout = detect()
        cgroups = [f"layout {layout.layout}", *open_cgroups(layout).describe()]
    except DiycError as error:
        cgroups = [str(error)]
    trial = _trial()
    able = not facts.missing() and trial is None
    if as_json:
        features = [
            {"name": f.name, "present": f.present, "needed": f.needed, "detail": f.detail, "remedy": f.remedy}
            for f in facts.features
        ]
        print(
            json.dumps(
                {"type": "doctor", "schema": 1, "able": able, "features": features, "cgroups": cgroups, "trial": trial}
            )
        )
    else:
        _print_doctor(facts.features, cgroups, trial)
    raise SystemExit(common.OK if able else common.HOST)


def _print_doctor(features: tuple[Feature, ...], cgroups: list[str], trial: str | None) -> None:
    from diyc.cli.text import Paint, use_color

    paint = Paint(use_color(sys.stdout, os.environ))
    for feature in features:
        state = "yes" if feature.present else "NO " if feature.needed else "no "
        remedy = f" ({feature.remedy})" if feature.remedy and not feature.present else ""
        print(f"{state}  {feature.name:<18} {feature.detail}{paint.dim(remedy)}")
    print("\ncgroups")
    for line in cgroups:
        print(f"     {line}")
    print(
        "\na job    " + ("ran in a container: this host can run jobs" if trial is None else f"could not run: {trial}")
    )


def _trial() -> str | None:
    """Run /bin/true of this host in a container; what went wrong, or None."""
    from diyc.config import job_from_mapping

    try:
        spec = job_from_mapping("doctor", {"command": ["true"], "timeout": "10s"})
        common.settle_process()
        result = common.run_loop(lambda: _run(spec, None, True, []))
    except (DiycError, SetupError) as error:
        return str(error)
    return None if result.verdict == "ok" else f"{result.verdict}: {result.reason}"


# -- schema, cleanup ---------------------------------------------------------------------------------------------------


@main.command()
def schema() -> None:
    """Print the JSON Schema of jobs.toml, for editors."""
    from diyc.config import json_schema

    print(json.dumps(json_schema(), indent=2))


@main.command(context_settings={**_CONTEXT, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def unshare(command: tuple[str, ...]) -> None:
    """Run COMMAND as root of the user namespace that diyc uses without root: to look at or remove what jobs' users
    own, or to run a Python program that uses diyc.Supervisor."""
    program = shutil.which(command[0])
    if program is None:
        common.fail(PROGRAM, DiycError(f"{command[0]}: no such program on PATH"), NOT_FOUND)
    try:
        if os.geteuid() == 0:
            os.execv(program, list(command))
        rootless.enter([program, *command[1:]])
    except OSError as error:
        common.fail(PROGRAM, DiycError(f"{program}: {error.strerror}"), NOT_EXECUTABLE)
    except DiycError as error:
        common.fail(PROGRAM, error, FAILED)


@main.command()
@click.option("--runtime-dir", metavar="DIR", help="Default: /run/diyc, or diyc in XDG_RUNTIME_DIR.")
def cleanup(runtime_dir: str | None) -> None:
    """Remove what killed supervisors left: cgroups with all that runs in them, and scratch directories."""
    from diyc.cgroups import remove_leftovers
    from diyc.config import supervisor_from_mapping
    from diyc.ids import new_id
    from diyc.images.directories import private_directory
    from diyc.images.host import remove_abandoned_skeletons
    from diyc.instance import Instance

    try:
        config = supervisor_from_mapping({"runtime_dir": runtime_dir} if runtime_dir else {})
        common.enter_host()
        private_directory(config.runtime_dir, "runtime_dir")
        private_directory(f"{config.runtime_dir}/instances", "runtime_dir")
        instance = Instance(config.runtime_dir, new_id())
        try:
            leftovers = instance.recover(remove_leftovers)
            skeletons = sum(map(remove_abandoned_skeletons, (config.runtime_dir, f"{config.state_dir}/run")))
        finally:
            instance.close()
    except DiycError as error:
        common.fail(PROGRAM, error)
    for left in leftovers:
        what = f"{left.cgroups} cgroups and {left.paths} directories"
        print(f"removed {what} of supervisor {left.instance} (pid {left.pid})")
    if skeletons:
        print(f"removed {skeletons} skeletons of the host's root")
    if not leftovers and not skeletons:
        print("nothing was left behind")
