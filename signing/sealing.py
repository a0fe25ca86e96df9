"""Sealed secrets, sealed archives, and the proof that binds a sealing key to a device.

Only a single device can open a box, and only for a single purpose. Pure: bytes in, bytes out. Format of a box,
version 1:

    offset  bytes
    0       1     1, the format's version
    1       32    an X25519 public key made for this box only
    33      16+n  ChaCha20-Poly1305 of the padded value, tag last

The key is HKDF-SHA256 (RFC 5869) over the X25519 agreement (RFC 7748) of the box's key and the device's sealing key,
with both public keys as salt. As no two boxes have the same key, the nonce (RFC 8439) is zero. The associated data are
fleet, device, instance, name and version, so that a box does not open for another device, instance or name, or in
place of a newer version. The value is preceded by its length in two bytes and padded with zeros to a multiple of 256
bytes, so that a box reveals little about the value's length.

An archive about a device is sealed in the same format, without padding, to a key that an operator made for one request:
with another label of HKDF, and with the device and the number of the command as associated data.

The proof is a statement signed by the device key. An operator who pinned that key when it was first seen need not trust
the server for the key to which secrets are sealed.
"""

import base64
import binascii
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fleet.protocol import bounds, names, wire
from fleet.protocol.bounds import Count
from fleet.protocol.codes import RejectCode
from signing.errors import KeyFileError, Rejected, SigningError

if TYPE_CHECKING:
    from signing.device_statements import DeviceSigner

FORMAT: Final = 1
KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
PAD_BYTES: Final = 256
_LENGTH_BYTES: Final = 2
_HEAD_BYTES: Final = 1 + KEY_BYTES
_NONCE: Final = bytes(12)
_INFO: Final = b"wasmfleet sealed secret 1"
_ARCHIVE_INFO: Final = b"wasmfleet sealed archive 1"


class Purpose(msgspec.Struct, frozen=True, kw_only=True):
    """Purpose of a box; it opens for no other."""

    fleet: str
    device: str
    instance: str
    name: str
    version: Count

    def __str__(self) -> str:
        return f"secret {self.name} version {self.version} of {self.instance}"


def seal(value: str, *, recipient: str, purpose: Purpose) -> bytes:
    """Seal a value into a box for a single device.

    Args:
        value: text, as guests read it as text.
        recipient: the device's public sealing key, base64.
        purpose: for which alone the box can be opened.

    Raises:
        SigningError: a value that no guest can be given (see `check_value`), or an invalid key.
    """
    data = check_value(value)
    padded = len(data).to_bytes(_LENGTH_BYTES, "big") + data
    padded += bytes(-len(padded) % PAD_BYTES)
    return _sealed(padded, check_key(recipient), wire.canonical(purpose), _INFO)


def open_box(box: bytes, *, key: X25519PrivateKey, purpose: Purpose) -> str:
    """Open a box and return its value.

    Args:
        box: as returned by `seal`.
        key: the device's sealing key.
        purpose: as in the device's assignment.

    Raises:
        Rejected: TOO_LARGE, UNSUPPORTED_VERSION; SECRET_UNOPENED: tampered with, or sealed for another purpose or key.
    """
    check_box(box)
    try:
        padded = _opened(box, key, wire.canonical(purpose), _INFO)
        length = int.from_bytes(padded[:_LENGTH_BYTES], "big")
        return padded[_LENGTH_BYTES:][:length].decode()
    except (InvalidTag, ValueError) as error:
        raise Rejected(
            RejectCode.SECRET_UNOPENED, f"the box of {purpose} was changed, or is not for this device and purpose"
        ) from error


class ArchivePurpose(msgspec.Struct, frozen=True, kw_only=True):
    """Request that a sealed archive answers; it opens for no other."""

    device: str
    command: Count


def archive_key() -> X25519PrivateKey:
    """Return a new key for one request; whoever loses it cannot open the answer."""
    return X25519PrivateKey.generate()


def seal_archive(archive: bytes, *, recipient: str, purpose: ArchivePurpose) -> bytes:
    """Seal an archive to the operator who asked for it.

    Args:
        archive: any bytes.
        recipient: the public key in the command, base64.
        purpose: for which alone the archive can be opened.

    Raises:
        SigningError: an invalid key.
    """
    return _sealed(archive, check_key(recipient), wire.canonical(purpose), _ARCHIVE_INFO)


def open_archive(sealed: bytes, *, key: X25519PrivateKey, purpose: ArchivePurpose) -> bytes:
    """Open a sealed archive.

    Raises:
        SigningError: of another format, tampered with, or sealed for another request or key.
    """
    if sealed[:1] != bytes([FORMAT]):
        raise SigningError(f"the archive of {purpose.device} is sealed in a format that this program does not know")
    try:
        return _opened(sealed, key, wire.canonical(purpose), _ARCHIVE_INFO)
    except (InvalidTag, ValueError) as error:
        raise SigningError(
            f"the archive of {purpose.device} was changed on its way, or answers another request"
        ) from error


def _sealed(data: bytes, theirs: X25519PublicKey, associated: bytes, info: bytes) -> bytes:
    ours = X25519PrivateKey.generate()
    shown = ours.public_key().public_bytes_raw()
    try:
        shared = ours.exchange(theirs)
    except ValueError as error:  # a point of small order: anybody could open the box
        raise SigningError("the sealing key is not an X25519 key") from error
    cipher = ChaCha20Poly1305(_key(shared, shown + theirs.public_bytes_raw(), info))
    return bytes([FORMAT]) + shown + cipher.encrypt(_NONCE, data, associated)


