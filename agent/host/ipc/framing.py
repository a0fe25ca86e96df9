"""SEQPACKET packets with descriptors; socket pairs."""

import array
import os
import socket
from typing import Final

PACKET_MAX_BYTES: Final = 160 * 1024

FDS_MAX: Final = 36


class GoneError(Exception):
    """The other side closed, or sent what is no message."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A socket pair of the type this protocol speaks."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def send_packet(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send one packet and descriptors, which stay open here; OSError as the socket has it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """One packet and its descriptors, which the caller owns.

    Raises:
        GoneError: closed, or cut short.
        BlockingIOError: nothing there on a non-blocking socket.
    """
    space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
    try:
        data, rights, flags, _ = sock.recvmsg(PACKET_MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise
    except OSError as error:
        raise GoneError(str(error)) from error
    fds = array.array("i")
    for level, kind, payload in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or (not data and not fds):
        for fd in fds:
            os.close(fd)
        raise GoneError("the other side closed the connection" if not data else "a packet larger than is allowed")
    return data, tuple(fds)
