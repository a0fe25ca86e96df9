"""The supervisor's side of the router: keeps one alive on the shared port, and tells it what there is.

The supervisor holds the listening socket too, so a router that dies takes no waiting client with it.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from agent.host import control, ipc, router
from fleet.protocol import wire

_ACK_S: Final = 5.0
_PAUSE_S: Final = 0.5
_DRAIN_S: Final = 6.0

_ack: Final[msgspec.json.Decoder[router.Ack]] = msgspec.json.Decoder(router.Ack)


class Front:
    """The router's handle."""

    def __init__(self, ingress: socket.socket, directory: Path) -> None:
        self._ingress = ingress
        self._directory = directory
        self._up: dict[str, tuple[bool, bool]] = {}
        self._ids = itertools.count(1)
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._closing = False
        self._fork()

    def _fork(self) -> None:
        self._pid, self._sock, self._page = router.fork(self._ingress, self._directory)
        self._pidfd = os.pidfd_open(self._pid)
        self._sock.setblocking(False)
        self._writer = ipc.Writer(self._sock, lambda _: None)  # its pidfd tells of its end
        self._gone = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock, self._readable)
        loop.add_reader(self._pidfd, self._ended)
        for instance, (up, spread) in self._up.items():
            self._tell(router.Set(instance, up, spread))

    def _tell(self, message: router.Set | router.Unset | router.Drain) -> None:
        self._writer.send(msgspec.json.encode(message))  # a router that is gone is replaced, and told everything again

    async def route(self, instance: str, *, up: bool | None, spread: bool) -> None:
        """Say whether an instance answers (None: it is gone), and wait until the router knows; `spread` as in `Set`."""
        if self._up.get(instance) == (None if up is None else (up, spread)):
            return
        number = next(self._ids)
        if up is None:
            del self._up[instance]
            self._tell(router.Unset(instance, number))
        else:
            self._up[instance] = up, spread
            self._tell(router.Set(instance, up, spread, number))
        if self._gone.done():
            return
        future = self._acks[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(future, _ACK_S)
        except TimeoutError:
            pass
        finally:
            self._acks.pop(number, None)

    def _readable(self) -> None:
        try:
            data, fds = control.receive_packet(self._sock)
        except BlockingIOError:
            return
        except control.GoneError:
            asyncio.get_running_loop().remove_reader(self._sock)
            return
        for fd in fds:
            os.close(fd)
        try:
            future = self._acks.get(_ack.decode(data).id)
        except wire.JSON_ERRORS:  # a router that somebody broke into
            return
        if future is not None and not future.done():
            future.set_result(None)

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        loop.remove_reader(self._sock)
        os.close(self._pidfd)
        self._writer.close()
        self._sock.close()
        lost = router.clients_of(self._page)
        self._page.close()
        _, status = os.waitpid(self._pid, 0)
        for future in self._acks.values():
            if not future.done():
                future.set_result(None)
        if not self._gone.done():
            self._gone.set_result(None)
        if not self._closing:
            why = f"{os.waitstatus_to_exitcode(status)}; client connections lost with it: {lost}"
            sys.stderr.write(f"host: the router ended ({why}), starting another\n")
            sys.stderr.flush()
            loop.call_later(_PAUSE_S, self._again)

    def _again(self) -> None:
        if not self._closing:
            self._fork()

    async def drain(self) -> None:
        """Accept no more on the shared port, answer what was asked, and end the router."""
        self._closing = True
        self._ingress.close()
        if self._gone.done():
            return
        self._tell(router.Drain())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._gone), _DRAIN_S)

    def close(self) -> None:
        """End the router now."""
        self._closing = True
        if not self._gone.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ended()
