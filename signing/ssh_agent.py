"""Signing with an Ed25519 key that stays in an ssh-agent (draft-miller-ssh-agent, sections 4.4 and 4.5).

The agent signs the very bytes that it is given, so that its signature is one of TUF. What unlocks the key (a
passphrase, a touch, a confirmation) is between the agent and its user.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Key, SecretsHandler, Signature, Signer, SSlibKey

from signing.errors import KeyFileError

SCHEME: Final = "ssh-agent"
_REQUEST_IDENTITIES: Final = 11
_IDENTITIES_ANSWER: Final = 12
_SIGN_REQUEST: Final = 13
_SIGN_RESPONSE: Final = 14
_ED25519: Final = b"ssh-ed25519"
_ANSWER_MAX: Final = 256 * 1024
_TIMEOUT_S: Final = 60


class SSHAgentSigner(Signer):
    """A signer whose private key is in the agent behind `SSH_AUTH_SOCK`."""

    def __init__(self, key: Key) -> None:
        self._key = key

    @property
    def public_key(self) -> Key:
        """As listed in metadata."""
        return self._key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> "SSHAgentSigner":
        """See `Signer`; the URI is `ssh-agent:`."""
        del secrets_handler
        if priv_key_uri.partition(":")[0] != SCHEME:
            raise ValueError(f"{priv_key_uri} is not of an ssh-agent")
        return cls(public_key)

    def sign(self, payload: bytes) -> Signature:
        """Have the agent sign; raises `KeyFileError` when it cannot or its user says no."""
        public = bytes.fromhex(str(self._key.keyval["public"]))
        blob = _string(_ED25519) + _string(public)
        body = _string(blob) + _string(payload) + struct.pack(">I", 0)
        kind, answer = _ask(_SIGN_REQUEST, body)
        if kind != _SIGN_RESPONSE:
            raise KeyFileError("the ssh-agent does not sign with this key: ssh-add -l lists what it has")
        signature = next(_strings(answer))
        name, value = tuple(_strings(signature))[:2]
        if name != _ED25519:
            raise KeyFileError("the ssh-agent answered with a signature of another kind")
        return Signature(self._key.keyid, value.hex())


def identities() -> dict[str, Key]:
    """The Ed25519 keys in the agent, by their comments.

    Raises:
        KeyFileError: there is no agent.
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
                raise KeyFileError("the ssh-agent answered something that is no answer")
            answer = _exactly(sock, length)
    except OSError as error:
        raise KeyFileError(f"the ssh-agent at {path} does not answer: {error}") from error
    return answer[0], answer[1:]


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise KeyFileError("the ssh-agent hung up")
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
