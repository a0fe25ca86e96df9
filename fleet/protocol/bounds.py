"""Upper bounds of everything that crosses a boundary, in bytes unless the name says otherwise."""

from datetime import datetime
from typing import Annotated, Final

from msgspec import Meta

KIB: Final = 1024
MIB: Final = 1024 * KIB

# MQTT messages
DESIRED_MAX_BYTES: Final = 256 * KIB
COMMAND_MAX_BYTES: Final = 8 * KIB
ACK_MAX_BYTES: Final = 1 * KIB
HELLO_MAX_BYTES: Final = 4 * KIB
STATE_MAX_BYTES: Final = 8 * KIB
HEALTH_MAX_BYTES: Final = 64 * KIB
REPORT_MAX_BYTES: Final = 64 * KIB

# TUF metadata: the largest file of a role that a device fetches
ROOT_MAX_BYTES: Final = 512 * KIB
TIMESTAMP_MAX_BYTES: Final = 16 * KIB
SNAPSHOT_MAX_BYTES: Final = 2 * MIB
TARGETS_MAX_BYTES: Final = 5 * MIB
ROOT_ROTATIONS_MAX: Final = 256

# Components
MANIFEST_MAX_BYTES: Final = 4 * KIB
ARTIFACT_MAX_BYTES: Final = 64 * MIB
DATA_MAX_BYTES: Final = 1024 * MIB  # of a data package
DATA_USES_MAX: Final = 8  # data packages of one component
IMAGE_MAX_BYTES: Final = 512 * MIB
ITEMS_MAX: Final = 64
CONFIG_VALUE_MAX_BYTES: Final = 8 * KIB
DEVICE_KEYS_MAX_BYTES: Final = 64 * KIB  # configuration of a device's own, of each instance, as JSON

# Sealed secrets: values of one instance, each in a box of its own
SECRETS_MAX: Final = 16
SECRET_VALUE_MAX_BYTES: Final = 4 * KIB
SECRET_VALUE_MIN_CHARS: Final = 4  # a shorter value could not be recognised and removed from log lines
SECRET_BOX_MAX_BYTES: Final = 8 * KIB

# Lines of an instance's log in a trap or rollback report
LOG_LINES: Final = 50
LOG_MAX_BYTES: Final = 16 * KIB

# The log before a failure, in its report: as JSON, so that a report with its message stays within REPORT_MAX_BYTES
EXCERPT_MAX_BYTES: Final = 44 * KIB

# Chunks that are sent while an operator follows a log
LOG_CHUNK_MAX_BYTES: Final = 128 * KIB
LOGS_MINUTES_MAX: Final = 60

# Messages of components, and readings: those of them on their way to the operator
MESSAGE_MAX_BYTES: Final = 16 * KIB  # content alone; as text in JSON a third more
MESSAGE_TYPE_MAX_CHARS: Final = 128
MESSAGE_METADATA_MAX: Final = 16
MESSAGE_METADATA_WORD_MAX_CHARS: Final = 1024
MESSAGE_METADATA_MAX_BYTES: Final = 4 * KIB  # of all names and values together
READINGS_MAX: Final = 500
READINGS_MAX_BYTES: Final = 64 * KIB

# The archive about a device that an operator asks for. Sealed, it is hardly larger than its members, compressed or not
ARCHIVE_MEMBERS_MAX_BYTES: Final = 4 * MIB
ARCHIVE_MAX_BYTES: Final = ARCHIVE_MEMBERS_MAX_BYTES + 256 * KIB
ARCHIVE_NOTE_MAX_BYTES: Final = 4 * KIB

# Messages that travel over HTTPS at once where a network blocks MQTT, each way
EXCHANGE_MESSAGES_MAX: Final = 64
EXCHANGE_MAX_BYTES: Final = 448 * KIB  # of their payloads; as text in JSON they may be twice that, in a body of 1 MiB
EXCHANGE_WAIT_MAX_S: Final = 55

