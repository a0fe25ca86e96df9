"""Whose a sealing key is: a board's own word on it, signed by its device key.

Who remembers the device key from first sight need not believe a server about the key that secrets are sealed to.
"""

from typing import ClassVar, Final

from fleet.protocol import caps, names, wire
from fleet.protocol.codes import RejectCode
from signing.errors import Rejected, SigningError
from signing.sealing import check_key
from signing.statements import Ear, Voice

SEALING_TYPE: Final = "application/vnd.wasmfleet.sealing.v1+json"


class SealingKey(wire.Message, frozen=True, kw_only=True):
    """What a board signs about its sealing key (X25519, base64)."""

    MAX_BYTES: ClassVar[int] = caps.KIB
    fleet: str
    sealing_key: str


def prove(voice: Voice, *, fleet: str, sealing_key: str) -> bytes:
    """The board's signed word that this sealing key is its own."""
    return voice.sign(wire.encode(SealingKey(fleet=fleet, sealing_key=sealing_key)), SEALING_TYPE)


def proved(proof: bytes, *, certificate: bytes, fleet: str, device: str) -> tuple[str, str]:
    """A board's sealing key by its own word, and the fingerprint of the key that signed it.

    Args:
        proof: what `prove` made.
        certificate: the board's, PEM.
        fleet: which fleet's board it is.
        device: its id, which ends in the beginning of the fingerprint.

    Raises:
        Rejected: MALFORMED, TOO_LARGE; UNSIGNED by this key; WRONG_DEVICE: another board's certificate; WRONG_FLEET.
    """
    ear = Ear(certificate)
    if names.fingerprint_of(device) != ear.fingerprint[: len(names.fingerprint_of(device))]:
        raise Rejected(RejectCode.WRONG_DEVICE, f"the certificate shown for {device} is for another key")
    try:
        said = wire.decode(SealingKey, ear.verify(proof, SEALING_TYPE))
        check_key(said.sealing_key)
    except (wire.WireError, SigningError) as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected(RejectCode.MALFORMED, f"{device}: {error}") from error
    if said.fleet != fleet:
        raise Rejected(RejectCode.WRONG_FLEET, f"the sealing key of {device} is for the fleet {said.fleet[:80]!r}")
    return said.sealing_key, ear.fingerprint
