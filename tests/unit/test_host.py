"""What a host offers, read from fake trees: each missing feature is named, with what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diyc.cli.common import HOST, exit_status
from diyc.errors import HostError
from diyc.host import NAMESPACES, SYSTEM_CALLS, Feature, HostFacts, load_overlay, read_host
from diyc.process import system_calls

ALL_CAPABILITIES = "000001ffffffffff"
Host = tuple[Path, Path]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with everything: its /proc and /sys."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    files = {
        proc / "self/status": f"Name:\tpython\nCapInh:\t0000000000000000\nCapEff:\t{ALL_CAPABILITIES}\n",
        proc / "sys/kernel/osrelease": "6.1.0-18-amd64\n",
        proc / "filesystems": "nodev\tsysfs\nnodev\ttmpfs\n\text4\nnodev\toverlay\n",
        proc / "pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        proc / "sys/kernel/seccomp/actions_avail": "kill_process errno allow\n",
        proc / "swaps": "Filename\t\tType\n/dev/vda2 partition\n",
        sys / "kernel/security/lsm": "lockdown,capability,landlock,apparmor",
        **{proc / f"self/ns/{name}": "" for name in NAMESPACES},
        **{proc / f"sys/user/max_{name}_namespaces": "31000\n" for name in NAMESPACES},
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, sys


def facts(host: Host, euid: int = 0) -> HostFacts:
    return read_host(*host, euid=euid)


def named(found: HostFacts, name: str) -> Feature:
    (feature,) = [feature for feature in found.features if feature.name == name]
    return feature


def test_a_host_with_everything_lacks_nothing(host: Host) -> None:
    found = facts(host)
    assert found.missing() == ()
    found.require()
    assert [feature.name for feature in found.features if not feature.present] == ["selinux"]
    assert [feature.name for feature in found.features][:2] == ["root", "kernel"]


def without_capability(proc: Path) -> None:
    (proc / "self/status").write_text("CapEff:\t00000000a80425fb\n")  # what Docker gives root


def old_kernel(proc: Path) -> None:
    (proc / "sys/kernel/osrelease").write_text("5.10.0-28-amd64\n")


def odd_kernel(proc: Path) -> None:
    (proc / "sys/kernel/osrelease").write_text("custom\n")


def no_overlay(proc: Path) -> None:
    (proc / "filesystems").write_text("nodev\tsysfs\n\text4\nnodev\toverlayish\n")


def without_namespace(name: str) -> Callable[[Path], None]:
    return lambda proc: (proc / f"self/ns/{name}").unlink()


def limited_namespace(name: str) -> Callable[[Path], None]:
    def limit(proc: Path) -> None:
        (proc / f"sys/user/max_{name}_namespaces").write_text("0\n")

    return limit


MISSING: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "capability": (without_capability, "root", "root without CAP_SYS_ADMIN"),
    "old kernel": (old_kernel, "kernel", "Linux 5.10.0-28-amd64, older than 5.19; Linux 5.19 or later is needed"),
    "odd kernel": (odd_kernel, "kernel", "Linux custom, older than 5.19"),
    "no overlay": (no_overlay, "overlay", "not loaded; modprobe overlay"),
    **{
        f"no {name}": (without_namespace(name), f"{name} namespace", "not in this kernel; a kernel with CONFIG_")
        for name in NAMESPACES
    },
    **{
        f"limited {name}": (limited_namespace(name), f"{name} namespace", f"sysctl user.max_{name}_namespaces=")
        for name in NAMESPACES
    },
}


@pytest.mark.parametrize("case", MISSING)
def test_each_missing_feature_is_named_with_its_remedy(case: str, host: Host) -> None:
    spoil, name, message = MISSING[case]
    spoil(host[0])
    found = facts(host)
    assert [feature.name for feature in found.missing()] == [name]
    with pytest.raises(HostError) as caught:
        found.require()
    assert caught.value.feature == name
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert exit_status(caught.value) == HOST == 3


def test_an_ordinary_user_is_told_that_root_is_needed(host: Host) -> None:
    found = facts(host, euid=1000)
    with pytest.raises(HostError, match="root: running as uid 1000; start it with sudo") as caught:
        found.require()
    assert exit_status(caught.value) == 3


def test_several_missing_features_are_all_listed(host: Host) -> None:
    old_kernel(host[0])
    no_overlay(host[0])
    assert [feature.name for feature in facts(host, euid=7).missing()] == ["root", "kernel", "overlay"]


OPTIONAL: dict[str, Callable[[Host], None]] = {
    "pressure": lambda host: shutil.rmtree(host[0] / "pressure"),
    "seccomp": lambda host: shutil.rmtree(host[0] / "sys/kernel/seccomp"),
    "landlock": lambda host: (host[1] / "kernel/security/lsm").unlink(),
    "apparmor": lambda host: (host[1] / "kernel/security/lsm").unlink(),
    "swap": lambda host: (host[0] / "swaps").unlink(),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_only_some_jobs_need_is_shown_as_missing_and_keeps_nobody_from_running(name: str, host: Host) -> None:
    assert named(facts(host), name).present
    OPTIONAL[name](host)
    found = facts(host)
    assert not named(found, name).present
    assert named(found, name).remedy
    found.require()


def test_an_lsm_counts_only_by_its_whole_name(host: Host) -> None:
    (host[1] / "kernel/security/lsm").write_text("capability,notlandlock,apparmor")
    found = facts(host)
    assert not named(found, "landlock").present
    assert named(found, "apparmor").present


def test_modules_are_known_without_securityfs(host: Host) -> None:
    proc, sys = host
    (sys / "kernel/security/lsm").unlink()
    assert not {"landlock", "apparmor", "selinux"} & {f.name for f in facts(host).features if f.present}
    (proc / "filesystems").write_text("nodev\tselinuxfs\nnodev\toverlay\n")
    parameters = sys / "module/apparmor/parameters"
    parameters.mkdir(parents=True)
    for enabled, active in (("N\n", False), ("Y\n", True)):
        (parameters / "enabled").write_text(enabled)
        assert named(facts(host), "apparmor").present == active
    found = read_host(*host, euid=0, calls={"landlock_create_ruleset": 4})
    assert named(found, "landlock").present


@pytest.mark.parametrize(
    ("own", "detail"),
    [
        ("kernel\0", "active, but no policy is loaded"),
        ("system_u:system_r:init_t:s0\0", "active, we are system_u:system_r:init_t:s0"),
    ],
)
def test_selinux_counts_with_a_policy_only(own: str, detail: str, host: Host) -> None:
    proc = host[0]
    (proc / "filesystems").write_text("nodev\tselinuxfs\nnodev\toverlay\n")
    (proc / "self/attr").mkdir()
    (proc / "self/attr/current").write_text(own)
    found = named(facts(host), "selinux")
    assert (found.detail, found.present) == (detail, ":" in own)


REFUSED = {"ENOSYS": -errno.ENOSYS, "EPERM": -errno.EPERM}


@pytest.mark.parametrize("refusal", REFUSED)
@pytest.mark.parametrize("name", SYSTEM_CALLS)
def test_each_missing_system_call_is_named(name: str, refusal: str, host: Host) -> None:
    calls = {**dict.fromkeys(SYSTEM_CALLS, -errno.EINVAL), name: REFUSED[refusal]}
    found = read_host(*host, euid=0, calls=calls)
    feature = named(found, name)
    assert (feature.present, refusal in feature.detail) == (False, True)
    assert "seccomp" in feature.remedy
    needed = SYSTEM_CALLS[name][1] or (name, refusal) == ("clone3", "EPERM")
    assert [missing.name for missing in found.missing()] == ([name] if needed else [])
    assert all(named(found, other).present for other in SYSTEM_CALLS if other != name)


def test_without_the_capability_eperm_is_the_kernels_own_answer(host: Host) -> None:
    without_capability(host[0])
    found = read_host(*host, euid=1000, calls={"fsopen": -errno.EPERM, "openat2": -errno.ENOSYS})
    assert named(found, "fsopen").present
    assert not named(found, "openat2").present


def test_the_kernel_that_is_just_new_enough_is_enough(host: Host) -> None:
    (host[0] / "sys/kernel/osrelease").write_text("5.19.0\n")
    assert named(facts(host), "kernel").present


def test_the_overlay_module_is_asked_for_only_where_it_is_not_loaded(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "modprobe").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (programs / "modprobe").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    load_overlay(host[0])
    assert not (tmp_path / "asked").exists()
    (host[0] / "filesystems").write_text("nodev\tsysfs\n")
    load_overlay(host[0])
    assert (tmp_path / "asked").read_text() == "--quiet overlay\n"


@pytest.mark.privileged
def test_this_host_can_run_jobs() -> None:
    calls = system_calls()
    assert set(SYSTEM_CALLS) < set(calls)
    read_host(calls=calls).require()
