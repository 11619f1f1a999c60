"""Run examples/jobs.toml as a person would, and check that every run ended as the file says it must.

`make demo` shows this on a terminal. Exit status 0 if every verdict, every result and /metrics are right."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUPERVISOR = Path(sys.executable).with_name("diyc-supervisor")
VERDICTS = {
    "read_only": "exit",
    "memory_hog": "oom",
    "sleeper": "timeout",
    "fork_bomb": "timeout",
    "flood": "output_limit",
    "crash": "signal",
}


class Scraper(threading.Thread):
    """Reads /metrics while the jobs run; keeps the last page."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.url = f"http://{address}/metrics"
        self.page = ""
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            try:
                with urllib.request.urlopen(self.url, timeout=5) as answer:
                    self.page = answer.read().decode()
            except urllib.error.URLError:
                continue  # not listening yet, or no more


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def check(results: list[dict[str, Any]], page: str) -> list[str]:
    """Everything that is not as it must be."""
    by_job: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_job.setdefault(result["job"], []).append(result)
    wrong = [
        f"{r['job']}[{r['index']}] ended {r['verdict']} ({r['reason']}), not {VERDICTS.get(r['job'], 'ok')}"
        for r in results
        if r["verdict"] != VERDICTS.get(r["job"], "ok")
    ]
    facts = {
        "500 squares are right": sorted(int(r["stdout"]) for r in by_job.get("squares", []))
        == [n * n for n in range(500)],
        "there are 17,984 primes below 200,000": sum(
            json.loads(r["stdout"])["primes"] for r in by_job.get("primes", [])
        )
        == 17984,
        "the flood was cut at 64 KiB": [len(r["stdout"]) for r in by_job.get("flood", [])] == [65536],
        "the fork bomb hit its limit": all(r["pids_limit_hits"] != 0 for r in by_job.get("fork_bomb", [])),
        "the hog was killed by its own cgroup": all(r["oom_kills"] == 1 for r in by_job.get("memory_hog", [])),
        "busybox wrote to its root": all("written" in r["stdout"] for r in by_job.get("busybox", [])),
        "/metrics counted runs": "diyc_job_runs_total{" in page,
    }
    return wrong + [f"not so: {what}" for what, true in facts.items() if not true]


def show(results: list[dict[str, Any]], page: str) -> None:
    def first(job: str) -> str:
        return next((r["stdout"] for r in results if r["job"] == job), "")

    print("\nmost used words:  " + ", ".join(line.split()[1] for line in first("words").splitlines()))
    print("in busybox:       " + " ".join(first("busybox").splitlines()[1:]))
    print(
        "at /metrics:      " + next((line for line in page.splitlines() if line.startswith("diyc_job_runs_total{")), "")
    )


def main() -> int:
    address = free_address()
    scraper = Scraper(address)
    with tempfile.TemporaryDirectory(prefix="diyc-demo-") as scratch:
        log = os.path.join(scratch, "results.jsonl")
        command = [str(SUPERVISOR), "--config", str(HERE / "jobs.toml"), "--joblog", log, "--metrics-listen", address]
        scraper.start()
        started = time.monotonic()
        status = subprocess.run([*command, *sys.argv[1:]], check=False).returncode
        scraper.over.set()
        if status not in (0, 1):
            print(f"diyc-supervisor failed with exit status {status}", file=sys.stderr)
            if os.geteuid() != 0:
                print("without root not every host can do this (see above): try `sudo make demo`", file=sys.stderr)
            return status
        lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    results = [line for line in lines if line["type"] == "result"]
    show(results, scraper.page)
    wrong = check(results, scraper.page)
    for line in wrong:
        print(f"WRONG  {line}", file=sys.stderr)
    if not wrong:
        print(f"\nEvery one of {len(results)} runs ended as it must, in {time.monotonic() - started:.1f} s.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
