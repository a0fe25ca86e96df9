"""Director documents: sign and verify assignments, freshness statements and commands.

The director chooses among what publishers have signed; it cannot make code. Its key is a delegation in the TUF targets
role. `signing.verifier` holds these documents against the rest of the repository.

Verification is pure: envelope, state and time go in, the document and the new state come out. The order of the checks
is fixed: size, signature, addressee, version, expiry. Replays are found by `VerifierState`, scoped to the director's
current keys: rotating them ends what was done to the version numbers with stolen ones.
"""

import contextlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, TypeVar

import msgspec
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Targets

from fleet.protocol import bounds, names, wire
from fleet.protocol.assignment import (
    ASSIGNMENT_TYPE,
    COMMAND_TYPE,
    COMMANDS,
    FRESH_TYPE,
    Assignment,
    Command,
    Fresh,
    LaterCommand,
    payload,
)
from fleet.protocol.codes import RejectCode
from signing import dsse, metadata
from signing.errors import Rejected, SigningError
from signing.state import VERSION_MAX, Remembered, VerifierState


def sign_assignment(assignment: Assignment, signer: Signer) -> bytes:
    """Sign an assignment and return its envelope.

    The device recognizes an equal version by the payload's sha256 (`dsse.parse(...).sha256`), which a freshness
    statement names too; signing the same assignment again, with a rotated key for example, keeps it.

    Raises:
        SigningError: no device would accept it: too large, too many items, an instance listed twice or with a bad name,
            empty without `stop_all`, or expired when issued.
    """
    check_items(assignment)
    if not assignment.items and not assignment.stop_all:
        raise SigningError("an empty list of instances would stop everything: set stop_all if that is meant")
    try:
        names.check_device(assignment.device)
    except names.BadNameError as error:
        raise SigningError(str(error)) from error
    return _sign(ASSIGNMENT_TYPE, assignment, payload(assignment), signer)


def sign_fresh(fresh: Fresh, signer: Signer) -> bytes:
    """Sign a freshness statement.

    Raises:
        SigningError: too large, or expired when issued.
    """
    return _sign(FRESH_TYPE, fresh, wire.encode(fresh), signer)


def sign_command(command: Command, signer: Signer) -> bytes:
    """Sign a command.

    Raises:
        SigningError: too large, or expired when issued.
    """
    return _sign(COMMAND_TYPE, command, wire.encode(command), signer)


def _sign(payload_type: str, message: Assignment | Fresh | Command, encoded: bytes, signer: Signer) -> bytes:
    if message.issued.tzinfo is None or message.expires.tzinfo is None:
        raise SigningError("issue and expiry times need a time zone (UTC)")
    if message.expires <= message.issued:
        raise SigningError("the document would expire before it is issued")
    envelope = dsse.sign(payload_type, encoded, [signer])
    if len(envelope) > message.MAX_BYTES:
        raise SigningError(
            f"{len(envelope)} bytes are too many for a device, at most {message.MAX_BYTES} fit in a message"
        )
    return envelope


def payload_sha256(envelope: bytes) -> str:
    """Return the sha256 that a freshness statement for this envelope names, and that devices report."""
    return dsse.parse(envelope).sha256


COMMAND_LIFE_MAX: Final = timedelta(minutes=15)
PORT_MAX: Final = 65535
M = TypeVar("M", Assignment, Fresh, Command, LaterCommand)


@dataclass(frozen=True, slots=True, kw_only=True)
class Director:
    """Delegation whose keys sign assignments, freshness statements and commands.

    Attributes:
        targets: the verified top-level targets, which delegate to the director.
        role: the delegation's name.
        keys: digest of the director's key set.
    """

    targets: Targets
    role: str
    keys: str


