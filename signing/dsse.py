"""The envelope around what the director signs: DSSE, Dead Simple Signing Envelope, protocol version 1.

A signature covers the payload's type as well as the payload, through the pre-authentication encoding (PAE), so that
bytes signed as one thing are never taken for another. Who may sign is not decided here.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from securesystemslib.signer import Signature, Signer

from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from signing.errors import Rejected

MAX_BYTES: Final = bounds.DESIRED_MAX_BYTES
SIGNATURES_MAX: Final = 16


class _Signature(msgspec.Struct):
    keyid: str
    sig: str


class _Envelope(msgspec.Struct):
    payloadType: str  # noqa: N815 - the name in the specification
    payload: str
    signatures: list[_Signature]


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope. Nothing in it is trusted yet.

    Attributes:
        payload_type: a media type.
        payload: the bytes that were signed together with the type.
        signatures: key id -> signature.
    """

    payload_type: str
    payload: bytes
    signatures: Mapping[str, Signature]

    @property
    def pae(self) -> bytes:
        """Bytes that the signatures cover."""
        return pae(self.payload_type, self.payload)

    @property
    def sha256(self) -> str:
        """sha256 of the payload in hex: the identity of what was signed, whoever signed it."""
        return hashlib.sha256(self.payload).hexdigest()


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding (DSSE protocol, section 'Signature definition')."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload_type: str, payload: bytes, signers: Sequence[Signer]) -> bytes:
    """Return the envelope as JSON, signed by each of `signers`."""
    message = pae(payload_type, payload)
    signatures = [signer.sign(message) for signer in signers]
    return msgspec.json.encode(
        _Envelope(
            payloadType=payload_type,
            payload=base64.b64encode(payload).decode(),
            signatures=[
                _Signature(keyid=each.keyid, sig=base64.b64encode(bytes.fromhex(each.signature)).decode())
                for each in signatures
            ],
        )
    )


def parse(data: bytes, *, max_bytes: int = MAX_BYTES) -> Envelope:
    """Read an envelope without verifying it.

    Raises:
        Rejected: TOO_LARGE; MALFORMED for anything that is not an envelope, or names a key twice.
    """
    if len(data) > max_bytes:
        raise Rejected(RejectCode.TOO_LARGE, f"the envelope has {len(data)} bytes, at most {max_bytes} are accepted")
    try:
        raw = msgspec.json.decode(data, type=_Envelope)
        payload = base64.b64decode(raw.payload, validate=True)
        signatures = {
            each.keyid: Signature(each.keyid, base64.b64decode(each.sig, validate=True).hex())
            for each in raw.signatures
        }
    except (binascii.Error, ValueError, *wire.JSON_ERRORS) as error:
        raise Rejected(RejectCode.MALFORMED, f"not a signed envelope: {error}") from error
    if len(signatures) != len(raw.signatures) or len(signatures) > SIGNATURES_MAX:
        raise Rejected(RejectCode.MALFORMED, "the envelope names a key twice, or has too many signatures")
    return Envelope(raw.payloadType, payload, signatures)
