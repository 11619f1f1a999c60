"""AppArmor and SELinux for real, where the kernel has them on: the job has its label and is denied what that denies."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diyc import host
from needs import require
from system.commands import Done, Place

pytestmark = pytest.mark.privileged

LOOK = "cat /proc/self/attr/current; echo; for name in plain secret; do cat /mnt/$name && : ; done"


@dataclass(frozen=True, slots=True)
class World:
    """A place with two files below /mnt of its jobs, and what a job's security table says to be denied one of them."""

    place: Place
    security: str
    label: str
    extra: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, security: str, mounts: str = "") -> Done:
        """One job of the host's image with /mnt."""
        files = f'{{ type = "bind", source = "{self.place.root}/files", target = "/mnt", read_only = true }}'
        self.place.write(
            f"[jobs.one]\nshell = '''\n{script}\n'''\nmounts = [{files}{mounts}]\n[jobs.one.security]\n{security}\n"
        )
        return self.place.supervise("--json")


def output(done: Done) -> tuple[str, str]:
    """What the only run wrote."""
    assert done.results, done.stderr
    (result,) = done.results
    assert result["verdict"] in ("ok", "exit"), result
    return result["stdout"], result["stderr"]


def place_with_files(root: Path) -> Place:
    (root / "files").mkdir()
    (root / "files/plain").write_text("plain words\n")
    (root / "files/secret").write_text("secret words\n")
    return Place(root)


def refused(done: Done, *words: str) -> None:
    """Nothing ran, and the message says all these words."""
    assert done.status == 3, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


# ---- AppArmor ----

PROFILE = """
profile {name} flags=(attach_disconnected,mediate_deleted) {{
  capability,
  dbus,
  file,
  mount,
  network,
  pivot_root,
  ptrace,
  remount,
  signal,
  umount,
  unix,
  deny /mnt/secret r,
}}
"""


@pytest.fixture
def apparmor(tmp_path: Path) -> Iterator[World]:
    """With a profile loaded that denies /mnt/secret."""
    if not host.apparmor().present:
        pytest.skip("needs AppArmor (boot with apparmor=1)")
    parser = shutil.which("apparmor_parser")
    if parser is None or not Path("/sys/kernel/security/apparmor").exists():
        pytest.skip("needs apparmor_parser and securityfs")
    name = f"diyc-test-{os.getpid()}"
    file = tmp_path / "profile"
    file.write_text(PROFILE.format(name=name))
    subprocess.run([parser, "--replace", "--skip-cache", str(file)], check=True, timeout=60)
    yield World(place_with_files(tmp_path), f'apparmor = "{name}"', f"{name} (enforce)", {"name": name})
    subprocess.run([parser, "--remove", str(file)], check=True, timeout=60)


def test_apparmor_confines_the_job_and_nothing_else(apparmor: World) -> None:
    assert output(apparmor.run(LOOK, security="")) == ("unconfined\n\nplain words\nsecret words\n", "")  # the control
    stdout, stderr = output(apparmor.run(LOOK, security=apparmor.security))
    assert stdout == f"{apparmor.label}\n\nplain words\n"
    assert "/mnt/secret: Permission denied" in stderr
    assert Path("/proc/self/attr/current").read_text().strip() == "unconfined"  # this process is none of it


def test_a_job_cannot_leave_its_profile_nor_can_its_children(apparmor: World) -> None:
    script = """
        echo changeprofile unconfined > /proc/self/attr/current
        echo exec unconfined > /proc/self/attr/exec
        sh -c "cat /proc/self/attr/current"
    """
    stdout, stderr = output(apparmor.run(script, security=apparmor.security))
    assert stdout.strip() == apparmor.label
    assert len(stderr.splitlines()) == 2  # both writes failed


def test_a_profile_that_is_not_loaded_is_refused_before_anything_runs(apparmor: World) -> None:
    done = apparmor.run("true", security='apparmor = "no-such-profile"')
    refused(done, "security.apparmor = 'no-such-profile': no such profile is loaded", "apparmor_parser --replace")
    done = apparmor.place.run("--security-opt", "apparmor=no-such-profile", "host", "true")
    assert done.status == 125
    assert "no such profile is loaded" in done.stderr


def test_diyc_run_takes_a_profile(apparmor: World) -> None:
    option = f"apparmor={apparmor.extra['name']}"
    done = apparmor.place.run("--security-opt", option, "host", "cat", "/proc/self/attr/current")
    assert (done.status, done.stdout.strip()) == (0, apparmor.label)


def test_best_effort_does_not_run_a_job_without_its_profile(apparmor: World) -> None:
    apparmor.place.write(
        '[jobs.one]\ncommand = ["true"]\nsecurity.apparmor = "no-such-profile"\n', 'enforce = "best-effort"'
    )
    refused(apparmor.place.supervise("--json"), "no such profile is loaded")


