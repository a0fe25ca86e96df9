"""Resources that the host holds for instances: a single `HostResources`, passed to each instance.

Listeners: a Unix socket behind the router, or a port of the instance's own. The supervisor owns each listener for the
instance's life and lends it to workers, so that no swap or crash loses a client that waits to be accepted.

Users: each instance has a uid from a reserved range, unique and stable across restarts. Only a host that runs as root
can assign users, and not in each container (`can_assign_users`). No account, container or dynamic user is in the range
(systemd, "Users, Groups, UIDs and GIDs": above the container range). A uid is not reused while the range lasts, so that
no instance inherits files; afterwards, those of instances that no longer run are reused, longest unused first. A device
has a single host, in the packaged place. If there are several (tests, demos), each has a range of its own, derived from
its state directory: the kernel counts processes by user, so hosts with the same users would share limits.

Crash counts: consecutive crashes, remembered across restarts of host and device. A component that crashes its workers
(or the whole device) must not get new attempts from each reboot: it starts with its old count, so that a single further
crash leads to quarantine. Written only after a crash or a recovery.

Control groups: limits of memory and processes for each instance, if systemd delegates a control group to this host.
Only cgroup v2, and only a group delegated exclusively to this host (`Delegate=` in its unit): the supervisor first
moves into a leaf, as groups with members cannot have limited children. In addition to the limits of each worker, a
group limits all workers of an instance together, including kernel memory and page cache.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from agent import disk
from agent.disk import Write
from agent.host.ipc import framing, host_api
from agent.host.ipc.host_api import StartError
from agent.host.ipc.write_quota import QuotaStore
from agent.host.sandbox.sandbox import can_assign_users
from agent.host.supervisor.hardware import HeldHardware
from agent.host.supervisor.instance_log import LogFiles
from agent.host.supervisor.messages import MessageGate
from fleet.protocol import bounds, files
from fleet.protocol.codes import RejectCode

BACKLOG: Final = 1024


class NoRoomError(StartError):
    """Start for which the device has no room, which is no fault of the component's: it may succeed later."""


def no_room(name: str, error: Exception) -> NoRoomError:
    """Return the error of a start that failed for `error`, of this process or the router."""
    why = str(error)
    if isinstance(error, OSError):
        full = error.errno in framing.NO_DESCRIPTORS
        why = framing.no_descriptors("the host") if full else error.strerror or why
    return NoRoomError(RejectCode.INTERNAL, f"{name}: {why}")


_FILES_OF_A_START: Final = 24
"""More descriptors than a worker takes while it starts, its zygote included."""


def check_room(name: str) -> None:
    """Raise `NoRoomError` where a start might not find the descriptors that it takes: before something is stopped."""
    taken: list[int] = []
    try:
        taken.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(_FILES_OF_A_START))
    except OSError as error:
        raise no_room(name, error) from error
    finally:
        framing.close_all(taken)


@dataclass(frozen=True, slots=True)
class Listener:
    """Listening socket; `port` None for the Unix socket behind the router."""

    sock: socket.socket
    port: int | None


