"""Metadata of one role: parsing, verification, and our own signed fields (ceiling, revoked, profile, key ends).

Small steps that every verifier of TUF metadata takes, on a device or an operator's machine. Uses python-tuf's data
model but not its client. Pure: no file, no network, no clock.
"""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final, TypeVar

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.signer import Key, Signature
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError, SerializationError

from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing.errors import Rejected
from signing.state import VERSION_MAX

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)

MAX_BYTES: Final[Mapping[type[Signed], int]] = {
    Root: bounds.ROOT_MAX_BYTES,
    Timestamp: bounds.TIMESTAMP_MAX_BYTES,
    Snapshot: bounds.SNAPSHOT_MAX_BYTES,
    Targets: bounds.TARGETS_MAX_BYTES,
}

KEY_ENDS: Final = "key_ends"
"""Signed field of a namespace's delegation: key id -> end of that key's validity; absent for keys without an end."""


def sha256(data: bytes) -> str:
    """Return the sha256 of data in hex."""
    return hashlib.sha256(data).hexdigest()


def parse(kind: type[S], data: bytes, what: str) -> Metadata[S]:
    """Read metadata of one type without judging its signatures.

    Args:
        kind: Root, Timestamp, Snapshot or Targets.
        data: the file.
        what: the role's name, for error messages.

    Raises:
        Rejected: TOO_LARGE; MALFORMED: not metadata, of another type, or with a version beyond the largest one.
    """
    if len(data) > MAX_BYTES[kind]:
        raise Rejected(RejectCode.TOO_LARGE, f"{what} has {len(data)} bytes, at most {MAX_BYTES[kind]} are accepted")
    try:
        metadata: Metadata[S] = Metadata.from_bytes(data)
    except (DeserializationError, RecursionError) as error:
        raise Rejected(RejectCode.MALFORMED, f"{what} is not TUF metadata: {error.__cause__ or error}") from error
    if metadata.signed.type != kind.type:
        raise Rejected(RejectCode.MALFORMED, f"{what} is of type {metadata.signed.type}, not {kind.type}")
    if metadata.signed.version > VERSION_MAX:
        raise Rejected(RejectCode.MALFORMED, f"{what} has version {metadata.signed.version}, beyond {VERSION_MAX}")
    return metadata


def verify(delegator: Root | Targets, role: str, payload: bytes, signatures: Mapping[str, Signature]) -> None:
    """Require signatures of a threshold of the role's keys (TUF specification, 5.3.4, 5.4.2, 5.5.3 and 5.6.3).

    Signatures are counted by the *value* of their keys: one key under two ids is one signer.

    Raises:
        Rejected: UNSIGNED: fewer signatures than the threshold, or no such role.
    """
    try:
        result = delegator.get_verification_result(role, payload, dict(signatures))
    except ValueError as error:
        raise Rejected(RejectCode.UNSIGNED, f"no key is trusted to sign {role}") from error
    signers = {identity(key) for key in result.signed.values()}
    if len(signers) < result.threshold:
        raise Rejected(RejectCode.UNSIGNED, f"{role} is signed by {len(signers)} of the {result.threshold} keys needed")


def verify_metadata(delegator: Root | Targets, role: str, metadata: Metadata[S]) -> None:
    """Verify a role's metadata file, see `verify`; also raises `Rejected` (MALFORMED) without a canonical form."""
    try:
        payload = metadata.signed_bytes
    except (SerializationError, RecursionError) as error:
        raise Rejected(RejectCode.MALFORMED, f"{role} cannot be put into canonical form: {error}") from error
    verify(delegator, role, payload, metadata.signatures)


def check_lives(delegator: Root | Targets, role: str, metadata: Metadata[S]) -> None:
    """Refuse metadata that would outlive the keys that signed it.

    A delegation may limit how long a key is valid (`KEY_ENDS`). Such a key may only sign metadata that expires no
    later, so that anything signed with a stolen key, whatever its date, has expired when the key has. No clock is
    involved.

    Raises:
        Rejected: UNSIGNED: fewer valid signatures than the threshold.
    """
    counted = counting(delegator, role, metadata)
    if len(counted) != len(metadata.signatures):
        verify(delegator, role, metadata.signed_bytes, counted)


def counting(delegator: Root | Targets, role: str, metadata: Metadata[S]) -> dict[str, Signature]:
    """Return the signatures whose keys do not end before the metadata expires, see `check_lives`."""
    ends = key_ends(delegator, role)
    late = {keyid for keyid, end in ends.items() if metadata.signed.expires > end}
    return {keyid: signature for keyid, signature in metadata.signatures.items() if keyid not in late}


def key_ends(delegator: Root | Targets, role: str) -> dict[str, datetime]:
    """Return when the keys of a delegation end (key id -> UTC); keys without an end are left out.

    Raises:
        Rejected: MALFORMED: the field cannot be read.
    """
    try:
        fields = delegator.get_delegated_role(role).unrecognized_fields
        return msgspec.convert(fields.get(KEY_ENDS, {}), dict[str, Annotated[datetime, msgspec.Meta(tz=True)]])
    except (ValueError, msgspec.ValidationError) as error:
        raise Rejected(RejectCode.MALFORMED, f"the end dates of the keys of {role} cannot be read: {error}") from error


