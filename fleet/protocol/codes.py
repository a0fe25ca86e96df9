"""Closed vocabularies: reject codes, phases, call outcomes, instance and rollout states; remediation texts.

The closed vocabularies that travel in reports: why something was refused, and how a deployment stands.

An operator reads these words; a program switches on them. A word is never renamed, only added.

What to do about each thing that a board may refuse: one sentence per code, for timelines and `fleet why`.
"""

from enum import StrEnum
from typing import Final


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


_ATTACK: Final = "if nobody in the team did this, treat the server or the network as hostile: see SECURITY.md"

ADVICE: Final[dict[RejectCode, str]] = {
    RejectCode.TOO_LARGE: "make it smaller, or split it over several instances",
    RejectCode.MALFORMED: _ATTACK,
    RejectCode.UNSUPPORTED_VERSION: "upgrade the agent on the board",
    RejectCode.UNSIGNED: _ATTACK,
    RejectCode.ROLLBACK: "the server's database or repository was set back: restore the newest backup; " + _ATTACK,
    RejectCode.FREEZE: "let the server sign its timestamp anew (fleet status names the roles); check the board's clock",
    RejectCode.EXPIRED: "sign the expired role again (fleet status names it); the board tries again by itself",
    RejectCode.EQUIVOCATION: _ATTACK,
    RejectCode.WRONG_FLEET: _ATTACK,
    RejectCode.WRONG_DEVICE: _ATTACK,
    RejectCode.UNKNOWN_TARGET: "publish the component, then deploy again",
    RejectCode.TARGET_MISMATCH: _ATTACK,
    RejectCode.SECURITY_EPOCH: "the board has run a version with a higher security epoch: deploy one not below it",
    RejectCode.GRANT_DENIED: "the board's owner or the namespace's ceiling does not allow these grants: ask for fewer",
    RejectCode.WRONG_ARCH: "publish a version for this CPU, or keep the board out of the group",
    RejectCode.EMPTY: _ATTACK,
    RejectCode.REVOKED: "this release was revoked: deploy another version",
    RejectCode.REPLAY: _ATTACK,
    RejectCode.RATE_LIMITED: "wait: the board does this only so often",
    RejectCode.NOT_FOUND: "upload the artifact again: fleet publish FILE",
    RejectCode.HASH_MISMATCH: "the artifact on the server or a cache was changed: upload it again; " + _ATTACK,
    RejectCode.LENGTH_MISMATCH: "the artifact on the server or a cache was changed: upload it again; " + _ATTACK,
    RejectCode.SECRET_MISSING: "give it the secret: fleet secret set NAME; fleet secret list says who lacks one",
    RejectCode.SECRET_UNOPENED: "set the secret again: fleet secret set NAME; " + _ATTACK,
    RejectCode.UNREACHABLE: "check the way from the board to the devices' port (fleet-agent check); it tries again",
    RejectCode.TOO_SLOW: "the network is too slow for this artifact; the board tries again",
    RejectCode.NO_SPACE: "free space on the board, or remove an instance; the board tries again",
    RejectCode.NOT_A_COMPONENT: "build a WASI 0.2 component",
    RejectCode.COMPILE_FAILED: "the engine on this board cannot compile it: see the message, deploy another build",
    RejectCode.COMPILE_LIMIT: "compiling took more memory or time than this board allows: make the component smaller",
    RejectCode.NO_ENGINE: "this board has no wasm engine: keep it out of the group",
    RejectCode.IMAGE_DAMAGED: "the compiled image was changed on disk: check the board's storage, then fleet retry",
    RejectCode.START_FAILED: "see the message and the log; deploy a corrected version",
    RejectCode.HEALTH_FAILED: "the version's own health check failed: see the log, deploy a corrected version",
    RejectCode.TRAPPED: "the version trapped: see the log, deploy a corrected version",
    RejectCode.RESTARTED: "the version did not stay up: see the log, deploy a corrected version",
    RejectCode.ERROR_RATE: "the version answered too many calls with errors: see the log, deploy a corrected version",
    RejectCode.TOO_LATE: "the version is slower than what it replaced: deploy a corrected version",
    RejectCode.TOO_MUCH_MEMORY: "the version needs far more memory than what it replaced: deploy a corrected version",
    RejectCode.STATE_FAILED: "the old version's memory was not carried over, see the message: correct save-state or "
    "load-state, or deploy a version without them, which starts empty",
    RejectCode.SET_FAILED: "an instance that is swapped together with this one failed: see that one",
    RejectCode.DEVELOPMENT: "the board is in production and this fleet is for development: enrol it in a real one",
    RejectCode.CONTAINMENT: "the board's policy asks for walls that it does not have: see fleet-host check there",
    RejectCode.PORT_IN_USE: "another program has that port: deploy with another --port",
    RejectCode.HOST_GONE: "fleet-host does not run on the board: systemctl status fleet-host; it tries again",
    RejectCode.SUPERSEDED: "",
    RejectCode.INTERRUPTED: "power or process was lost too often: check the board's supply, then fleet retry",
    RejectCode.INTERNAL: "a fault of the agent: report it with the log, then fleet retry",
}


def advice(code: RejectCode | str | None) -> str:
    """What to do; empty for nothing, or for a code of a later version."""
    return ADVICE.get(code, "") if isinstance(code, RejectCode) else ""