def assignment(
    director: Director, data: bytes, *, fleet: str, device: str, state: VerifierState, now: datetime, clamp: datetime
) -> tuple[Assignment, str, VerifierState]:
    """Verify an assignment; return it with its payload's sha256 and the state to store.

    Raises:
        Rejected: see `verifier.accept_assignment`.
    """
    message, envelope = _open(director, data, ASSIGNMENT_TYPE, Assignment)
    _check_addressee(message, fleet, device)
    _check_version("the assignment", message.version)
    known = _scoped(state.assignment, director)
    if known is not None and message.version < known.version:
        raise Rejected(RejectCode.ROLLBACK, f"assignment {message.version} is older than {known.version}")
    if known is not None and message.version == known.version and envelope.sha256 != known.sha256:
        raise Rejected(RejectCode.EQUIVOCATION, f"assignment {message.version} was seen with other bytes before")
    _check_times(message, now, "the assignment")
    if not message.items and not message.stop_all:
        raise Rejected(RejectCode.EMPTY, "the assignment has no instances, and does not set stop_all")
    check_items(message)
    remembered = Remembered(message.version, envelope.sha256, director.keys)
    state = msgspec.structs.replace(state, assignment=remembered)
    return message, envelope.sha256, state.with_floor(min(message.issued, message.expires, clamp))


def own_assignment(data: bytes, key: Key, *, fleet: str, device: str) -> Assignment:
    """Return an assignment that a director's own key signed for a device, however old it is.

    Raises:
        Rejected: UNSIGNED: another key signed it; WRONG_FLEET, WRONG_DEVICE; MALFORMED, TOO_LARGE.
    """
    envelope = dsse.parse(data, max_bytes=Assignment.MAX_BYTES)
    signature = envelope.signatures.get(key.keyid)
    if envelope.payload_type != ASSIGNMENT_TYPE or signature is None:
        raise Rejected(RejectCode.UNSIGNED, "this director's key did not sign it")
    try:
        key.verify_signature(signature, envelope.pae)
    except UnverifiedSignatureError as error:
        raise Rejected(RejectCode.UNSIGNED, "this director's key did not sign it") from error
    try:
        message = wire.decode(Assignment, envelope.payload)
    except wire.WireError as error:
        raise Rejected(RejectCode.MALFORMED, str(error)) from error
    _check_addressee(message, fleet, device)
    _check_version("the assignment", message.version)
    check_items(message)
    return message


def check_items(message: Assignment) -> None:
    """Refuse a list that no device can carry out: instance names become directories, routes and ports.

    Raises:
        Rejected: TOO_LARGE: too many instances; MALFORMED: a bad or repeated name, a bad port or attempt number.
    """
    if len(message.items) > bounds.ITEMS_MAX:
        raise Rejected(RejectCode.TOO_LARGE, f"{len(message.items)} instances, at most {bounds.ITEMS_MAX} are accepted")
    try:
        for instance in (*(item.instance for item in message.items), *message.keep_data):
            names.check_label(instance, "instance")
    except names.BadNameError as error:
        raise Rejected(RejectCode.MALFORMED, str(error)) from error
    seen: set[str] = set()
    for item in message.items:
        if item.instance in seen:
            raise Rejected(RejectCode.MALFORMED, f"the instance {item.instance!r} is listed twice")
        if item.port is not None and not 0 < item.port <= PORT_MAX:
            raise Rejected(RejectCode.MALFORMED, f"{item.instance}: {item.port} is not a port number")
        if not 0 <= item.attempt <= VERSION_MAX:
            raise Rejected(RejectCode.MALFORMED, f"{item.instance}: {item.attempt} is not an attempt number")
        seen.add(item.instance)


def fresh(
    director: Director,
    data: bytes,
    *,
    fleet: str,
    device: str,
    nonce: str,
    sha256: str,
    state: VerifierState,
    now: datetime,
    clamp: datetime,
) -> tuple[Fresh, VerifierState]:
    """Verify a freshness statement; return it with the state to store (a raised time floor).

    Raises:
        Rejected: see `verifier.accept_freshness`.
    """
    message, _ = _open(director, data, FRESH_TYPE, Fresh)
    _check_addressee(message, fleet, device)
    if message.nonce != nonce:
        raise Rejected(RejectCode.REPLAY, "the freshness statement answers another nonce")
    _check_times(message, now, "the freshness statement")
    if message.assignment_sha256 != sha256:
        raise Rejected(RejectCode.FREEZE, "the director has another assignment for this device than was delivered")
    return message, state.with_floor(min(message.issued, message.expires, clamp))


