"""What a process gives up before it runs code that nobody has read. Linux only; imports nothing of this package.

Two features of the kernel, both for good and inherited by all threads:

* Landlock (Linux 5.13, https://docs.kernel.org/userspace-api/landlock.html): files may be read anywhere and changed
  only below one directory.
* A seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html): no sockets, no new processes, no signals
  to others, no changes of permissions, owners, limits, mounts or name spaces. These calls fail with EPERM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2

# Numbers of system calls, from asm/unistd_64.h and asm-generic/unistd.h.
_DENIED_NEW = (424, 425, 434, 452)  # pidfd_send_signal, io_uring_setup, pidfd_open, fchmodat2: the same everywhere
_CLONE3 = 435
_MACHINES = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "prlimit64": 302,
        # socket connect sendto bind listen, fork vfork execve kill tkill tgkill, chmod fchmod chown fchown lchown utime
        # ptrace setrlimit mount umount2 reboot, *xattr, utimes keyctl fchownat fchmodat unshare utimensat setns
        # process_vm_writev bpf execveat
        "denied": (
            *(41, 42, 44, 49, 50, 57, 58, 59, 62, 200, 234, 90, 91, 92, 93, 94, 132),
            *(101, 160, 165, 166, 169, 188, 189, 190, 197, 198, 199, 235, 250, 260, 268, 272, 280, 308, 311, 321, 322),
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "prlimit64": 261,
        "denied": (
            *(198, 203, 206, 200, 201, 221, 129, 130, 131, 52, 53, 54, 55),
            *(117, 164, 40, 39, 142, 5, 6, 7, 14, 15, 16, 88, 219, 97, 268, 271, 280, 281),
        ),
    },
}
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_AT_NUMBER, _AT_MACHINE, _AT_ARGUMENT = 0, 4, 16

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Access rights that change something, by the version of Landlock's interface that knows them: write, remove, make;
# then refer (2) and truncate (3).
_WRITES = {1: sum(1 << bit for bit in (1, *range(4, 13))), 2: 1 << 13, 3: 1 << 14}


class ConfinementError(RuntimeError):
    """The kernel cannot confine this process; the message names the feature."""


def confine(directory: str) -> None:
    """Confines this process, for good.

    Args:
        directory: The only place below which files may be written.

    Raises:
        ConfinementError: The kernel or the processor is not one of those known.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise ConfinementError(f"prctl refused no_new_privs ({os.strerror(ctypes.get_errno())})")
    _restrict_files(libc, directory)
    _restrict_calls(libc)


def landlock_version() -> int:
    """The version of Landlock that this kernel offers; 0 where there is none."""
    return max(0, ctypes.CDLL(None, use_errno=True).syscall(_LANDLOCK_CREATE, None, 0, 1))


def _restrict_files(libc: ctypes.CDLL, directory: str) -> None:
    version = landlock_version()
    if not version:
        raise ConfinementError("this kernel has no Landlock (Linux 5.13 or newer, enabled at boot)")
    rights = sum(bits for since, bits in _WRITES.items() if since <= version)
    handled = ctypes.create_string_buffer(struct.pack("<Q", rights), 8)
    ruleset = libc.syscall(_LANDLOCK_CREATE, handled, 8, 0)
    parent = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, parent), 12)
    failed = ruleset < 0 or libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
    os.close(parent)
    if failed or libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0):
        raise ConfinementError(f"Landlock refused its rules ({os.strerror(ctypes.get_errno())})")
    os.close(ruleset)


def _restrict_calls(libc: ctypes.CDLL) -> None:
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise ConfinementError(f"no list of system calls for {platform.machine()} processors")
    program = _filter(machine)
    instructions = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    described = Program(len(program) // 8, ctypes.addressof(instructions))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0):
        raise ConfinementError(f"seccomp refused the filter ({os.strerror(ctypes.get_errno())})")


def _filter(machine: dict) -> bytes:
    """The filter as classic BPF; jumps count the instructions that are skipped if the test holds, or does not."""

    def step(code: int, value: int, holds: int = 0, fails: int = 0) -> bytes:
        return struct.pack("<HBBI", code, holds, fails, value)

    denied = step(_RETURN, _ERRNO | errno.EPERM)
    allowed = step(_RETURN, _ALLOW)
    steps = [step(_LOAD, _AT_MACHINE), step(_JUMP_EQ, machine["audit"], 1, 0), denied]  # another ABI
    steps += [step(_LOAD, _AT_NUMBER), step(_JUMP_GE, _X32, 0, 1), denied]
    for number in (*machine["denied"], *_DENIED_NEW):
        steps += [step(_JUMP_EQ, number, 0, 1), denied]
    # The filter cannot see clone3's flags, which are in memory; libraries fall back to clone.
    steps += [step(_JUMP_EQ, _CLONE3, 0, 1), step(_RETURN, _ERRNO | errno.ENOSYS)]
    # clone makes threads, but no processes.
    steps += [step(_JUMP_EQ, machine["clone"], 0, 4), step(_LOAD, _AT_ARGUMENT)]
    steps += [step(_JUMP_SET, _CLONE_THREAD, 0, 1), allowed, denied]
    # prlimit64 reads limits (third argument null), but changes none.
    steps += [step(_JUMP_EQ, machine["prlimit64"], 0, 6)]
    for half in (0, 4):
        steps += [step(_LOAD, _AT_ARGUMENT + 2 * 8 + half), step(_JUMP_EQ, 0, 1, 0), denied]
    return b"".join([*steps, allowed])
