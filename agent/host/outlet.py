"""The supervisor's side of the egress: keeps one alive while a lane needs it, and says who each lane is.

The supervisor keeps the egress's end of every lane's socket too, so that an egress that dies is replaced and lanes
notice nothing but that a question stayed unanswered.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from agent.host import control, egress, ipc
from fleet.protocol.manifest import Grants

HANDLER: Final = "wasi:http/outgoing-handler"
_PAUSE_S: Final = 0.5


def wanted(grants: Grants) -> bool:
    """Whether an instance with these grants may send requests anywhere."""
    return grants.allows(HANDLER) and bool(grants.outbound or grants.instances)


class Outlet:
    """The egress's handle; there is a process behind it only while there are lanes."""

    def __init__(self, directory: Path) -> None:
        """`directory` holds the sockets of the board's instances."""
        self._directory = directory
        self._lanes: dict[int, tuple[socket.socket, egress.Admit]] = {}
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._pid = 0
        self._next = 0
        self._closing = False

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._sock is not None

    def admit(self, instance: str, grants: Grants) -> tuple[int, socket.socket]:
        """A lane more: what to call it here, and its end of the socket on which it asks."""
        ours, theirs = control.pair()
        self._next += 1
        admit = egress.Admit(instance=instance, outbound=grants.outbound, instances=grants.instances)
        self._lanes[self._next] = (ours, admit)
        if self._sock is None:
            self._fork()
        else:
            self._tell(ours, admit)
        return self._next, theirs

    def release(self, number: int) -> None:
        """A lane is gone; with the last of them the process."""
        found = self._lanes.pop(number, None)
        if found is not None:
            found[0].close()
        if not self._lanes and self._sock is not None:
            self._writer.close()
            self._sock.close()  # and it ends

    def _fork(self) -> None:
        self._pid, self._sock = egress.fork(self._directory)
        self._sock.setblocking(False)
        self._writer = ipc.Writer(self._sock, lambda _: None)  # its pidfd tells of its end
        self._pidfd = os.pidfd_open(self._pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
        for ours, admit in self._lanes.values():
            self._tell(ours, admit)

    def _tell(self, ours: socket.socket, admit: egress.Admit) -> None:
        # An egress that is gone is replaced, and told everything again.
        with contextlib.suppress(OSError):  # out of descriptors: this lane's questions stay unanswered
            self._writer.send(msgspec.json.encode(admit), ours.fileno())

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        _, status = os.waitpid(self._pid, 0)
        if self._sock is not None:
            self._writer.close()
            self._sock.close()
            self._sock = None
        if self._lanes and not self._closing:
            sys.stderr.write(f"host: the egress ended ({os.waitstatus_to_exitcode(status)}), starting another\n")
            loop.call_later(_PAUSE_S, self._again)

    def _again(self) -> None:
        if self._lanes and self._sock is None and not self._closing:
            self._fork()

    def close(self) -> None:
        """End it now."""
        self._closing = True
        for number in list(self._lanes):
            self.release(number)
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ended()
