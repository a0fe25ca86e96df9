"""What the agent keeps about components: plain values, as they are stored and as the agent speaks of them."""

from datetime import datetime
from typing import Any

import msgspec

from agent.update.machine import Phase, State, phase_of
from agent.update.probation import Facts
from fleet.protocol import wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Manifest


def item_key(item: Item) -> str:
    """A digest of all that makes an item what it is; attempt and rollout are no part of it."""
    return wire.digest(msgspec.structs.replace(item, attempt=0, rollout=""))


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """What runs, and is to run again after a boot.

    Attributes:
        generation: of the instance in the host.
        assignment: version of the assignment that brought it.
    """

    item: Item
    manifest: Manifest
    generation: int
    assignment: int
    at: datetime


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One instance being changed.

    Attributes:
        item: what is to run; None for a removal.
        manifest: known once the target was found in the signed metadata.
        generation: in the host, given when the swap begins; 0 before.
        replaced: figures of what it replaces, taken before the swap.
        boot_id: of the boot in which `state.entered` counts.
        timings_ms: phase -> how long it took.
    """

    instance: str
    assignment: int
    state: State
    item: Item | None = None
    manifest: Manifest | None = None
    generation: int = 0
    replaced: Facts | None = None
    boot_id: str = ""
    timings_ms: dict[str, int] = {}

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        return self.state.phase

    def encode(self) -> bytes:
        """As JSON, for the store."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Change":
        """Read what `encode` of this or another version made: an unknown phase rolls back, unknown fields are left.

        Raises:
            msgspec.MsgspecError: damaged.
        """
        raw: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        raw["state"]["phase"] = phase_of(str(raw["state"].get("phase", ""))).value
        return msgspec.convert(raw, cls)


class FailedItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item that failed: not tried again by itself until its attempt is raised.

    Attributes:
        tries: how often it has been tried in all, where the failure is of a kind that may pass.
        retry_at: unix seconds; None for never.
    """

    instance: str
    key: str
    attempt: int
    target: str
    code: RejectCode
    message: str
    at: datetime
    rollout: str = ""
    tries: int = 1
    retry_at: float | None = None
