"""Keyring: a person's directory of key cards, `<name>.json`, with the private keys beside them or elsewhere.

A card holds a public key, its name, and where its private half is: in a file (`<name>.pem`, see `signing.keys`), in an
ssh-agent, on a PKCS#11 token, or with someone else. Cards hold no secrets.
"""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from securesystemslib.signer import CryptoSigner, HSMSigner, Key, Signature, Signer, SSlibKey

from fleet.protocol import names, wire
from fleet.protocol.files import atomic_write, create_exclusive
from signing import keys
from signing.errors import KeyFileError

FILE: Final = "file"
ELSEWHERE: Final = ""
Ask = Callable[[str], bytes | None]
"""Ask a person for the passphrase or PIN of the named key; returns None when there is nobody to ask."""

_ID_MIN: Final = 8
_RECOVERY_PREFIX: Final = "WFRK1"
_SEED_BYTES: Final = 32
_CHECK_BYTES: Final = 3


class _Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    public: str
    where: str = ELSEWHERE


@dataclass(frozen=True, slots=True)
class Entry:
    """Named key.

    Attributes:
        key: the public key.
        where: place of the private key: `file`, `ssh-agent:`, `hsm:...`, or empty for someone else's key.
    """

    name: str
    key: Key
    where: str

    @property
    def ours(self) -> bool:
        """Return whether the private half can be used from here."""
        return self.where != ELSEWHERE


class Keyring:
    """Directory of key cards; nothing in it is ever overwritten."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def entries(self) -> tuple[Entry, ...]:
        """Return every card, sorted by name.

        Raises:
            KeyFileError: a card cannot be read.
        """
        return tuple(self._read(path) for path in sorted(self.directory.glob("*.json")))

    def get(self, name: str) -> Entry:
        """Find a key by its name or by the beginning of its key id; raises `KeyFileError` if there is none."""
        by_id = len(name) >= _ID_MIN
        found = [each for each in self.entries() if each.name == name or (by_id and each.key.keyid.startswith(name))]
        if len(found) != 1:
            raise KeyFileError(f"there is no key {name!r} in {self.directory}. List the keys with: fleet keys list")
        return found[0]

    def by_id(self, keyid: str) -> Entry | None:
        """Find a key by its whole id; None if it is unknown."""
        return next((each for each in self.entries() if each.key.keyid == keyid), None)

    def called(self, keyid: str) -> str:
        """Return this person's name for a key; the beginning of its id for an unknown one."""
        entry = self.by_id(keyid)
        return keyid[:12] if entry is None else f"{entry.name} ({keyid[:12]})"

    def file(self, name: str) -> Path:
        """Return the path of the private key of that name (whether or not the file exists)."""
        return self.directory / f"{name}.pem"

    def free(self, name: str) -> str:
        """Return the first unused name of `name`, `name-2`, `name-3`, ..."""
        number, found = 1, name
        while self.file(found).exists() or self._card(found).exists():
            number += 1
            found = f"{name}-{number}"
        return found

    def add(self, name: str, key: Key, *, where: str = ELSEWHERE) -> Entry:
        """Write a card, or record the new place of a known key's private half.

        Raises:
            KeyFileError: the name is bad or taken, or the key already has a name.
        """
        _check(name)
        known = self.by_id(key.keyid)
        found = known is not None and known.name == name and not known.ours and where != ELSEWHERE
        if known is not None and not found:
            raise KeyFileError(f"this key is already known as {known.name}")
        card = _Card(name=name, public=public_pem(key), where=where)
        write = atomic_write if found else create_exclusive
        try:
            write(self._card(name), msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n", mode=0o644)
        except FileExistsError as error:
            raise KeyFileError(f"there is already a key {name!r}: choose another name") from error
        except OSError as error:
            raise KeyFileError(f"cannot write {self._card(name)}: {error.strerror}") from error
        return Entry(name, key, where)

    def forget(self, name: str) -> None:
        """Remove a card; a private key in a file stays."""
        self._card(name).unlink(missing_ok=True)

    def generate(
        self, name: str, *, passphrase: bytes | None, form: keys.Format = keys.Format.PKCS12
    ) -> tuple[Entry, CryptoSigner]:
        """Make an Ed25519 key, its file and its card; raises `KeyFileError` as `keys.generate` and `add`."""
        _check(name)
        if self._card(name).exists():
            raise KeyFileError(f"there is already a key {name!r}: choose another name")
        signer = keys.generate(self.file(name), passphrase=passphrase, form=form)
        return self.add(name, signer.public_key, where=FILE), signer

    def adopt(self, name: str, signer: CryptoSigner, *, passphrase: bytes | None) -> Entry:
        """Store a private key from elsewhere in a file; raises `KeyFileError` as `generate`."""
        _check(name)
        keys.store(self.file(name), signer, passphrase=passphrase)
        try:
            return self.add(name, signer.public_key, where=FILE)
        except KeyFileError:
            self.file(name).unlink()
            raise

    def open(self, entry: Entry, ask: Ask) -> Signer:
        """Return a signer for a key whose private half is accessible.

        Raises:
            KeyFileError: the key is someone else's, its file or token is missing, or the passphrase is wrong.
        """
        if entry.where == keys.SCHEME + ":":
            return keys.SSHAgentSigner(entry.key)
        if entry.where.startswith("hsm:"):
            return _Token(entry, ask)
        if entry.where != FILE:
            raise KeyFileError(f"the private key of {entry.name} is not on this machine: its owner must sign")
        path = self.file(entry.name)
        signer = open_file(path, ask)
        if signer.public_key.keyid != entry.key.keyid:
            raise KeyFileError(f"{path} holds a different key than its card {self._card(entry.name).name}")
        return signer

    def _card(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _read(self, path: Path) -> Entry:
        try:
            card = msgspec.json.decode(path.read_bytes(), type=_Card)
        except (OSError, *wire.JSON_ERRORS) as error:
            raise KeyFileError(
                f"{path} is not a key card ({error}): restore it from a copy, or remove it if the key is not needed"
            ) from error
        return Entry(path.stem, read_public(card.public.encode(), what=str(path)), card.where)


class _Token(Signer):
    """Signer for a key on a PKCS#11 token: securesystemslib's, with error messages for people."""

    def __init__(self, entry: Entry, ask: Ask) -> None:
        self._entry = entry

        def pin(_what: str) -> str:
            return (ask(f"the token with {entry.name}") or b"").decode()

        try:
            self._inner = HSMSigner.from_priv_key_uri(entry.where, entry.key, pin)
        except Exception as error:  # the library passes on whatever its driver raises
            raise KeyFileError(f"the token with {entry.name} cannot be used: {error}") from error

    @property
    def public_key(self) -> Key:
        return self._entry.key

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: object = None) -> "_Token":
        raise NotImplementedError

    def sign(self, payload: bytes) -> Signature:
        try:
            return self._inner.sign(payload)
        except Exception as error:  # the same
            raise KeyFileError(f"the token with {self._entry.name} does not sign: {error!r}") from error


def import_token(*, label: str, number: int, ask: Ask) -> tuple[str, Key]:
    """Read the URI and public key of an ECDSA key on a PKCS#11 token; `PYKCS11LIB` names the driver.

    Args:
        label: of the token.
        number: id of the key on the token.
        ask: asks for the PIN.

    Raises:
        KeyFileError: no driver, no token, no such key.
    """
    try:
        return HSMSigner.import_(number, label or None, lambda _what: (ask(f"the token {label}") or b"").decode())
    except Exception as error:
        raise KeyFileError(f"no key {number} on a PKCS#11 token {label}: {error or type(error).__name__}") from error


def open_file(path: Path, ask: Ask) -> CryptoSigner:
    """Open a key file, asking for a passphrase only when it needs one; raises `KeyFileError`."""
    try:
        return keys.load(path)
    except keys.EncryptedError:
        passphrase = ask(str(path))
        if passphrase is None:
            raise
        return keys.load(path, passphrase=passphrase)


def public_pem(key: Key) -> str:
    """Encode a public key as PEM (SubjectPublicKeyInfo)."""
    value = str(key.keyval["public"])
    if key.keytype != "ed25519":
        return value
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(value))
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public(data: bytes, *, what: str) -> Key:
    """Read a public key from PEM, from an OpenSSH line, or from a card; `what` names the source in errors.

    Raises:
        KeyFileError: none of these formats.
    """
    try:
        if data.lstrip()[:1] == b"{":
            data = msgspec.json.decode(data, type=_Card).public.encode()
        if data.lstrip().startswith((b"ssh-", b"ecdsa-")):
            return SSlibKey.from_crypto(load_ssh_public_key(data.strip()))
        return SSlibKey.from_crypto(load_pem_public_key(data))
    except (ValueError, UnsupportedAlgorithm, *wire.JSON_ERRORS) as error:
        raise KeyFileError(f"{what} is not a public key (PEM, OpenSSH, or a card from fleet keys show)") from error