def identity(key: Key) -> bytes:
    """Return a canonical form of a public key: equal for every key id and every encoding of the same key."""
    public = str(key.keyval.get("public", ""))
    try:
        if key.keytype == "ed25519":
            return b"ed25519" + bytes.fromhex(public)
        return load_pem_public_key(public.encode()).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm):
        return public.encode()


def key_set(delegator: Root | Targets, roles: Iterable[str]) -> str:
    """Return a digest of the roles' keys and thresholds: the scope in which versions are remembered."""
    digest = hashlib.sha256()
    for name in roles:
        try:
            role = delegator.get_delegated_role(name)
        except ValueError as error:
            raise Rejected(RejectCode.UNSIGNED, f"no key is trusted to sign {name}") from error
        values = sorted({identity(key).hex() for key in keys_by_id(delegator, role.keyids).values()})
        digest.update(f"{name} {role.threshold} {' '.join(values)}\n".encode())
    return digest.hexdigest()


def keys_by_id(delegator: Root | Targets, keyids: Iterable[str]) -> dict[str, Key]:
    """Return the keys of these ids; ids without a key are left out."""
    known = (
        delegator.keys if isinstance(delegator, Root) else delegator.delegations.keys if delegator.delegations else {}
    )
    return {keyid: known[keyid] for keyid in keyids if keyid in known}


def check_duplicates(delegator: Root | Targets, role: str) -> None:
    """Refuse a role whose keys are the same key under several ids: its threshold would be smaller than it looks.

    Raises:
        Rejected: MALFORMED.
    """
    keys = keys_by_id(delegator, delegator.get_delegated_role(role).keyids).values()
    if len({identity(key) for key in keys}) != len(keys):
        raise Rejected(RejectCode.MALFORMED, f"{role} lists one public key under several ids")


def check_expiry(signed: Signed, now: datetime, what: str) -> None:
    """Refuse metadata that is no longer valid at `now`.

    Raises:
        Rejected: EXPIRED.
    """
    if signed.is_expired(now):
        raise Rejected(
            RejectCode.EXPIRED,
            f"{what} {signed.version} expired on {signed.expires:%Y-%m-%d %H:%M} UTC, now is {now:%Y-%m-%d %H:%M}",
        )


def check_file(meta: MetaFile | TargetFile, data: bytes, what: str) -> None:
    """Refuse a file that is not the one that another role promised (TUF specification, 5.5.2 and 5.6.2).

    Raises:
        Rejected: HASH_MISMATCH.
    """
    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise Rejected(RejectCode.HASH_MISMATCH, f"{what} is not the file that was promised: {error}") from error


CEILING: Final = "ceiling"
"""Signed field of a namespace's delegation: the most that its components may be granted."""

REVOKED: Final = "revoked"
"""Signed field of a namespace's role: target paths that must no longer run."""

PROFILE: Final = "wasmfleet"
"""Signed field of root: which fleet the repository is of, and its size."""


def verify_root(trusted: Root, data: bytes) -> Root:
    """Verify the root that follows a trusted one (TUF specification, 5.3.4 and 5.3.5).

    The keys of both roots must have signed the new one, and its version must be the trusted version plus one.

    Raises:
        Rejected: TOO_LARGE, MALFORMED, UNSIGNED, ROLLBACK.
    """
    new = parse(Root, data, "root")
    verify_metadata(trusted, "root", new)
    verify_metadata(new.signed, "root", new)
    if new.signed.version != trusted.version + 1:
        raise rollback_rejection("root", new.signed.version, trusted.version + 1)
    return new.signed


def profile(root: Root) -> dict[str, Any]:
    """Return root's signed fields about the fleet: `fleet` and `size`; empty where there are none."""
    fields = root.unrecognized_fields.get(PROFILE, {})
    return fields if isinstance(fields, dict) else {}


def ceiling(delegator: Targets, name: str) -> list[Grants]:
    """Return the ceiling that a delegation sets (no or a single item); raises `Rejected` (MALFORMED) if unreadable."""
    role = delegator.delegations.roles.get(name) if delegator.delegations and delegator.delegations.roles else None
    if not isinstance(role, DelegatedRole) or CEILING not in role.unrecognized_fields:
        return []
    try:
        return [msgspec.convert(role.unrecognized_fields[CEILING], Grants)]
    except msgspec.ValidationError as error:
        raise Rejected(RejectCode.MALFORMED, f"the ceiling of {name} cannot be read: {error}") from error


def is_revoked(role: Targets, path: str) -> bool:
    """Return whether a role's publisher has revoked the target."""
    revoked = role.unrecognized_fields.get(REVOKED, [])
    return isinstance(revoked, list) and path in revoked


def rollback_rejection(what: str, version: int, known: int) -> Rejected:
    """Return the error for a role whose version is below the known one."""
    return Rejected(RejectCode.ROLLBACK, f"{what} has version {version}, but version {known} was seen before")


DIRECTOR: Final = "director"
"""Name of the delegation whose keys sign assignments, freshness statements and commands."""
