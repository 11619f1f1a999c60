"""The child runs on the supervisor's memory: csrc/child.c may call nothing and keep no state of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sources import ROOT

COMPILERS = {
    "x86-64": ("gcc", "nm", []),
    "aarch64": ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-nm", ["-mno-outline-atomics"]),
}
FLAGS = ["-std=gnu17", "-O2", "-fPIC", "-ffreestanding", "-fno-builtin", "-fno-stack-protector"]


def symbols(machine: str, source: Path, where: Path) -> list[tuple[str, str]]:
    """(type letter of nm(1), name) of every symbol in the object."""
    compiler, nm, extra = COMPILERS[machine]
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    target = where / f"{source.stem}.o"
    subprocess.run([compiler, *FLAGS, *extra, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target], check=True)
    lines = subprocess.run([nm, target], check=True, capture_output=True, text=True).stdout.splitlines()
    return [(line.split()[-2], line.split()[-1]) for line in lines]


@pytest.mark.parametrize("machine", COMPILERS)
def test_the_child_needs_no_symbol_and_keeps_no_data(machine: str, tmp_path: Path) -> None:
    found = symbols(machine, ROOT / "csrc/child.c", tmp_path)
    assert [name for kind, name in found if kind == "U" and name != "_GLOBAL_OFFSET_TABLE_"] == []
    assert [name for kind, name in found if kind in "dDbBC"] == []
    assert ("T", "child_main") in found


def test_a_libc_call_in_the_child_would_be_seen(tmp_path: Path) -> None:
    """The control: the same look at a child that calls memset."""
    spoilt = tmp_path / "spoilt.c"
    text = (ROOT / "csrc/child.c").read_text()
    assert "static long child_signals(void) {" in text
    spoilt.write_text(
        "extern int usleep(unsigned);\n"
        + text.replace("static long child_signals(void) {", "static long child_signals(void) {\n    usleep(1);", 1)
    )
    assert ("U", "usleep") in symbols("x86-64", spoilt, tmp_path)


@pytest.mark.parametrize("name", ["child.c", "spawner.c", "prepare.c"])
def test_the_parts_without_python_do_not_include_it(name: str) -> None:
    assert "Python.h" not in (ROOT / "csrc" / name).read_text()
