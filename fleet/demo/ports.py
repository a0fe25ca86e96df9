"""Loopback ports for servers that are started soon."""

import contextlib
import random
import socket
from pathlib import Path
from typing import Final

_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST: Final = 10_000
_TRIES: Final = 1000


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody has now, and that no connection is given by chance before somebody listens there.

    The kernel takes the near ends of connections from a range of its own (`ip_local_port_range`): these lie below it.

    Raises:
        OSError: there are none.
    """
    below = int(_RANGE.read_text(encoding="ascii").split()[0])
    # where the kernel's range leaves no room, it chooses
    ports = random.SystemRandom().sample(range(_LOWEST, below), k=_TRIES) if below > 2 * _LOWEST else [0] * count
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in ports:
            if len(found) == count:
                break
            sock = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(int(sock.getsockname()[1]))
    if len(found) < count:
        raise OSError("no free port on the loopback")
    return found