def recovery_key() -> tuple[CryptoSigner, str]:
    """Make a recovery key; return its signer and the text to print on paper (never to store on a disk)."""
    key = Ed25519PrivateKey.generate()
    seed = key.private_bytes_raw()
    text = base64.b32encode(seed + _check_sum(seed)).decode().rstrip("=")
    groups = [text[start : start + 4] for start in range(0, len(text), 4)]
    return CryptoSigner(key), "-".join((_RECOVERY_PREFIX, *groups))


def from_recovery(text: str) -> CryptoSigner:
    """Restore a recovery key from its printed text; blanks, dashes and case do not matter.

    Raises:
        KeyFileError: the text was mistyped.
    """
    plain = "".join(text.split()).replace("-", "").upper()
    body = plain.removeprefix(_RECOVERY_PREFIX)
    try:
        data = base64.b32decode(body + "=" * (-len(body) % 8))
    except ValueError as error:
        raise KeyFileError("this is not a recovery key: only A to Z and 2 to 7 occur in one") from error
    seed = data[:_SEED_BYTES]
    if not plain.startswith(_RECOVERY_PREFIX) or data[_SEED_BYTES:] != _check_sum(seed):
        raise KeyFileError("the recovery key is mistyped: its checksum does not match")
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(seed))


def _check_sum(seed: bytes) -> bytes:
    return hashlib.sha256(b"wasmfleet recovery key\n" + seed).digest()[:_CHECK_BYTES]


def _check(name: str) -> None:
    try:
        names.check_label(name, "key")
    except names.BadNameError as error:
        raise KeyFileError(str(error)) from error
