"""Every MQTT topic of the protocol, built and parsed by one table.

    fleet/v1/<shard>/<device>/down/<channel>     from the server to one device
    fleet/v1/<shard>/<device>/up/<channel>       from one device to the server
    fleet/v1/all/poke                            to every device: check in, with jitter
    fleet/v1/messages/<group>/<device>/<instance>/<topic>    what components published, for consumers

Only what MQTT 3.1.1 guarantees everywhere is used: no shared subscriptions, no retained bytes beyond the newest.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fleet.protocol import names

PREFIX: Final = "fleet/v1"
POKE: Final = f"{PREFIX}/all/poke"
MESSAGES: Final = f"{PREFIX}/messages"
_PARTS: Final = 6


class Down(StrEnum):
    """Channels from the server to a device."""

    DESIRED = "desired"  # retained: the assignment envelope
    FRESH = "fresh"  # the answer to a nonce
    ACK = "ack"  # the newest report that is stored
    COMMAND = "command"  # signed
    READINGS = "readings"  # the newest reading that is stored


class Up(StrEnum):
    """Channels from a device to the server."""

    HELLO = "hello"  # a nonce, after each connect
    STATE = "state"  # retained, with a will
    HEALTH = "health"  # periodic; only the newest matters
    REPORT = "report"  # deployment progress; kept on the device until acknowledged
    READINGS = "readings"  # messages of components; kept on the device until acknowledged


RETAINED: Final[frozenset[Down | Up]] = frozenset({Down.DESIRED, Up.STATE})


class BadTopicError(ValueError):
    """The topic does not belong to this protocol."""


@dataclass(frozen=True, slots=True)
class Topic:
    """Channel of one device."""

    device: str
    channel: Down | Up

    def __str__(self) -> str:
        way = "down" if isinstance(self.channel, Down) else "up"
        return f"{PREFIX}/{names.shard(self.device)}/{self.device}/{way}/{self.channel}"

    @classmethod
    def parse(cls, text: str) -> "Topic":
        """Read a topic.

        Raises:
            BadTopicError: a topic of another protocol, an invalid device id, or a shard that is not the device's.
        """
        parts = text.split("/")
        try:
            fleet, version, shard, device, way, channel = parts
            names.check_device(device)
            topic = cls(device, Down(channel) if way == "down" else Up(channel))
        except ValueError as error:
            raise BadTopicError(f"{text[:200]!r} is not a topic of this protocol") from error
        if f"{fleet}/{version}" != PREFIX or way not in {"down", "up"} or shard != names.shard(device):
            raise BadTopicError(f"{text[:200]!r} is not a topic of this protocol")
        return topic


def device_subscriptions(device: str) -> tuple[str, ...]:
    """Return the topics that a device subscribes to."""
    return (f"{PREFIX}/{names.shard(device)}/{device}/down/+", POKE)


def device_rights(user: str) -> tuple[tuple[str, str], ...]:
    """Return what a device may do as pairs of `read` or `write` and a topic; `user` stands for its id.

    The channels are named one by one, so that a device cannot fill a broker with topics that nobody reads. The shard
    stays open, because no broker computes it: a message in another shard than the device's is refused by `Topic.parse`.
    """
    return (
        *(("write", f"{PREFIX}/+/{user}/up/{channel}") for channel in Up),
        *(("read", f"{PREFIX}/+/{user}/down/{channel}") for channel in Down),
        ("read", POKE),
    )


def sender(topic: str) -> str:
    """Return the device whose certificate let it write to a topic, also where that is none of the protocol; or empty.

    The broker binds this part of a topic to the certificate, and no other.
    """
    parts = topic.split("/")
    if len(parts) != _PARTS or "/".join(parts[:2]) != PREFIX or parts[4] != "up":
        return ""
    return parts[3] if names.is_device(parts[3]) else ""


def server_subscriptions(shards: tuple[str, ...] = ("+",)) -> tuple[str, ...]:
    """Return the topics that a server process subscribes to: all devices, or those of its shards."""
    return tuple(f"{PREFIX}/{shard}/+/up/+" for shard in shards)


def consumed(group: str, device: str, instance: str, topic: str) -> str:
    """Return the topic on which consumers read a component's message."""
    return f"{MESSAGES}/{group}/{device}/{instance}/{topic}"


def consumer_user(name: str, number: str) -> str:
    """Return the user of a consumer's certificate, which is no device's: their ids have no dot."""
    return f"consumer.{name}.{number}"


def consumer_topics(group: str, filters: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a consumer may read, as filters of the broker."""
    return tuple(consumed(group, "+", "+", each) for each in filters)


def not_of_consumers(user: str) -> tuple[str, ...]:
    """Return what devices may write and read, by patterns that hold for every user, and a consumer may not."""
    return (f"{PREFIX}/+/{user}/#", POKE)
