"""Lines of GPIO chips by the kernel's character devices, version 2 of their interface (linux/gpio.h, Linux 5.10).

The supervisor opens a chip, requests a line of it and keeps the line's descriptor, through which the kernel reaches
that line alone. Workers get a copy. Of its calls the sandbox lets a worker make `IOCTLS`, which read and set the level;
what the line is, input or output, only the supervisor changes.

Four calls of the kernel need no library: `gpiod` has another interface in each release of Debian, and hands out no
descriptor.
"""

import fcntl
import struct
from typing import Final

from fleet.protocol.hardware import GpioLine

_GET_LINE: Final = 0xC250B407
_SET_CONFIG: Final = 0xC110B40D
_GET_VALUES: Final = 0xC010B40E
_SET_VALUES: Final = 0xC010B40F

IOCTLS: Final = (_GET_VALUES, _SET_VALUES)

_ACTIVE_LOW, _INPUT, _OUTPUT = 1 << 1, 1 << 2, 1 << 3
_PULLS: Final = {"none": 0, "up": 1 << 8, "down": 1 << 9}
_OUTPUT_VALUES: Final = 2
_CONSUMER: Final = b"wasmfleet"

_VALUES: Final = struct.Struct("=QQ")  # bits, mask
_CONFIG: Final = struct.Struct("=QI20x IIQQ 216x")  # flags, attributes; the one attribute: id, padding, values, mask
_REQUEST: Final = struct.Struct(f"=I252x 32s {_CONFIG.size}s II20x i")  # offset, consumer, config, lines, events, fd


def _config(line: GpioLine, *, active: bool) -> bytes:
    flags = _PULLS[line.pull] | (_ACTIVE_LOW if line.active == "low" else 0)
    flags |= _OUTPUT if line.direction == "output" else _INPUT
    return _CONFIG.pack(flags, line.direction == "output", _OUTPUT_VALUES, 0, active, 1)


def request(chip_fd: int, line: GpioLine) -> int:
    """Request a line, an output at its safe level, and return its descriptor. Raises `OSError`."""
    packet = bytearray(_REQUEST.pack(line.line, _CONSUMER, _config(line, active=line.is_safe_active), 1, 0, -1))
    fcntl.ioctl(chip_fd, _GET_LINE, packet)
    return int(_REQUEST.unpack(packet)[-1])


def configure(fd: int, line: GpioLine, *, active: bool) -> None:
    """Make a requested line what it is to be from now on, an output at this level. Raises `OSError`."""
    fcntl.ioctl(fd, _SET_CONFIG, bytearray(_config(line, active=active)))


def is_active(fd: int) -> bool:
    """Read the level of a line. Raises `OSError`."""
    packet = bytearray(_VALUES.pack(0, 1))
    fcntl.ioctl(fd, _GET_VALUES, packet)
    return bool(_VALUES.unpack(packet)[0] & 1)


def set_active(fd: int, *, active: bool) -> None:
    """Set the level of an output. Raises `OSError`."""
    fcntl.ioctl(fd, _SET_VALUES, bytearray(_VALUES.pack(active, 1)))
