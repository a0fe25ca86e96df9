"""Packets with descriptors over SOCK_SEQPACKET, socket pairs, and sealed memfds."""

import array
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterable
from typing import BinaryIO, Final

PACKET_MAX_BYTES: Final = 160 * 1024
FDS_MAX: Final = 48
"""Descriptors of one packet: a worker with everything that can be granted gets 41 (`worker_api.Setup`)."""


class GoneError(Exception):
    """The peer closed the connection, or sent data that is not a message."""


NO_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE})
"""Errors of a process, or a device, in which no more files may be open."""


def no_descriptors(where: str) -> str:
    """Return the sentence for a process that may open no more files."""
    return f"no more files may be open in {where}: stop other instances, or raise LimitNOFILE of fleet-host.service"


class DescriptorsLostError(GoneError):
    """A packet came without all of its descriptors, for which this process has no room; the connection goes on.

    `data` is the packet.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__("no more files may be open")
        self.data = data


_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
CONSTANT_SEALS: Final = _SIZE_SEALS | fcntl.F_SEAL_WRITE


def sealed_memfd(name: str, size: int) -> int:
    """Return a memfd of a fixed size, sealed so that no receiver can truncate it while others have it mapped.

    The content stays writable.
    """
    return _sealed(name, lambda fd: os.ftruncate(fd, size), _SIZE_SEALS)


def constant_memfd(name: str, fill: Callable[[int], None]) -> int:
    """Return a memfd with content written by `fill`, sealed against any change.

    Raises:
        OSError: there is no memory for it; and whatever `fill` raises.
    """
    return _sealed(name, fill, CONSTANT_SEALS)


def memory_file(name: str) -> BinaryIO:
    """Return an empty file in memory, for bytes that another process or library writes to a descriptor.

    Starting and updating must not depend on a disk for temporary files, which may be full or read-only.
    """
    return os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "w+b")


def _sealed(name: str, fill: Callable[[int], None], seals: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fill(fd)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return a socket pair for packets (SOCK_SEQPACKET)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def close_all(fds: Iterable[int]) -> None:
    """Close unwanted descriptors that came with a packet."""
    for fd in fds:
        os.close(fd)


def send_packet(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send a packet with descriptors, which stay open in this process. Raises `OSError`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive_packet(
    sock: socket.socket, *, max_bytes: int = PACKET_MAX_BYTES, max_fds: int = FDS_MAX
) -> tuple[bytes, tuple[int, ...]]:
    """Receive a packet and its descriptors, which the caller owns.

    Raises:
        GoneError: the connection is closed, or the packet exceeds `max_bytes`.
        DescriptorsLostError: this process may not open as many, or there are more than `max_fds`.
        BlockingIOError: no packet on a non-blocking socket.
    """
    space = socket.CMSG_SPACE(max_fds * array.array("i").itemsize)
    try:
        data, rights, flags, _ = sock.recvmsg(max_bytes, space, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise
    except OSError as error:
        raise GoneError(f"cannot reach the peer: {error.strerror}") from error
    fds = array.array("i")
    for level, kind, payload in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & socket.MSG_TRUNC or (not data and not fds):
        close_all(fds)
        raise GoneError("the peer closed the connection" if not data else "the packet is larger than allowed")
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise DescriptorsLostError(data)
    return data, tuple(fds)
