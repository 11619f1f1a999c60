"""Run a command to which the kernel refuses one system call: `refuse_calls.py NAME ERRNO COMMAND...`.

A seccomp filter answers ERRNO (a name, as ENOSYS) to the call and lets all others pass, as those of container engines
and of systemd's SystemCallFilter= do. It is inherited, so the jobs of a supervisor started this way have it too."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

# The same on every machine that diyc knows but for keyctl and bpf (asm/unistd.h).
NUMBERS = {
    "clone3": 435,
    "openat2": 437,
    "close_range": 436,
    "open_tree": 428,
    "move_mount": 429,
    "mount_setattr": 442,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_open": 434,
    "pidfd_send_signal": 424,
    **({"keyctl": 250, "bpf": 321} if platform.machine() == "x86_64" else {"keyctl": 219, "bpf": 280}),
}

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06


class Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(number: int, error: int) -> None:
    """Refuse system call `number` with `error` from now on, in this process and all that it starts (seccomp(2))."""
    instructions = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD_WORD, 0, 0, 0),  # struct seccomp_data begins with the number of the call
            (_JUMP_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _ERRNO | error),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = Program(len(instructions) // 8, ctypes.addressof(code))
    if os.geteuid() != 0 and libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def main() -> None:
    name, error, *command = sys.argv[1:]
    install(NUMBERS[name], getattr(errno, error))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
