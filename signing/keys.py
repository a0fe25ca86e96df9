"""Keys in files and in an ssh-agent.

Signing keys are Ed25519. Key files are created exclusively, readable only by their owner, and never overwritten.
Without a passphrase a key is unencrypted PKCS#8: for development, and for the online roles on a server. With a
passphrase it is PKCS#12 with 600,000 rounds, or OpenSSH's format with bcrypt (whose passphrase `ssh-keygen -p` can
change; needs the bcrypt package). Encrypted PKCS#8 is read but never written: with its 2,048 rounds, passphrases are
guessed too quickly.

An ssh-agent signs with an Ed25519 key that never leaves it (draft-miller-ssh-agent, sections 4.4 and 4.5). It signs
exactly the bytes that it is given, so the result is a valid TUF signature. How the key is unlocked (a passphrase, a
touch, a confirmation) is between the ssh-agent and its user.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
    pkcs12,
)
from securesystemslib.signer import CryptoSigner, Key, SecretsHandler, Signature, Signer, SSlibKey

from fleet.protocol import files
from signing.errors import KeyFileError

MAX_BYTES: Final = 64 * 1024
PKCS12_ROUNDS: Final = 600_000
BCRYPT_ROUNDS: Final = 64
MIN_PASSPHRASE_BYTES: Final = 8
_PKCS12_NAME: Final = b"wasmfleet"


class EncryptedError(KeyFileError):
    """The key needs a passphrase, and none was given."""


class Format(StrEnum):
    """Format of an encrypted key file."""

    OPENSSH = "openssh"
    PKCS12 = "pkcs12"


def generate(path: Path, *, passphrase: bytes | None = None, form: Format = Format.PKCS12) -> CryptoSigner:
    """Make an Ed25519 key, write it to a new file of mode 0600 and return its signer.

    Args:
        path: of the new file; must not exist, as a key is never overwritten.
        passphrase: None to leave the key unencrypted.
        form: format of an encrypted file.

    Raises:
        KeyFileError: the file exists or cannot be written, or the passphrase is too short.
    """
    key = Ed25519PrivateKey.generate()
    _write(path, _encode(key, passphrase, form))
    return CryptoSigner(key)


def store(path: Path, signer: CryptoSigner, *, passphrase: bytes | None = None, form: Format = Format.PKCS12) -> None:
    """Write an existing key to a new file of mode 0600; raises `KeyFileError` as `generate`."""
    key = load_pem_private_key(signer.private_bytes, None)
    assert isinstance(key, Ed25519PrivateKey)
    _write(path, _encode(key, passphrase, form))


def load(path: Path, *, passphrase: bytes | None = None) -> CryptoSigner:
    """Open a key file in any of the formats that the module's docstring lists.

    Raises:
        KeyFileError: no such file, others may read it, not an Ed25519 key, or a missing or wrong passphrase.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key {path}: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(f"the key {path} is readable by others: run chmod 600 {path}")
    return parse(data, what=str(path), passphrase=passphrase)


def parse(data: bytes, *, what: str, passphrase: bytes | None = None) -> CryptoSigner:
    """Open a key from bytes; `what` names it in errors (a file, an environment variable).

    Raises:
        KeyFileError: as for `load`.
    """
    if len(data) > MAX_BYTES:
        raise KeyFileError(f"{what} is too large to be a key")
    try:
        key = _decode(data, passphrase)
    except TypeError as error:
        if passphrase is None:
            raise EncryptedError(f"{what} is encrypted: give its passphrase") from error
        raise KeyFileError(f"{what} is not encrypted: leave the passphrase out") from error
    except UnsupportedAlgorithm as error:
        raise KeyFileError(f"{what} cannot be opened here: {error}") from error
    except ValueError as error:
        wrong = " or the passphrase is wrong" if passphrase is not None else ""
        raise KeyFileError(f"{what} is not a private key (PKCS#8, OpenSSH or PKCS#12){wrong}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{what} is not an Ed25519 key: make one with fleet keys new")
    return CryptoSigner(key)


def _encode(key: Ed25519PrivateKey, passphrase: bytes | None, form: Format) -> bytes:
    if passphrase is None:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise KeyFileError(f"the passphrase is too short: at least {MIN_PASSPHRASE_BYTES} characters are needed")
    if form is Format.OPENSSH:
        strong = PrivateFormat.OpenSSH.encryption_builder().kdf_rounds(BCRYPT_ROUNDS).build(passphrase)
        try:
            return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, strong)
        except UnsupportedAlgorithm as error:
            raise KeyFileError("OpenSSH key files need the bcrypt package; PKCS#12 needs nothing more") from error
    # Not BestAvailableEncryption: its number of rounds is the library's choice, and may be small.
    strong = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(PKCS12_ROUNDS)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(passphrase)
    )
    return pkcs12.serialize_key_and_certificates(_PKCS12_NAME, key, None, None, strong)


