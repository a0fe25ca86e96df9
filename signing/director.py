"""What the director says, signed: assignments, freshness statements and commands.

The director chooses among what publishers have signed; it cannot make code. Its key is a delegation in the TUF targets
role. `signing.trust` verifies what is made here.
"""

from securesystemslib.signer import Signer

from fleet.protocol import names, wire
from fleet.protocol.assignment import (
    ASSIGNMENT_TYPE,
    COMMAND_TYPE,
    FRESH_TYPE,
    Assignment,
    Command,
    Fresh,
)
from signing import dsse, orders
from signing.errors import SigningError


def sign_assignment(assignment: Assignment, signer: Signer) -> bytes:
    """The assignment in its envelope.

    The board judges an equal version by the payload's sha256 (`dsse.parse(...).sha256`), which is also what a freshness
    statement names; signing the same assignment again, with a rotated key for example, keeps it.

    Raises:
        SigningError: what no board would accept: too large, too many items, an instance twice or with a bad name, empty
            without `stop_all`, expired at birth.
    """
    orders.check_items(assignment)
    if not assignment.items and not assignment.stop_all:
        raise SigningError("an empty list would stop everything: say stop_all")
    try:
        names.check_device(assignment.device)
    except names.BadNameError as error:
        raise SigningError(str(error)) from error
    return _sign(ASSIGNMENT_TYPE, assignment, signer, assignment.MAX_BYTES)


def sign_fresh(fresh: Fresh, signer: Signer) -> bytes:
    """The freshness statement in its envelope; raises `SigningError` when it is too large or expired at birth."""
    return _sign(FRESH_TYPE, fresh, signer, fresh.MAX_BYTES)


def sign_command(command: Command, signer: Signer) -> bytes:
    """The command in its envelope; raises `SigningError` when it is too large or expired at birth."""
    return _sign(COMMAND_TYPE, command, signer, command.MAX_BYTES)


def _sign(payload_type: str, message: Assignment | Fresh | Command, signer: Signer, max_bytes: int) -> bytes:
    if message.issued.tzinfo is None or message.expires.tzinfo is None:
        raise SigningError("times are in UTC: give them a time zone")
    if message.expires <= message.issued:
        raise SigningError("it would expire before it is issued")
    envelope = dsse.sign(payload_type, wire.encode(message), [signer])
    if len(envelope) > max_bytes:
        raise SigningError(f"{len(envelope)} bytes are too many for one board, at most {max_bytes} fit in a message")
    return envelope


def payload_sha256(envelope: bytes) -> str:
    """The sha256 that a freshness statement for this envelope names, and that boards report."""
    return dsse.parse(envelope).sha256
