"""The command diyc: one job now, what a job comes to, what this host offers, the schema of the file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jsonschema
import pytest

import diyc
from needs import require
from sources import ROOT
from system.commands import DIYC, Place, finish, killed_at_the_end, wait_until

pytestmark = pytest.mark.privileged

MIB = 1024**2


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# -- diyc run: exit statuses -----------------------------------------------------------------------------------------

STATUSES = {
    "the command's own 0": (["host", "true"], 0, ""),
    "the command's own 7": (["host", "sh", "-c", "exit 7"], 7, ""),
    "the command's own 255": (["host", "sh", "-c", "exit 255"], 255, ""),
    "a timeout": (["-t", "200ms", "host", "sleep", "60"], 124, "timeout of 200 ms reached"),
    "not found": (["host", "no-such-program"], 127, "no-such-program"),
    "not found by its path": (["host", "/no/such/program"], 127, "/no/such/program"),
    "not executable": (["host", "/etc/passwd"], 126, "/etc/passwd"),
    "a directory": (["host", "/etc"], 126, "/etc"),
    "a crash": (["host", "python3", "-c", "import ctypes; ctypes.string_at(0)"], 128 + signal.SIGSEGV, "SIGSEGV"),
    "out of memory": (["-m", "8MiB", "host", "tail", "/dev/zero"], 128 + signal.SIGKILL, "memory limit 8 MiB reached"),
    "no such image": (["/nowhere", "true"], 125, "/nowhere"),
    "a wrong limit": (["-m", "lots", "host", "true"], 125, "lots"),
    "a wrong user": (["-u", "nemo", "host", "true"], 125, "nemo"),
    "a wrong variable": (["-e", "NAME", "host", "true"], 125, "'NAME' is not NAME=VALUE"),
    "a wrong volume": (["-v", "/usr", "host", "true"], 125, "'/usr' is not SOURCE:TARGET[:ro]"),
    "a volume that is not there": (["-v", "/nowhere:/x", "host", "true"], 125, "/nowhere"),
    "a wrong capability": (["--cap-add", "SYS_ADMIN", "host", "true"], 125, "SYS_ADMIN"),
    "a working directory that is not there": (["-w", "/nowhere", "host", "true"], 125, "/nowhere"),
    "an unknown option": (["--bogus", "host", "true"], 125, "No such option"),
    "no command": (["host"], 125, "Missing argument"),
}


@pytest.mark.parametrize("case", STATUSES)
def test_exit_status(case: str, place: Place) -> None:
    arguments, status, message = STATUSES[case]
    done = place.run(*arguments)
    assert (done.status, done.stdout) == (status, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if not message:
        assert done.stderr == ""


# -- diyc run: streams -----------------------------------------------------------------------------------------------


def test_output_and_errors_come_out_where_they_belong(place: Place) -> None:
    done = place.run("host", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_standard_input_may_be_a_pipe_a_file_or_nothing(place: Place, tmp_path: Path) -> None:
    assert place.run("host", "tr", "a-z", "A-Z", stdin="piped").stdout == "PIPED"
    (tmp_path / "in").write_text("from a file")
    with open(tmp_path / "in") as file:
        assert finish(place.spawn(DIYC, "run", "host", "cat", stdin=file)).stdout == "from a file"
    assert finish(place.spawn(DIYC, "run", "host", "cat", stdin=subprocess.DEVNULL)).stdout == ""


def test_a_device_as_standard_input_does_not_reach_the_job(place: Place) -> None:
    """A terminal is one: a job that had the host's could type on it."""
    with open("/dev/zero") as device:
        done = finish(place.spawn(DIYC, "run", "host", "sh", "-c", "head -c 3 | wc -c", stdin=device))
    assert done.stdout == "0\n"


def test_output_comes_as_it_is_written_and_not_at_the_end(place: Place) -> None:
    with killed_at_the_end(place.spawn(DIYC, "run", "host", "sh", "-c", "echo now; sleep 60")) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "now\n"
        assert run.poll() is None
        run.terminate()
        run.wait(20)


