"""Hardware that a component is granted: lines of GPIO chips, serial ports.

A manifest names each piece (`Hardware` in its grants), and the device owner's policy (`policy.gpio`, `policy.serial`)
which of them components may have at all: none by default.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from fleet.protocol.bounds import Count

Level = Literal["low", "high"]
Direction = Literal["input", "output"]
Pull = Literal["none", "up", "down"]
Parity = Literal["none", "even", "odd"]

EACH_MAX: Final = 16
"""Most pieces of one kind of hardware in one manifest."""

LINE_MAX: Final = 1023
NODE_MAX_CHARS: Final = 128

BAUDS: Final = (300, 600, 1200, 2400, 4800, 9600, 19200, 38400, 57600, 115200, 230400, 460800, 921600)
"""Speeds of serial ports."""

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_CHIP: Final = re.compile(r"gpiochip(0|[1-9][0-9]{0,3})")
_NODE: Final = re.compile(r"/dev/[A-Za-z0-9][A-Za-z0-9_:.,+@-]*(/[A-Za-z0-9][A-Za-z0-9_:.,+@-]*){0,3}")
_LINES: Final = re.compile(r"(gpiochip[0-9]{1,4}):([0-9]{1,4})(?:-([0-9]{1,4}))?")


class BadHardwareError(ValueError):
    """Not a piece of hardware; the message says what is expected."""


class GpioLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Line of a GPIO chip.

    Attributes:
        name: label by which the component gets it.
        chip: character device of its chip, such as `gpiochip0`.
        line: offset on the chip.
        active: level that the component calls active.
        pull: resistor of an input.
        safe: level of an output until the component sets another, and once it is stopped or in quarantine; None for the
            level that is not active.
    """

    name: str
    chip: str
    line: Count
    direction: Direction = "input"
    active: Level = "high"
    pull: Pull = "none"
    safe: Level | None = None

    def flaw(self) -> str:
        """Say in which field it is no line; empty where it is one."""
        if _CHIP.fullmatch(self.chip) is None:
            return f"chip: {self.chip[:40]!r} is no GPIO chip: write one such as gpiochip0"
        if not 0 <= self.line <= LINE_MAX:
            return f"line: {self.line} is not between 0 and {LINE_MAX}"
        if self.direction == "input" and self.safe is not None:
            return "safe: an input has no level of its own: leave it out, or make it an output"
        if self.direction == "output" and self.pull != "none":
            return "pull: an output has no pull resistor: leave it out, or make it an input"
        return ""

    @property
    def address(self) -> str:
        """Place on the device, as policies name it: `gpiochip0:17`."""
        return f"{self.chip}:{self.line}"

    @property
    def is_safe_active(self) -> bool:
        """True where the safe level is the active one."""
        return self.safe == self.active

    def __str__(self) -> str:
        """Name it for people."""
        return f"GPIO line {self.address} as {self.direction}"


class SerialPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Serial port, as the device's owner names it.

    Attributes:
        name: in the owner's policy, which has its device; the component opens it by the same name.
        rs485: the driver switches between sending and receiving on two wires.
    """

    name: str
    baud: Count
    data_bits: Count = 8
    parity: Parity = "none"
    stop_bits: Count = 1
    rs485: bool = False

    def flaw(self) -> str:
        """Say in which field it is no port; empty where it is one."""
        for field, value, allowed in (
            ("baud", self.baud, BAUDS),
            ("data_bits", self.data_bits, (7, 8)),
            ("stop_bits", self.stop_bits, (1, 2)),
        ):
            if value not in allowed:
                return f"{field}: {value} is none of {', '.join(map(str, allowed))}"
        return ""

    @property
    def address(self) -> str:
        """Place on the device, as policies name it."""
        return self.name

    def __str__(self) -> str:
        """Name it for people."""
        frame = f"{self.data_bits}{self.parity[0].upper()}{self.stop_bits}"
        return f"serial port {self.name} at {self.baud} {frame}{', RS-485' if self.rs485 else ''}"


Piece = GpioLine | SerialPort


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Hardware of one component. Fields that are empty are left out, since earlier hosts and agents refuse them.

    Attributes:
        gpio: lines of GPIO chips.
        serial: serial ports.
    """

    gpio: tuple[GpioLine, ...] = ()
    serial: tuple[SerialPort, ...] = ()

    def flaw(self) -> str:
        """Say which piece is none, or is there twice, or which kind has too many; empty where all is well."""
        return _flaw_of("gpio", self.gpio) or _flaw_of("serial", self.serial)

    def beyond(self, allowed: "Hardware") -> tuple[str, ...]:
        """Name what `allowed` does not have in the same way."""
        return tuple(str(each) for each in self.pieces if each not in allowed.pieces)

    def within(self, allowed: "Hardware") -> "Hardware":
        """Return what `allowed` has, too."""
        return Hardware(
            gpio=tuple(each for each in self.gpio if each in allowed.gpio),
            serial=tuple(each for each in self.serial if each in allowed.serial),
        )

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Everything, in the order in which workers get descriptors."""
        return (*self.gpio, *self.serial)


def _flaw_of(kind: str, pieces: Sequence[Piece]) -> str:
    if len(pieces) > EACH_MAX:
        return f"{kind}: {len(pieces)} entries, at most {EACH_MAX} are allowed"
    for at, piece in enumerate(pieces, 1):
        if wrong := name_flaw(piece.name) or piece.flaw():
            return f"{kind}[{at}].{wrong}"
    for what, values in (("name", [each.name for each in pieces]), ("place", [each.address for each in pieces])):
        if twice := next((each for each in values if values.count(each) > 1), ""):
            return f"{kind}: two entries have the {what} {twice!r}"
    return ""


def name_flaw(text: str) -> str:
    """Say why this is no name of a piece of hardware; empty where it is one."""
    if _NAME.fullmatch(text) is not None:
        return ""
    return f"name: {text[:40]!r} is no name: 1 to 32 lower-case letters, digits and hyphens, such as relay"


NONE: Final = Hardware()


class PolicyLines(NamedTuple):
    """Lines of one chip, as a policy names them."""

    chip: str
    first: int
    last: int


def parse_lines(text: str) -> PolicyLines:
    """Parse `gpiochip0:17` or `gpiochip0:17-27`. Raises `BadHardwareError`."""
    found = _LINES.fullmatch(text)
    chip, first, last = ("", 1, 0) if found is None else (found[1], int(found[2]), int(found[3] or found[2]))
    if _CHIP.fullmatch(chip) is None or not first <= last <= LINE_MAX:
        raise BadHardwareError(f"{text[:40]!r} is no GPIO line: write gpiochip0:17, or gpiochip0:22-27 for several")
    return PolicyLines(chip, first, last)


def denied_lines(lines: Iterable[GpioLine], allowed: Iterable[str]) -> tuple[str, ...]:
    """Name the lines that a policy does not allow, and what its owner would add."""
    ranges = [parse_lines(each) for each in allowed]
    return tuple(
        f'{each} (policy.gpio in agent.toml would have "{each.address}")'
        for each in lines
        if not any(r.chip == each.chip and r.first <= each.line <= r.last for r in ranges)
    )


def check_node(name: str, node: str) -> None:
    """Check an entry of `policy.serial`. Raises `BadHardwareError`."""
    if wrong := name_flaw(name):
        raise BadHardwareError(wrong)
    if len(node) > NODE_MAX_CHARS or _NODE.fullmatch(node) is None:
        raise BadHardwareError(f"{name}: {node[:40]!r} is no device: write one such as /dev/ttyUSB0")


def denied_ports(ports: Iterable[SerialPort], allowed: Mapping[str, str]) -> tuple[str, ...]:
    """Name the serial ports that a policy does not have, and what its owner would add."""
    return tuple(
        f'{each} (policy.serial in agent.toml would have {each.name} = "/dev/...")'
        for each in ports
        if each.name not in allowed
    )
