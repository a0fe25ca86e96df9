"""Who this board is: what enrolment left in `identity/`, read back."""

import logging
from datetime import datetime
from pathlib import Path

import msgspec

from agent.images import write_once
from fleet.protocol import wire

log = logging.getLogger("agent.identity")


class IdentityError(Exception):
    """The board is not enrolled, or its identity is damaged; the message says what to do."""


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


def note_production(directory: Path) -> None:
    """Remember that the fleet is not one for development any more; raises `OSError`."""
    who = msgspec.structs.replace(load(directory), production=True)
    write_once(directory / "enrolled.json", msgspec.json.encode(who), mode=0o600)
    log.info("the fleet %s is in production now", who.fleet)


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
        raise IdentityError(f"{path} is damaged ({error}): enrol anew with 'fleet-agent enroll --force'") from error