# ---- SELinux ----

SHOW = 'import os, sys; [print(os.getxattr(path, "security.selinux").decode().strip(chr(0))) for path in sys.argv[1:]]'


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests' own policy, enforced until they are done. Only where there is none: it would replace a real one."""
    require("root", "program.secilc")
    control = Path("/sys/fs/selinux")
    if "selinuxfs" not in Path("/proc/filesystems").read_text() or not (control / "load").exists():
        pytest.skip("needs SELinux (boot with security=selinux selinux=1) and selinuxfs")
    own = Path("/proc/self/attr/current").read_text()
    if ":" in own and "base_t" not in own:
        pytest.skip("needs a kernel without a policy: this would replace it")
    compiled = tmp_path_factory.mktemp("policy") / "policy"
    source = Path(__file__).with_name("job.cil")
    versions = ["-c", (control / "policyvers").read_text().strip()]
    command = ["secilc", *versions, "-o", str(compiled), "-f", "/dev/null", str(source)]
    subprocess.run(command, check=True, timeout=60)
    (control / "load").write_bytes(compiled.read_bytes())
    (control / "enforce").write_text("1")
    yield
    (control / "enforce").write_text("0")


@pytest.fixture
def selinux(policy: None, tmp_path: Path) -> World:
    place = place_with_files(tmp_path)
    try:
        os.setxattr(tmp_path / "files/secret", "security.selinux", b"u:r:secret_t")
    except OSError as error:
        pytest.skip(f"needs a file system with labels in TMPDIR: {error}")
    return World(place, 'selinux = "u:r:job_t"', "u:r:job_t")


def test_selinux_confines_the_job_and_nothing_else(selinux: World) -> None:
    stdout, stderr = output(selinux.run(LOOK, security=""))  # the control
    assert (stdout.replace("\0", ""), stderr) == ("u:r:base_t\nplain words\nsecret words\n", "")
    stdout, stderr = output(selinux.run(LOOK, security=selinux.security))
    assert stdout.replace("\0", "") == f"{selinux.label}\nplain words\n"
    assert "/mnt/secret: Permission denied" in stderr


def test_a_label_that_the_policy_has_not_is_refused_before_anything_runs(selinux: World) -> None:
    for key in ("selinux", "selinux_mount"):
        done = selinux.run("true", security=f'{key} = "u:r:no_such_t"')
        refused(done, f"security.{key} = 'u:r:no_such_t': the loaded policy has no such label")


def test_a_forbidden_transition_ends_the_run_with_the_step_and_what_to_do(selinux: World) -> None:
    (result,) = selinux.run("true", security='selinux = "u:r:other_t"').results
    assert (result["verdict"], result["error"]["step"]) == ("infra", "exec")
    assert "SELinux does not let this command be run as u:r:other_t" in result["reason"]
    assert "nnp_transition" in result["reason"]


def test_what_the_job_writes_gets_the_label_for_files(selinux: World) -> None:
    script = f"touch /new /dev/shm/new /tmpfs/new; python3 -c '{SHOW}' / /new /dev/shm/new /tmpfs/new /dev/pts"
    tmpfs = ', { type = "tmpfs", target = "/tmpfs" }'
    labelled = 'selinux_mount = "u:r:work_t"'
    stdout, _ = output(selinux.run(script, security=f"{selinux.security}\n{labelled}", mounts=tmpfs))
    assert stdout.split() == ["u:r:work_t"] * 5
    stdout, _ = output(selinux.run(script, security=selinux.security, mounts=tmpfs))
    assert "u:r:work_t" not in stdout.split()


def test_a_permissive_selinux_is_told(selinux: World) -> None:
    enforce = Path("/sys/fs/selinux/enforce")
    enforce.write_text("0")
    try:
        done = selinux.run(LOOK, security=selinux.security)
    finally:
        enforce.write_text("1")
    assert "security.selinux: SELinux is permissive here: it denies nothing" in done.stderr
    assert "secret words" in output(done)[0]


# ---- on any host ----


@pytest.mark.parametrize(
    ("module", "keys"),
    [
        ("apparmor", 'apparmor = "some-profile"'),
        ("selinux", 'selinux = "u:r:t"'),
        ("selinux", 'selinux_mount = "u:object_r:t"'),
    ],
)
def test_a_module_that_is_not_active_is_refused_by_name(module: str, keys: str, tmp_path: Path) -> None:
    feature = {"apparmor": host.apparmor(), "selinux": host.selinux()}[module]
    if feature.present:
        pytest.skip(f"{module} is active here")
    place = Place(tmp_path)
    place.write(f'[jobs.first]\ncommand = ["true"]\n[jobs.one]\ncommand = ["true"]\n[jobs.one.security]\n{keys}\n')
    refused(place.supervise("--json"), f"{module}: job one: security.{keys.split()[0]}", feature.remedy)
