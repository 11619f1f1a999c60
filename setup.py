"""Builds diyc._core, one abi3 extension from csrc/*.c, and writes the JSON Schema of jobs.toml into the wheel.

Everything else about the package stands in pyproject.toml. Environment: DIYC_WERROR=1 makes warnings errors,
DIYC_SANITIZE=address,undefined instruments the extension (`make sanitize`)."""

from __future__ import annotations

import json
import os
import platform
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Runs between clone and execve on the parent's memory, without a libc to call.
CHILD = "csrc/child.c"
SANITIZE = os.environ.get("DIYC_SANITIZE", "")

WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wstrict-prototypes", "-Wno-unused-parameter"]
if os.environ.get("DIYC_WERROR") == "1":
    WARNINGS.append("-Werror")

COMMON = ["-std=gnu17", "-D_GNU_SOURCE", "-O2", "-g", "-fvisibility=hidden", "-fno-strict-overflow", *WARNINGS]
if platform.machine() in ("x86_64", "AMD64"):
    COMMON.append("-fcf-protection")

HARDENED = [
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-pthread",
]
LINK = ["-pthread", "-Wl,-z,relro,-z,now,-z,noexecstack"]

# The child's stack is a small one of its own and nothing of libc may be called: no stack guard, which lives in
# the thread's TLS and aborts through libc, no checked variants, and no loop turned into a call of memset.
BARE = [
    "-ffreestanding",
    "-fno-builtin",
    "-fno-stack-protector",
    "-U_FORTIFY_SOURCE",
    "-fno-tree-loop-distribute-patterns",
]


def sanitizer_flags() -> tuple[list[str], list[str]]:
    """The flags of DIYC_SANITIZE for ordinary files and for the child, whose checks may only trap."""
    if not SANITIZE:
        return [], []
    undefined = "undefined" in SANITIZE.split(",")
    child = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"] if undefined else []
    return [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"], child


class BuildCore(build_ext):
    """Compiles csrc/child.c by itself, with flags of its own, and links it with the rest."""

    def build_extension(self, ext: Extension) -> None:
        ordinary, child = sanitizer_flags()
        if Path(CHILD).exists():
            ext.extra_objects = self._compile_child(ext, child)
        ext.extra_compile_args = [*COMMON, *HARDENED, *ordinary]
        ext.extra_link_args = [*LINK, *ordinary]
        super().build_extension(ext)

    def _compile_child(self, ext: Extension, flags: list[str]) -> list[str]:
        objects: list[str] = self.compiler.compile(
            [CHILD],
            output_dir=self.build_temp,
            depends=ext.depends,
            extra_postargs=[*COMMON, *BARE, *flags],
        )
        return objects


class BuildPackage(build_py):
    """Adds diyc/jobs.schema.json, made from the configuration's models, to what is built."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "diyc", "jobs.schema.json")
            target.write_text(json.dumps(jobs_schema(), indent=2) + "\n", encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return [*outputs, os.path.join(self.build_lib, "diyc", "jobs.schema.json")]


def jobs_schema() -> dict[str, Any]:
    """The JSON Schema of jobs.toml, by the package that is being built."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        from diyc.config import json_schema
    finally:
        del sys.path[0]
    return json_schema()


core = Extension(
    "diyc._core",
    sources=sorted(set(glob("csrc/*.c")) - {CHILD}),
    depends=[CHILD, *sorted(glob("csrc/*.h")), "setup.py"],
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030b0000")],
    py_limited_api=True,
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildCore, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
