"""enrolled.json; copied disks; first-boot token.

Who this board is: what enrolment left in `identity/`, read back.

First boot: a board that finds its token by itself, and one that finds out that its disk was copied.

The token lies where whoever wrote the disk could put it: a systemd credential, a file `wasmfleet.token` on the boot
partition, or `wasmfleet.token=` on the kernel's command line. It is good once, and erased after use all the same. A
copied disk carries the key of the board that it was copied from; two boards with one key are none, so the copy drops
everything of that identity and enrols itself.
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from fleet.protocol import wire
from fleet.protocol.files import atomic_write, damage

log = logging.getLogger("agent.identity.identity")


class IdentityError(Exception):
    """The board is not enrolled, or its identity is damaged; the message says what to do."""


_ENROL_ANEW: Final = "restore it from a copy, or enrol anew with 'fleet-agent enroll --force'"


def note_production(directory: Path) -> None:
    """Remember that the fleet is not one for development any more; raises `OSError`."""
    who = msgspec.structs.replace(load(directory), production=True)
    atomic_write(directory / "enrolled.json", msgspec.json.encode(who), mode=0o600)
    log.info("the fleet %s is in production now", who.fleet)


NAME: Final = "wasmfleet.token"
BOOT: Final = (Path("/boot/firmware"), Path("/boot/efi"), Path("/boot"))
COMMAND_LINE: Final = Path("/proc/cmdline")
TOKEN_MAX_BYTES: Final = 8192
NAME_CHARS: Final = 54  # a device id is a name and nine characters more, and a DNS label
SERIAL_CHARS: Final = 8
MACHINE_SOURCES: Final = {
    "serial": Path("/sys/firmware/devicetree/base/serial-number"),
    "dmi": Path("/sys/class/dmi/id/product_uuid"),
    "id": Path("/etc/machine-id"),
}
"""What tells one machine from another, the best first; not every user may read each."""


@dataclass(frozen=True, slots=True)
class Found:
    """A token and the file that it lies in; None where it cannot be erased (a credential)."""

    text: str
    file: Path | None
    where: str


def machine(sources: Mapping[str, Path] = MACHINE_SOURCES) -> str:
    """What tells this machine from others, as `source:value`; empty where nothing does."""
    for name in sources:
        value = _machine_value(sources[name])
        if value:
            return f"{name}:{value}"
    return ""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """`identity/enrolled.json`.

    Attributes:
        device, fleet, group: as the server gave them.
        devices_url: the HTTPS API for devices.
        mqtt: broker addresses in the order to try.
        production: whether the fleet is one, as signed root said at enrolment or since.
        floor: no earlier than this was it at enrolment.
        machine: serial or machine id of the board that enrolled, to notice a copied disk; empty where it has none.
    """

    device: str
    fleet: str
    group: str
    devices_url: str
    mqtt: tuple[str, ...]
    production: bool
    floor: datetime
    machine: str = ""


def load(directory: Path) -> Identity:
    """Read the identity.

    Raises:
        IdentityError: not enrolled, or damaged.
    """
    path = directory / "enrolled.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError as error:
        raise IdentityError(
            f"this board is not enrolled ({path} is not there): run 'fleet-agent enroll' with a token"
        ) from error
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from error
    except wire.JSON_ERRORS as error:
        raise IdentityError(f"{path} is damaged ({error}): {_ENROL_ANEW}") from error


_NEEDED: Final = {
    "ca.pem": "the fleet's server cannot be verified",
    "device.pem": "no server lets this device in",
    "root.json": "nothing that is signed can be verified",
    "sealing.key": "no secret can be opened",
}
"""Files of an identity without which components run on, and what is missing then."""


def damaged_files(directory: Path) -> list[str]:
    """Find files that a power cut left empty, full of zeros or cut off; return a sentence on each.

    Raises:
        IdentityError: the device's key is one of them, without which there is no device.
    """
    key = directory / "device.key"
    if key.exists() and (words := damage(key)):
        raise IdentityError(f"{key} is damaged ({words}): {_ENROL_ANEW}")
    paths = [path for name in _NEEDED if (path := directory / name).exists()]
    found = [(path, words) for path in paths if (words := damage(path))]
    return [f"{path} is damaged ({words}): {_NEEDED[path.name]}; {_ENROL_ANEW}" for path, words in found]


def name_of(host: str, machine: str) -> str:
    """What to call a board that nobody has named: every copy of an image has the same host name, so with its serial."""
    source, _, value = machine.partition(":")
    tail = "".join(char for char in value if char.isalnum())[-SERIAL_CHARS:].lower()
    return f"{host[: NAME_CHARS - 1 - SERIAL_CHARS]}-{tail}" if source == "serial" and tail else host


def _machine_value(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_bytes().strip(b"\0\n ").decode()
    return ""


def is_copied_disk(who: Identity, sources: Mapping[str, Path] = MACHINE_SOURCES) -> bool:
    """Whether this identity was made on another machine: its source can be read here, and says something else."""
    name, _, value = who.machine.partition(":")
    here = _machine_value(sources[name]) if name in sources else ""
    return bool(value and here and here != value)


def find_token(
    *,
    credentials: str | None = None,
    boot: tuple[Path, ...] = BOOT,
    command_line: Path = COMMAND_LINE,
) -> Found | None:
    """Look for a token: in systemd's credentials, on the boot partition, on the kernel's command line."""
    if credentials:
        text = _read(Path(credentials) / NAME)
        if text:
            return Found(text, None, "a systemd credential")
    for directory in boot:
        path = directory / NAME
        text = _read(path)
        if text:
            return Found(text, path, str(path))
    for word in _read(command_line).split():
        name, _, value = word.partition("=")
        if name == NAME and value:
            file = next((path for path in _command_line_files(boot) if word in _read(path).split()), None)
            return Found(value, file, "the kernel's command line")
    return None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError), path.open("rb") as file:
        return file.read(TOKEN_MAX_BYTES).decode().strip()
    return ""


def _command_line_files(boot: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(directory / "cmdline.txt" for directory in boot)


def erase(found: Found) -> bool:
    """Remove a used token from where it lay; false where that could not be done.

    The bytes are overwritten (boot partitions are FAT, without a journal or copies); of a kernel command line the one
    word is taken out, in a new file that takes the old one's place whole.
    """
    if found.file is None:
        return False
    try:
        with found.file.open("r+b") as file:
            if found.file.name != NAME:
                words = [word for word in file.read().decode().split() if word != f"{NAME}={found.text}"]
                _replace(found.file, " ".join(words) + "\n")
            file.seek(0)
            file.write(b"\0" * os.fstat(file.fileno()).st_size)
            file.flush()
            os.fsync(file.fileno())
        if found.file.name == NAME:
            found.file.unlink()
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
