"""What a board says about itself, signed by its device key: who has that key on record cannot be told otherwise.

A report travels in a DSSE envelope under the key of the board's certificate (P-256, or Ed25519), so neither a broker
nor a server can invent what a board runs. What is inside is the report's own JSON; nothing of it is trusted before
`verify` returned it.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner

from fleet.protocol import caps
from fleet.protocol.codes import RejectCode
from signing import dsse
from signing.errors import KeyFileError, Rejected

REPORT_TYPE: Final = "application/vnd.wasmfleet.report.v1+json"
ENVELOPE_MAX_BYTES: Final = caps.REPORT_MAX_BYTES * 4 // 3 + caps.KIB
_P256_BITS: Final = 256
_ECDSA: Final = ECDSA(SHA256())
_START: Final = b'{"payloadType"'


class Voice:
    """A board's own: signs what it says."""

    def __init__(self, pem: bytes) -> None:
        """From the device key's file.

        Raises:
            KeyFileError: no private key, or one of a kind that no board has.
        """
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise KeyFileError(f"the device key cannot be read: {error}") from error
        if not isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey):
            raise KeyFileError("the device key is neither of P-256 nor of Ed25519: enrol the board anew")
        self._signer = CryptoSigner(key)

    def sign(self, said: bytes, payload_type: str = REPORT_TYPE) -> bytes:
        """The envelope of a report's JSON, or of something else that the board says."""
        return dsse.sign(payload_type, said, [self._signer])


class Ear:
    """Hears one board: checks that it was that board's key that spoke.

    Attributes:
        fingerprint: sha256 of the public key (SubjectPublicKeyInfo, DER) in hex: what is compared from first sight on.
    """

    def __init__(self, certificate: bytes) -> None:
        """From the board's certificate, PEM.

        Raises:
            Rejected: MALFORMED: no certificate, or a key of another kind.
        """
        try:
            key = x509.load_pem_x509_certificate(certificate).public_key()
        except ValueError as error:
            raise Rejected(RejectCode.MALFORMED, f"the board's certificate cannot be read: {error}") from error
        if isinstance(key, EllipticCurvePublicKey) and key.key_size == _P256_BITS:
            self._verify: Callable[[bytes, bytes], None] = functools.partial(_ecdsa, key)
        elif isinstance(key, Ed25519PublicKey):
            self._verify = key.verify
        else:
            raise Rejected(RejectCode.MALFORMED, "the board's key is neither of P-256 nor of Ed25519")
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.fingerprint = hashlib.sha256(der).hexdigest()

    def verify(self, data: bytes, payload_type: str = REPORT_TYPE) -> bytes:
        """The report's JSON (or what else is asked for) in an envelope that this board signed.

        Raises:
            Rejected: TOO_LARGE, MALFORMED; UNSIGNED for what another key signed, or signed as something else.
        """
        envelope = dsse.parse(data, max_bytes=ENVELOPE_MAX_BYTES)
        if envelope.payload_type != payload_type:
            raise Rejected(RejectCode.UNSIGNED, f"signed as {envelope.payload_type[:80]!r}, not as {payload_type}")
        for signature in envelope.signatures.values():
            try:
                self._verify(bytes.fromhex(signature.signature), envelope.pae)
            except InvalidSignature:
                continue
            return envelope.payload
        raise Rejected(RejectCode.UNSIGNED, "it is not signed by this board's key")


def _ecdsa(key: EllipticCurvePublicKey, signature: bytes, data: bytes) -> None:
    """With the key as it was read once: parsing it for each report costs as much as half of the verification."""
    key.verify(signature, data, _ECDSA)


def is_signed(data: bytes) -> bool:
    """Whether it looks like an envelope; it may still be anybody's."""
    return data.startswith(_START)


def unverified(data: bytes) -> bytes:
    """The report's JSON, in an envelope or not, from bytes that were judged before they were stored.

    Raises:
        Rejected: MALFORMED.
    """
    return dsse.parse(data, max_bytes=ENVELOPE_MAX_BYTES).payload if is_signed(data) else data
