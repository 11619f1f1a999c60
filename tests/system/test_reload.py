"""diyc-supervisor as a service, without a service manager: what it tells on NOTIFY_SOCKET, --serve, and HUP."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from needs import require
from system.commands import SUPERVISOR, Done, Place, finish, killed_at_the_end, metrics_address, scrape, wait_until

pytestmark = pytest.mark.privileged

SMALL = 'limits = { memory = "8MiB", pids = 8, disk = "1MiB" }\n'


class Manager:
    """Stands in for the service manager: what it was told, datagram by datagram."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))

    def listen(self) -> list[dict[str, str]]:
        """Everything so far."""
        while True:
            try:
                lines = self._socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in lines))

    def count(self, key: str) -> int:
        return sum(key in message for message in self.listen())

    @property
    def status(self) -> str:
        """The last status line."""
        return next((message["STATUS"] for message in reversed(self.listen()) if "STATUS" in message), "")

    def wait(self, key: str, times: int = 1) -> None:
        wait_until(lambda: self.count(key) >= times, f"{key} for the {times}. time")

    def wait_status(self, part: str) -> None:
        wait_until(lambda: part in self.status, f"a status with {part!r}")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def manager(place: Place) -> Iterator[Manager]:
    """A manager that the place's supervisor knows of."""
    there = Manager(place.root / "notify")
    place.environment["NOTIFY_SOCKET"] = str(there.path)
    yield there
    there.close()


def quick(name: str, word: str = "hello", **keys: str) -> str:
    """A job that ends at once."""
    extra = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return f'[jobs.{name}]\ncommand = ["echo", "{word}"]\n{extra}{SMALL}'


def gated(place: Place, name: str, word: str = "old", **keys: str) -> str:
    """A job whose runs end when there is a file open-NAME in the directory gate."""
    gate = place.root / "gate"
    gate.mkdir(exist_ok=True)
    shell = f"until test -e /gate/open-{name}; do sleep 0.05; done; echo {word}"
    extra = "".join(f"{key} = {value}\n" for key, value in keys.items())
    mounts = f'mounts = [{{ type = "bind", source = "{gate}", target = "/gate", read_only = true }}]\n'
    return f"[jobs.{name}]\nshell = {json.dumps(shell)}\n{extra}{mounts}{SMALL}"


def open_gate(place: Place, name: str) -> None:
    (place.root / "gate" / f"open-{name}").touch()


def hup(supervisor: subprocess.Popen[str], manager: Manager) -> None:
    """Reload, and wait until it is done."""
    before, ready = manager.count("RELOADING"), manager.count("READY")
    supervisor.send_signal(signal.SIGHUP)
    manager.wait("RELOADING", before + 1)
    manager.wait("READY", ready + 1)


def stop(supervisor: subprocess.Popen[str]) -> Done:
    """TERM, and what came of all."""
    supervisor.send_signal(signal.SIGTERM)
    done = finish(supervisor)
    assert done.status == 128 + signal.SIGTERM
    assert "Traceback" not in done.stderr
    return done


def said(done: Done) -> list[tuple[str, str, str]]:
    """Each run's job, verdict and output, sorted."""
    return sorted((result["job"], result["verdict"], result["stdout"].strip()) for result in done.results)


def test_a_service_is_told_readiness_status_life_and_end(place: Place, manager: Manager) -> None:
    place.environment["WATCHDOG_USEC"] = "400000"
    place.write(gated(place, "long", count="3") + quick("short"), 'max_parallel = 2\nmetrics_listen = "127.0.0.1:0"\n')
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait("READY")
        manager.wait_status("2 running, 2 queued, 0 ok, 0 not ok")
        beats = manager.count("WATCHDOG")
        manager.wait("WATCHDOG", beats + 3)
        open_gate(place, "long")
        manager.wait_status("0 running, 0 queued, 4 ok, 0 not ok")
        assert supervisor.poll() is None  # --serve
        assert manager.count("STOPPING") == 0
        done = stop(supervisor)
    assert manager.count("STOPPING") == 1
    assert manager.count("READY") == 1
    assert manager.count("EXTEND_TIMEOUT_USEC") >= 1
    assert done.summary["verdicts"]["ok"] == 4
    assert done.summary["exit_status"] == 143


