"""Identity of the device (`identity/enrolled.json`), detection of copied disks, and the token for the first boot.

At its first boot, a device enrols with a token that was put on its disk: in a systemd credential, in a file
`wasmfleet.token` on the boot partition, or as `wasmfleet.token=` on the kernel's command line. A token works only once,
and is still erased after use. A copied disk holds the key of the device that it was copied from. As two devices must
not share a key, the copy discards that identity and enrols by itself.

A copy is proved by an id of the hardware that differs: a serial number or a DMI id. /etc/machine-id proves nothing: it
may be on a tmpfs, `uninitialized` at the first boot, or new in each container. Where it differs, the device keeps its
identity and asks.
"""

import contextlib
import logging
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

import msgspec

from agent import disk
from agent.disk import Write
from fleet.protocol import files, wire
from fleet.protocol.files import damage, irregular

log = logging.getLogger("agent.identity.identity")


class IdentityError(Exception):
    """The device is not enrolled, or its identity is damaged; the message says what to do."""


_ENROL_AGAIN: Final = "restore it from a copy, or enrol again with 'fleet-agent enroll --force'"


def note_production(directory: Path) -> None:
    """Record that the fleet has moved from development to production; raises `OSError`."""
    who = msgspec.structs.replace(load(directory), production=True)
    path = directory / "enrolled.json"
    disk.write(Write.PRODUCTION, path, wire.keeping(files.read(path), who), mode=0o600)
    log.info("the fleet %s is now in production", who.fleet)


NAME: Final = "wasmfleet.token"
BOOT: Final = (Path("/boot/firmware"), Path("/boot/efi"), Path("/boot"))
COMMAND_LINE: Final = Path("/proc/cmdline")
TOKEN_MAX_BYTES: Final = 8192
NAME_CHARS: Final = 54  # a device id is a name and nine more characters, and must fit a DNS label (63)
SERIAL_CHARS: Final = 8
MACHINE_SOURCES: Final = {
    "serial": Path("/sys/firmware/devicetree/base/serial-number"),
    "soc": Path("/sys/devices/soc0/serial_number"),
    "dmi": Path("/sys/class/dmi/id/product_uuid"),
    "product": Path("/sys/class/dmi/id/product_serial"),
    "board": Path("/sys/class/dmi/id/board_serial"),
    "id": Path("/etc/machine-id"),
}
"""Files with an id of the machine, best first; some users may not read all of them."""

_WEAK: Final = frozenset({"id"})
"""Sources that differ on one machine from boot to boot, or from container to container."""

_MEANINGLESS: Final = frozenset(
    {
        *("none", "n/a", "unknown", "uninitialized", "not specified", "not applicable", "default string", "123456789"),
        *("to be filled by o.e.m.", "system serial number", "chassis serial number", "0123456789", "invalid"),
        "03000200-0400-0500-0006-000700080009",  # product_uuid of many boards whose maker left the default
    }
)
"""Values, in lower case, that machines share whose maker has set none; and those of only one digit or letter."""


Origin = Literal["same", "doubtful", "copied"]
"""Relation of an identity to the machine on which it is found.

Doubtful where only /etc/machine-id differs, or where ids of the hardware contradict each other.
"""


@dataclass(frozen=True, slots=True)
class Found:
    """Token and its source.

    Attributes:
        text: the token.
        file: the file that contains the token; None if it cannot be erased (a credential).
        where: the source, for messages.
    """

    text: str
    file: Path | None
    where: str


def machine(sources: Mapping[str, Path] = MACHINE_SOURCES) -> str:
    """Return an id of this machine as `source:value`, to detect a copied disk; empty if it has none."""
    return next((f"{name}:{value}" for name, value in evidence(sources).items()), "")


