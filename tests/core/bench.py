"""A bench for single steps: a spawner of one thread, and plans made of just what a test is about."""

from __future__ import annotations

import os
import select
import struct
from dataclasses import dataclass
from typing import Any

from diyc import _core
from diyc.plan import CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS, Plan, Step

KINDS = {name: number for number, name in enumerate(_core.STEP_NAMES)}
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS
ID_MAP = "0 1000000000 65536\n"
WALL = 0x40000000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the spawner reported: `failed` with the step's index and errno, or a started process."""

    failed: bool
    errno: int
    index: int
    pid: int
    pidfd: int
    marks: tuple[int, ...]

    def wait(self) -> tuple[int, int]:
        """(si_code, si_status) of the started process, reaped."""
        info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | WALL)
        os.close(self.pidfd)
        assert info is not None
        return info.si_code, info.si_status


class Bench:
    """Runs a list of steps in a child and tells what became of it."""

    def __init__(self, scratch: str) -> None:
        self.spawner = _core.Spawner(1, scratch)
        self._token = 0

    def submit(self, *steps: Step, given: dict[str, int] | None = None, **settings: Any) -> int:
        given = given or {}
        made = tuple(step.out for step in steps if step.out)
        plan = Plan(steps, settings.get("namespaces", NAMESPACES), tuple(given), (*given, *made))
        compiled = _core.Plan(plan.rows(KINDS), plan.clone_flags, len(plan.registers), settings.get("spawner_steps", 0))
        self._token += 1
        self.spawner.submit(
            compiled,
            self._token,
            list(given.values()),
            settings.get("argv", ["job"]),
            settings.get("env", []),
            settings.get("paths", ["/nonexistent"]),
            settings.get("id_map", ID_MAP if plan.clone_flags & CLONE_NEWUSER else None),
            settings.get("oom_score_adj"),
            -1,
        )
        return self._token

    def outcome(self) -> Outcome:
        assert select.select([self.spawner], [], [], 20)[0], "the spawner reported nothing"
        ((token, pid, pidfd, failed, errno, index, _, _, marks),) = self.spawner.completions()
        assert token == self._token
        return Outcome(failed, errno, index, pid, pidfd, marks)

    def run(self, *steps: Step, **settings: Any) -> Outcome:
        self.submit(*steps, **settings)
        return self.outcome()


def rlimit(value: int) -> bytes:
    return struct.pack("<2Q", value, value)