class Listeners:
    """Listeners of every instance, by instance and port."""

    def __init__(self, directory: Path, address: str) -> None:
        """Open Unix sockets in `directory`, and own ports at `address`."""
        self._directory = directory
        self._address = address
        self._open: dict[tuple[str, int | None], Listener] = {}
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)

    def open(self, instance: str, port: int | None) -> Listener:
        """Return the instance's listener on `port` (None: behind the router), opened if needed. Raises `OSError`."""
        found = self._open.get((instance, port))
        if found is not None and found.sock.fileno() >= 0:
            return found
        listener = Listener(self._unix(instance) if port is None else self._tcp(port), port)
        self._open[instance, port] = listener
        return listener

    def is_open(self, instance: str, port: int | None) -> bool:
        """Return whether the instance has a listener on `port`."""
        found = self._open.get((instance, port))
        return found is not None and found.sock.fileno() >= 0

    def close_port(self, instance: str, port: int | None) -> None:
        """Close a listener of an instance."""
        listener = self._open.pop((instance, port), None)
        if listener is not None:
            listener.sock.close()
            if port is None:
                with contextlib.suppress(OSError):
                    (self._directory / instance).unlink()

    def _unix(self, instance: str) -> socket.socket:
        (self._directory / instance).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # By its name alone: the address of a Unix socket has at most 107 characters (unix(7)).
            with _inside(self._directory):
                sock.bind(instance)
                os.chmod(instance, 0o666)  # noqa: PTH101, S103 - access is controlled by access to the directory
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        return sock

    def _tcp(self, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self._address, port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        return sock

    def close(self, instance: str) -> None:
        """Close every listener of an instance."""
        for name, port in list(self._open):
            if name == instance:
                self.close_port(name, port)


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    """Make a directory the current one for a moment, in which no other thread may run."""
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


FIRST: Final = 1_879_048_192
COUNT: Final = 65_000
_RANGES: Final = 2048
_RANGE: Final = 1 << 16
_END: Final = FIRST + _RANGES * _RANGE
_PACKAGED: Final = Path("/var/lib/wasmfleet-host")


def first_of(state: Path) -> int:
    """Return the first uid of the host with this state directory."""
    if state == _PACKAGED:
        return FIRST
    digest = hashlib.sha256(os.fsencode(state.resolve())).digest()
    return FIRST + _RANGE * (1 + int.from_bytes(digest[:8]) % (_RANGES - 1))


class UidAllocator:
    """Uids assigned to instances, stored in the host's state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = first_of(path.parent)
        self._given: dict[str, int] = {}
        try:
            kept = json.loads(files.read_text(path))
            self._given = {str(name): int(uid) for name, uid in kept.items() if FIRST <= int(uid) < _END}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError):
            if files.irregular(path):
                disk.set_aside(Write.UIDS_DAMAGED, path)
            else:
                disk.remove(Write.UIDS_DAMAGED, path, missing_ok=True)  # written atomically, so the file is not ours

    def allocate(self, instance: str) -> int | None:
        """Return the uid of an instance, assigned if needed; None if this host cannot assign users.

        Raises `OSError`: it could not be saved, and is not assigned.
        """
        if not can_assign_users():
            return None
        found = self._given.pop(instance, None)
        if found is None:
            found = self._free()
            self._given[instance] = found
            try:
                self._save()
            except OSError:  # nobody else's, after a restart
                del self._given[instance]
                raise
        else:
            self._given[instance] = found  # ordered by use: the longest unused first
        return found

    def _free(self) -> int:
        own = range(self._first, self._first + COUNT)
        free = 1 + max((uid for uid in self._given.values() if uid in own), default=self._first - 1)
        if free in own:
            return free
        oldest = next(iter(self._given))
        return self._given.pop(oldest)

    def _save(self) -> None:
        disk.write(Write.UIDS, self._path, json.dumps(self._given).encode(), mode=0o600)


class CrashCounter:
    """Consecutive crashes by instance and target, stored in the host's state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, int] = {}
        try:
            kept = json.loads(files.read_text(path))
            self._counts = {str(key): int(count) for key, count in kept.items()}
        except (OSError, ValueError, AttributeError):
            self._counts = {}  # no file yet, or not ours: every count starts at zero
        self.written_bytes = 0

    @staticmethod
    def _key(instance: str, target: str) -> str:
        return f"{instance} {target}"

    def count(self, instance: str, target: str) -> int:
        """Return the consecutive crashes of a target as this instance."""
        return self._counts.get(self._key(instance, target), 0)

    def remember(self, instance: str, target: str, count: int) -> None:
        """Remember the count; 0 removes it, together with the counts of the instance's other targets."""
        key = self._key(instance, target)
        if self._counts.get(key, 0) == count:
            return
        self._counts = {other: n for other, n in self._counts.items() if not other.startswith(f"{instance} ")}
        if count:
            self._counts[key] = count
        self._save()

    def _save(self) -> None:
        data = json.dumps(self._counts).encode()
        try:
            disk.write(Write.CRASHES, self._path, data, mode=0o600)
        except OSError as error:  # a worker that crashed is replaced all the same
            sys.stderr.write(f"host: cannot save the count of crashes: {error.strerror}\n")
            sys.stderr.flush()
            return
        self.written_bytes += len(data)


class _HeldSecrets(NamedTuple):
    generation: int
    fd: int


class PendingSecrets:
    """Secrets between their arrival and the start of their generation: held, and never read here."""

    def __init__(self) -> None:
        self._held: dict[str, _HeldSecrets] = {}

    def hold(self, request: host_api.PutSecrets, fd: int | None) -> None:
        """Hold a descriptor, replacing an earlier one of the instance. Raises `StartError`."""
        if fd is None:
            raise StartError(RejectCode.MALFORMED, f"{request.instance}: no secrets came with the request to hold them")
        if len(self._held) >= bounds.ITEMS_MAX and request.instance not in self._held:
            os.close(fd)
            raise StartError(RejectCode.TOO_LARGE, f"secrets of {bounds.ITEMS_MAX} instances wait for their start")
        self._close(request.instance)
        self._held[request.instance] = _HeldSecrets(request.generation, fd)

    def take(self, run: host_api.Run) -> int:
        """Return the descriptor for a generation, which the caller then owns; -1 without secrets.

        Raises:
            StartError: the generation has secrets, but they were not sent.
        """
        held = self._held.get(run.instance)
        if run.secrets and held is not None and held.generation == run.generation:
            return self._held.pop(run.instance).fd
        self._close(run.instance)
        if run.secrets:
            raise StartError(RejectCode.START_FAILED, f"{run.instance}: its secrets were not sent before its start")
        return -1

    def drop(self, run: host_api.Run) -> None:
        """Close the secrets of a generation that was not started."""
        held = self._held.get(run.instance)
        if held is not None and held.generation <= run.generation:
            self._close(run.instance)

    def clear(self) -> None:
        """Close all secrets: no client is left that could start a generation."""
        for instance in list(self._held):
            self._close(instance)

    def _close(self, instance: str) -> None:
        if (held := self._held.pop(instance, None)) is not None:
            os.close(held.fd)


_MOUNT: Final = Path("/sys/fs/cgroup")
_WANTED: Final = ("memory", "pids")
_OWN: Final = "supervisor"

_THREADS_PER_WORKER: Final = 32


class Cgroups:
    """Control groups of this host; without any, `available` is False and all methods do nothing."""

    def __init__(self, root: Path | None = None, *, pid: int | None = None) -> None:
        """Take over the host's own group (or `root`); `pid` is the supervisor's."""
        self.available = False
        self._root = root if root is not None else _own_group()
        if self._root is None:
            return
        try:
            self.available = self._take(self._root, os.getpid() if pid is None else pid)
        except OSError:
            self.available = False

    @staticmethod
    def _take(root: Path, pid: int) -> bool:
        there = (root / "cgroup.controllers").read_text(encoding="ascii").split()
        if any(name not in there for name in _WANTED):
            return False
        leaf = root / _OWN
        leaf.mkdir(exist_ok=True)
        _write(leaf / "cgroup.procs", str(pid))
        try:
            _write(root / "cgroup.subtree_control", " ".join(f"+{name}" for name in _WANTED))
        except OSError:  # the group has other members: it is not delegated exclusively to this host
            _write(root / "cgroup.procs", str(pid))
            with contextlib.suppress(OSError):
                leaf.rmdir()
            return False
        return True

    def admit(self, instance: str, pid: int, *, workers: int, worker_bytes: int) -> bool:
        """Move a process into its group, which may have `workers` of `worker_bytes` each; return whether it worked.

        Raises `OSError`: there is no descriptor for it.
        """
        if not self.available or self._root is None:
            return False
        group = self._root / f"i-{instance}"
        try:
            group.mkdir(exist_ok=True)
            _write(group / "memory.max", str(workers * worker_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap accounting
                _write(group / "memory.swap.max", "0")
            _write(group / "pids.max", str(workers * _THREADS_PER_WORKER))
            _write(group / "cgroup.procs", str(pid))
        except OSError as error:
            if error.errno in framing.NO_DESCRIPTORS:
                raise
            return False
        return True

    def dismiss(self, instance: str) -> None:
        """Remove an instance's group, if it is empty."""
        if self.available and self._root is not None:
            with contextlib.suppress(OSError):
                (self._root / f"i-{instance}").rmdir()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")


def _own_group() -> Path | None:
    """Return this process's own cgroup v2, if it is not the root of the tree."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            if line.startswith("0::/") and line != "0::/":
                group = _MOUNT / line.removeprefix("0::/")
                if os.access(group / "cgroup.subtree_control", os.W_OK):
                    return group
    return None


def _renamed(old: Path, new: Path) -> Path:
    """Move a file of an older version to its present name, unless that is taken, and return that name."""
    with contextlib.suppress(OSError):  # most often there is none
        if not new.exists():
            disk.move(Write.CRASHES_RENAMED, old, new)
    return new


@dataclass(frozen=True, slots=True)
class HostResources:
    """Resources that the host holds for its instances.

    Attributes:
        data: parent of the instances' data directories.
        pairs: parent of the directories with their key-value pairs.
        messages: what components publish, until the agent has it.
        hardware: hardware that instances are granted.
    """

    data: Path
    pairs: Path
    listeners: Listeners
    uids: UidAllocator
    crashes: CrashCounter
    quotas: QuotaStore
    cgroups: Cgroups
    secrets: PendingSecrets
    logs: LogFiles
    messages: MessageGate = field(default_factory=MessageGate)
    hardware: HeldHardware = field(default_factory=HeldHardware)

    @classmethod
    def open(cls, *, state: Path, sockets: Path, address: str) -> "HostResources":
        """Load the resources from `state`; Unix sockets are in `sockets`, own ports are opened at `address`."""
        disk.remove_leftovers(state, recursive=False)  # instances' own files are below it
        return cls(
            data=state / "data",
            pairs=state / "keyvalue",
            listeners=Listeners(sockets, address),
            uids=UidAllocator(state / "uids.json"),
            crashes=CrashCounter(_renamed(state / "deaths.json", state / "crashes.json")),
            quotas=QuotaStore(state / "written.json"),
            cgroups=Cgroups(),
            secrets=PendingSecrets(),
            logs=LogFiles(state / "logs"),
        )

    @property
    def written_bytes(self) -> int:
        """Bytes of the host's own files written since it started."""
        return self.crashes.written_bytes + self.quotas.written_bytes + self.logs.written_bytes
