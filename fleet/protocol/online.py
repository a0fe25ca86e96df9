"""The part of the operator API that is about snapshot and timestamp signed on another host than the server."""

from typing import Final

import msgspec

from fleet.protocol.api import Body, View
from fleet.protocol.caps import Stored

NONE: Final = msgspec.Raw(b"null")
"""No snapshot: the newest one stays."""


class OnlineView(View, frozen=True, kw_only=True):
    """Where snapshot and timestamp are signed, and what waits for it.

    Attributes:
        elsewhere: the server does not hold their keys: a publisher host signs.
        snapshot, timestamp: the versions that boards see.
        waiting: the signing event that is published as soon as both are signed over it; empty for none.
        problems: sentences for people.
    """

    elsewhere: bool
    snapshot: Stored
    timestamp: Stored
    waiting: str = ""
    problems: tuple[str, ...] = ()


class OnlineRequest(Body, frozen=True, kw_only=True):
    """Snapshot (where it changed) and timestamp, signed. Their signatures say whether they count."""

    timestamp: msgspec.Raw
    snapshot: msgspec.Raw = msgspec.field(default_factory=lambda: NONE)  # a schema cannot show a raw default
