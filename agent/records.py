"""What the agent keeps about components: plain values, as they are stored and as the agent speaks of them."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final

import msgspec

from agent.update.machine import Phase, State, phase_of
from agent.update.plan import Failure, InFlight, Want
from agent.update.probation import Facts
from fleet.protocol import wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RETRYABLE, RejectCode
from fleet.protocol.manifest import Manifest

RETRY_FIRST_S: Final = 3600.0
RETRY_MAX_S: Final = 86_400.0
RETRY_TRIES_MAX: Final = 10


def item_key(item: Item) -> str:
    """A digest of all that makes an item what it is; attempt, rollout and what it is swapped with are no part of it."""
    return wire.digest(msgspec.structs.replace(item, attempt=0, rollout="", atomic=""))


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
        well: it has passed its own probation, and waits for the rest of its atomic set.
    """

    instance: str
    assignment: int
    state: State
    well: bool = False
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
            msgspec.DecodeError: damaged, in whichever way.
        """
        try:
            raw: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            raw["state"]["phase"] = phase_of(str(raw["state"].get("phase", ""))).value
            return msgspec.convert(raw, cls)
        except (KeyError, TypeError, AttributeError, *wire.JSON_ERRORS) as error:
            raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error


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


class Doubt(msgspec.Struct, frozen=True, kw_only=True):
    """What speaks by now against an item that is committed (`agent.confirm`).

    Attributes:
        key: of the item (`item_key`).
        target: its target path.
    """

    instance: str
    key: str
    target: str
    code: RejectCode
    message: str


def want_of(item: Item) -> Want:
    """An item, as a plan has to know it."""
    return Want(instance=item.instance, key=item_key(item), attempt=item.attempt, rollout=item.rollout)


def in_flight_of(change: Change) -> InFlight:
    """A change under way, as a plan has to know it."""
    item = change.item
    if item is None:
        return InFlight(instance=change.instance, key="", phase=change.phase)
    want = want_of(item)
    return InFlight(
        instance=change.instance, key=want.key, phase=change.phase, attempt=want.attempt, rollout=want.rollout
    )


def failure_of(failed: FailedItem) -> Failure:
    """A remembered failure, as a plan has to know it."""
    return Failure(
        instance=failed.instance,
        key=failed.key,
        attempt=failed.attempt,
        rollout=failed.rollout,
        retry_at=failed.retry_at,
    )


def failed_item(change: Change, known: Iterable[FailedItem], now: datetime) -> FailedItem | None:
    """What is to be remembered of a change that failed; None for one that was only superseded.

    A failure of a kind that passes may be tried again by itself: after an hour, then doubling up to a day, ten times.
    """
    code = RejectCode(change.state.code or RejectCode.INTERNAL)
    if change.item is None or code is RejectCode.SUPERSEDED:
        return None
    key, attempt = item_key(change.item), change.item.attempt
    earlier = [
        each.tries for each in known if (each.instance, each.key, each.attempt) == (change.instance, key, attempt)
    ]
    tries = 1 + max(earlier, default=0)
    delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** (tries - 1))
    again = code in RETRYABLE and tries <= RETRY_TRIES_MAX
    return FailedItem(
        instance=change.instance,
        key=key,
        attempt=attempt,
        target=change.item.target,
        code=code,
        message=change.state.message,
        at=now,
        rollout=change.item.rollout,
        tries=tries,
        retry_at=now.timestamp() + delay_s if again else None,
    )
