"""Seccomp filters: allow-lists of system calls for each kind of process.

Seccomp cannot inspect clone3's arguments, so clone3 fails with ENOSYS, and `clone` may only make threads: the WASI
implementation's runtime threads start, a fork does not. All other unlisted calls fail with EPERM, also `tgkill`, by
which a process aborts: it then ends by the illegal instruction that follows.

A filter is built once, as a BPF program; `agent.host.sandbox.kernel.filter_calls` applies it.
"""

import errno
import resource
from functools import cache
from typing import Any, Final

from agent.host.ipc import framing

try:
    import pyseccomp
except (ImportError, RuntimeError, OSError):  # no libseccomp on this device: the layer is reported as missing
    pyseccomp = None

AVAILABLE: Final = pyseccomp is not None

_CLONE_THREAD: Final = 0x00010000
_PROT_EXEC: Final = 4
_AF_UNIX: Final = 1
_AF_INET: Final = 2
_AF_INET6: Final = 10
_AF_NETLINK: Final = 16
# Only some arguments of these calls: others reach other processes (signal owners, limits) or weaken the sandbox.
_FCNTL: Final = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1034)  # not F_SETOWN, F_SETSIG
_IOCTL: Final = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_PRCTL: Final = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA

_BASE: Final = (
    # memory
    # (RISC-V: a process that makes or maps machine code must flush the instruction cache)
    "brk mmap munmap mremap madvise mprotect mincore membarrier riscv_flush_icache riscv_hwprobe",
    # time, threads, the process itself
    "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time futex rt_sigaction rt_sigprocmask",
    "rt_sigreturn sigaltstack set_robust_list rseq sched_yield sched_getaffinity getpid gettid getppid getuid geteuid",
    "getgid getegid getrandom exit exit_group restart_syscall uname getrusage times set_tid_address sysinfo",
    "sched_getparam sched_getscheduler getrlimit",
    # open descriptors
    "read readv pread64 preadv write writev pwrite64 close fstat lseek dup poll ppoll select pselect6",
    "epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2 pipe2 ftruncate",
    "newfstatat fstatat64",
)
_SOCKETS: Final = ("recvfrom recvmsg sendto sendmsg shutdown getsockopt setsockopt getsockname getpeername",)
_ACCEPT: Final = ("accept accept4",)
_FILES: Final = (
    "openat openat2 statx mkdirat unlinkat renameat renameat2 linkat symlinkat readlinkat getdents64 fsync fdatasync",
    "faccessat faccessat2 utimensat fallocate fadvise64 fstatfs statfs flock futimesat copy_file_range sync_file_range",
    "preadv2 pwritev pwritev2",  # the engine appends to files by the last
)
_OLDER_FILES: Final = (
    "open stat lstat access unlink rename mkdir rmdir readlink getcwd fchmod fchown fchmodat fchownat fstat64 lstat64",
)
_READING: Final = ("openat openat2 statx readlinkat getdents64 faccessat faccessat2 sendmmsg recvmmsg",)


def _names(*groups: tuple[str, ...]) -> list[str]:
    return [name for group in groups for line in group for name in line.split()]


def _allow(rules: Any, name: str, *conditions: Any) -> None:
    if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0:  # otherwise this CPU has no such call
        rules.add_rule(pyseccomp.ALLOW, name, *conditions)


def _filter(names: list[str], *, executable_memory: bool) -> Any:
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    rules.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    for name in names:
        if name in {"mmap", "mprotect"} and not executable_memory:
            _allow(rules, name, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, _PROT_EXEC, 0))
        else:
            _allow(rules, name)
    for name, at, values in (("fcntl", 1, _FCNTL), ("ioctl", 1, _IOCTL), ("prctl", 0, _PRCTL)):
        for value in values:
            _allow(rules, name, pyseccomp.Arg(at, pyseccomp.EQ, value))
    _allow(rules, "prlimit64", pyseccomp.Arg(0, pyseccomp.EQ, 0), pyseccomp.Arg(2, pyseccomp.EQ, 0))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    _allow(rules, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
    return rules


def _program(rules: Any) -> bytes:
    with framing.memory_file("seccomp") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@cache
def worker(*, files: bool, ioctls: tuple[int, ...] = ()) -> bytes:
    """Return the filter of a worker: no new socket, connection, process or executable memory.

    `files`: file access. `ioctls`: of the devices that it is granted.
    """
    rules = _filter(_names(_BASE, _SOCKETS, _FILES if files else ()), executable_memory=False)
    if files:  # a process may lower its own limit of file sizes
        own, files_size = pyseccomp.Arg(0, pyseccomp.EQ, 0), pyseccomp.Arg(1, pyseccomp.EQ, resource.RLIMIT_FSIZE)
        _allow(rules, "prlimit64", own, files_size)
        _allow(rules, "setrlimit", pyseccomp.Arg(0, pyseccomp.EQ, resource.RLIMIT_FSIZE))
    for value in ioctls:
        _allow(rules, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, value))
    return _program(rules)


@cache
def router() -> bytes:
    """Return the filter of the router: it accepts connections, and makes none."""
    return _program(_filter(_names(_BASE, _SOCKETS, _ACCEPT), executable_memory=False))


@cache
def tls() -> bytes:
    """Return the filter of the TLS terminator: it accepts connections, and makes pairs of Unix sockets."""
    rules = _filter(_names(_BASE, _SOCKETS, _ACCEPT), executable_memory=False)
    _allow(rules, "socketpair", pyseccomp.Arg(0, pyseccomp.EQ, _AF_UNIX))
    return _program(rules)


@cache
def egress() -> bytes:
    """Return the filter of the egress: IP connections, the instances' Unix sockets, pairs of these, resolving names."""
    rules = _filter(_names(_BASE, _SOCKETS, _READING), executable_memory=True)  # the resolver loads its parts
    for family in (_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK):
        _allow(rules, "socket", pyseccomp.Arg(0, pyseccomp.EQ, family))
    _allow(rules, "connect")
    _allow(rules, "socketpair", pyseccomp.Arg(0, pyseccomp.EQ, _AF_UNIX))
    return _program(rules)


@cache
def keyvalue() -> bytes:
    """Return the filter of the key-value store: files, which SQLite opens and removes by older calls too."""
    return _program(_filter(_names(_BASE, _SOCKETS, _FILES, _OLDER_FILES), executable_memory=False))


@cache
def compiler() -> bytes:
    """Return the filter of the compiler: memory, also executable, and its open descriptors."""
    return _program(_filter(_names(_BASE), executable_memory=True))


def prepare() -> None:
    """Build the workers' filters before the fork: each takes milliseconds and half a megabyte."""
    if AVAILABLE:
        worker(files=False)
        worker(files=True)
