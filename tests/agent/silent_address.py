"""Address that answers nothing, as one behind a dead route or a firewall that drops packets."""

import contextlib
import socket
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def silent(host: str, port: int = 0) -> Iterator[int]:
    """Make a loopback address silent: the queue of connections of a listener there is full. Yield its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(family))
        server.bind((host, port))
        server.listen(0)
        for _ in range(64):
            queued = stack.enter_context(socket.socket(family))
            queued.settimeout(0.2)
            try:
                queued.connect(server.getsockname()[:2])
            except TimeoutError:
                break
        else:
            pytest.skip("this kernel's queues of connections are never full")
        yield server.getsockname()[1]