def test_readiness_comes_after_the_metrics_endpoint(place: Place, manager: Manager) -> None:
    place.write(gated(place, "long"), 'metrics_listen = "127.0.0.1:0"\n')
    with killed_at_the_end(place.start("--serve", stderr=(place.root / "err").open("w"))) as supervisor:
        manager.wait("READY")
        address = metrics_address(iter((place.root / "err").read_text().splitlines()))
        assert "diyc_jobs_running" in scrape(address)
        stop(supervisor)


def test_images_that_take_long_get_more_time_before_readiness(place: Place, manager: Manager) -> None:
    (place.root / "state/images").mkdir(parents=True, mode=0o700)
    (place.root / "state").chmod(0o700)
    with slow_image(place) as slow:
        place.write(slow)
        supervisor = place.start("--json")
        wait_until(lambda: manager.count("EXTEND_TIMEOUT_USEC") >= 2, "more time")
        assert manager.status == "getting 1 jobs ready"
        assert manager.count("READY") == 0
    with killed_at_the_end(supervisor):
        done = finish(supervisor)
    assert manager.count("READY") == 1
    assert done.status == 0


def test_a_hung_loop_answers_no_watchdog(place: Place, manager: Manager) -> None:
    place.environment["WATCHDOG_USEC"] = "200000"
    place.write(gated(place, "long"))
    with killed_at_the_end(place.start("--serve")) as supervisor:
        manager.wait("WATCHDOG", 2)
        supervisor.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        beats = manager.count("WATCHDOG")
        time.sleep(0.6)
        assert manager.count("WATCHDOG") == beats
        supervisor.send_signal(signal.SIGCONT)
        manager.wait("WATCHDOG", beats + 2)
        stop(supervisor)


@pytest.mark.parametrize("jobs", ["[jobs.bad]\ncommand = 3\n", quick("bad", image='"nowhere"'), ""])
def test_a_failed_start_tells_why(jobs: str, place: Place, manager: Manager) -> None:
    place.write(jobs)
    done = place.supervise()
    assert done.status == 2
    assert manager.status.startswith("failed: ")
    assert str(place.file) in manager.status
    assert manager.count("READY") == 0


def test_jobs_see_nothing_of_the_service_manager(place: Place, manager: Manager) -> None:
    place.environment |= {"WATCHDOG_USEC": "60000000", "INVOCATION_ID": "0" * 32, "LISTEN_FDS": "0"}
    place.write(f'[jobs.env]\ncommand = ["env"]\n{SMALL}')
    done = place.supervise("--json")
    assert done.status == 0, done.stderr
    manager.wait("READY")
    for name in ("NOTIFY", "WATCHDOG", "INVOCATION", "LISTEN"):
        assert name not in done.results[0]["stdout"]


def test_without_a_manager_or_with_one_that_is_gone_all_goes_on(place: Place) -> None:
    place.environment["NOTIFY_SOCKET"] = str(place.root / "nobody")
    place.write(quick("one"))
    done = place.supervise("--json")
    assert done.status == 0
    assert done.stderr.count("NOTIFY_SOCKET") == 1


# -- HUP ---------------------------------------------------------------------------------------------------------------


def test_reload_runs_what_is_new_and_leaves_the_rest_alone(place: Place, manager: Manager) -> None:
    place.write(
        gated(place, "same") + gated(place, "gone", count="3") + gated(place, "other", count="3"), "max_parallel = 3"
    )
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait("READY")
        manager.wait_status("3 running, 4 queued")  # same, two of gone
        place.write(gated(place, "same") + gated(place, "other", "new", count="2") + quick("fresh"), "max_parallel = 3")
        hup(supervisor, manager)
        manager.wait_status("3 running, 3 queued")
        for name in ("same", "gone", "other"):
            open_gate(place, name)
        manager.wait_status("0 running, 0 queued, 6 ok, 0 not ok")
        hup(supervisor, manager)  # nothing changed: nothing runs again
        done = stop(supervisor)
    ends = ["fresh hello", "gone old", "gone old", "other new", "other new", "same old"]
    assert said(done) == [(job, "ok", word) for job, word in map(str.split, ends)]
    assert "reloaded: jobs: 1 new, 1 changed, 1 removed, 1 as before" in done.stderr
    assert "gone: 1 runs not started were dropped" in done.stderr
    assert "other: 3 runs not started were dropped" in done.stderr
    assert done.summary["not_started"] == 4


