"""Resources that the host holds for instances: listeners, uids, control groups, crash counters, pending secrets.

The sockets on which instances are called: a Unix socket behind the router, or a port of the instance's own.

The supervisor owns each for the instance's life and lends it to lanes, so that a swap or a crash closes nothing and
loses no client that waits to be accepted.

Which user each instance's lanes become: a uid from a reserved range, the same after a restart, never another's.

Only a host that runs as root can give users away. The range is one that no account, container or dynamic user has
(systemd, "Users, Groups, UIDs and GIDs": above the container range). A uid is not given again while the range lasts, so
nobody inherits files; then those of instances that no longer run are, the longest unused first.

A board has one host, in the packaged place. Where there are more (tests, a demonstration), each has a range of its own,
by where its state is: the kernel counts processes by user, so hosts that shared users would share their limits.

How often each instance's lanes have died in a row: remembered over restarts of host and board.

A component that brings its lanes (or the whole board) down gets no fresh set of chances from each reboot: it starts
again with the count it had, so that one more death is a quarantine. Written only when something dies or has recovered.

Secrets between their arrival and the start of the generation that they are for: descriptors, held and never read.

A share of memory and processes for each instance, where systemd gives this host control groups of its own.

Only cgroup v2, and only a part of the tree that was delegated to this host alone (`Delegate=` in its unit): the
supervisor moves into a leaf of its own first, since groups with members cannot have limited children. On top of the
limits that each lane has: it bounds what an instance's lanes take together, kernel memory and page cache included.
"""

import contextlib
import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.host.ipc import host_api
from agent.host.ipc.host_api import StartError
from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode

BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket; `port` None for the Unix socket behind the router."""

    sock: socket.socket
    port: int | None


class Listeners:
    """Every instance's listeners, by instance and port."""

    def __init__(self, directory: Path, address: str) -> None:
        """`directory` holds the Unix sockets; `address` is where own ports are opened."""
        self._directory = directory
        self._address = address
        self._open: dict[tuple[str, int | None], Listener] = {}
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)

    def open(self, instance: str, port: int | None) -> Listener:
        """The instance's listener on `port` (None: behind the router), opened if it is not. Raises OSError."""
        found = self._open.get((instance, port))
        if found is not None and found.sock.fileno() >= 0:
            return found
        listener = Listener(self._unix(instance) if port is None else self._tcp(port), port)
        self._open[instance, port] = listener
        return listener

    def _unix(self, instance: str) -> socket.socket:
        path = self._directory / instance
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.bind(str(path))
        os.chmod(path, 0o666)  # noqa: PTH101, S103 - who may connect is decided by who sees the directory
        sock.listen(BACKLOG)
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
        for (name, port), listener in list(self._open.items()):
            if name == instance:
                listener.sock.close()
                del self._open[name, port]
                if port is None:
                    with contextlib.suppress(OSError):
                        (self._directory / instance).unlink()


FIRST: Final = 1_879_048_192

COUNT: Final = 65_000

_RANGES: Final = 2048

_RANGE: Final = 1 << 16

_END: Final = FIRST + _RANGES * _RANGE

_PACKAGED: Final = Path("/var/lib/wasmfleet-host")


def first_of(state: Path) -> int:
    """Where the range of the host begins whose state directory this is."""
    if state == _PACKAGED:
        return FIRST
    digest = hashlib.sha256(os.fsencode(state.resolve())).digest()
    return FIRST + _RANGE * (1 + int.from_bytes(digest[:8]) % (_RANGES - 1))


