"""Files that somebody's build tools wrote, taken for hostile: bounded JSON, and one error type for all of them."""

from typing import Any, TypeVar

import msgspec

from fleet.protocol import wire
from fleet.protocol.evidence import MAX_BYTES

T = TypeVar("T")


class DocumentError(ValueError):
    """A file that is not what it was said to be. The message is for people: what, and what to do."""


def load(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Args:
        data: the whole file.
        what: how messages call it.

    Raises:
        DocumentError: empty, too large, not JSON, or no object.
    """
    if not data.strip():
        raise DocumentError(f"{what} is empty: did the tool that writes it fail?")
    if len(data) > MAX_BYTES:
        raise DocumentError(f"{what} has {len(data)} bytes, at most {MAX_BYTES >> 20} MiB are kept")
    head = data.lstrip()[:64]
    if head.startswith(b"<"):
        raise DocumentError(f"{what} is XML: have the tool write JSON")
    if head.startswith((b"SPDXVersion:", b"SPDXID:")):
        raise DocumentError(f"{what} is SPDX in tag-value form: have the tool write JSON")
    try:
        value = msgspec.json.decode(data)
    except wire.JSON_ERRORS as error:
        raise DocumentError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DocumentError(f"{what} is JSON, but no object")
    return value


def convert(value: object, kind: type[T], what: str) -> T:
    """A part of it as `kind`; raises `DocumentError` that names the field."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DocumentError(f"{what}: {error}") from error
