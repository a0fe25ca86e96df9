"""System calls for isolation that Python has no functions for: namespaces, mounts, capabilities, Landlock, prctl.

Each function makes a single call and raises OSError with the kernel's error; `agent.host.sandbox.sandbox` builds
sandboxes of them.
"""

import contextlib
import ctypes
import os
import platform
import struct
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
_MNT_DETACH: Final = 2

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_BPF_INSTRUCTION_BYTES: Final = 8

_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_LANDLOCK_CREATE: Final = 444
_LANDLOCK_ADD: Final = 445
_LANDLOCK_RESTRICT: Final = 446
_LANDLOCK_VERSION: Final = 1
_LANDLOCK_PATH_BENEATH: Final = 1
_CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)

_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def close_range(first: int, last: int) -> None:
    """Close every descriptor from `first` to `last`, both included."""
    if last < first:
        return
    try:
        _check(_libc.close_range(ctypes.c_uint(first), ctypes.c_uint(last), 0), "close_range")
    except (AttributeError, OSError):  # glibc before 2.34, Linux before 5.9
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            if first <= int(name) <= last:
                with contextlib.suppress(OSError):
                    os.close(int(name))


def unshare(flags: int) -> None:
    """Move this process to new namespaces of the kinds in `flags`."""
    _check(_libc.unshare(flags), "unshare")


def enter_user_namespace(flags: int) -> None:
    """Enter a new user namespace, and those in `flags`; the user keeps its id."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | flags)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())  # UTF-8 is built in: no codec is imported
    finally:
        os.close(fd)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system, with the kernel's flags."""
    encoded = [None if each is None else each.encode() for each in (source, target, kind, options)]
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def pivot_here() -> None:
    """Make the current directory, which must be a mount, the root, and detach the old root."""
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(38, f"pivot_root is not known for {platform.machine()}")
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def capabilities() -> int:
    """Return the effective capabilities of this thread, as a bit set; raises OSError."""
    header, data = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    low, _, _, high, _, _ = struct.unpack("=6I", data.raw)
    return int(low | high << 32)


def drop_capabilities() -> None:
    """Give up every capability, in all sets."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def no_new_privileges() -> None:
    """Forbid gaining privileges by executing a program from now on."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def undumpable() -> None:
    """Forbid core files, and tracing by other processes of the same user."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def set_name(name: str) -> None:
    """Name this process in `ps` and `fleet-host processes`; the kernel keeps 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def signal_at_parents_death(number: int) -> None:
    """Have the kernel send this signal when the parent ends; a later change of user resets it."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "pdeathsig")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Restrict this thread and its children to the system calls that a BPF program allows."""
    loaded = _Program(len(program) // _BPF_INSTRUCTION_BYTES, program)
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(loaded), 0, 0), "seccomp")


def landlock_version() -> int:
    """Return Landlock's ABI version; 0 if the kernel has no Landlock."""
    found = _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION))
    return max(0, int(found))


def landlock(allowed: dict[int, int], *, network: bool = False) -> None:
    """Deny every path, port and scope by Landlock, except paths beneath given directories.

    Args:
        allowed: directory descriptor -> rights beneath it.
        network: do not restrict ports.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(95, "landlock: not supported by the kernel")
    files = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        if version >= since:
            files |= 1 << bit
    ports = 0b11 if version >= 4 and not network else 0  # noqa: PLR2004 - bind and connect of TCP, since ABI 4
    scoped = 0b11 if version >= 6 else 0  # noqa: PLR2004 - abstract sockets and signals, since ABI 6
    size = 24 if version >= 6 else 16 if version >= 4 else 8  # noqa: PLR2004
    attributes = struct.pack("=QQQ", files, ports, scoped)[:size]
    ruleset = _check(
        int(_libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))),
        "landlock",
    )
    try:
        for fd, rights in allowed.items():
            rule = struct.pack("=Qi", rights & files, fd)
            added = _libc.syscall(
                ctypes.c_long(_LANDLOCK_ADD), ctypes.c_int(ruleset), ctypes.c_int(_LANDLOCK_PATH_BENEATH), rule, 0
            )
            _check(int(added), "landlock rule")
        _check(int(_libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(ruleset), 0)), "landlock")
    finally:
        os.close(ruleset)
