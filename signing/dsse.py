"""DSSE (Dead Simple Signing Envelope), protocol version 1: the envelope around what directors and devices sign.

A signature covers the payload's type as well as the payload, through the pre-authentication encoding (PAE), so that
bytes signed as one type are never accepted as another. Callers decide whose keys count.
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
        """Hash of the payload in hex: identifies what was signed, independent of who signed."""
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
        Rejected: TOO_LARGE; MALFORMED: not an envelope, or one that names a key twice.
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