BROKEN = {
    "a mistake": ('[jobs.one]\ncommand = ["true"]\ntimout = "1s"\n[jobs.two]\n', ["timout", "jobs.two"]),
    "an image that is none": (
        '[images.no]\ntar = "no.tar"\n[jobs.one]\nimage = "no"\ncommand = ["true"]\n',
        ["no.tar"],
    ),
    "a limit that is too much": (f"[jobs.one]\ncommand = ['true']\nlimits = {{ nofile = {2**31} }}\n", ["nofile"]),
    "no file": (None, ["cannot read the configuration: No such file"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_reload_that_cannot_be_done_changes_nothing(what: str, place: Place, manager: Manager) -> None:
    text, words = BROKEN[what]
    (place.root / "no.tar").write_bytes(b"not a tar")
    place.write(gated(place, "kept", count="2"), "max_parallel = 1")
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait("READY")
        manager.wait_status("1 running, 1 queued")
        if text is None:
            place.file.unlink()
        else:
            place.write(quick("fresh") + text, "max_parallel = 7")
        hup(supervisor, manager)
        assert "1 running, 1 queued, 0 ok, 0 not ok; last reload failed: " in manager.status
        open_gate(place, "kept")
        manager.wait_status("0 running, 0 queued, 2 ok, 0 not ok; last reload failed: ")
        place.write(gated(place, "kept", count="2") + quick("mended"), "max_parallel = 1")
        hup(supervisor, manager)
        manager.wait_status("0 running, 0 queued, 3 ok, 0 not ok")
        assert "failed" not in manager.status
        done = stop(supervisor)
    assert said(done) == [("kept", "ok", "old"), ("kept", "ok", "old"), ("mended", "ok", "hello")]
    assert all(word in done.stderr for word in words)
    assert "all goes on as before" in done.stderr


def test_limits_of_the_supervisor_change_while_it_runs(place: Place, manager: Manager) -> None:
    jobs = gated(place, "many", count="6")
    place.write(jobs, 'max_parallel = 1\nmax_memory = "64MiB"')
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait_status("1 running, 5 queued")
        place.write(jobs, 'max_parallel = 4\nmax_memory = "64MiB"')
        hup(supervisor, manager)
        manager.wait_status("4 running, 2 queued")
        place.write(jobs, 'max_parallel = 6\nmax_memory = "40MiB"\nreuse = false')
        hup(supervisor, manager)
        manager.wait_status("5 running, 1 queued")  # of 8 MiB each
        open_gate(place, "many")
        manager.wait_status("6 ok")
        done = stop(supervisor)
    assert "supervisor.max_parallel is 4 now" in done.stderr
    assert "supervisor.reuse was changed: restart needed" in done.stderr


def test_a_job_as_large_as_the_new_max_memory_may_come_with_it(place: Place, manager: Manager) -> None:
    place.write(quick("small"), 'max_memory = "32MiB"')
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait_status("1 ok")
        large = '[jobs.large]\ncommand = ["echo", "large"]\nlimits = { memory = "48MiB" }\n'
        place.write(quick("small") + large, 'max_memory = "48MiB"')
        hup(supervisor, manager)
        manager.wait_status("2 ok")
        stop(supervisor)


def test_the_command_line_keeps_winning(place: Place, manager: Manager) -> None:
    place.write(gated(place, "many", count="4"), "max_parallel = 1")
    with killed_at_the_end(place.start("--serve", "-j", "2", "--set", "jobs.many.count=3", "--json")) as supervisor:
        manager.wait_status("2 running, 1 queued")
        place.write(gated(place, "many", count="9"), "max_parallel = 4")
        hup(supervisor, manager)
        manager.wait_status("2 running, 1 queued")
        open_gate(place, "many")
        manager.wait_status("3 ok")
        stop(supervisor)


def test_many_hups_at_once_end_with_the_last_file(place: Place, manager: Manager) -> None:
    place.write(quick("first"))
    told = place.root / "told"
    with killed_at_the_end(place.start("--serve", "--json", "--joblog", str(told))) as supervisor:
        manager.wait("READY")
        for number in range(20):
            place.write(quick("first") + quick(f"job{number}", f"word{number}"))
            supervisor.send_signal(signal.SIGHUP)
        wait_until(lambda: "job19" in told.read_text(), "the last job")
        manager.wait_status("0 running, 0 queued")
        done = stop(supervisor)
    assert ("job19", "ok", "word19") in said(done)
    assert said(done).count(("first", "ok", "hello")) == 1
    assert all(verdict == "ok" for _, verdict, _ in said(done))


@contextmanager
def slow_image(place: Place) -> Iterator[str]:
    """The tables of a job `slow` whose image is not unpacked before the context ends: somebody else unpacks one."""
    require("program.busybox")
    with tarfile.open(place.root / "box.tar", "w") as archive:
        archive.add(str(shutil.which("busybox")), "bin/busybox")
    image = '[images.box]\ntar = "box.tar"\n'
    job = f'[jobs.slow]\nimage = "box"\ncommand = ["/bin/busybox", "echo", "slow"]\ncount = 5\n{SMALL}'
    with (place.root / "state/images/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield image + job


def test_without_serve_a_reload_that_outlasts_the_last_run_is_still_done(place: Place, manager: Manager) -> None:
    place.write(gated(place, "last"))
    with killed_at_the_end(place.start("--json")) as supervisor:
        manager.wait_status("1 running")
        with slow_image(place) as slow:
            place.write(gated(place, "last") + slow)
            supervisor.send_signal(signal.SIGHUP)
            manager.wait("RELOADING")
            open_gate(place, "last")
            manager.wait_status("0 running, 0 queued, 1 ok")
        done = finish(supervisor)
    assert done.status == 0
    assert done.summary["verdicts"]["ok"] == 6
    assert done.summary["not_started"] == 0


def test_hups_during_a_reload_are_one_reload_after_it(place: Place, manager: Manager) -> None:
    place.write(quick("first"))
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait_status("1 ok")
        with slow_image(place) as slow:
            place.write(quick("first") + slow)
            supervisor.send_signal(signal.SIGHUP)
            manager.wait("RELOADING")
            time.sleep(0.5)  # it has read the file by then
            place.write(quick("first") + quick("third"))
            for _ in range(2):
                supervisor.send_signal(signal.SIGHUP)
                time.sleep(0.1)
            assert manager.count("READY") == 1
        manager.wait("READY", 3)
        manager.wait_status("0 running, 0 queued")
        assert manager.count("RELOADING") == 2
        done = stop(supervisor)
    assert {job for job, _, _ in said(done)} >= {"first", "third"}


def test_what_cannot_be_read_twice_is_refused(place: Place, manager: Manager) -> None:
    text = place.write(gated(place, "piped")).read_text()
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    with killed_at_the_end(place.spawn(SUPERVISOR, "--config", "/dev/stdin", "--serve", stdin=reading)) as supervisor:
        os.close(reading)
        manager.wait_status("1 running")
        hup(supervisor, manager)
        manager.wait_status("1 running, 0 queued, 0 ok, 0 not ok; last reload failed: /dev/stdin is not a file")
        stop(supervisor)


def test_a_stop_during_a_reload_leaves_nothing_half_done(place: Place, manager: Manager) -> None:
    place.write(gated(place, "long"))
    with killed_at_the_end(place.start("--serve", "--json")) as supervisor:
        manager.wait_status("1 running")
        place.write(gated(place, "long") + "".join(quick(f"job{number}", count="50") for number in range(50)))
        supervisor.send_signal(signal.SIGHUP)
        manager.wait("RELOADING")
        done = stop(supervisor)
    assert done.summary["exit_status"] == 143
    assert manager.count("READY") == 1