def evidence(sources: Mapping[str, Path] = MACHINE_SOURCES) -> dict[str, str]:
    """Return every id of this machine that means anything, by source, best first."""
    found = {name: _machine_value(path) for name, path in sources.items()}
    return {name: value for name, value in found.items() if value}


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of an enrolled device, stored in `identity/enrolled.json`.

    Attributes:
        device, fleet, group: as assigned by the server.
        devices_url: URL of the HTTPS API for devices.
        mqtt: broker addresses in the order to try.
        production: whether the fleet is for production, according to the newest signed root seen.
        floor: time floor at enrolment.
        machine: `source:value` of the machine that enrolled, to detect a copied disk; empty if it has none.
        evidence: every id of the machine that enrolled, by source; empty in identities from before 0.3.
    """

    device: str
    fleet: str
    group: str
    devices_url: str
    mqtt: tuple[str, ...]
    production: bool
    floor: datetime
    machine: str = ""
    evidence: dict[str, str] = {}


def load(directory: Path) -> Identity:
    """Read the identity.

    Raises:
        IdentityError: the device is not enrolled, or the file is damaged.
    """
    path = directory / "enrolled.json"
    try:
        return msgspec.json.decode(files.read(path), type=Identity)
    except FileNotFoundError as error:
        raise IdentityError(
            f"this device is not enrolled ({path} does not exist): run 'fleet-agent enroll' with a token"
        ) from error
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from error
    except wire.JSON_ERRORS as error:
        raise IdentityError(f"{path} is damaged ({error}): {_ENROL_AGAIN}") from error


_NEEDED: Final = {
    "ca.pem": "the fleet's server cannot be verified",
    "device.pem": "no server accepts this device",
    "root.json": "signed metadata cannot be verified",
    "sealing.key": "no secret can be opened",
}
"""Files of an identity that running components do not need, and what fails without each."""


def damaged_files(directory: Path) -> list[str]:
    """Find files that a power cut left empty, full of zeros or truncated; return a sentence on each.

    Raises:
        IdentityError: the device key is damaged, without which the device must enrol again.
    """
    key = directory / "device.key"
    if fault := _damage(key):
        raise IdentityError(f"{key} is damaged ({fault}): {_ENROL_AGAIN}")
    found = [(path, fault) for name in _NEEDED if (fault := _damage(path := directory / name))]
    return [f"{path} is damaged ({fault}): {_NEEDED[path.name]}; {_ENROL_AGAIN}" for path, fault in found]


def _damage(path: Path) -> str:
    """Return how a file is damaged, or what has its name; empty for a whole file, and for none."""
    try:
        return damage(path)
    except FileNotFoundError:
        return irregular(path)
    except OSError as error:
        return error.strerror or "unreadable"


def name_of(host: str, machine: str) -> str:
    """Return a default device name: the host name, with the serial, as all copies of an image share a host name."""
    source, _, value = machine.partition(":")
    tail = "".join(char for char in value if char.isalnum())[-SERIAL_CHARS:].lower()
    return f"{host[: NAME_CHARS - 1 - SERIAL_CHARS]}-{tail}" if source == "serial" and tail else host


def _machine_value(path: Path) -> str:
    """Read an id; empty if it cannot be read, means nothing, or does not outlive a boot (on a tmpfs)."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        value = files.read(path).strip(b"\0\n ").decode()
        meant = value.lower() not in _MEANINGLESS and len(set(value) - set("-. ")) > 1
        return value if meant and not _is_transient(path) else ""
    return ""


def _is_transient(path: Path) -> bool:
    """Return whether a file lies in memory, as /etc/machine-id does that systemd made up at this boot."""
    with contextlib.suppress(OSError, IndexError):
        place = path.stat().st_dev
        here = f"{os.major(place)}:{os.minor(place)}"
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
        return any(each[2] == here and each[each.index("-") + 1] in {"tmpfs", "ramfs"} for each in mounts)
    return False


def origin(who: Identity, sources: Mapping[str, Path] = MACHINE_SOURCES) -> Origin:
    """Compare the ids of the machine that enrolled with those here, where both are known."""
    name, _, value = who.machine.partition(":")
    before = who.evidence or ({name: value} if value else {})
    here = evidence(sources)
    alike = {name: before[name] == here[name] for name in before if name in here}
    strong = [same for name, same in alike.items() if name not in _WEAK]
    if strong:
        return "same" if all(strong) else "doubtful" if any(strong) else "copied"
    return "same" if all(alike.values()) else "doubtful"


def is_copied_disk(who: Identity, sources: Mapping[str, Path] = MACHINE_SOURCES) -> bool:
    """Return whether an identity was certainly made on another machine: by every id of the hardware that is known."""
    return origin(who, sources) == "copied"


def doubt(who: Identity, sources: Mapping[str, Path] = MACHINE_SOURCES) -> str:
    """Return a question to the device's owner where it is not certain that this machine enrolled; empty for none."""
    if origin(who, sources) != "doubtful":
        return ""
    return (
        f"this may be another machine than the one that enrolled as {who.device}, and goes on as that device: run "
        "'fleet-agent enroll --same-device' if it is the same, or 'fleet-agent enroll --force' with a new token if "
        "this disk was copied"
    )


def note_machine(directory: Path, found: Mapping[str, str]) -> None:
    """Record the ids of the machine that has this identity; raises `OSError` and `IdentityError`."""
    machine = next((f"{name}:{value}" for name, value in found.items()), "")
    who = msgspec.structs.replace(load(directory), machine=machine, evidence=dict(found))
    path = directory / "enrolled.json"
    disk.write(Write.MACHINE, path, wire.keeping(files.read(path), who), mode=0o600)


def find_token(
    *,
    credentials: str | None = None,
    boot: tuple[Path, ...] = BOOT,
    command_line: Path = COMMAND_LINE,
) -> Found | None:
    """Find a token: in systemd's credentials, on the boot partition, or on the kernel's command line.

    Args:
        credentials: systemd's `$CREDENTIALS_DIRECTORY`; None for none.
        boot: mount points of the boot partition to look in.
        command_line: file with the kernel's command line.
    """
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
    with contextlib.suppress(OSError, UnicodeDecodeError), files.open_to_read(path) as file:
        return file.read(TOKEN_MAX_BYTES).decode().strip(f"\0{string.whitespace}")  # zeros: erased, up to a power cut
    return ""


def _command_line_files(boot: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(directory / "cmdline.txt" for directory in boot)


def erase(found: Found) -> bool:
    """Erase a used token from its source; return whether that succeeded.

    The bytes are overwritten (boot partitions are FAT, without a journal or copies). A kernel command line is replaced
    atomically by one without the token.
    """
    if found.file is None:
        return False
    try:
        if found.file.name == NAME:
            disk.erase(Write.BOOT_TOKEN, found.file)
        else:
            words = [word for word in files.read_text(found.file).split() if word != f"{NAME}={found.text}"]
            disk.write_over(Write.BOOT_COMMAND, found.file, " ".join(words) + "\n")
    except (OSError, UnicodeDecodeError):
        return False
    return True
