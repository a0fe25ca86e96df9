"""Socket for the agent: peers, dispatch, replies."""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from agent.host.ipc import host_api

_QUEUE_MAX: Final = 256


class AgentConnection:
    """One connection of the agent's (or of `fleet-agent restore`); `on_closed` is called once, however it ends."""

    def __init__(self, sock: socket.socket, on_closed: Callable[["AgentConnection"], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._on_closed = on_closed
        self._writer = host_api.Writer(sock, lambda _: self.close())

    def say(self, message: host_api.FromHost) -> None:
        """Send, or keep until there is room; a peer that never reads is dropped."""
        try:
            self._writer.send(host_api.encode(message))
        except host_api.IpcError:
            self.close()
        if len(self._writer) > _QUEUE_MAX:
            self.close()

    def close(self) -> None:
        """Hang up."""
        if self.sock.fileno() >= 0:
            self._writer.close()
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()
            self._on_closed(self)
