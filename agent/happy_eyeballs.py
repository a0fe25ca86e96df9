"""Connections to the first address of a name that answers (RFC 8305), so that a dead address costs a moment only.

Every way out of a device connects here: enrolment, HTTPS, MQTT, and the requests of components. An attempt at the next
address begins when the last one failed, or did not answer within a quarter of a second. `connect` blocks, for worker
threads; `first_connected` is for a loop.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from typing import Final

ATTEMPT_DELAY_S: Final = 0.25
"""Time after which the next address is tried too (RFC 8305, section 5: "Connection Attempt Delay")."""


class NoAnswerError(OSError):
    """No address answered.

    Attributes:
        failures: (address, error) in the order tried; `TimeoutError` for those that did not answer in time.
    """

    def __init__(self, failures: Sequence[tuple[str, OSError]], *, host: str = "") -> None:
        """Describe `failures`; an address that is `host` itself is not named again."""
        reasons = [
            reason_of(error) if address == host else f"{address}: {reason_of(error)}" for address, error in failures
        ]
        numbers = {error.errno for _, error in failures}
        # with an errno, OSError would become one of its subclasses, which takes other arguments
        super().__init__("; ".join(reasons) or "there is no address to connect to")
        self.errno = numbers.pop() if len(numbers) == 1 else None
        self.strerror = str(self.args[0])
        self.failures = tuple(failures)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def timed_out(self) -> bool:
        """True if no address answered at all, rather than refusing."""
        return bool(self.failures) and all(isinstance(error, TimeoutError) for _, error in self.failures)


def reason_of(error: OSError) -> str:
    """Return why a connection failed, for people."""
    return os.strerror(error.errno) if error.errno else str(error)  # asyncio puts the address into strerror


def interleave(addresses: Sequence[str]) -> list[str]:
    """Return numeric addresses with families alternating, beginning with the first one's (RFC 8305, section 4)."""
    unique = list(dict.fromkeys(addresses))
    first = [address for address in unique if (":" in address) == (":" in unique[0])]
    other = [address for address in unique if (":" in address) != (":" in unique[0])]
    mixed = [address for pair in zip(first, other, strict=False) for address in pair]
    return mixed + first[len(other) :] + other[len(first) :]


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name from this device's resolver, its preferred first.

    Raises:
        socket.gaierror: its `strerror` is a sentence.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"cannot resolve {host} ({error.strerror})") from error
    except UnicodeError as error:  # a label that is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, f"{host[:100]!r} is not a host name") from error
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def connect(host: str, port: int, *, timeout_s: float) -> socket.socket:
    """Resolve a name and connect to its first address that answers; return a blocking socket. Blocks.

    Args:
        host: name, or address without brackets.
        port: TCP port.
        timeout_s: for all addresses together; also the timeout of the socket.

    Raises:
        socket.gaierror: the name cannot be resolved.
        NoAnswerError: no address answers.
    """
    addresses = resolve(host, port)
    try:
        sock = asyncio.run(first_connected(addresses, port, timeout_s=timeout_s))
    except NoAnswerError as error:
        raise NoAnswerError(error.failures, host=host) from None
    sock.settimeout(timeout_s)
    return sock


async def first_connected(
    addresses: Sequence[str], port: int, *, timeout_s: float, delay_s: float = ATTEMPT_DELAY_S
) -> socket.socket:
    """Connect to the first of numeric addresses that answers; return a socket that does not block.

    Args:
        addresses: preferred first; families are tried in turn.
        port: TCP port.
        timeout_s: for all addresses together.
        delay_s: after which the next address is tried too.

    Raises:
        NoAnswerError: none answers.
    """
    waiting = interleave(addresses)
    errors: dict[str, OSError] = {}
    tried: dict[asyncio.Task[socket.socket], str] = {}
    running: set[asyncio.Task[socket.socket]] = set()
    winner: asyncio.Task[socket.socket] | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while (waiting or running) and winner is None:
                if waiting:
                    address = waiting.pop(0)
                    task = asyncio.create_task(_connected(address, port))
                    tried[task] = address
                    running.add(task)
                done, running = await asyncio.wait(
                    running, timeout=delay_s if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    error = task.exception()
                    if error is None:
                        winner = winner or task
                    elif isinstance(error, OSError):
                        errors[tried[task]] = error
                    else:
                        raise error
    except TimeoutError:
        pass
    finally:
        for task in tried:
            if task is not winner:
                task.cancel()
                task.add_done_callback(_close)
    if winner is not None:
        return winner.result()
    silent = TimeoutError(f"no answer in {timeout_s:.3g} s")
    raise NoAnswerError([(address, errors.get(address, silent)) for address in [*tried.values(), *waiting]])


def _close(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that came too late."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _connected(address: str, port: int) -> socket.socket:
    """Connect a new socket. Raises `OSError`, also where the device has no such family or no descriptor left."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock
