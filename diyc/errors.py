"""Every error diyc raises.

DiycError
├── ConfigError        jobs.toml or the command line is wrong; carries every problem found (exit status 2)
├── HostError          this host or this user cannot do what was asked; names the feature (exit status 3)
├── ImageError         an image cannot be read, verified or unpacked
├── CgroupError        a cgroup file or directory refused what was asked of it
└── SetupError         one step between clone and execve failed; names the step, its errno and its target
"""

from __future__ import annotations

import errno as errno_names
import os
from dataclasses import dataclass


class DiycError(Exception):
    """The base of all errors raised on purpose by diyc."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration: where it is, what it is and what to do about it."""

    file: str
    line: int | None
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        hint = f" ({self.hint})" if self.hint else ""
        return f"{where}: {self.key}: {self.message}{hint}" if self.key else f"{where}: {self.message}{hint}"


class ConfigError(DiycError):
    """The configuration is not valid. `problems` holds every mistake, in file order."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class HostError(DiycError):
    """The host lacks a feature or a privilege. `feature` is its short name, as `diyc doctor` prints it."""

    def __init__(self, feature: str, message: str) -> None:
        super().__init__(f"{feature}: {message}")
        self.feature = feature


class ImageError(DiycError):
    """An image cannot be read, verified or unpacked."""


class CgroupError(DiycError):
    """The kernel refused an operation on a cgroup."""

    def __init__(self, action: str, path: str, error: OSError) -> None:
        super().__init__(f"cannot {action} {path}: {error.strerror or error}")
        self.path = path
        self.errno = error.errno


class SetupError(DiycError):
    """A step of a container's set-up failed. `index` counts the plan's steps from 0; None before the plan begins.

    `errno` is the kernel's; 0 means that the process was killed at this step."""

    def __init__(self, step: str, index: int | None, errno: int, target: str | None, advice: str = "") -> None:
        code = errno_names.errorcode.get(errno, str(errno))
        cause = f"{os.strerror(errno)} ({code})" if errno else "killed"
        on = f" on {target!r}" if target else ""
        name = step if index is None else f"step {index} ({step})"
        super().__init__(f"{name}{on} failed: {cause}" + (f": {advice}" if advice else ""))
        self.step = step
        self.index = index
        self.errno = errno
        self.target = target