def peak_memory(place: Place, command: str) -> int:
    """The peak memory in bytes of `diyc run` (and of the small job) in a pipeline that must succeed."""
    run = subprocess.Popen(
        ["bash", "-o", "pipefail", "-c", command], env={**os.environ, "DIYC": DIYC}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    assert run.returncode == 0
    return usage.ru_maxrss * 1024


def test_fifty_megabytes_pass_through_in_bounded_memory(place: Place, tmp_path: Path) -> None:
    little = peak_memory(place, 'head -c 50 /dev/zero | "$DIYC" run host cat | wc -c | grep -qx 50')
    much = peak_memory(place, 'head -c 50000000 /dev/zero | "$DIYC" run host cat | wc -c | grep -qx 50000000')
    assert much - little < 16 * MIB


def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(place: Place) -> None:
    done = finish(place.spawn("bash", "-c", f"timeout 30 '{DIYC}' run host yes | head -n 1; exit ${{PIPESTATUS[0]}}"))
    assert done.stdout == "y\n"
    assert done.status not in (0, 124)
    assert "Traceback" not in done.stderr
    assert "exception in callback" not in done.stderr.lower()


@pytest.mark.parametrize("how", ["timeout", "SIGINT"])
def test_a_reader_that_does_not_read_keeps_nobody_from_stopping_the_run(how: str, place: Place) -> None:
    timeout = ["-t", "1s"] if how == "timeout" else []
    with killed_at_the_end(place.spawn(DIYC, "run", *timeout, "host", "yes")) as run:
        time.sleep(1.5)  # the pipe is full by now
        if how == "SIGINT":
            run.send_signal(signal.SIGINT)
        try:
            status = run.wait(10)
        except subprocess.TimeoutExpired:
            status = None
        assert status is not None, "it hangs on its own output"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_run(number: signal.Signals, place: Place) -> None:
    shell = "trap 'echo stopping; exit 0' TERM; echo ready; sleep 60 & wait"
    with killed_at_the_end(place.spawn(DIYC, "run", "host", "sh", "-c", shell)) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        run.send_signal(number)
        done = finish(run)
    assert done.stdout == "stopping\n"
    assert done.status == 128 + number
    assert "Traceback" not in done.stderr


def test_json_is_the_result_record_instead_of_the_output(place: Place) -> None:
    done = place.run("--json", "host", "sh", "-c", "echo hi; exit 3")
    (record,) = done.lines
    assert (record["type"], record["verdict"], record["exit_code"], record["stdout"]) == ("result", "exit", 3, "hi\n")
    assert (done.status, done.stderr) == (3, "")


# -- diyc run: flags -------------------------------------------------------------------------------------------------


def said(place: Place, *arguments: str) -> str:
    done = place.run(*arguments)
    assert done.status == 0, done.stderr
    return done.stdout.strip()


def test_words_with_braces_reach_the_command_as_they_are(place: Place) -> None:
    words = ["{index}", "{{", "}}", "{", "{job}", "{{index}}", "{row.x}", "${x}", "%d\\n", "", "a b", "{ index }"]
    printed = said(place, "host", "python3", "-c", "import sys, json; print(json.dumps(sys.argv[1:]))", *words)
    assert json.loads(printed) == words
    assert said(place, "-e", "BRACES={index}{{", "host", "sh", "-c", 'echo "$BRACES"') == "{index}{{"


def test_options_after_the_image_are_the_commands(place: Place) -> None:
    assert said(place, "host", "echo", "--json", "-m", "--help") == "--json -m --help"
    assert said(place, "host", "echo", "--", "-x") == "-- -x"
    assert said(place, "--", "host", "echo", "hi") == "hi"
    assert said(place, "--hostname", "h1", "--", "host", "hostname") == "h1"


@pytest.mark.parametrize(
    "flags, command, expected",
    [
        (["-e", "A=1", "-e", "B=x=y"], "echo $A $B", "1 x=y"),
        (["-e", "EMPTY="], "echo [$EMPTY]", "[]"),
        (["-w", "/usr/bin"], "pwd", "/usr/bin"),
        (["-u", "1000:1001"], "id -u; id -g", "1000\n1001"),
        (["-u", "nobody"], "id -un", "nobody"),
        (["--hostname", "box.example.org"], "hostname", "box.example.org"),
        (["--hostname", "box"], "cat /etc/hostname", "box"),
        (["--network", "loopback"], "cat /sys/class/net/lo/operstate; ls /sys/class/net", "unknown\nlo"),
        ([], "cat /sys/class/net/lo/operstate", "down"),
        (["--read-only"], "touch /x 2>/dev/null || echo refused", "refused"),
        ([], "touch /x && echo written", "written"),
        (
            ["--tmpfs", "/scratch:1MiB"],
            "stat -f -c %T /scratch; df -k --output=size /scratch | tail -n 1",
            "tmpfs\n 1024",
        ),
        (["--tmpfs", "/scratch"], "touch /scratch/x && stat -f -c %T /scratch", "tmpfs"),
        (["--cap-add", "NET_RAW"], "grep CapEff /proc/self/status", "CapEff:\t0000000000002000"),
        ([], "grep CapEff /proc/self/status", "CapEff:\t0000000000000000"),
        (["--disk", "1MiB"], "head -c 4000000 /dev/zero > /x; echo $(($(stat -c %s /x) / 524288))", "1"),
        (["--pids", "3"], "ulimit -c; nproc > /dev/null; echo ok", "0\nok"),
        (["-t", "30s"], "echo in time", "in time"),
        ([], "env | sort | grep -v ^PWD= | cut -d= -f1 | tr '\\n' ' '", None),
    ],
)
def test_a_flag_does_what_its_name_says(flags: list[str], command: str, expected: str | None, place: Place) -> None:
    done = place.run(*flags, "host", "sh", "-c", command)
    if expected is None:
        assert done.stdout.split() == "DIYC_ATTEMPT DIYC_INDEX DIYC_JOB DIYC_RUN_ID HOME HOSTNAME PATH".split()
    else:
        assert re.sub(r"(?m)^ +", " ", done.stdout.rstrip("\n")) == expected, done.stderr


def test_volumes_are_writable_or_read_only_as_asked(place: Place, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("host\n")
    (tmp_path / "one").write_text("a single file\n")
    assert said(place, "-v", f"{shared}:/in/deep:ro", "host", "cat", "/in/deep/file") == "host"
    done = place.run("-v", f"{shared}:/in:ro", "host", "touch", "/in/new")
    assert done.status == 1
    assert "Read-only file system" in done.stderr
    assert said(place, "-v", f"{tmp_path}/one:/etc/one:ro", "host", "cat", "/etc/one") == "a single file"
    assert place.run("-v", f"{shared}:/out", "host", "sh", "-c", "echo job > /out/made").status == 0
    made = shared / "made"
    assert (made.read_text(), made.stat().st_uid) == ("job\n", 0)
    assert not (shared / "new").exists()


def test_a_relative_volume_starts_where_the_command_was_given(place: Place, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").write_text("found\n")
    assert place.run("-v", "here:/x:ro", "host", "cat", "/x/file", cwd=tmp_path).stdout == "found\n"


def test_processor_time_is_limited(place: Place) -> None:
    require("cgroup.cpu")
    burn = "import time; end = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    spent = float(said(place, "--cpus", "0.25", "host", "python3", "-c", burn))
    assert spent < 0.6


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small image: Debian's static busybox and an /etc/passwd."""
    require("program.busybox")
    root = tmp_path / "image"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    busybox = subprocess.run(["which", "busybox"], capture_output=True, text=True, check=True).stdout.strip()
    (root / "bin/busybox").write_bytes(Path(busybox).read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "bin/sh").symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n")
    (root / "here").write_text("in the image\n")
    return root


def test_an_image_may_be_a_directory_that_stays_as_it_is(place: Place, image: Path) -> None:
    shell = "cat /here; echo changed > /here; rm /etc/passwd; cat /here"
    assert (
        said(place, str(image), "sh", "-c", f"busybox {shell.replace('; ', '; busybox ')}") == "in the image\nchanged"
    )
    assert (image / "here").read_text() == "in the image\n"
    assert (image / "etc/passwd").exists()


def test_an_image_may_be_an_archive(place: Place, image: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "image.tar.gz", "w:gz") as archive:
        archive.add(image, ".")
    for _ in range(2):
        assert said(place, "-u", "app", str(tmp_path / "image.tar.gz"), "busybox", "id", "-u") == "1000"
    assert len([path for path in (tmp_path / "state/images").iterdir() if path.name.startswith("sha256-")]) == 1


def test_an_archive_that_is_none_is_125(place: Place, tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_text("this is no archive" * 100)
    done = place.run(str(tmp_path / "image.tar"), "true")
    assert done.status == 125
    assert f"{tmp_path}/image.tar" in done.stderr
    assert "Traceback" not in done.stderr


# -- explain ---------------------------------------------------------------------------------------------------------

JOB = """
[jobs.job]
command = ["echo", "{index}"]
limits = { memory = "32MiB", nofile = 99 }
network = { mode = "loopback" }
"""


def test_explain_shows_what_the_kernel_is_asked_in_order_with_why_and_source(place: Place) -> None:
    place.write(JOB)
    done = place.diyc("explain", "job", "--config", str(place.file))
    assert (done.status, done.stderr) == (0, "")
    expected = [
        "33554432",
        "clone3(",
        "uid_map",
        "pivot_root",
        "SIOCSIFFLAGS",
        "RLIMIT_NOFILE, 99",
        "capset",
        "execve(command)",
    ]
    found = [done.stdout.find(text) for text in expected]
    assert -1 not in found, dict(zip(expected, found, strict=True))
    assert found == sorted(found)
    calls = re.findall(r"^ *(\d+)  \S", done.stdout, re.MULTILINE)
    assert [int(number) for number in calls] == list(range(len(calls)))
    assert len(re.findall(r"^ +\S.*\[.*\w\(\w+\).*\]$", done.stdout, re.MULTILINE)) == len(calls)
    assert "\x1b" not in done.stdout


def test_explain_for_programs_has_the_steps_of_the_plan(place: Place) -> None:
    place.write(JOB)
    (plan,) = place.diyc("explain", "job", "--config", str(place.file), "--json").lines
    assert (plan["type"], plan["job"], plan["argv"]) == ("plan", "job", ["echo", "{index}"])
    steps = plan["steps"]
    assert [step["index"] for step in steps] == list(range(len(steps)))
    assert steps[-1]["kind"] == "exec"
    assert all(step["why"] and step["call"] for step in steps)
    assert all(call["who"] and call["call"] and call["why"] and call["source"] for call in plan["calls"])
    shown = [call["call"] for call in plan["calls"]]
    assert [step["call"] for step in steps if step["kind"] != "cgroup_join"] == [
        call for call in shown[-len(steps) :] if "/tasks" not in call
    ]
    assert "/usr/bin/echo" in plan["candidates"]


def test_explain_of_a_job_that_is_not_there_is_2(place: Place) -> None:
    place.write(JOB)
    done = place.diyc("explain", "jab", "--config", str(place.file))
    assert (done.status, done.stdout) == (2, "")
    assert "jab" in done.stderr
    assert "job" in done.stderr


def test_explain_runs_and_makes_nothing(place: Place) -> None:
    place.write(JOB)
    place.diyc("explain", "job", "--config", str(place.file))
    assert not (place.root / "state").exists()
    assert not (place.root / "run").exists()


# -- doctor, schema, version -----------------------------------------------------------------------------------------


def test_doctor_finds_this_host_able(place: Place) -> None:
    done = place.diyc("doctor")
    assert done.status == 0, done.stdout
    for name in ("root", "kernel", "user namespace", "overlay", "seccomp", "landlock", "cgroups"):
        assert name in done.stdout
    assert "this host can run jobs" in done.stdout


def test_doctor_for_programs(place: Place) -> None:
    done = place.diyc("doctor", "--json")
    (found,) = done.lines
    assert (done.status, found["type"], found["able"], found["trial"]) == (0, "doctor", True, None)
    features = {feature["name"]: feature for feature in found["features"]}
    assert {"root", "kernel", "overlay", "cgroup namespace", "net namespace"} <= set(features)
    assert all(feature["present"] for feature in found["features"] if feature["needed"])
    assert found["cgroups"]


def test_schema_is_a_json_schema_that_takes_the_example_and_refuses_nonsense(place: Place) -> None:
    import tomllib

    done = place.diyc("schema")
    assert (done.status, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    check = validator(schema)
    check.validate(tomllib.loads((ROOT / "examples/jobs.toml").read_text()))
    assert list(check.iter_errors({"jobs": {"a": {"command": "echo", "timeot": 3}}}))
    assert list(check.iter_errors({"job": {}}))


def test_version_and_help(place: Place) -> None:
    for command in ("diyc", "diyc-supervisor"):
        program = str(Path(sys.executable).with_name(command))
        assert finish(place.spawn(program, "--version")).stdout.strip().endswith(diyc.__version__)
        text = finish(place.spawn(program, "--help")).stdout
        assert text.startswith("Usage: ")
    for name in ("run", "explain", "doctor", "schema", "cleanup"):
        assert name in place.diyc("--help").stdout
        assert place.diyc(name, "--help").status == 0


def test_nothing_of_a_run_is_left_in_the_default_directories(place: Place) -> None:
    before = set(Path("/run/diyc").glob("*")) if Path("/run/diyc").exists() else set()
    place.run("host", "true")
    wait_until(lambda: {path for path in Path("/run/diyc").glob("host-root-*") if path.is_dir()} <= before, "removal")
