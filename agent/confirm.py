"""Whether what runs may go on running: committed items held against what publishers and the owner say by now.

An item is judged when it is deployed, and that was the last time that the server had a say in it: a release can be
revoked later, a ceiling lowered, this board's policy narrowed. So everything committed is looked at again after each
refresh, whether or not a new assignment came with it, for a server that keeps a revocation's removal from its boards
still has to show them metadata that has not expired. What cannot be known (no metadata, an expired role) is no doubt:
expiry ends updates, never what runs.
"""

from collections.abc import Iterable
from typing import Final, Protocol

from agent.config import Policy
from agent.records import Committed, Doubt, item_key
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Manifest
from signing.errors import Rejected

REASONS: Final = frozenset({RejectCode.REVOKED, RejectCode.GRANT_DENIED, RejectCode.SECURITY_EPOCH})
"""Codes that stand against something that runs; all others were judged when it was deployed."""


class Reconfirms(Protocol):
    """The part of `agent.trust.Trust` that is asked."""

    def reconfirm(self, item: Item, manifest: Manifest) -> None:
        """Raise `Rejected` if publishers no longer stand by a committed item."""


def doubts(trust: Reconfirms, policy: Policy, committed: Iterable[Committed]) -> tuple[Doubt, ...]:
    """What speaks against each committed item that should not run any more.

    Args:
        trust: asked for revocations, ceilings and epochs.
        policy: the board owner's.
        committed: what runs.
    """
    asked = ((each, _doubt(trust, policy, each)) for each in committed)
    return tuple(
        Doubt(
            instance=each.item.instance,
            key=item_key(each.item),
            target=each.item.target,
            code=error.code,
            message=error.message,
        )
        for each, error in asked
        if error is not None
    )


def _doubt(trust: Reconfirms, policy: Policy, committed: Committed) -> Rejected | None:
    item, manifest = committed.item, committed.manifest
    try:
        trust.reconfirm(item, manifest)
    except Rejected as error:
        if error.code in REASONS:
            return error
    denied = policy.denied(manifest.grants if item.grants is None else item.grants)
    if denied:
        return Rejected(RejectCode.GRANT_DENIED, f"this board's own policy does not allow {', '.join(denied)}")
    return None
