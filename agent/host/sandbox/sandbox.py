"""Sandbox around every process that runs or reads untrusted data: apply a `SandboxSpec`; report the isolation layers.

    layer       protects against a compromised process that ...
    limits      exhausts memory, processes or descriptors
    user        accesses files and processes of other users (own uid, if root; else a user namespace without rights)
    network     connects anywhere: its network namespace is empty, without even loopback
    mount       reads files: its root is empty except for its own data
    privileges  gains privileges by executing a program
    landlock    opens files, or reaches abstract sockets and processes, where namespaces are not available
    seccomp     makes sockets, processes or executable memory, traces, or signals other processes

Isolation layers are independent: none relies on another. Each is applied if the kernel and the host's rights allow it,
and reported. A process must have a single thread, and must have closed the descriptors of others (`close_all_but`).
Afterwards, even `import` fails: `apply` therefore imports the modules named in the spec, which the standard library
would import at first use, while files can still be read.

The report shows each layer for each way in which a host may run, and the way of this host. A layer that the kernel
lacks holds in none of the ways; a layer that needs namespaces never holds for a user without them.
"""

import contextlib
import gc
import importlib
import os
import resource
import signal
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, NamedTuple

from agent.host.sandbox import kernel, seccomp
from fleet.protocol.bounds import MIB

LAYERS: Final = ("limits", "user", "network", "mount", "privileges", "landlock", "seccomp")
BASELINE: Final = tuple(layer for layer in LAYERS if layer != "landlock")  # landlock needs a recent kernel
DATA: Final = "/data"
_WORDS_BYTES: Final = 64 * 1024
_SLACK_BYTES: Final = 48 * MIB
_VALUE_BYTES: Final = 100  # memory for each byte of a body in transfer: a value of 32 bytes, and its copies

_THREADS_PER_WORKER: Final = 16

RESOLVER_THREADS: Final = 32
"""Names that the egress resolves at once."""

_FILES_MAX: Final = 1024

_SHARED_WORKERS: Final = 256  # of one publisher on one device

_FILES_PER_SLOT: Final = 8  # socket, epoll set and listener, and those of a swap

_CLIENTS_FILES: Final = 4 * _FILES_MAX  # clients of the shared port and of own ones, and what else the router has

_FILES_PER_CHANNEL: Final = 4  # of the router, for a worker: its channel, two pages, and the instance's listener

_CHANNELS_MAX: Final = 4 * _FILES_MAX

_DESCRIPTORS_MAX: Final = 1 << 31
_ROOT: Final = "/tmp"  # noqa: S108 - only a mount point for an empty root, in the process's own namespace
_ALL_RIGHTS: Final = (1 << 16) - 1
_ROUTER_UID: Final = 1_879_113_727
_EGRESS_UID: Final = 1_879_113_726
_TLS_UID: Final = 1_879_113_725
_KEYVALUE_UID: Final = 1_879_113_724
_MANAGING_USERS: Final = sum(1 << bit for bit in (0, 1, 3, 5, 6, 7))
"""CAP_CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID: to give processes and files to users, and manage them then."""