def command(
    director: Director, data: bytes, *, fleet: str, device: str, state: VerifierState, now: datetime
) -> tuple[Command | LaterCommand, VerifierState]:
    """Verify a command; return it with the state to store before the command is carried out.

    Raises:
        Rejected: see `verifier.accept_command`.
    """
    message, envelope = _open_command(director, data)
    _check_addressee(message, fleet, device)
    _check_version("the command", message.sequence)
    known = _scoped(state.command, director)
    if known is not None and message.sequence <= known.version:
        raise Rejected(RejectCode.REPLAY, f"command {message.sequence} is not newer than {known.version}")
    _check_times(message, now, "the command")
    if message.expires - message.issued > COMMAND_LIFE_MAX:
        raise Rejected(RejectCode.MALFORMED, "the command is valid for longer than 15 minutes")
    remembered = Remembered(message.sequence, envelope.sha256, director.keys)
    return message, msgspec.structs.replace(state, command=remembered)


def _open(director: Director, data: bytes, payload_type: str, kind: type[M]) -> tuple[M, dsse.Envelope]:
    envelope = dsse.parse(data, max_bytes=kind.MAX_BYTES)
    if envelope.payload_type != payload_type:
        raise Rejected(RejectCode.UNSIGNED, f"signed as {envelope.payload_type[:80]!r}, not as {payload_type}")
    metadata.verify(director.targets, director.role, envelope.pae, envelope.signatures)
    try:
        return wire.decode(kind, envelope.payload), envelope
    except wire.TooLargeError as error:
        raise Rejected(RejectCode.TOO_LARGE, str(error)) from error
    except wire.UnknownSchemaError as error:
        raise Rejected(RejectCode.UNSUPPORTED_VERSION, str(error)) from error
    except wire.WireError as error:
        raise Rejected(RejectCode.MALFORMED, str(error)) from error


def _open_command(director: Director, data: bytes) -> tuple[Command | LaterCommand, dsse.Envelope]:
    """Open a command; one with a verb that is not known here comes with its name alone."""
    try:
        return _open(director, data, COMMAND_TYPE, Command)
    except Rejected as error:
        if error.code is not RejectCode.MALFORMED:
            raise
        with contextlib.suppress(Rejected):
            later, envelope = _open(director, data, COMMAND_TYPE, LaterCommand)
            if later.verb.verb not in COMMANDS:
                return later, envelope
        raise


def _check_addressee(message: Assignment | Fresh | Command | LaterCommand, fleet: str, device: str) -> None:
    if message.fleet != fleet:
        raise Rejected(
            RejectCode.WRONG_FLEET, f"the signed document is for fleet {message.fleet[:80]!r}, not {fleet!r}"
        )
    if message.device != device:
        raise Rejected(
            RejectCode.WRONG_DEVICE, f"the signed document is for device {message.device[:80]!r}, not {device!r}"
        )


def _check_version(what: str, version: int) -> None:
    if not 0 < version <= VERSION_MAX:
        raise Rejected(RejectCode.MALFORMED, f"{what} has number {version}, outside 1 to {VERSION_MAX}")


def _check_times(message: Assignment | Fresh | Command | LaterCommand, now: datetime, what: str) -> None:
    if message.issued.tzinfo is None or message.expires.tzinfo is None:
        raise Rejected(RejectCode.MALFORMED, f"{what} has a time without a zone")
    if now >= message.expires:
        raise Rejected(
            RejectCode.EXPIRED, f"{what} expired on {message.expires:%Y-%m-%d %H:%M}, now is {now:%Y-%m-%d %H:%M}"
        )


def _scoped(remembered: Remembered | None, director: Director) -> Remembered | None:
    return remembered if remembered is not None and remembered.keys == director.keys else None
