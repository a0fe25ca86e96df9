"""The sockets on which instances are called: a Unix socket behind the router, or a port of the instance's own.

The supervisor owns each for the instance's life and lends it to lanes, so that a swap or a crash closes nothing and
loses no client that waits to be accepted.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
