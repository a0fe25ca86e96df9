"""A limit on everything that crosses a boundary, in one place. Sizes in bytes unless the name says otherwise."""

from typing import Final

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

# TUF metadata: what a board fetches of one role at the most
ROOT_MAX_BYTES: Final = 512 * KIB
TIMESTAMP_MAX_BYTES: Final = 16 * KIB
SNAPSHOT_MAX_BYTES: Final = 2 * MIB
TARGETS_MAX_BYTES: Final = 5 * MIB
ROOT_ROTATIONS_MAX: Final = 256

# Components
MANIFEST_MAX_BYTES: Final = 4 * KIB
ARTIFACT_MAX_BYTES: Final = 64 * MIB
IMAGE_MAX_BYTES: Final = 512 * MIB
ITEMS_MAX: Final = 64
CONFIG_VALUE_MAX_BYTES: Final = 8 * KIB

# Sealed secrets: values of one instance, each in a box of its own
SECRETS_MAX: Final = 16
SECRET_VALUE_MAX_BYTES: Final = 4 * KIB
SECRET_VALUE_MIN_CHARS: Final = 4  # a shorter one could not be kept out of log lines
SECRET_BOX_MAX_BYTES: Final = 8 * KIB

# What a trap or rollback report carries of an instance's log
LOG_LINES: Final = 50
LOG_MAX_BYTES: Final = 16 * KIB

# What is sent while an operator follows a log
LOG_CHUNK_MAX_BYTES: Final = 128 * KIB
LOGS_MINUTES_MAX: Final = 60

# JSON that people and machines post to the HTTP API
API_BODY_MAX_BYTES: Final = 1 * MIB
