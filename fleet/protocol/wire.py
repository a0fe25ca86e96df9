"""Strict codec for everything that crosses the wire: JSON by msgspec.

A message is a frozen struct with its schema version in `v`. Decoding checks the size first, then the version, then
every type. The decoder ignores unknown fields, stores keep the raw bytes with them; an unknown version is an error
(`UnknownSchemaError`).
"""

import hashlib
import re
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from fleet.protocol.bounds import Count

JSON_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Every exception of decoding untrusted JSON; for bytes that are no UTF-8 it is no `MsgspecError`."""


class WireError(Exception):
    """The peer's data violates the protocol; the message names the message and the reason."""


class TooLargeError(WireError):
    """More bytes than the message's cap."""


class UnknownSchemaError(WireError):
    """A schema version that this program does not know."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A message with a schema version and a size cap.

    Attributes:
        v: schema version, 1.
    """

    MAX_BYTES: ClassVar[int] = 64 * 1024
    v: Count = 1


class _Version(msgspec.Struct, frozen=True):
    v: Count = 1


M = TypeVar("M", bound=Message)


def take_earlier(message: msgspec.Struct, **earlier: str) -> None:
    """Move what came under an earlier name of a field to the field. For `__post_init__`.

    The field of the earlier name is only read: unset from here on, and so never written. Where a message has both
    names, the present one counts, unless it says nothing (false, zero, empty).

    Args:
        message: just made or decoded.
        earlier: by name of a field, the name of the field that reads its earlier name.
    """
    for name, before in earlier.items():
        value = getattr(message, before)
        if value is not msgspec.UNSET:
            msgspec.structs.force_setattr(message, before, msgspec.UNSET)
            if not getattr(message, name):
                msgspec.structs.force_setattr(message, name, value)


def encode(message: msgspec.Struct) -> bytes:
    """Return the message as compact JSON with fields in the order of the struct."""
    return msgspec.json.encode(message)


def canonical(value: Any) -> bytes:
    """Encode as deterministic JSON, keys sorted and no spaces, to be hashed or signed."""
    return msgspec.json.encode(value, order="deterministic")


def digest(value: Any) -> str:
    """Return the sha256 of `canonical(value)` in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def plain_name(kind: type) -> str:
    """Return a message's name for people: `log chunk` for `LogChunk`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()


def decode(kind: type[M], data: bytes) -> M:
    """Read a message of type `kind`.

    Raises:
        TooLargeError: more than `kind.MAX_BYTES`.
        UnknownSchemaError: a version other than 1.
        WireError: not JSON, or a field of another type.
    """
    if len(data) > kind.MAX_BYTES:
        raise TooLargeError(f"{plain_name(kind)}: {len(data)} bytes, at most {kind.MAX_BYTES} are accepted")
    try:
        version = msgspec.json.decode(data, type=_Version).v
        if version != 1:
            raise UnknownSchemaError(f"{plain_name(kind)}: schema version {version}, this program supports 1")
        return msgspec.json.decode(data, type=kind)
    except JSON_ERRORS as error:
        raise WireError(f"{plain_name(kind)}: {error}") from error


def keeping(before: bytes, after: msgspec.Struct, *, goes_on: tuple[str, ...] = ()) -> bytes:
    """Encode a record that replaces `before`, with the fields of that one which only a newer version knows.

    Those of a record inside it stay where that is the same as before, and where `goes_on` names its field: what a newer
    version says of another thing would not be true of this one.
    """
    try:
        old = msgspec.json.decode(before)
    except JSON_ERRORS:
        old = None
    return msgspec.json.encode(with_unknown(old, after, goes_on) if isinstance(old, dict) else after)


def with_unknown(old: dict[str, Any], after: msgspec.Struct, goes_on: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a record for JSON, with the fields that only `old` has; see `keeping`."""
    new: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(after))
    fields = {field.encode_name: getattr(after, field.name) for field in msgspec.structs.fields(after)}
    for name, was in old.items():
        now = fields.get(name)
        if name not in fields:
            new.setdefault(name, was)
        elif isinstance(now, msgspec.Struct) and isinstance(was, dict) and (name in goes_on or _is_same(was, now)):
            new[name] = with_unknown(was, now)
    return new


def _is_same(was: dict[str, Any], now: msgspec.Struct) -> bool:
    try:
        return msgspec.convert(was, type(now)) == now
    except msgspec.ValidationError:
        return False
