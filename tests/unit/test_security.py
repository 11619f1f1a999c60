"""Labels of security modules: refused by name, with what to do, where the host cannot give them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from diyc.cli.common import HOST, exit_status
from diyc.errors import HostError
from diyc.jobs import JobSpec
from diyc.security import attempt, check_labels

LABEL = "system_u:system_r:job_t:s0"


class World:
    """Fake /proc and /sys, and a kernel that answers `answer` to every label that it is asked for."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        self.answer = 0
        self.asked: list[tuple[str, str]] = []
        self.write(self.proc / "filesystems", "nodev\ttmpfs\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def with_apparmor(self) -> None:
        self.write(self.sys / "module/apparmor/parameters/enabled", "Y\n")

    def with_selinux(self, own: str = "u:r:t\0", enforcing: str = "1") -> None:
        self.write(self.proc / "filesystems", "nodev\tselinuxfs\n")
        self.write(self.proc / "self/attr/current", own)
        self.write(self.sys / "fs/selinux/enforce", enforcing)

    def attempt(self, file: str, text: str) -> int:
        self.asked.append((file, text))
        return self.answer

    def check(self, **labels: str) -> list[str]:
        return check_labels(JobSpec("one", command=("x",), **labels), self.proc, self.sys, self.attempt)

    def refusal(self, **labels: str) -> str:
        with pytest.raises(HostError) as caught:
            self.check(**labels)
        assert exit_status(caught.value) == HOST == 3
        assert caught.value.feature == ("apparmor" if "apparmor" in labels else "selinux")
        return str(caught.value)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_job_without_labels_asks_for_nothing(world: World) -> None:
    assert world.check() == []
    assert world.asked == []


@pytest.mark.parametrize("key", ["apparmor", "selinux", "selinux_mount"])
def test_a_module_that_is_not_active_is_named(key: str, world: World) -> None:
    message = world.refusal(**{key: LABEL})
    assert f"job one: security.{key} = '{LABEL}'" in message
    assert "is not active: boot with" in message
    assert world.asked == []


def test_selinux_without_a_policy_takes_any_label_and_is_refused(world: World) -> None:
    world.with_selinux(own="kernel\0")
    assert "no policy is loaded" in world.refusal(selinux=LABEL)


def test_a_label_that_the_kernel_takes_is_fine(world: World) -> None:
    world.with_apparmor()
    world.with_selinux()
    assert world.check(apparmor="profile", selinux=LABEL, selinux_mount=LABEL) == []
    assert world.asked == [("apparmor/exec", "exec profile"), ("exec", LABEL), ("exec", LABEL)]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOENT, "no such profile is loaded: load it with `apparmor_parser --replace FILE`"),
        (errno.EACCES, "our own profile does not let us change to it (Permission denied): give it a rule"),
    ],
)
def test_a_profile_that_cannot_be_had_is_named(number: int, message: str, world: World) -> None:
    world.with_apparmor()
    world.answer = number
    assert message in world.refusal(apparmor="profile")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EINVAL, "the loaded policy has no such label"),
        (errno.EACCES, "our own label may not set one for execve (Permission denied)"),
    ],
)
@pytest.mark.parametrize("key", ["selinux", "selinux_mount"])
def test_a_label_that_cannot_be_had_is_named(key: str, number: int, message: str, world: World) -> None:
    world.with_selinux()
    world.answer = number
    assert message in world.refusal(**{key: LABEL})


def test_a_permissive_selinux_is_told(world: World) -> None:
    world.with_selinux(enforcing="0")
    (warning,) = world.check(selinux=LABEL)
    assert "job one: security.selinux: SELinux is permissive here" in warning
    assert world.check(selinux_mount=LABEL) == []


def test_an_attempt_tells_the_kernels_answer() -> None:
    assert attempt("nosuchfile", "x") == errno.ENOENT
    assert attempt("current", "\n") in (errno.EINVAL, errno.EACCES, errno.EPERM)  # nothing that any module takes
