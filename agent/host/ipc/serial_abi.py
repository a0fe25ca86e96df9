"""Serial ports: the kernel's calls on terminals (termios(3), linux/serial.h).

The supervisor opens a port and sets it up; a worker gets the descriptor, reads and writes, and may drop what came in.
Speed, parity and mode it cannot change.
"""

import errno
import fcntl
import os
import struct
from typing import Final

from fleet.protocol.hardware import SerialPort

_FLUSH: Final = 0x540B  # TCFLSH
_EXCLUSIVE: Final = 0x540C  # TIOCEXCL
_SHARED: Final = 0x540D  # TIOCNXCL
_SET_RS485: Final = 0x542F  # TIOCSRS485
_RS485: Final = struct.Struct("=III20x")  # flags, delays before and after sending
_RS485_ON: Final = 0b11  # enabled, RTS while sending
_INPUT: Final = 0  # TCIFLUSH

IOCTLS: Final = (_FLUSH,)


def open_port(node: str, port: SerialPort) -> int:
    """Open a port, set it up, and return its descriptor. Raises `OSError`."""
    fd = os.open(node, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        set_up(fd, port)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_up(fd: int, port: SerialPort) -> None:
    """Set up an open port: bytes as they are, speed and frame. Raises `OSError`."""
    import termios  # noqa: PLC0415 - for the supervisor of a device with serial ports alone

    frame = termios.CREAD | termios.CLOCAL | (termios.CS7 if port.data_bits == 7 else termios.CS8)  # noqa: PLR2004
    frame |= termios.CSTOPB if port.stop_bits == 2 else 0  # noqa: PLR2004
    frame |= {"none": 0, "even": termios.PARENB, "odd": termios.PARENB | termios.PARODD}[port.parity]
    check = 0 if port.parity == "none" else termios.INPCK
    speed = getattr(termios, f"B{port.baud}")
    try:
        control = termios.tcgetattr(fd)[6]
        control[termios.VMIN], control[termios.VTIME] = 1, 0
        termios.tcsetattr(fd, termios.TCSANOW, [check, 0, frame, 0, speed, speed, control])
        made = termios.tcgetattr(fd)
    except termios.error as error:
        raise OSError(*error.args) from error
    parts = termios.CSIZE | termios.CSTOPB | termios.PARENB | termios.PARODD
    if (made[2] & parts, made[4], made[5]) != (frame & parts, speed, speed):  # drivers ignore what they cannot do
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fcntl.ioctl(fd, _EXCLUSIVE)
    if port.rs485:
        fcntl.ioctl(fd, _SET_RS485, _RS485.pack(_RS485_ON, 0, 0))


def share(fd: int) -> None:
    """Let other programs open the port again, which they could not while any descriptor is open. Raises `OSError`."""
    fcntl.ioctl(fd, _SHARED)


def discard(fd: int) -> None:
    """Drop what came in and was not read. Raises `OSError`."""
    fcntl.ioctl(fd, _FLUSH, _INPUT)