def _decode(data: bytes, passphrase: bytes | None) -> object:
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in data:
        return load_ssh_private_key(data, passphrase)
    if b"-----BEGIN" in data:
        return load_pem_private_key(data, passphrase)
    if passphrase is None and data[:1] == b"\x30":
        raise TypeError("PKCS#12 files are encrypted")
    return pkcs12.load_key_and_certificates(data, passphrase)[0]


def _write(path: Path, data: bytes) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise KeyFileError(f"{path} exists: a key is never overwritten") from error
    except OSError as error:
        raise KeyFileError(f"cannot write the key {path}: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        files.sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise KeyFileError(f"cannot write the key {path}: {error.strerror}") from error


SCHEME: Final = "ssh-agent"
_REQUEST_IDENTITIES: Final = 11
_IDENTITIES_ANSWER: Final = 12
_SIGN_REQUEST: Final = 13
_SIGN_RESPONSE: Final = 14
_ED25519: Final = b"ssh-ed25519"
_ANSWER_MAX: Final = 256 * 1024
_TIMEOUT_S: Final = 60


class SSHAgentSigner(Signer):
    """Signer whose private key is in the agent behind `SSH_AUTH_SOCK`."""

    def __init__(self, key: Key) -> None:
        self._key = key

    @property
    def public_key(self) -> Key:
        """Public key, as listed in metadata."""
        return self._key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> "SSHAgentSigner":
        """Make a signer for the URI `ssh-agent:`, see `Signer`."""
        del secrets_handler
        if priv_key_uri.partition(":")[0] != SCHEME:
            raise ValueError(f"{priv_key_uri} is not the URI of a key in an ssh-agent")
        return cls(public_key)

    def sign(self, payload: bytes) -> Signature:
        """Have the agent sign; raises `KeyFileError` when it cannot or its user declines."""
        public = bytes.fromhex(str(self._key.keyval["public"]))
        blob = _string(_ED25519) + _string(public)
        body = _string(blob) + _string(payload) + struct.pack(">I", 0)
        kind, answer = _ask(_SIGN_REQUEST, body)
        if kind != _SIGN_RESPONSE:
            raise KeyFileError("the ssh-agent refused to sign with this key: list its keys with ssh-add -l")
        signature = next(_strings(answer))
        name, value = tuple(_strings(signature))[:2]
        if name != _ED25519:
            raise KeyFileError("the ssh-agent answered with a signature that is not Ed25519")
        return Signature(self._key.keyid, value.hex())


def identities() -> dict[str, Key]:
    """List the Ed25519 keys in the agent: comment -> key.

    Raises:
        KeyFileError: no agent answers.
    """
    kind, answer = _ask(_REQUEST_IDENTITIES, b"")
    if kind != _IDENTITIES_ANSWER:
        raise KeyFileError("the ssh-agent does not list its keys")
    parts = list(_strings(answer[4:]))
    found: dict[str, Key] = {}
    for blob, comment in zip(parts[::2], parts[1::2], strict=False):
        name, *rest = _strings(blob)
        if name == _ED25519 and rest:
            key = SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(rest[0]))
            found[comment.decode("utf-8", "replace")] = key
    return found


def _ask(kind: int, body: bytes) -> tuple[int, bytes]:
    path = os.environ.get("SSH_AUTH_SOCK", "")
    if not path:
        raise KeyFileError("there is no ssh-agent: SSH_AUTH_SOCK is not set")
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_TIMEOUT_S)
            sock.connect(path)
            sock.sendall(_string(bytes([kind]) + body))
            (length,) = struct.unpack(">I", _exactly(sock, 4))
            if not 0 < length <= _ANSWER_MAX:
                raise KeyFileError("the ssh-agent's answer has an invalid length")
            answer = _exactly(sock, length)
    except OSError as error:
        raise KeyFileError(f"the ssh-agent at {path} does not answer: {error}") from error
    return answer[0], answer[1:]


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise KeyFileError("the ssh-agent closed the connection")
        data += chunk
    return data


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _strings(data: bytes) -> Iterator[bytes]:
    while data:
        if len(data) < 4 or len(data) < 4 + (length := struct.unpack(">I", data[:4])[0]):  # noqa: PLR2004 - a length
            raise KeyFileError("the ssh-agent's answer cannot be read")
        yield data[4 : 4 + length]
        data = data[4 + length :]
