"""Messages between a worker and the supervisor about what a component publishes: one packet each.

The socket is the worker's own. It sends one message and waits for the reply before it sends another; a reply to an
earlier number comes from a wait that was over.
"""

from typing import Final

import msgspec

from fleet.protocol import bounds
from fleet.protocol.bounds import (
    MESSAGE_METADATA_WORD_MAX_CHARS,
    Count,
    MessageData,
    MessageTopic,
    MessageType,
    Metadata,
    Text,
)
from fleet.protocol.message_topics import BadMessageTopicError, any_matches, check_topic

SEND_S: Final = 10.0
"""Longest wait for the agent to keep a message; `limits.idle` may shorten it."""

MESSAGES_A_MINUTE: Final = 600
"""Messages that an instance may publish in a minute, and at once."""

BYTES_A_MINUTE: Final = 1024 * 1024
"""Bytes of an instance's messages in a minute, and at once."""


BLOCKED_S: Final = 5.0
"""Longest wait of a sender for room in the queue of an instance that gets its message."""

LOCAL_MESSAGES_A_MINUTE: Final = 6000
LOCAL_BYTES_A_MINUTE: Final = 16 * 1024 * 1024
"""The same of messages that stay on the device."""


class Publish(msgspec.Struct, frozen=True, kw_only=True):
    """Publish a message. Answered with `Published`."""

    number: Count
    topic: MessageTopic
    data: MessageData = b""
    content_type: MessageType = ""
    metadata: Metadata = ()


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to `Publish`: kept, unless there is an error.

    Attributes:
        late: nobody kept it in time; it may be kept all the same.
        error: why it is not kept, for people.
    """

    number: Count
    late: bool = False
    error: Text = ""


def denied(topic: str, granted: tuple[str, ...]) -> str:
    """Say why a component with these grants may not publish on a topic; empty where it may."""
    try:
        check_topic(topic)
    except BadMessageTopicError as error:
        return str(error)
    return "" if any_matches(granted, topic) else f"no topic of grants.publish matches {topic!r}"


def metadata_flaw(metadata: Metadata) -> str:
    """Say why metadata is not taken; empty where it is."""
    size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata)
    if len(metadata) > bounds.MESSAGE_METADATA_MAX or size > bounds.MESSAGE_METADATA_MAX_BYTES:
        return (
            f"its metadata has {len(metadata)} entries of {size} bytes, at most "
            f"{bounds.MESSAGE_METADATA_MAX} of {bounds.MESSAGE_METADATA_MAX_BYTES} are taken"
        )
    longest, most = max((len(word) for entry in metadata for word in entry), default=0), MESSAGE_METADATA_WORD_MAX_CHARS
    if longest > most:
        return f"its metadata has a word of {longest} characters, at most {most} are taken"
    return ""
