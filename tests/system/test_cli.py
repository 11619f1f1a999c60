"""diyc-supervisor as a user runs it: output, exit statuses, signals, many jobs at once, and what breaks around it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from needs import require
from system.commands import (
    PATIENCE,
    SOAK,
    SUPERVISOR,
    Done,
    Place,
    finish,
    killed_at_the_end,
    metrics_address,
    our_cgroups,
    scrape,
    wait_until,
)

pytestmark = pytest.mark.privileged

SMALL = 'limits = { memory = "8MiB", pids = 8, disk = "1MiB" }'
QUICK = f'[jobs.quick]\ncommand = ["echo", "quick"]\n{SMALL}\n'
NOBODY = 65534


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(params=["uvloop", "asyncio"])
def each_loop(request: pytest.FixtureRequest, place: Place) -> Place:
    """The place, on either event loop."""
    place.environment["DIYC_EVENT_LOOP"] = request.param
    return place


def no_traceback(done: Done) -> None:
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "never retrieved" not in done.stderr


# -- standard output is data, standard error is progress -------------------------------------------------------------


def test_json_is_an_object_a_line_as_runs_end_and_the_summary_last(each_loop: Place) -> None:
    each_loop.write(
        f'[jobs.good]\ncommand = ["echo", "grün"]\ncount = 3\n{SMALL}\n'
        f'[jobs.bad]\nshell = "echo oh >&2; exit 3"\n{SMALL}\n'
        f'[jobs.absent]\ncommand = ["no-such-program"]\n{SMALL}\n'
    )
    done = each_loop.supervise("--json")
    assert done.status == 1, done.stderr
    assert [line["type"] for line in done.lines] == ["result"] * 5 + ["summary"]
    assert done.verdicts() == {"good": "ok", "bad": "exit", "absent": "infra"}
    by_job = {result["job"]: result for result in done.results}
    assert by_job["good"]["stdout"] == "grün\n"
    assert (by_job["bad"]["exit_code"], by_job["bad"]["stderr"]) == (3, "oh\n")
    error = by_job["absent"]["error"]
    assert (error["step"], error["errno"], error["target"]) == ("exec", 2, "no-such-program")
    assert done.summary["runs"] == 5
    assert done.summary["verdicts"] | {"ok": 3, "exit": 1, "infra": 1} == done.summary["verdicts"]
    assert (done.summary["exit_status"], done.summary["not_started"]) == (1, 0)
    no_traceback(done)


def test_results_are_told_as_runs_end_and_not_at_the_end(place: Place) -> None:
    place.write(f'[jobs.a]\ncommand = ["true"]\n{SMALL}\n[jobs.b]\ncommand = ["sleep", "60"]\n{SMALL}\n')
    with killed_at_the_end(place.start("--json")) as supervisor:
        assert supervisor.stdout is not None
        assert json.loads(supervisor.stdout.readline())["job"] == "a"
        assert supervisor.poll() is None
        supervisor.send_signal(signal.SIGTERM)
        finish(supervisor)


def test_without_json_standard_output_is_empty_and_everything_is_told_on_standard_error(place: Place) -> None:
    place.write(f'{QUICK}[jobs.bad]\nshell = "exit 9"\n{SMALL}\n')
    done = place.supervise()
    assert (done.status, done.stdout) == (1, "")
    assert re.search(r"^ok +quick\[0\]", done.stderr, re.MULTILINE)
    assert re.search(r"^exit +bad\[0\] .*exit status 9$", done.stderr, re.MULTILINE)
    assert "2 runs" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_job_log_gets_the_same_lines_appended(place: Place) -> None:
    place.write(QUICK)
    log = place.root / "log.jsonl"
    first = place.supervise("--json", "--joblog", str(log))
    assert log.read_text() == first.stdout
    second = place.supervise("--json", "--joblog", str(log))
    assert log.read_text() == first.stdout + second.stdout
    assert place.supervise("--joblog", str(log)).stdout == ""
    assert len(log.read_text().splitlines()) == 6


def test_quiet_and_progress_never_are_silent(place: Place) -> None:
    place.write(QUICK)
    assert place.supervise("-q", "--json").stderr == ""
    assert "quick[0]" not in place.supervise("--progress", "never").stderr
    assert place.supervise("--progress", "never", "-q", "--json").stderr == ""


def test_verbose_has_a_line_for_every_start_and_end(place: Place) -> None:
    place.write(f'[jobs.many]\ncommand = ["true"]\ncount = 250\n{SMALL}\n')
    done = place.supervise("-v")
    assert Counter(line.split()[0] for line in done.stderr.splitlines() if "many[" in line) >= Counter(
        start=250, ok=250
    )
    plain = place.supervise()
    assert plain.stderr.count("many[") < 20
    assert re.search(r"^100%  250/250", plain.stderr, re.MULTILINE)


def on_terminal(place: Place, *arguments: str) -> str:
    """What a terminal on standard error gets."""
    ours, theirs = pty.openpty()
    with killed_at_the_end(place.start(*arguments, stderr=theirs)) as supervisor:
        os.close(theirs)
        said = bytearray()
        with contextlib.suppress(OSError):  # EIO: the last one has closed it
            while chunk := os.read(ours, 65536):
                said += chunk
        os.close(ours)
        assert finish(supervisor).status == 1
    return said.decode()


@pytest.mark.parametrize(
    "environment, moves, colours",
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "CI": "true"}, False, True),
    ],
)
def test_a_terminal_gets_a_display_unless_it_cannot_or_does_not_want_it(
    environment: dict[str, str], moves: bool, colours: bool, place: Place
) -> None:
    place.write(f'{QUICK}[jobs.bad]\nshell = "sleep 0.5; exit 9"\n{SMALL}\n')
    place.environment |= environment
    said = on_terminal(place)
    assert ("\x1b[?25l" in said) == moves
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", said)) == colours
    assert "2 runs" in said


def test_control_characters_of_a_file_do_not_reach_the_terminal(place: Place) -> None:
    place.write(f'[jobs.a]\ncommand = ["/no/\\u001b]0;title\\u0007"]\n{SMALL}\n')
    done = place.supervise()
    assert "\x1b" not in done.stderr
    assert "\\x1b]0;title" in done.stderr


# -- exit statuses ---------------------------------------------------------------------------------------------------


def test_all_runs_ok_is_0(place: Place) -> None:
    place.write(QUICK)
    assert place.supervise("-q").status == 0


@pytest.mark.parametrize("what", ["exit 1", "kill -9 $$; sleep 60", "sleep 60"])
def test_a_run_that_is_not_ok_is_1(what: str, place: Place) -> None:
    place.write(f'{QUICK}[jobs.bad]\nshell = "sh -c \'{what}\'"\ntimeout = "300ms"\n{SMALL}\n')
    assert place.supervise("-q").status == 1


WRONG = {
    "an unknown option": (["--bogus"], "No such option"),
    "no file": (["--config", "/nowhere/jobs.toml"], "/nowhere/jobs.toml: cannot read the configuration: No such file"),
    "a directory": (["--config", "/"], "/: is a directory"),
    "an unknown job": (["--only", "nothing"], "nothing"),
    "a broken override": (["--set", "jobs.quick.timeout"], "jobs.quick.timeout"),
    "an override of nothing": (["--set", "jobs.quick.timeot=5s"], "timeot"),
    "no runs at once": (["-j", "0"], "0 is not in the range"),
    "an unknown progress": (["--progress", "some"], "some"),
    "a wrong address": (["--metrics-listen", "nonsense"], "metrics_listen"),
    "a job log in no directory": (["--joblog", "/nowhere/log"], "/nowhere/log: cannot be opened"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_2_and_says_what(case: str, place: Place) -> None:
    arguments, message = WRONG[case]
    place.write(QUICK)
    done = place.supervise(*arguments)
    assert (done.status, done.stdout) == (2, "")
    assert message in done.stderr
    no_traceback(done)


MISTAKES = """
[supervisor]
max_paralel = 3
max_memory = "much"
[images.one]
tar = "nowhere.tar"
[jobs.a]
command = "echo"
timeout = "10 parsecs"
[jobs.b]
command = ["true"]
shell = "true"
[jobs.c]
command = ["true"]
image = "twoo"
limits = { memory = "64MQ", pids = -1, cpus = 0 }
[jobs.d]
"""


def test_every_mistake_of_a_file_is_a_line_and_nothing_else_is_told(place: Place) -> None:
    place.file.write_text(MISTAKES)
    done = place.supervise()
    assert (done.status, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) >= 10
    assert [line for line in lines if not re.match(rf"{re.escape(str(place.file))}:\d+: ", line)] == []
    numbers = [int(line.split(":")[1]) for line in lines]
    assert numbers == sorted(numbers)
    for key in (
        "max_paralel",
        "max_memory",
        "images.one",
        "jobs.a.command",
        "jobs.a.timeout",
        "jobs.b",
        "jobs.c.image",
    ):
        assert key in done.stderr
    for key in ("jobs.c.limits.memory", "jobs.c.limits.pids", "jobs.c.limits.cpus", "jobs.d"):
        assert key in done.stderr


def test_a_file_that_is_not_toml_is_one_line(place: Place) -> None:
    place.file.write_text('[jobs.a]\ncommand = ["true"\n')
    done = place.supervise()
    assert done.status == 2
    assert re.fullmatch(rf"{place.file}:\d+: .*\n", done.stderr)


@pytest.fixture
def open_place() -> Iterator[Place]:
    """A place that everybody may look at; skips where an ordinary user cannot even run this Python."""
    with tempfile.TemporaryDirectory(prefix="diyc-open-") as directory:
        os.chmod(directory, 0o755)
        place = Place(Path(directory))
        try:
            done = finish(place.spawn(SUPERVISOR, "--version", user=NOBODY, group=NOBODY, extra_groups=[]))
        except PermissionError:
            done = Done(1, "", "")
        if done.status != 0:
            pytest.skip("an ordinary user cannot run this interpreter")
        yield place


def test_an_ordinary_user_may_check_a_file(open_place: Place) -> None:
    open_place.write(QUICK)
    assert open_place.supervise("--check", user=NOBODY, group=NOBODY, extra_groups=[], cwd="/").status == 0


@pytest.mark.parametrize("directory", ["state", "run"])
def test_a_directory_that_cannot_be_made_is_3_and_named(directory: str, place: Place) -> None:
    place.write(QUICK)
    (place.root / directory).touch()
    done = place.supervise()
    assert (done.status, done.stdout) == (3, "")
    assert f"{place.root}/{directory}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    (place.root / directory).unlink()


def test_an_address_in_use_is_told_and_leaves_nothing(place: Place) -> None:
    place.write(f'[jobs.a]\ncommand = ["sleep", "60"]\n{SMALL}\n', 'metrics_listen = "127.0.0.1:0"')
    with killed_at_the_end(place.start()) as first:
        assert first.stderr is not None
        address = metrics_address(first.stderr)
        wait_until(lambda: scrape(address)["diyc_jobs_running"] == 1, "the job")
        before = our_cgroups()
        second = place.supervise("--metrics-listen", address)
        assert second.status in (2, 3)
        assert address in second.stderr
        no_traceback(second)
        assert our_cgroups() == before
        first.send_signal(signal.SIGTERM)
        finish(first)


# -- check, dry run, and the options that change a file --------------------------------------------------------------

SEVERAL = f"""
[jobs.array]
command = ["echo", "{{index}}", "two words"]
count = 3
hostname = "h{{index}}"
{SMALL}
[jobs.other]
shell = "echo $HOME"
timeout = "7s"
{SMALL}
"""


def test_check_prints_the_expansion_and_runs_nothing(place: Place) -> None:
    place.write(SEVERAL)
    done = place.supervise("--check")
    assert (done.status, done.stderr) == (0, "")
    assert "2 jobs, 4 runs" in done.stdout
    assert re.search(r"^ +array +3 x +echo", done.stdout, re.MULTILINE)
    assert not (place.root / "state").exists()
    assert not (place.root / "run").exists()
    (record,) = place.supervise("--check", "--json").lines
    assert (record["type"], record["file"]) == ("check", str(place.file))
    assert [(job["job"], job["runs"]) for job in record["jobs"]] == [("array", 3), ("other", 1)]


def test_a_dry_run_prints_every_run_and_its_plan_and_runs_nothing(place: Place) -> None:
    place.write(SEVERAL)
    done = place.supervise("--dry-run")
    assert (done.status, done.stderr) == (0, "")
    for text in ("[2] echo 2 two words", "host name h2", "DIYC_INDEX=2", "pivot_root", "execve"):
        assert text in done.stdout
    assert not (place.root / "state").exists()
    lines = place.supervise("--dry-run", "--json").lines
    runs = [line for line in lines if line["type"] == "run"]
    assert [(run["job"], run["index"]) for run in runs] == [("array", 0), ("array", 1), ("array", 2), ("other", 0)]
    assert runs[2]["argv"] == ["echo", "2", "two words"]
    assert runs[2]["hostname"] == "h2"
    assert runs[3]["argv"] == ["/bin/sh", "-c", "echo $HOME"]
    assert runs[3]["timeout_s"] == 7
    assert runs[0]["limits"]["memory"] == "8 MiB"


def test_only_runs_the_named_jobs_in_the_files_order(place: Place) -> None:
    place.write(SEVERAL + QUICK)
    done = place.supervise("--json", "--only", "quick", "--only", "other")
    assert set(done.verdicts()) == {"quick", "other"}


def test_set_overrides_a_key_for_this_time(place: Place) -> None:
    place.write(SEVERAL)
    done = place.supervise(
        "--json", "--only", "array", "--set", "jobs.array.count=2", "--set", 'jobs.array.command=["echo", "set"]'
    )
    assert [result["stdout"] for result in done.results] == ["set\n", "set\n"]


def test_j_and_state_dir_have_the_last_word(place: Place) -> None:
    place.write(f'[jobs.a]\ncommand = ["sleep", "0.1"]\ncount = 4\n{SMALL}\n', "max_parallel = 4")
    done = place.supervise("--json", "-j", "1", "--state-dir", f"{place.root}/elsewhere")
    queued = sorted(result["queued_s"] for result in done.results)
    assert all(later - earlier >= 0.09 for earlier, later in itertools.pairwise(queued))
    assert (place.root / "elsewhere/logs").is_dir()
    assert not (place.root / "state").exists()


def test_output_longer_than_inline_is_kept_whole_in_a_file(place: Place) -> None:
    place.write('[jobs.a]\nshell = "seq 1 5000"\nlimits = { inline = "10", output = "1MiB" }\n')
    (result,) = place.supervise("--json").results
    assert (result["verdict"], result["stdout"], result["stdout_truncated"]) == ("ok", "1\n2\n3\n4\n5\n", False)
    assert Path(result["stdout_path"]).read_text() == "".join(f"{n}\n" for n in range(1, 5001))
    assert result["stderr_path"] is None


# -- many jobs -------------------------------------------------------------------------------------------------------


def test_very_many_sleeping_jobs_overlap_and_a_scrape_answers_meanwhile(each_loop: Place) -> None:
    count, seconds, parallel = (1000, 2, 200) if SOAK else (200, 1, 100)
    each_loop.write(
        f'[jobs.sleep]\ncommand = ["sleep", "{seconds}"]\ncount = {count}\n{SMALL}\n',
        f'max_parallel = {parallel}\nmax_memory = "4GiB"\nmetrics_listen = "127.0.0.1:0"',
    )
    out = each_loop.root / "out"
    with open(out, "w") as file, killed_at_the_end(each_loop.start("--json", stdout=file)) as supervisor:
        assert supervisor.stderr is not None
        address = metrics_address(supervisor.stderr)
        peak = 0.0

        def all_at_once() -> bool:
            nonlocal peak
            figures = scrape(address)
            peak = max(peak, figures["diyc_jobs_running"])
            assert figures["diyc_jobs_running"] + figures["diyc_jobs_queued"] <= count
            return peak >= parallel

        wait_until(all_at_once, f"{parallel} at once (at most {peak:g} were)", 60)
        began = time.monotonic()
        figures = scrape(address)
        assert time.monotonic() - began < 5
        assert figures["diyc_slots"] == parallel
        assert supervisor.stderr.read() is not None
        assert supervisor.wait(120) == 0
    assert peak == parallel
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(line["verdict"] for line in lines[:-1]) == {"ok": count}
    assert min(line["wall_s"] for line in lines[:-1]) >= 0.9 * seconds
    assert lines[-1]["wall_s"] < count / parallel * seconds * 4


def test_thousands_of_tiny_jobs_are_all_ok_and_leave_nothing(each_loop: Place) -> None:
    count = 5000 if SOAK else 500
    before = our_cgroups()
    each_loop.write(f'[jobs.true]\ncommand = ["true"]\ncount = {count}\n{SMALL}\n')
    done = each_loop.supervise("--json", "-q")
    assert done.status == 0
    assert Counter(result["verdict"] for result in done.results) == {"ok": count}
    assert {result["index"] for result in done.results} == set(range(count))
    assert our_cgroups() == before
    assert [
        path for path in (each_loop.root / "run").rglob("*") if path.name not in ("instances", "host-root-lock")
    ] == []


# -- signals ---------------------------------------------------------------------------------------------------------


def gated(place: Place, shell: str, **keys: str) -> str:
    """A job that tells that it is ready by a file below gate/."""
    gate = place.root / "gate"
    gate.mkdir(exist_ok=True)
    extra = "".join(f"{key} = {value}\n" for key, value in keys.items())
    mounts = f'mounts = [{{ type = "bind", source = "{gate}", target = "/gate" }}]'
    return f"[jobs.gated]\nshell = {json.dumps(shell)}\n{extra}{mounts}\n{SMALL}\n"


def ready(place: Place, number: int) -> None:
    wait_until(lambda: len(list((place.root / "gate").iterdir())) >= number, f"{number} jobs to be ready")


READY = "touch /gate/$DIYC_INDEX;"
HANDLES = f"trap 'echo stopping; exit 0' TERM; echo working; {READY} sleep 60 & wait"
IGNORES = f"trap '' TERM; {READY} sleep 60 & wait; sleep 60"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals, each_loop: Place) -> None:
    each_loop.write(gated(each_loop, HANDLES, count="20", stop_timeout='"30s"'), "max_parallel = 4")
    with killed_at_the_end(each_loop.start("--json")) as supervisor:
        ready(each_loop, 4)
        supervisor.send_signal(number)
        done = finish(supervisor)
    assert done.status == 128 + number
    assert [result["verdict"] for result in done.results] == ["cancelled"] * 4
    assert [result["stdout"] for result in done.results] == ["working\nstopping\n"] * 4
    assert [result["exit_code"] for result in done.results] == [0] * 4
    assert (done.summary["runs"], done.summary["not_started"], done.summary["stopped_by"]) == (4, 16, number)
    assert f"{number.name}: stopping 4 running jobs" in done.stderr
    assert "16 runs were not started" in done.stderr
    no_traceback(done)


def test_another_stop_signal_is_the_one_that_jobs_get(place: Place) -> None:
    handles = f"trap 'echo hup; exit 0' HUP; trap 'echo term' TERM; {READY} while :; do sleep 60 & wait; done"
    place.write(gated(place, handles, stop_signal='"HUP"', stop_timeout='"30s"'))
    with killed_at_the_end(place.start("--json")) as supervisor:
        ready(place, 1)
        supervisor.send_signal(signal.SIGTERM)
        (result,) = finish(supervisor).results
    assert (result["verdict"], result["stdout"], result["exit_code"]) == ("cancelled", "hup\n", 0)


def test_a_second_signal_kills_at_once(place: Place) -> None:
    keys = {"count": "4", "stop_timeout": '"60s"'}
    place.write(gated(place, IGNORES, **keys), 'max_parallel = 2\nshutdown_grace = "60s"')
    with killed_at_the_end(place.start("--json")) as supervisor:
        ready(place, 2)
        began = time.monotonic()
        supervisor.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert supervisor.poll() is None
        supervisor.send_signal(signal.SIGTERM)
        done = finish(supervisor)
    assert time.monotonic() - began < 20
    assert done.status == 128 + signal.SIGINT
    assert [(result["verdict"], result["signal"]) for result in done.results] == [("cancelled", 9)] * 2
    assert done.summary["not_started"] == 2


def test_shutdown_grace_bounds_the_drain_whatever_a_jobs_stop_timeout(place: Place) -> None:
    place.write(gated(place, IGNORES, count="3", stop_timeout='"60s"'), 'shutdown_grace = "500ms"')
    with killed_at_the_end(place.start("--json")) as supervisor:
        ready(place, 3)
        began = time.monotonic()
        supervisor.send_signal(signal.SIGTERM)
        done = finish(supervisor)
    assert 0.5 <= time.monotonic() - began < 20
    assert [result["verdict"] for result in done.results] == ["cancelled"] * 3


def test_a_signal_before_the_first_run_ends_it_too(place: Place) -> None:
    place.write(f'[jobs.a]\ncommand = ["sleep", "60"]\ncount = 100\n{SMALL}\n', "max_parallel = 2")
    with killed_at_the_end(place.start("-v")) as supervisor:
        assert supervisor.stderr is not None
        assert supervisor.stderr.readline().startswith("start")
        supervisor.send_signal(signal.SIGTERM)
        done = finish(supervisor)
    assert done.status == 128 + signal.SIGTERM
    no_traceback(done)


# -- what breaks around it -------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_it_cleanly(place: Place) -> None:
    before = our_cgroups()
    place.write(f'[jobs.a]\nshell = "sleep 0.02; seq 1 2000"\ncount = 2000\n{SMALL}\n')
    command = f"{shlex.quote(SUPERVISOR)} --config {shlex.quote(str(place.file))} --json | head -n 1"
    done = finish(place.spawn("bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"))
    assert done.status == 4, done.stderr[-500:]
    assert len(done.stdout.splitlines()) == 1
    assert "cannot write results: Broken pipe" in done.stderr
    no_traceback(done)
    assert our_cgroups() == before


@pytest.mark.parametrize("option", ["--check", "--dry-run"])
def test_a_reader_of_an_expansion_that_goes_away_is_no_traceback(option: str, place: Place) -> None:
    place.write(f'[jobs.a]\ncommand = ["true"]\ncount = 5000\n{SMALL}\n')
    command = f"{shlex.quote(SUPERVISOR)} --config {shlex.quote(str(place.file))} {option} --json | true"
    done = finish(place.spawn("bash", "-c", command))
    no_traceback(done)


def test_closed_standard_descriptors_do_no_harm(place: Place) -> None:
    place.write(QUICK)
    log = place.root / "log"
    command = f"{shlex.quote(SUPERVISOR)} --config {shlex.quote(str(place.file))} --joblog {log} <&- >&- 2>&-"
    assert finish(place.spawn("sh", "-c", command)).status == 0
    assert [json.loads(line)["type"] for line in log.read_text().splitlines()] == ["result", "summary"]


def test_a_full_disk_under_the_logs_spoils_that_run_and_no_other(place: Place) -> None:
    require("root")
    big = '[jobs.big]\nshell = "sleep 0.1; seq 1 100000"\nlimits = { inline = "1KiB", output = "1MiB" }\n'
    place.write(f"{big}[jobs.small]\ncommand = ['echo', 'fits']\ncount = 20\n{SMALL}\n", "max_parallel = 2")
    state = place.root / "state"
    state.mkdir(mode=0o700)
    mounted = f"mount -t tmpfs -o size=128k,mode=0700 tmpfs {shlex.quote(str(state))}"
    command = f"{mounted} && exec {shlex.quote(SUPERVISOR)} --config {shlex.quote(str(place.file))} --json"
    done = finish(place.spawn("unshare", "--mount", "sh", "-c", command))
    assert done.status == 1, done.stderr
    by_job = {result["job"]: result for result in done.results}
    assert by_job["big"]["verdict"] == "infra"
    assert "No space left on device" in by_job["big"]["reason"]
    assert by_job["big"]["error"]["errno"] == 28
    assert Counter(result["verdict"] for result in done.results) == {"ok": 20, "infra": 1}
    no_traceback(done)


@pytest.mark.parametrize("what", ["job log", "standard output"])
def test_a_full_disk_under_the_results_stops_it_and_says_so(what: str, place: Place) -> None:
    before = our_cgroups()
    arguments = ["--joblog", "/dev/full"] if what == "job log" else ["--json"]
    full = os.open("/dev/full", os.O_WRONLY)
    place.write(f'[jobs.a]\ncommand = ["echo", "hi"]\ncount = 50\n{SMALL}\n', "max_parallel = 2")
    done = place.supervise(*arguments, stdout=subprocess.PIPE if what == "job log" else full)
    os.close(full)
    assert done.status == 4
    assert "No space left on device" in done.stderr
    no_traceback(done)
    assert our_cgroups() == before


def test_an_unknown_event_loop_is_refused_by_name(place: Place) -> None:
    place.write(QUICK)
    place.environment["DIYC_EVENT_LOOP"] = "gevent"
    done = place.supervise()
    assert done.status in (2, 3)
    assert "DIYC_EVENT_LOOP is 'gevent'" in done.stderr


def test_inherited_descriptors_and_ignored_signals_of_its_parent_do_no_harm(place: Place) -> None:
    """Started with SIGCHLD ignored the kernel would reap the jobs; with a signal blocked none could stop it."""
    place.write(f'[jobs.a]\nshell = "exit 5"\n{SMALL}\n')
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
    code = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    try:
        done = finish(
            place.spawn(
                sys.executable, "-c", code, SUPERVISOR, "--config", str(place.file), "--json", pass_fds=tuple(extra)
            )
        )
    finally:
        for fd in extra:
            os.close(fd)
    (result,) = done.results
    assert (result["verdict"], result["exit_code"]) == ("exit", 5)


def test_it_starts_quickly_enough_to_be_pleasant() -> None:
    """No speed test: --version must not load the event loop, the validation and the metrics."""
    code = (
        "import sys; from diyc.cli import supervisor, main; "
        "print(*sorted({'pydantic', 'aiohttp', 'uvloop', 'rich', 'prometheus_client', 'asyncio'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert run.stdout.strip() == ""