_EGRESS_BYTES: Final = 64 * MIB
_KEYVALUE_BYTES: Final = 64 * MIB
_KEYVALUE_FILE_BYTES: Final = 8 * 1024 * MIB  # instances have limits of their own, which the process itself keeps to
NEIGHBOURS: Final = _ROOT
_RESOLVER: Final = ("/etc", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/run/systemd/resolve", "/run/resolvconf")
# Imported by the standard library at first use.
_NAMES: Final = ("encodings.idna",)  # a host's name, given to TLS or to the resolver
_RESOLVING: Final = ("concurrent.futures.thread",)  # asyncio resolves names on a thread
_READ_RIGHTS: Final = 0b1101  # Landlock: execute (libraries are mapped so), read files and directories
_LOOK_RIGHTS: Final = 0b1100  # read files and directories


class SandboxError(Exception):
    """A layer failed halfway: the process must not continue."""


class ReadOnlyFile(NamedTuple):
    """File to be mounted read-only into a process's root.

    Attributes:
        source: its path outside.
        inside: its path there, in `DATA` or in a directory of the root.
        owner: user to whom it has to belong; None for anyone.
    """

    source: str
    inside: str
    owner: int | None = None


class UnreadableError(Exception):
    """A directory that a process is to read is not there, or not for its user: the device's fault."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path = path


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """Sandbox of a kind of process: the rights that it keeps.

    Attributes:
        uid: user to become; None to stay.
        data_bytes: private memory beyond the current amount; None for no limit.
        file_bytes: size of the largest file that it may write.
        data: data directory, empty for none; mounted at `DATA` if the mount layer holds.
        directories: others that it may read; if the mount layer holds, each is mounted at its `directory_place`.
        files: to be mounted read-only; without the mount layer there is no sandbox with them.
        filter: makes the seccomp filter.
        threads: limit for all processes of `uid` together.
        descriptors: limit of open descriptors.
        network: keep the network.
        neighbours: directory to mount at `NEIGHBOURS`, keeping the current root.
        readable: directories whose files may be read, if the root is kept.
        modules: modules that the standard library imports at first use, to be imported before.
    """

    uid: int | None
    filter: Callable[[], bytes]
    data_bytes: int | None = None
    file_bytes: int = 0
    data: str = ""
    directories: tuple[str, ...] = ()
    files: tuple[ReadOnlyFile, ...] = ()
    threads: int = _THREADS_PER_WORKER
    descriptors: int = _FILES_MAX
    network: bool = False
    neighbours: str = ""
    readable: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


def worker_bytes(*, memory_bytes: int, body_bytes: int) -> int:
    """Return the private memory that a worker may take beyond its amount at the start."""
    return memory_bytes + body_bytes * _VALUE_BYTES + _SLACK_BYTES


def worker_spec(
    *,
    uid: int | None,
    memory_bytes: int,
    body_bytes: int,
    storage_bytes: int,
    data: str,
    workers: int = 1,
    connects: bool = False,
) -> SandboxSpec:
    """Return the sandbox of a worker.

    Args:
        uid: user to become; None to stay.
        memory_bytes: limit of the guest's memory.
        body_bytes: limit of request and response bodies of a call together.
        storage_bytes: limit of a file in the data directory.
        data: data directory; empty for none.
        workers: number of workers of the instance that may run at once.
        connects: allow requests, over TLS too.
    """
    return SandboxSpec(
        uid=uid,
        data_bytes=worker_bytes(memory_bytes=memory_bytes, body_bytes=body_bytes),
        file_bytes=storage_bytes if data else 0,
        data=data,
        filter=lambda: seccomp.worker(files=bool(data)),
        threads=2 * workers * _THREADS_PER_WORKER,  # two generations at a swap
        modules=_NAMES if connects else (),
    )


def reading(spec: SandboxSpec, directories: tuple[str, ...]) -> SandboxSpec:
    """Return the sandbox of a worker that may also read these directories of the device."""
    if not directories:
        return spec
    return replace(spec, directories=directories, filter=lambda: seccomp.worker(files=True))


def with_files(spec: SandboxSpec, files: tuple[ReadOnlyFile, ...]) -> SandboxSpec:
    """Return the sandbox of a worker with files that are mounted read-only."""
    return replace(spec, files=files, filter=lambda: seccomp.worker(files=True)) if files else spec


def with_devices(spec: SandboxSpec, ioctls: tuple[int, ...]) -> SandboxSpec:
    """Return a worker's sandbox in which it may make these calls on the devices that it was given."""
    files = bool(spec.data or spec.directories or spec.files)
    return replace(spec, filter=lambda: seccomp.worker(files=files, ioctls=ioctls)) if ioctls else spec


def shared_worker_spec(*, uid: int | None, slots: int, memory_bytes: int, body_bytes: int) -> SandboxSpec:
    """Return the sandbox of a shared worker: up to `slots` instances of `memory_bytes` each, no files.

    Instances are called one at a time, so bodies count once.
    """
    return SandboxSpec(
        uid=uid,
        data_bytes=worker_bytes(memory_bytes=slots * memory_bytes, body_bytes=body_bytes),
        filter=lambda: seccomp.worker(files=False),
        threads=_THREADS_PER_WORKER * _SHARED_WORKERS,
        descriptors=_FILES_MAX + slots * (1 + _FILES_PER_SLOT),
    )


@cache
def can_assign_users() -> bool:
    """Test whether this process gives workers users of their own, and can manage their processes and files then.

    Root cannot in a user namespace that maps fewer users (LXC, rootless Podman), nor without some capabilities, as a
    container may have been started. Nor does root where only user namespaces isolate network and files, as without
    CAP_SYS_ADMIN: no other user exists in those.
    """
    if os.geteuid() != 0:
        return False
    try:
        if _MANAGING_USERS & ~kernel.capabilities():
            return False
    except OSError:
        return False
    pid = os.fork()
    if pid == 0:
        try:
            apart = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWNET
            if _holds(lambda: kernel.unshare(apart)) or not _holds(lambda: kernel.enter_user_namespace(apart)):
                _become(_ROUTER_UID)
                os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def router_spec() -> SandboxSpec:
    """Return the sandbox of the router, which has the sockets that it was given and can access no file."""
    return SandboxSpec(
        uid=_ROUTER_UID if can_assign_users() else None,
        filter=seccomp.router,
        descriptors=_CLIENTS_FILES + _FILES_PER_CHANNEL * _CHANNELS_MAX,
    )


def tls_spec() -> SandboxSpec:
    """Return the sandbox of the TLS terminator, which has read its certificates and can access no file."""
    return SandboxSpec(
        uid=_TLS_UID if can_assign_users() else None,
        filter=seccomp.tls,
        descriptors=3 * _FILES_MAX,
        modules=(*_NAMES, "asyncio.sslproto", "ssl"),
    )


def egress_spec(directory: str) -> SandboxSpec:
    """Return the sandbox of the egress, which keeps the network and may read the files for resolving names.

    The directory of the instances' sockets is at `NEIGHBOURS` where the mount layer holds.
    """
    return SandboxSpec(
        uid=_EGRESS_UID if can_assign_users() else None,
        neighbours=directory,
        network=True,
        readable=_RESOLVER,
        data_bytes=_EGRESS_BYTES,
        descriptors=_CHANNELS_MAX + 2 * _FILES_MAX,  # a socket for each worker, and connections that are being made
        threads=2 * RESOLVER_THREADS,
        filter=seccomp.egress,
        modules=(*_NAMES, *_RESOLVING),
    )


def keyvalue_user() -> int | None:
    """Return the user of the key-value store's process, to whom its directory belongs; None for this process's own."""
    return _KEYVALUE_UID if can_assign_users() else None


def keyvalue_spec(directory: str) -> SandboxSpec:
    """Return the sandbox of the key-value store, which has its directory and the sockets that it was given."""
    return SandboxSpec(
        uid=keyvalue_user(),
        data=directory,
        data_bytes=_KEYVALUE_BYTES,
        file_bytes=_KEYVALUE_FILE_BYTES,
        descriptors=_CHANNELS_MAX + _FILES_MAX,
        filter=seccomp.keyvalue,
    )


def compiler_spec() -> SandboxSpec:
    """Return the sandbox of the compiler, which has already set its own limits and has three descriptors.

    Standard error may be a file, to which the compiler writes why a component was refused.
    """
    return SandboxSpec(uid=None, file_bytes=_WORDS_BYTES, filter=seccomp.compiler)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit now if the parent is no longer `parent`."""
    kernel.signal_at_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def memory_figures() -> int | None:
    """Return a descriptor through which another process can read this one's memory figures; None without /proc."""
    try:
        return os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def scheduling() -> int | None:
    """Return a descriptor for reading whether the calling thread runs or waits; None without /proc."""
    try:
        return os.open("/proc/thread-self/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def waits(scheduling_fd: int | None) -> bool:
    """Return whether the thread waits for something other than the processor (proc(5), `/proc/pid/stat`: state)."""
    if scheduling_fd is None:
        return True
    try:
        return os.pread(scheduling_fd, 512, 0).rpartition(b") ")[2][:1] != b"R"
    except OSError:
        return True


def apply(spec: SandboxSpec) -> dict[str, bool]:
    """Apply every possible layer; return layer -> whether it holds.

    Without the mount layer, the spec's `data`, `root` or `neighbours` is the current directory afterwards: another user
    could not search the directories above it.

    Raises:
        SandboxError: a layer failed halfway.
        UnreadableError: one of the spec's `directories` cannot be read by the process's user.
    """
    holds: dict[str, bool] = {}
    for module in spec.modules:
        importlib.import_module(module)
    program = spec.filter() if seccomp.AVAILABLE else None
    parent = os.getppid()
    used = _data_bytes()
    own = _namespaces(network=spec.network, user=spec.uid is None)
    holds["network"] = own.network
    if spec.files and not own.mount:
        raise SandboxError("data packages need the mount layer, which does not hold on this device")
    opened = _open_directories(spec)
    try:
        if spec.files:
            _new_root(spec, opened)
            holds["mount"] = True
        else:
            holds["mount"] = own.mount and _holds(lambda: _new_root(spec, opened))
        if not holds["mount"] and (directory := spec.data or spec.neighbours):
            os.chdir(directory)
        if spec.uid is not None:
            _become(spec.uid)
        holds["limits"] = _limit(spec, used)
        if spec.uid is None:  # a change of user drops them
            with contextlib.suppress(OSError):
                kernel.drop_capabilities()
        holds["user"] = spec.uid is not None or own.user
        kernel.undumpable()
        die_with_parent(parent)  # a change of user forgets it
        holds["privileges"] = _holds(kernel.no_new_privileges)
        holds["landlock"] = _holds(lambda: _landlock(spec, opened, mounted=holds["mount"]))
        holds["seccomp"] = program is not None and _holds(lambda: kernel.filter_calls(program))
    except OSError as error:
        raise SandboxError(f"cannot close the sandbox: {error}") from error
    finally:
        for fd in opened:
            os.close(fd)
    return {layer: holds[layer] for layer in LAYERS}


def directory_place(number: int, path: str, *, mounted: bool) -> str:
    """Return where the process finds a directory of its spec after `apply`, by its place there."""
    return f"/{number}" if mounted else path


def _open_directories(spec: SandboxSpec) -> list[int]:
    """Open the spec's directories in this mount namespace, as the user that the process becomes.

    So nothing comes within reach but what any user of the device may read, whoever named it. Raises `UnreadableError`.
    """
    opened: list[int] = []
    if not spec.directories:
        return opened
    path = ""
    try:
        with _as_user(spec.uid):
            for path in spec.directories:
                opened.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        for fd in opened:
            os.close(fd)
        raise UnreadableError(path, os.strerror(error.errno or 0)) from error
    return opened


@contextlib.contextmanager
def _as_user(uid: int | None) -> Iterator[None]:
    """Open files as another user, without groups; None as this one."""
    before = os.getegid(), os.geteuid()
    if uid is not None:
        os.setgroups([])
        os.setegid(uid)
        os.seteuid(uid)
    try:
        yield
    finally:
        if uid is not None:
            os.seteuid(before[1])
            os.setegid(before[0])


def _holds(apply_layer: Callable[[], None]) -> bool:
    try:
        apply_layer()
    except (OSError, ValueError):
        return False
    return True


class _Namespaces(NamedTuple):
    """New namespaces that the process has entered."""

    user: bool
    network: bool
    mount: bool


def _namespaces(*, network: bool, user: bool) -> _Namespaces:
    """Enter new namespaces; with `network`, keep the network namespace, with `user`, try a user namespace first."""
    apart = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | (0 if network else kernel.CLONE_NEWNET)
    if user and _holds(lambda: kernel.enter_user_namespace(apart)):
        return _Namespaces(user=True, network=not network, mount=True)
    if _holds(lambda: kernel.unshare(apart)):
        return _Namespaces(user=False, network=not network, mount=True)
    if network:
        return _Namespaces(user=False, network=False, mount=_holds(lambda: kernel.unshare(kernel.CLONE_NEWNS)))
    network = _holds(lambda: kernel.unshare(kernel.CLONE_NEWNET))
    return _Namespaces(user=False, network=network, mount=_holds(lambda: kernel.unshare(kernel.CLONE_NEWNS)))


def _new_root(spec: SandboxSpec, directories: list[int]) -> None:
    """Mount an empty root, and in it the data directory, if there is one, and the directories that may be read."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    if spec.neighbours:
        kernel.mount(spec.neighbours, NEIGHBOURS, None, kernel.MS_BIND)
        return
    plain = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    # Opened in this namespace, before the empty root hides the path.
    data_fd = os.open(spec.data, os.O_PATH | os.O_CLOEXEC) if spec.data else -1
    sources = [_open_file(each) for each in spec.files]
    inodes = 8 + len(directories) + 2 * len(sources)
    kernel.mount("none", _ROOT, "tmpfs", plain, f"size=64k,nr_inodes={inodes},mode=0755")
    if spec.data:
        os.mkdir(_ROOT + DATA, 0o755)  # noqa: PTH102 - as few imports as possible from here on
        kernel.mount(f"/proc/self/fd/{data_fd}", _ROOT + DATA, None, kernel.MS_BIND)
        os.close(data_fd)
    for number, (path, fd) in enumerate(zip(spec.directories, directories, strict=True)):
        at = f"{_ROOT}/{number}"
        os.mkdir(at, 0o755)  # noqa: PTH102
        try:
            kernel.mount(f"/proc/self/fd/{fd}", at, None, kernel.MS_BIND)
            kernel.mount("none", at, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | plain)
        except OSError as error:  # not a process without this layer: it has begun, and the layer holds without these
            raise UnreadableError(path, f"it cannot be mounted: {os.strerror(error.errno or 0)}") from error
    for source, each in zip(sources, spec.files, strict=True):
        _mount_file(source, _ROOT + each.inside, plain)
    os.chdir(_ROOT)
    kernel.pivot_here()
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | plain)


def _open_file(file: ReadOnlyFile) -> int:
    """Open a file that is to be mounted, without following a link to it. Raises `SandboxError`."""
    try:
        opened = os.open(file.source, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(f"the data package for {file.inside} is not there: {error.strerror}") from error
    found = os.fstat(opened)
    if not stat.S_ISREG(found.st_mode) or file.owner not in {None, found.st_uid}:
        os.close(opened)
        raise SandboxError(f"the data package for {file.inside} is no file of whoever asks for it")
    return opened


def _mount_file(source: int, target: str, plain: int) -> None:
    """Mount an open file read-only at a path of the new root, which may be in the instance's own directory.

    Raises:
        SandboxError: something of the instance's own is at that path.
    """
    if not os.path.isdir(os.path.dirname(target)):  # noqa: PTH112, PTH120 - as few imports as possible
        os.mkdir(os.path.dirname(target), 0o755)  # noqa: PTH102, PTH120 - the same
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        place = os.open(target, flags, 0o444)
    except OSError as error:
        raise SandboxError(f"a data package has no place at {target.removeprefix(_ROOT)}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(place).st_mode):
        raise SandboxError(f"a data package has no place at {target.removeprefix(_ROOT)}: no file is there")
    kernel.mount(f"/proc/self/fd/{source}", f"/proc/self/fd/{place}", None, kernel.MS_BIND)
    kernel.mount("none", target, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | plain)
    os.close(place)
    os.close(source)


def _data_bytes() -> int:
    fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    text = os.read(fd, 4096)
    os.close(fd)
    for line in text.splitlines():
        if line.startswith(b"VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _limit(spec: SandboxSpec, used_bytes: int) -> bool:
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, spec.descriptors),
        (resource.RLIMIT_FSIZE, spec.file_bytes),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _lower(kind, most)
    if spec.data_bytes is not None:
        _lower(resource.RLIMIT_DATA, used_bytes + spec.data_bytes)
    if spec.uid is not None:
        _lower(resource.RLIMIT_NPROC, spec.threads)  # without an own uid, all processes of the user would count
    return True


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (limit, limit))


def _landlock(spec: SandboxSpec, directories: list[int], *, mounted: bool) -> None:
    allowed: dict[int, int] = {}
    opened = []
    try:
        for outside, inside in ((spec.data, DATA), (spec.neighbours, NEIGHBOURS)):
            if outside:
                here = os.open(inside if mounted else ".", os.O_PATH | os.O_CLOEXEC)
                opened.append(here)
                allowed[here] = _ALL_RIGHTS
        for number, fd in enumerate(directories):
            here = os.open(f"/{number}", os.O_PATH | os.O_CLOEXEC) if mounted else os.dup(fd)
            opened.append(here)
            allowed[here] = _LOOK_RIGHTS
        for directory in sorted({os.path.dirname(each.inside) for each in spec.files} - {DATA}):  # noqa: PTH120
            opened.append(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            allowed[opened[-1]] = _LOOK_RIGHTS
        for path in spec.readable:
            with contextlib.suppress(OSError):  # some devices lack some of them
                opened.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
                allowed[opened[-1]] = _READ_RIGHTS
        kernel.landlock(allowed, network=spec.network)
    finally:
        for fd in opened:
            os.close(fd)


def begin_helper(keep: set[int]) -> None:
    """Make a process just forked from the supervisor one of its own: with standard streams and these descriptors."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.freeze()
    close_all_but({0, 1, 2} | keep)


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor except those in `keep`."""
    first = 0
    for fd in [*sorted(keep), _DESCRIPTORS_MAX]:
        kernel.close_range(first, fd - 1)
        first = fd + 1


def probe() -> dict[str, bool]:
    """Test in child processes which layers hold on this device: around workers and each helper.

    Raises:
        SandboxError: no process can be confined here.
    """
    uid = _ROUTER_UID if can_assign_users() else None
    found = _probe_one(worker_spec(uid=uid, memory_bytes=MIB, body_bytes=MIB, storage_bytes=0, data=""))
    for spec in (router_spec(), egress_spec("/proc"), keyvalue_spec("/proc")):
        _probe_one(spec)
    return found


def _probe_one(spec: SandboxSpec) -> dict[str, bool]:
    """Enter a sandbox in a child process, and return which layers hold there. Raises `SandboxError`."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            close_all_but({0, 1, 2, write})
            layers = apply(spec)
            os.write(write, b"".join(b"\1" if layers[layer] else b"\0" for layer in LAYERS))
        except BaseException as error:  # noqa: BLE001 - nobody above could handle it: this process was forked
            os.write(write, b"!" + str(error).encode()[:_WORDS_BYTES])
        finally:
            os._exit(0)
    os.close(write)
    results = os.read(read, _WORDS_BYTES)
    os.close(read)
    os.waitpid(pid, 0)
    if len(results) != len(LAYERS) or results.startswith(b"!"):
        why = results[1:].decode(errors="replace") or "the process that tried ended"
        raise SandboxError(why)
    return {layer: bool(holds) for layer, holds in zip(LAYERS, results, strict=True)}


ROOT: Final = "root service"
USER: Final = "user with namespaces"
BARE: Final = "user without namespaces"
WAYS: Final = (ROOT, USER, BARE)

_BY_NAMESPACES: Final = frozenset({"user", "network", "mount"})
_MEANING: Final = {
    "limits": "memory, descriptors and threads are limited",
    "user": "workers are another user, or have no rights in a user namespace",
    "network": "workers have an empty network",
    "mount": "workers see an empty file system",
    "privileges": "nothing executed gains rights",
    "landlock": "files, ports and abstract sockets are refused a second time",
    "seccomp": "no process, socket, executable memory, tracing or signal to others",
}
_NAMESPACES: Final = (
    "CAP_SYS_ADMIN, or user namespaces, which a container's system call filter or its kernel may forbid "
    "(docs/containers.md)"
)
_NEEDS: Final = {
    "user": "root with users of its own and CAP_SETUID, SETGID, CHOWN, DAC_OVERRIDE, FOWNER, KILL, or user namespaces",
    "network": _NAMESPACES,
    "mount": _NAMESPACES,
    "landlock": "a kernel with Landlock, enabled (CONFIG_SECURITY_LANDLOCK, lsm=)",
    "seccomp": "libseccomp, and a kernel with seccomp filters",
    "cgroup": "a control group of its own (Delegate=yes in its unit)",
}
"""By layer, what it needs beyond a plain process; layers with the same need are missing together."""

_SHARED: Final = (
    "A shared worker isolates nothing between its instances: code that breaks out of one has the memory of the others.",
    "Only instances of one publisher share one, where the operator allows it; none with files, secrets or requests.",
)
_CGROUP: Final = ("Delegate=", "if given", "if given", "workers of an instance share one limit of memory")


def way(layers: Mapping[str, bool]) -> str:
    """Return the way in which this host runs, given the layers of its workers."""
    if can_assign_users():
        return ROOT
    return USER if layers.get("user") else BARE


def holds(layer: str, in_way: str, here: str, layers: Mapping[str, bool]) -> bool:
    """Return whether a layer holds in another way, derived from `layers`, which were tested in the way `here`."""
    if in_way == here or layer not in _BY_NAMESPACES:
        return layers[layer]
    if in_way == USER and here == ROOT and not layers["mount"]:
        return False  # a user may do no more than root here
    return in_way != BARE


def needs_of(missing: Collection[str]) -> str:
    """Return a sentence on what the missing layers need on this device; empty where nothing can be said."""
    wants = {layer: want for layer, want in _NEEDS.items() if layer in missing}
    return "; ".join(
        f"{' and '.join(layer for layer, want in wants.items() if want == each)}: {each}"
        for each in dict.fromkeys(wants.values())
    )


def isolation_report(here: str, layers: Mapping[str, bool]) -> list[str]:
    """Format the table of layers, with the column of `here` in brackets."""
    heads = [f"[{each}]" if each == here else each for each in WAYS]
    lines = ["  " + " " * 11 + "".join(f"{head:<26}" for head in heads).rstrip()]
    for layer in layers:
        columns = ["yes" if holds(layer, each, here, layers) else "NO" for each in WAYS]
        lines.append(f"  {layer:<11}" + "".join(f"{column:<26}" for column in columns) + _MEANING[layer])
    lines.append(f"  {'cgroup':<11}" + "".join(f"{column:<26}" for column in _CGROUP[:3]) + _CGROUP[3])
    lines.append(
        f"  {'shared':<11}" + "".join(f"{'NO':<26}" for _ in WAYS) + "instances in one worker, from each other"
    )
    return [*lines, *_SHARED]
