"""Handle of the key-value store's process, which only runs while there are workers that may use it."""

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from agent import disk
from agent.disk import Write
from agent.host.ipc import framing
from agent.host.ipc.keyvalue_api import RegisterUser
from agent.host.keyvalue import run_keyvalue
from agent.host.sandbox import sandbox
from agent.host.supervisor.helpers import HelperProcess, fork_child
from fleet.component import wasi
from fleet.protocol.manifest import Grants

NAME: Final = "key-value store"
_END_S: Final = 5.0
"""For the last commit, when the host stops."""


def needs_keyvalue(grants: Grants) -> bool:
    """Return whether an instance with these grants may use the key-value store."""
    return any(grants.allows(name) for name in (wasi.KEYVALUE_STORE, wasi.KEYVALUE_ATOMICS, wasi.KEYVALUE_BATCH))


class KeyValueTicket(NamedTuple):
    """Admission of a worker: its number, for `release`, and its end of the socket for requests."""

    number: int
    worker_end: socket.socket


def _duplicates(fds: Iterable[int]) -> tuple[int, ...]:
    """Return a descriptor of one's own for each. Raises `OSError`: there is no room for all of them."""
    made: list[int] = []
    try:
        made.extend(map(os.dup, fds))
    except OSError:
        framing.close_all(made)
        raise
    return tuple(made)


class _Admitted(NamedTuple):
    sock: socket.socket
    quota_fds: tuple[int, ...]
    message: RegisterUser


class KeyValueHandle(HelperProcess):
    """Handle of the process. The supervisor keeps the sockets of the workers, for the next process."""

    def __init__(self, directory: Path) -> None:
        """Prepare a handle; `directory` has the databases."""
        super().__init__(NAME)
        self._directory = directory
        self._workers: dict[int, _Admitted] = {}
        self._numbers = itertools.count(1)
        self._known: set[int] = set()  # workers that a process has had
        self._is_leaving = False  # the process was told to end

    def _spawn(self) -> tuple[int, socket.socket]:
        self._is_leaving = False
        disk.make_directory(Write.KEYVALUE, self._directory, mode=0o700)
        if (uid := sandbox.keyvalue_user()) is not None:
            os.chown(self._directory, uid, uid, follow_symlinks=False)
        return fork_child(NAME, lambda theirs: run_keyvalue(theirs, self._directory))

    def _tell_everything(self) -> None:
        for number in self._workers:
            self._admit(number)

    def _is_needed(self) -> bool:
        return bool(self._workers)

    def admit(self, about: RegisterUser, *quota_fds: int) -> KeyValueTicket:
        """Admit a worker; `quota_fds`: the quota pages of its instance. Raises `OSError`: there is no room for it."""
        ours, theirs = framing.socket_pair()
        number = next(self._numbers)
        try:
            self._workers[number] = _Admitted(ours, _duplicates(quota_fds), about)
            if self._sock is not None:
                self._admit(number)
            elif not self.running:
                self._start()
            # Otherwise the last process is ending, and its end starts the next.
        except OSError:
            for end in (ours, theirs):
                end.close()
            self.release(number)
            raise
        return KeyValueTicket(number, theirs)

    def _start(self) -> None:
        try:
            self._fork()
        except OSError as error:  # a full disk, for now: its users are told, each time
            sys.stderr.write(f"host: cannot start the {NAME}: {error}\n")
            sys.stderr.flush()
            asyncio.get_running_loop().call_later(self._next_pause(asyncio.get_running_loop().time()), self._again)

    def _admit(self, number: int) -> None:
        worker = self._workers[number]
        message = msgspec.structs.replace(worker.message, again=number in self._known)
        self._known.add(number)
        self._tell(message, worker.sock.fileno(), *worker.quota_fds)

    def release(self, number: int) -> None:
        """Remove a worker that has ended; with the last worker, the process ends."""
        worker = self._workers.pop(number, None)
        self._known.discard(number)
        if worker is not None:
            worker.sock.close()
            framing.close_all(worker.quota_fds)
        if not self._workers:
            self._is_leaving = True
            self._hang_up()

    def _next_pause(self, now_s: float) -> float:
        """Make no pause for workers that came while the process was ending as it was told."""
        return 0.0 if self._is_leaving else super()._next_pause(now_s)

    async def close(self) -> None:
        """Let the process commit what was written, and end it."""
        self._closing = True
        for number in list(self._workers):
            self.release(number)
        if self.running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await asyncio.shield(self._gone)
        self._kill()