def _opened(box: bytes, key: X25519PrivateKey, associated: bytes, info: bytes) -> bytes:
    shown = box[1:_HEAD_BYTES]
    shared = key.exchange(X25519PublicKey.from_public_bytes(shown))
    cipher = ChaCha20Poly1305(_key(shared, shown + key.public_key().public_bytes_raw(), info))
    return cipher.decrypt(_NONCE, box[_HEAD_BYTES:], associated)


def check_box(box: bytes) -> None:
    """Check a box's size and format, without a key.

    Raises:
        Rejected: TOO_LARGE, UNSUPPORTED_VERSION, SECRET_UNOPENED.
    """
    if len(box) > bounds.SECRET_BOX_MAX_BYTES:
        raise Rejected(
            RejectCode.TOO_LARGE, f"the box has {len(box)} bytes, at most {bounds.SECRET_BOX_MAX_BYTES} are accepted"
        )
    if box[:1] != bytes([FORMAT]):
        number = box[0] if box else "none"
        raise Rejected(RejectCode.UNSUPPORTED_VERSION, f"the box has format {number}, this program supports {FORMAT}")
    if len(box) < _HEAD_BYTES + TAG_BYTES + PAD_BYTES:
        raise Rejected(RejectCode.SECRET_UNOPENED, f"a box of {len(box)} bytes is too short")


def check_value(value: str) -> bytes:
    """Check a secret's value and return its bytes (UTF-8).

    Raises:
        SigningError: too short to be masked in logs, too long, or with a NUL, which no environment variable can hold.
    """
    if len(value) < bounds.SECRET_VALUE_MIN_CHARS:
        raise SigningError(
            f"a secret needs at least {bounds.SECRET_VALUE_MIN_CHARS} characters: shorter ones cannot be masked in logs"
        )
    if "\0" in value:
        raise SigningError("a secret is text without NUL: encode binary data as base64")
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise SigningError("a secret is text in UTF-8: encode binary data as base64") from None
    if len(data) > bounds.SECRET_VALUE_MAX_BYTES:
        raise SigningError(f"a secret has at most {bounds.SECRET_VALUE_MAX_BYTES} bytes, this one has {len(data)}")
    return data


def load(pem: bytes) -> X25519PrivateKey:
    """Read a device's sealing key from the content of its file; raises `KeyFileError`."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise KeyFileError(f"the sealing key cannot be read: {error}") from error
    if not isinstance(key, X25519PrivateKey):
        raise KeyFileError("the sealing key is not an X25519 key: enrol the device again")
    return key


def public_key(key: X25519PrivateKey) -> str:
    """Return the public half of a sealing key, base64."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def check_key(text: str) -> X25519PublicKey:
    """Read a device's public sealing key from base64; raises `SigningError`."""
    try:
        return X25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error) as error:
        raise SigningError("the device's sealing key is not an X25519 key") from error


def _key(shared: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(shared)


SEALING_TYPE: Final = "application/vnd.wasmfleet.sealing.v1+json"


class SealingKey(wire.Message, frozen=True, kw_only=True):
    """Statement of a device about its sealing key (X25519, base64)."""

    MAX_BYTES: ClassVar[int] = bounds.KIB
    fleet: str
    sealing_key: str


def prove(signer: "DeviceSigner", *, fleet: str, sealing_key: str) -> bytes:
    """Sign, as the device, a statement that this sealing key is its own."""
    return signer.sign(wire.encode(SealingKey(fleet=fleet, sealing_key=sealing_key)), SEALING_TYPE)


def proved(proof: bytes, *, certificate: bytes, fleet: str, device: str) -> tuple[str, str]:
    """Verify a device's statement about its sealing key; return the key, and the fingerprint of the key that signed.

    Args:
        proof: as returned by `prove`.
        certificate: the device's certificate, PEM.
        fleet: the device's fleet.
        device: the device's id, which ends in the beginning of the fingerprint.

    Raises:
        Rejected: MALFORMED, TOO_LARGE, UNSIGNED, WRONG_FLEET; WRONG_DEVICE: another device's certificate.
    """
    from signing.device_statements import DeviceVerifier  # noqa: PLC0415 - only a verifier of proofs needs its imports

    verifier = DeviceVerifier(certificate)
    if names.fingerprint_of(device) != verifier.fingerprint[: len(names.fingerprint_of(device))]:
        raise Rejected(RejectCode.WRONG_DEVICE, f"the certificate for {device} belongs to another key")
    try:
        statement = wire.decode(SealingKey, verifier.verify(proof, SEALING_TYPE))
        check_key(statement.sealing_key)
    except (wire.WireError, SigningError) as error:
        if isinstance(error, Rejected):
            raise
        raise Rejected(RejectCode.MALFORMED, f"{device}: {error}") from error
    if statement.fleet != fleet:
        raise Rejected(
            RejectCode.WRONG_FLEET, f"the sealing key of {device} is for fleet {statement.fleet[:80]!r}, not {fleet!r}"
        )
    return statement.sealing_key, verifier.fingerprint
