"""python -m tests.vm --host NAME -- COMMAND: runs a command of the project on a machine of the bench."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm.build import Unavailable, images
from vm.cache import Cache, default_cache
from vm.machine import boot
from vm.recipe import GUEST, HOSTS, RESULTS


def main() -> int:
    options = _parse()
    out = Path(options.out or tempfile.mkdtemp(prefix="vm-bench-out-"))
    start = time.monotonic()
    host = HOSTS[options.host]
    try:
        disks = images(host, Cache(default_cache()))
    except Unavailable as error:
        print(f"vm: {error}", file=sys.stderr)
        return 125
    _say(options, f"disks ready after {time.monotonic() - start:.1f} s, booting {host.name}")
    start = time.monotonic()
    environment = dict(word.split("=", 1) for word in options.env)
    outcome = boot(host, disks, options.command, out.resolve(), options.timeout, environment, _write)
    if outcome.status is None:
        print(f"vm: {outcome.why}; the console's end:\n{outcome.console()}", file=sys.stderr)
    _say(options, f"ended after {time.monotonic() - start:.1f} s, status {outcome.status}; results in {out}")
    return 125 if outcome.status is None else outcome.status


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm",
        description=f"Boots a machine and runs COMMAND there in {GUEST}, where the working tree lies with an "
        f"environment of its own. What the command leaves in {RESULTS} ($DIYC_VM_RESULTS) comes back to --out. "
        "The exit status is the command's, or 125 if the machine gave none.",
    )
    parser.add_argument("--host", choices=HOSTS, required=True, help="the kind of machine")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until the machine is killed (600)")
    parser.add_argument("--out", help="directory for logs and results; else a new one below $TMPDIR")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the command")
    parser.add_argument("--quiet", action="store_true", help="only the command's output")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    return parser.parse_args()


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(f"vm: {text}", file=sys.stderr, flush=True)


def _write(chunk: bytes) -> None:
    sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
