"""The closed vocabularies that travel in reports: why something was refused, and how a deployment stands.

An operator reads these words; a program switches on them. A word is never renamed, only added.
"""

from enum import StrEnum


class RejectCode(StrEnum):
    """Why a board refused something. Each is final unless `retryable` says otherwise."""

    TOO_LARGE = "too-large"
    MALFORMED = "malformed"
    UNSUPPORTED_VERSION = "unsupported-version"
    UNSIGNED = "unsigned"
    ROLLBACK = "rollback"
    FREEZE = "freeze"
    EXPIRED = "expired"
    EQUIVOCATION = "equivocation"  # an equal version with other bytes
    WRONG_FLEET = "wrong-fleet"
    WRONG_DEVICE = "wrong-device"
    UNKNOWN_TARGET = "unknown-target"
    TARGET_MISMATCH = "target-mismatch"  # length, hash or manifest differ from the image repository's
    SECURITY_EPOCH = "security-epoch"
    GRANT_DENIED = "grant-denied"
    WRONG_ARCH = "wrong-arch"
    EMPTY = "empty"  # an empty desired list without stop_all
    REVOKED = "revoked"
    REPLAY = "replay"
    RATE_LIMITED = "rate-limited"
    DEVELOPMENT = "development"  # a repository made for development, on a board in production

    NOT_FOUND = "not-found"
    HASH_MISMATCH = "hash-mismatch"
    LENGTH_MISMATCH = "length-mismatch"
    # a secret that the manifest requires is not assigned; a box was changed, or sealed for something else
    SECRET_MISSING = "secret-missing"  # noqa: S105 - a word
    SECRET_UNOPENED = "secret-unopened"  # noqa: S105 - a word

    UNREACHABLE = "unreachable"
    TOO_SLOW = "too-slow"
    NO_SPACE = "no-space"

    NOT_A_COMPONENT = "not-a-component"
    COMPILE_FAILED = "compile-failed"
    COMPILE_LIMIT = "compile-limit"
    NO_ENGINE = "no-engine"
    IMAGE_DAMAGED = "image-damaged"

    START_FAILED = "start-failed"
    HEALTH_FAILED = "health-failed"
    TRAPPED = "trapped"
    RESTARTED = "restarted"
    ERROR_RATE = "error-rate"
    TOO_LATE = "too-late"  # latency against the replaced version
    TOO_MUCH_MEMORY = "too-much-memory"  # against the replaced version
    CONTAINMENT = "containment"  # the board's policy demands a layer that it does not have
    PORT_IN_USE = "port-in-use"
    HOST_GONE = "host-gone"
    SUPERSEDED = "superseded"
    STATE_FAILED = "state-failed"  # memory could not be carried from the old version to the new
    SET_FAILED = "set-failed"  # another instance of its atomic set failed
    INTERRUPTED = "interrupted"  # power or process lost more often than the counter allows
    INTERNAL = "internal"


RETRYABLE = frozenset(
    {
        RejectCode.UNREACHABLE,
        RejectCode.TOO_SLOW,
        RejectCode.NO_SPACE,
        RejectCode.HOST_GONE,
        RejectCode.EXPIRED,
        RejectCode.FREEZE,  # the repository may catch up
    }
)
"""What the board tries again by itself; all else is final until the operator raises the attempt."""


class Phase(StrEnum):
    """Where a deployment of one instance stands on the board (DESIGN: the board's update machine)."""

    IDLE = "idle"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    COMPILING = "compiling"
    STAGED = "staged"
    SWAPPING = "swapping"
    PROBATION = "probation"
    COMMITTED = "committed"
    FAILED = "failed"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"


class CallOutcome(StrEnum):
    """How one call of a guest ended. Only the guest's own outcomes count against it."""

    OK = "ok"
    GUEST_TRAP = "guest-trap"
    GUEST_TIMEOUT = "guest-timeout"
    CLIENT_GONE = "client-gone"
    CLIENT_SLOW = "client-slow"
    HOST_ERROR = "host-error"


GUEST_FAULTS = frozenset({CallOutcome.GUEST_TRAP, CallOutcome.GUEST_TIMEOUT})


class InstanceState(StrEnum):
    """What an instance is doing in the host."""

    RUNNING = "running"
    BACKOFF = "backoff"
    QUARANTINED = "quarantined"
    STOPPED = "stopped"
