"""Signed by the director: assignments, freshness statements and commands, as the bytes inside a DSSE envelope.

The envelope itself (payload type, pre-authentication encoding, signatures) is in `signing.dsse`. The director is a
delegation in the TUF targets role, so its keys rotate as TUF's do.
"""

from typing import ClassVar, Final

import msgspec

from fleet.protocol import bounds, wire
from fleet.protocol.bounds import Count, Port, Utc, Word
from fleet.protocol.manifest import Grants
from fleet.protocol.wire import Message

ASSIGNMENT_TYPE: Final = "application/vnd.wasmfleet.assignment.v1+json"
FRESH_TYPE: Final = "application/vnd.wasmfleet.fresh.v1+json"
COMMAND_TYPE: Final = "application/vnd.wasmfleet.command.v1+json"


class SecretRef(msgspec.Struct, frozen=True, kw_only=True):
    """A secret by name and the sha256 of its sealed box, never its value.

    Attributes:
        version: of the secret; after a device has committed one, it refuses older ones.
    """

    name: str
    sha256: str
    version: Count = 0


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """Instance that a device should run.

    Attributes:
        instance: its name on the device.
        target: TUF target path.
        length, sha256: of the artifact.
        manifest_sha256: of the manifest in the target's `custom`.
        grants: narrowed by the operator; None for all that the manifest asks.
        config: values for the manifest's configuration keys.
        port: a port of its own on the device's ingress address; None for the shared one.
        share_worker: whether it may share a worker with other instances of its publisher.
        share_lane: earlier name of `share_worker`, in assignments from before 0.2.0: read and then unset.
        atomic: items with the same text here are swapped as one; empty for an item of its own.
        attempt: raised to make the device retry a failed item.
        rollout: id of the rollout that offers it, echoed in reports; not part of the item's identity.
    """

    instance: str
    target: str
    length: Count
    sha256: str
    manifest_sha256: str
    grants: Grants | None = None
    config: dict[str, str] = {}
    secrets: tuple[SecretRef, ...] = ()
    port: Port | None = None
    share_worker: bool = False
    share_lane: bool | msgspec.UnsetType = msgspec.UNSET
    atomic: str = ""
    attempt: Count = 0
    rollout: str = ""

    def __post_init__(self) -> None:
        """Read the earlier names of fields."""
        wire.take_earlier(self, share_worker="share_lane")

    def same_as(self, other: "Item") -> bool:
        """Tell whether both ask for the same instance, whatever their attempt and rollout."""
        return msgspec.structs.replace(self, attempt=0, rollout="") == msgspec.structs.replace(
            other, attempt=0, rollout=""
        )


class Assignment(Message, frozen=True, kw_only=True):
    """Desired state of one device, complete.

    Attributes:
        fleet, device: the addressee; other devices refuse it (`wrong-fleet`, `wrong-device`).
        version: grows with each change and never falls; an equal version is byte-identical.
        issued, expires: UTC. An expired assignment changes nothing on the device and stops nothing.
        snapshot: the oldest acceptable version of TUF's snapshot role.
        items: the complete desired list, at most 64.
        stop_all: required for an empty list of items.
        keep_data: instances that are no longer listed, and whose data is kept.
    """

    MAX_BYTES: ClassVar[int] = bounds.DESIRED_MAX_BYTES
    fleet: str
    device: str
    version: Count
    issued: Utc
    expires: Utc
    snapshot: Count = 1
    items: tuple[Item, ...] = ()
    stop_all: bool = False
    keep_data: tuple[str, ...] = ()


def payload(assignment: Assignment) -> bytes:
    """Return the JSON that the director signs.

    An item that may share a worker says so under both names: agents before 0.2.0 know `share_lane` alone.
    """
    plain = msgspec.to_builtins(assignment)
    for item in plain["items"]:
        if item["share_worker"]:
            item["share_lane"] = True
    return msgspec.json.encode(plain)


class Fresh(Message, frozen=True, kw_only=True):
    """Freshness statement: the director confirms for one nonce that an assignment is current."""

    MAX_BYTES: ClassVar[int] = bounds.COMMAND_MAX_BYTES
    fleet: str
    device: str
    nonce: str
    assignment_sha256: str
    issued: Utc
    expires: Utc


class Verb(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb"):
    """Base of the closed vocabulary of commands."""


class CheckIn(Verb, frozen=True, kw_only=True, tag="check-in"):
    """Fetch the desired state, and send health and a signed report of the state of each instance now."""


class Restart(Verb, frozen=True, kw_only=True, tag="restart"):
    """Restart one instance; rate-limited by the device."""

    instance: str


class FollowLogs(Verb, frozen=True, kw_only=True, tag="follow-logs"):
    """Send an instance's log lines over HTTPS for some minutes, as far as local policy allows."""

    instance: str
    minutes: Count = 5


class Diagnose(Verb, frozen=True, kw_only=True, tag="diagnose"):
    """Send an archive about the device over HTTPS, as far as local policy allows.

    Attributes:
        recipient: X25519 public key, base64, made by the operator for this request: the archive is sealed to it.
    """

    recipient: Word


class Command(Message, frozen=True, kw_only=True):
    """Signed command for one device: valid for minutes, carried out once."""

    MAX_BYTES: ClassVar[int] = bounds.COMMAND_MAX_BYTES
    fleet: str
    device: str
    sequence: Count
    issued: Utc
    expires: Utc
    verb: CheckIn | Restart | FollowLogs | Diagnose


COMMANDS: Final = tuple(sorted(str(kind.__struct_config__.tag) for kind in (CheckIn, Restart, FollowLogs, Diagnose)))
"""Commands that this agent knows, as it tells its server (`Versions.commands`)."""

FIRST_COMMANDS: Final = frozenset({"check-in", "restart", "follow-logs"})
"""Commands that every agent knows, also one that does not tell."""


class LaterVerb(msgspec.Struct, frozen=True, kw_only=True):
    """Verb of which only the name is known here."""

    verb: Word


class LaterCommand(Message, frozen=True, kw_only=True):
    """Command of a later vocabulary: as `Command`, with a verb that this agent does not know and names to people."""

    MAX_BYTES: ClassVar[int] = bounds.COMMAND_MAX_BYTES
    fleet: str
    device: str
    sequence: Count
    issued: Utc
    expires: Utc
    verb: LaterVerb
