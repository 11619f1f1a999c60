"""One machine: QEMU with software emulation, a command in, output and results out, ended at a hard time limit."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vm.build import Images
from vm.recipe import GUEST, RESULTS, Host

EXCHANGE_BYTES = 256 * 1024**2
# The guest ends the command itself so long before the machine is killed, to bring back what there is.
MARGIN = 20.0
PATH = f"{GUEST}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KERNEL = "console=ttyS0 panic=-1 loglevel=4 mitigations=off random.trust_cpu=on hugepages=4 no_timer_check"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended. `status` is the command's; None if the machine gave none, and then `why` says more."""

    status: int | None
    why: str
    out: Path

    def console(self, lines: int = 40) -> str:
        """The end of what the kernel said."""
        return "\n".join((self.out / "console.log").read_text(errors="replace").splitlines()[-lines:])


def boot(
    host: Host,
    images: Images,
    command: Sequence[str],
    out: Path,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    stream: Callable[[bytes], object] = lambda _: None,
) -> Outcome:
    """Run a command on a new machine. Into `out`: what the command left in $DIYC_VM_RESULTS, output.log, console.log,
    dmesg.txt. `stream` is given the output as it comes."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vm-bench-") as scratch:
        exchange = Path(scratch, "exchange")
        _give(exchange, host, command, timeout, environment or {})
        why = _emulate(_qemu(host, images, exchange, out), out, timeout, stream)
        _take(exchange, out)
    status = out / "status"
    if status.exists():
        return Outcome(int(status.read_text()), "", out)
    return Outcome(None, why or "the machine ended without giving an exit status", out)


def _give(exchange: Path, host: Host, command: Sequence[str], timeout: float, environment: Mapping[str, str]) -> None:
    """The exchange disk as the guest finds it: a tar of its settings and of the command as a shell script."""
    settings = {
        "host": host.name,
        "init": host.init,
        "user": host.user,
        "cgroup": host.cgroup,
        "swap": "/dev/vdf" if host.swap else "",
    }
    variables = {
        "PATH": PATH,
        "HOME": "/root" if host.user == "root" else f"/home/{host.user}",
        "USER": host.user,
        "LANG": "C.UTF-8",
        "TMPDIR": "/data",
        "PYTHONDONTWRITEBYTECODE": "1",
        "DIYC_VM": "off",
        "DIYC_VM_HOST": host.name,
        "DIYC_VM_RESULTS": RESULTS,
        **environment,
    }
    limit = max(timeout - MARGIN, 1)
    script = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    script += [f"cd {GUEST} || exit 126", f"exec timeout -k 5 {limit:.0f} {shlex.join(command)}", ""]
    with tarfile.open(exchange, "w") as archive:
        _add(archive, "settings", "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()))
        _add(archive, "command", "\n".join(script))
    os.truncate(exchange, EXCHANGE_BYTES)


def _add(archive: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.mode, data = 0o644, text.encode()
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _take(exchange: Path, out: Path) -> None:
    """The guest's results; nothing where it wrote none and our own settings are still there."""
    with tarfile.open(exchange) as archive:
        members = {os.path.normpath(member.name): member for member in archive if member.isfile()}
        if "settings" in members:
            return
        for name, member in members.items():
            target = (out / name).resolve()
            assert target.is_relative_to(out), f"a result named {name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None
            target.write_bytes(content.read())


def _qemu(host: Host, images: Images, exchange: Path, out: Path) -> list[str]:
    disks = [(str(path), "snapshot=on") for path in images.disks]
    disks += [(str(exchange), "snapshot=off")]
    disks += [(str(images.swap), "snapshot=on")] if host.swap else []
    drives = [
        word
        for number, (path, snapshot) in enumerate(disks)
        for word in (
            *("-drive", f"file={path},format=raw,if=none,id=disk{number},cache=unsafe,{snapshot}"),
            *("-device", f"virtio-blk-pci,drive=disk{number}"),
        )
    ]
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off", "-smp", "2", "-m", "3G"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-kernel", str(images.kernel), "-initrd", str(images.initramfs), "-append", f"{KERNEL} {host.cmdline}"),
        *drives,
        *("-serial", f"file:{out / 'console.log'}"),
        *("-device", "virtio-serial-pci", "-chardev", "file,id=output,path=/dev/stdout"),
        *("-device", "virtserialport,chardev=output,nr=1"),
    ]


def _emulate(command: Sequence[str], out: Path, timeout: float, stream: Callable[[bytes], object]) -> str:
    """Run QEMU to its end, or to the limit. Says what went wrong with it; "" for nothing."""
    (out / "console.log").touch()
    with (
        open(out / "output.log", "wb") as log,
        open(out / "qemu.log", "wb") as complaints,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints) as machine,
    ):
        timer = threading.Timer(timeout, machine.kill)
        timer.start()
        try:
            assert machine.stdout is not None
            while chunk := machine.stdout.read1(65536):  # type: ignore[attr-defined]
                log.write(chunk)
                stream(chunk)
        except BaseException:
            machine.kill()
            raise
        finally:
            status = machine.wait()
            timer.cancel()
    if status == -signal.SIGKILL:
        return f"killed at the time limit of {timeout:.0f} s"
    return "" if status == 0 else f"QEMU failed ({status}): {(out / 'qemu.log').read_text(errors='replace').strip()}"