# JSON that people and machines post to the HTTP API
API_BODY_MAX_BYTES: Final = 1 * MIB

ENROL_MAX_BYTES: Final = 32 * KIB  # whoever reaches the port may send it, before anything is known of them

# Texts and lists in requests of operators. Each is above what is valid, so that what is too long for its meaning is
# refused with a sentence about that; what is beyond these is refused by the name of its field.
Word = Annotated[str, Meta(max_length=256)]
"""A name, an id, a target or the sizes of waves."""

Text = Annotated[str, Meta(max_length=2000)]
"""A sentence for people."""

Document = Annotated[str, Meta(max_length=64 * KIB)]
"""PEM, base64, or the value of a secret or of a configuration key."""

DEVICES_MAX: Final = 10_000
"""Devices that one request may name."""

Words = Annotated[tuple[Word, ...], Meta(max_length=DEVICES_MAX)]
Labels = Annotated[dict[Word, Word], Meta(max_length=ITEMS_MAX)]

# Numbers and times. Every field of a message has one of these types, whose values every reader and database accepts.
NUMBER_MAX: Final = 2**53
"""Largest number that is accepted: JSON readers and databases disagree about larger ones."""

PRIORITY_MAX: Final = 1_000_000
WAIT_MAX_S: Final = 10 * 366 * 86_400
"""Ten years, the longest soak, timeout or validity: added to the present time, the sum is still a valid time."""

Whole = Annotated[int, Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)]
"""A whole number that may be negative: a bound of a configuration key."""

Count = Annotated[int, Meta(ge=0, le=NUMBER_MAX)]
"""A version, a sequence, an attempt, a generation, a number of things, bytes, or a duration."""

Seconds = Annotated[int, Meta(ge=0, le=WAIT_MAX_S)]
"""A duration that an operator chooses, seconds."""

Percent = Annotated[int, Meta(ge=0, le=100)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
"""A TCP port; 0 for none, where that is allowed."""

Priority = Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]
Figure = Annotated[float, Meta(ge=-1e12, le=1e12)]
"""A measured value."""

Stored = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""A number in an answer of the server, as the database holds it: wider than `Count`, so that old rows stay readable."""

NAMES_MAX: Final = 64
"""Members of a dictionary whose names are of a closed vocabulary: several times the longest of them."""

PROBLEMS_MAX: Final = 1000
INTERFACES_MAX: Final = 64
"""Most packages of interfaces that a host says it serves."""
COMMANDS_MAX: Final = 64
"""Most commands that an agent says it knows."""
INSTANCES_MAX: Final = 1000
"""Far more than an assignment has (`ITEMS_MAX`): a bound for readers, not for devices."""

Counts = Annotated[dict[str, Count], Meta(max_length=NAMES_MAX)]
"""Numbers by a name of a closed vocabulary."""

MetadataWord = Annotated[str, Meta(max_length=MESSAGE_METADATA_WORD_MAX_CHARS)]
"""A name or a value in the metadata of a component's message."""

Metadata = Annotated[tuple[tuple[MetadataWord, MetadataWord], ...], Meta(max_length=MESSAGE_METADATA_MAX)]
"""Metadata of a component's message: pairs of name and value."""

MessageTopic = Annotated[str, Meta(min_length=1, max_length=256)]
MessageType = Annotated[str, Meta(max_length=MESSAGE_TYPE_MAX_CHARS)]
"""Media type of a component's message; empty for none."""

MessageData = Annotated[bytes, Meta(max_length=MESSAGE_MAX_BYTES)]

Utc = Annotated[datetime, Meta(tz=True)]
"""A time with its zone: a time without one cannot be compared with it."""


_DIGITS_MAX: Final = 18


def parse_number(said: bytes) -> int | None:
    """Read a number that a guest or a peer wrote; None for anything but up to 18 digits.

    Python refuses to read more than 4,300 digits with an error of its own, and takes spaces, signs and underscores.
    """
    return int(said) if said.isdigit() and len(said) <= _DIGITS_MAX else None
