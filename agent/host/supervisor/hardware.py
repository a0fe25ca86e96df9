"""Hardware that the host holds for its instances, and lends to their workers: lines of GPIO chips, serial ports.

Each piece is opened once, for the instance. A line stays as its component left it across swaps, rollbacks and crashes
of workers; it goes to its safe level when the instance is stopped or in quarantine, and when a new version does not
have it. A serial port stays open, so that its control lines do not move. Both are released once nothing can go back to
a version that had them.
"""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.host.ipc import gpio_abi, serial_abi
from fleet.protocol import hardware
from fleet.protocol.hardware import GpioLine, Hardware, Piece, SerialPort

DEVICES: Final = Path("/dev")


class HardwareError(Exception):
    """The device lacks, or refuses, hardware that an instance is granted; the message is for people."""


@dataclass(slots=True)
class _Held:
    """Piece that an instance has; `device`: number of a serial port's, which may have several names."""

    instance: str
    piece: Piece
    node: str
    device: int
    fd: int


class HeldHardware:
    """Hardware by its place on the device. Everything here belongs to the supervisor's event loop."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def take(self, instance: str, granted: Hardware, serial: Mapping[str, str]) -> tuple[int, ...]:
        """Return the descriptors of an instance's hardware, in the order of its pieces; they stay this object's.

        `serial`: device of each serial port, by its name.

        Raises:
            HardwareError: the device does not have a piece, or has it for somebody else.
        """
        if wrong := granted.flaw():
            raise HardwareError(wrong)
        return tuple(self._take(instance, piece, _node(piece, serial)) for piece in granted.pieces)

    def _take(self, instance: str, piece: Piece, node: str) -> int:
        held = self._held.get(piece.address)
        try:
            if held is not None and held.instance == instance and not _lasts(held, node):
                self._close(held)
                held = None
            if held is None:
                device = self._free_device(piece, node)
                held = self._held[piece.address] = _Held(instance, piece, node, device, _open(piece, node))
            elif held.instance != instance:
                raise HardwareError(f"{piece} is held by {held.instance}: stop that first, or grant something else")
            else:
                _hand_on(held, piece)
        except OSError as error:
            raise HardwareError(_why(piece, node, error)) from error
        return held.fd

    def _free_device(self, piece: Piece, node: str) -> int:
        """Return the number of a serial port's device. Raises `OSError`, or `HardwareError`: another name has it."""
        if isinstance(piece, GpioLine):
            return 0
        device = Path(node).stat().st_rdev  # 0 of a file that is no device
        other = next((held for held in self._held.values() if device and held.device == device), None)
        if other is not None:
            raise HardwareError(f"{piece}: {node} is held by {other.instance} as {other.piece.name}: stop that first")
        return device

    def put_back(self, instance: str, running: Hardware) -> None:
        """Make hardware again what the version that runs has it for, after one that did not start."""
        for piece in running.pieces:
            held = self._held.get(piece.address)
            if held is not None and held.instance == instance and held.piece != piece:
                try:
                    _hand_on(held, piece)
                except OSError as error:
                    sys.stderr.write(f"host: {instance}: cannot set {piece} up again: {error.strerror}\n")
                    sys.stderr.flush()

    def rest(self, instance: str, *kept: Hardware) -> None:
        """Set the outputs of an instance to their safe levels, but for those that are `kept`."""
        for held in self._others(instance, *kept):
            if isinstance(held.piece, GpioLine) and held.piece.direction == "output":
                try:
                    gpio_abi.set_active(held.fd, active=held.piece.is_safe_active)
                except OSError as error:
                    sys.stderr.write(f"host: {instance}: cannot set {held.piece} to its safe level: {error.strerror}\n")
                    sys.stderr.flush()

    def release(self, instance: str, *kept: Hardware) -> None:
        """Give up the hardware of an instance, outputs at their safe levels, but for what is `kept`."""
        self.rest(instance, *kept)
        for held in self._others(instance, *kept):
            self._close(held)

    def _close(self, held: _Held) -> None:
        del self._held[held.piece.address]
        if isinstance(held.piece, SerialPort):
            with contextlib.suppress(OSError):  # of a port that hung up
                serial_abi.share(held.fd)
        os.close(held.fd)

    def _others(self, instance: str, *kept: Hardware) -> list[_Held]:
        places = {piece.address for each in kept for piece in each.pieces}
        return [held for place, held in self._held.items() if held.instance == instance and place not in places]


def _node(piece: Piece, serial: Mapping[str, str]) -> str:
    """Return the node of a piece. Raises `HardwareError`: the agent gave none, or a file."""
    if isinstance(piece, GpioLine):
        return str(DEVICES / piece.chip)
    node = serial.get(piece.name, "")
    try:
        hardware.check_node(piece.name, node)
    except hardware.BadHardwareError as error:
        raise HardwareError(f"{piece}: policy.serial: {error}") from error
    return node


def _open(piece: Piece, node: str) -> int:
    if isinstance(piece, SerialPort):
        return serial_abi.open_port(node, piece)
    chip = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        return gpio_abi.request(chip, piece)
    finally:
        os.close(chip)


def _lasts(held: _Held, node: str) -> bool:
    """Tell whether a piece is still what it was: not a port that hung up, or that the owner has put elsewhere."""
    if isinstance(held.piece, GpioLine):
        return True
    poll = select.poll()
    poll.register(held.fd, 0)
    return held.node == node and not poll.poll(0)


def _hand_on(held: _Held, piece: Piece) -> None:
    """Make a piece what the next worker has it for: an output keeps its level, a port begins without what came in."""
    if isinstance(piece, SerialPort):
        serial_abi.set_up(held.fd, piece)
        serial_abi.discard(held.fd)
    elif isinstance(held.piece, GpioLine) and held.piece != piece:
        stays = held.piece.direction == piece.direction == "output"
        is_high = gpio_abi.is_active(held.fd) == (held.piece.active == "high") if stays else None
        active = piece.is_safe_active if is_high is None else is_high == (piece.active == "high")
        gpio_abi.configure(held.fd, piece, active=active)
    held.piece = piece


def _why(piece: Piece, node: str, error: OSError) -> str:
    """Say why a piece cannot be had, and what to do."""
    is_line = isinstance(piece, GpioLine)
    said = f"{piece}: {node}: {error.strerror}"
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            lists = (
                "grant a chip that it has ('gpiodetect')" if is_line else "plug it in, or name another in policy.serial"
            )
            said = f"{piece}: this device has no {node} now: {lists}"
        case errno.EPERM | errno.EACCES:
            opens = "'fleet-host check' prints the drop-in of fleet-host.service that lets it"
            said = f"{piece}: the host may not open {node}: {opens}"
        case errno.EBUSY:
            finds = "gpioinfo" if is_line else f"fuser {node}"
            said = f"{piece} is in use by another program or driver of this device: '{finds}' names it"
        case errno.EINVAL if is_line:
            said = f"{piece}: {node} has no such line, or none that can be this: 'gpioinfo' lists them"
        case errno.EINVAL:
            said = f"{piece}: the driver of {node} cannot do this: grant another speed or frame"
        case errno.ENOTTY if isinstance(piece, SerialPort) and piece.rs485 and _is_terminal(node):
            lacks = "leave rs485 out where the adapter switches by itself, or name a port that has it"
            said = f"{piece}: the driver of {node} has no RS-485: {lacks}"
        case errno.ENOTTY:
            said = f"{piece}: {node} is no serial port: name another in policy.serial"
    return said


def _is_terminal(node: str) -> bool:
    try:
        fd = os.open(node, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # closed again by its driver
        return True
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)