class UidAllocator:
    """The uids given, kept in a file of the host's state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = first_of(path.parent)
        self._given: dict[str, int] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._given = {str(name): int(uid) for name, uid in kept.items() if FIRST <= int(uid) < _END}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError):
            path.unlink(missing_ok=True)  # written whole or not at all, so this is not ours

    def of(self, instance: str) -> int | None:
        """The uid of an instance, given now if it has none; None where this host cannot give any."""
        if os.geteuid() != 0:
            return None
        found = self._given.pop(instance, None)
        if found is None:
            found = self._free()
            self._given[instance] = found
            self._save()
        else:
            self._given[instance] = found  # the longest unused stands first
        return found

    def _free(self) -> int:
        own = range(self._first, self._first + COUNT)
        free = 1 + max((uid for uid in self._given.values() if uid in own), default=self._first - 1)
        if free in own:
            return free
        oldest = next(iter(self._given))
        return self._given.pop(oldest)

    def _save(self) -> None:
        part = self._path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(self._given, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)


class CrashCounter:
    """The counts, by instance and target, in a file of the host's state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, int] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._counts = {str(key): int(count) for key, count in kept.items()}
        except (OSError, ValueError, AttributeError):
            self._counts = {}  # none yet, or not ours: everybody starts anew
        self.written_bytes = 0

    @staticmethod
    def _key(instance: str, target: str) -> str:
        return f"{instance} {target}"

    def of(self, instance: str, target: str) -> int:
        """Deaths in a row of this target as this instance."""
        return self._counts.get(self._key(instance, target), 0)

    def note(self, instance: str, target: str, count: int) -> None:
        """Remember the count; 0 forgets it, and what other targets of this instance had."""
        key = self._key(instance, target)
        if self._counts.get(key, 0) == count:
            return
        self._counts = {other: n for other, n in self._counts.items() if not other.startswith(f"{instance} ")}
        if count:
            self._counts[key] = count
        self._save()

    def _save(self) -> None:
        data = json.dumps(self._counts).encode()
        part = self._path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        self.written_bytes += len(data)


class PendingSecrets:
    """What the agent has entrusted to this host and not yet started, one descriptor an instance."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, int]] = {}

    def hold(self, request: host_api.PutSecrets, fd: int | None) -> None:
        """Hold a descriptor, in place of an earlier one of the instance; raises `StartError`."""
        if fd is None:
            raise StartError(RejectCode.MALFORMED, f"{request.instance}: no secrets came with the request to hold them")
        if len(self._held) >= bounds.ITEMS_MAX and request.instance not in self._held:
            os.close(fd)
            raise StartError(RejectCode.TOO_LARGE, f"secrets of {bounds.ITEMS_MAX} instances wait for their start")
        self._close(self._held.pop(request.instance, None))
        self._held[request.instance] = request.generation, fd

    def take(self, run: host_api.Run) -> int:
        """The descriptor for a generation, the caller's from now on; -1 where it has no secrets.

        Raises:
            StartError: it has some, and they did not come.
        """
        held = self._held.pop(run.instance, None)
        if run.secrets and held is not None and held[0] == run.generation:
            return held[1]
        self._close(held)
        if run.secrets:
            raise StartError(RejectCode.START_FAILED, f"{run.instance}: its secrets did not come before it")
        return -1

    def drop(self, run: host_api.Run) -> None:
        """It was not started after all."""
        if (held := self._held.get(run.instance)) is not None and held[0] <= run.generation:
            self._close(self._held.pop(run.instance))

    def clear(self) -> None:
        """Nobody is left who could start anything."""
        for instance in list(self._held):
            self._close(self._held.pop(instance))

    @staticmethod
    def _close(held: tuple[int, int] | None) -> None:
        if held is not None:
            os.close(held[1])


_MOUNT: Final = Path("/sys/fs/cgroup")

_WANTED: Final = ("memory", "pids")

_OWN: Final = "supervisor"

_THREADS_A_LANE: Final = 32


class Cgroups:
    """The host's part of the tree; `available` False where there is none, and then nothing is done."""

    def __init__(self, root: Path | None = None, *, pid: int | None = None) -> None:
        """Take the host's own group (or `root`) over; `pid` is the supervisor's."""
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
        except OSError:  # others live in this group: it was not delegated to this host alone
            _write(root / "cgroup.procs", str(pid))
            with contextlib.suppress(OSError):
                leaf.rmdir()
            return False
        return True

    def admit(self, instance: str, pid: int, *, lanes: int, lane_bytes: int) -> bool:
        """Put a lane into its instance's group, which may have `lanes` of `lane_bytes` each; whether that worked."""
        if not self.available or self._root is None:
            return False
        group = self._root / f"i-{instance}"
        try:
            group.mkdir(exist_ok=True)
            _write(group / "memory.max", str(lanes * lane_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap accounting
                _write(group / "memory.swap.max", "0")
            _write(group / "pids.max", str(lanes * _THREADS_A_LANE))
            _write(group / "cgroup.procs", str(pid))
        except OSError:
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
    """This process's own cgroup v2, if it is not the root of the tree."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            if line.startswith("0::/") and line != "0::/":
                group = _MOUNT / line.removeprefix("0::/")
                if os.access(group / "cgroup.subtree_control", os.W_OK):
                    return group
    return None
