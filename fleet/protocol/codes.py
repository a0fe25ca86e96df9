"""Closed vocabularies: reject codes, phases, call outcomes, instance and rollout states; remediation texts.

Operators read these words and programs switch on them: words are added, never renamed. Each vocabulary is declared here
once, for the device, the server and the operator alike.
"""

from enum import StrEnum
from typing import Final


class RejectCode(StrEnum):
    """Reason why a device refused something. Final, unless the code is in `RETRYABLE`."""

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
    DEVELOPMENT = "development"  # a repository made for development, on a device in production

    NOT_FOUND = "not-found"
    HASH_MISMATCH = "hash-mismatch"
    LENGTH_MISMATCH = "length-mismatch"
    # a secret that the manifest requires is not assigned; a box was changed, or sealed for something else
    SECRET_MISSING = "secret-missing"  # noqa: S105 - a word
    DATA_MISSING = "data-missing"  # no version of a data package that the manifest asks for is on the device
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
    METRIC_GATE = "metric-gate"  # a figure of the component's own against the replaced version
    CONTAINMENT = "containment"  # the device requires an isolation layer that its kernel does not provide
    PORT_IN_USE = "port-in-use"
    HOST_GONE = "host-gone"
    SUPERSEDED = "superseded"
    STATE_FAILED = "state-failed"  # memory could not be carried from the old version to the new
    SET_FAILED = "set-failed"  # another instance of its atomic set failed
    INTERRUPTED = "interrupted"  # stopped or killed from outside, or power was lost, beyond the limit of the counter
    INTERNAL = "internal"


RETRYABLE = frozenset(
    {
        RejectCode.UNREACHABLE,
        RejectCode.TOO_SLOW,
        RejectCode.NO_SPACE,
        RejectCode.DATA_MISSING,  # deployed a moment later
        RejectCode.PORT_IN_USE,
        RejectCode.HOST_GONE,
        RejectCode.EXPIRED,
        RejectCode.FREEZE,  # may be published a moment later
        RejectCode.INTERRUPTED,  # a stop, a power cut or a lack of memory; final where it may be the version's doing
        RejectCode.INTERNAL,  # a bug in the device's own software: no verdict on the component
    }
)
"""Codes after which the device retries by itself; every other code is final until the operator raises the attempt."""


class Phase(StrEnum):
    """Progress of one instance's deployment on a device (states of `agent.update.machine`)."""

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
    """End of one call of a guest. Only outcomes in `GUEST_FAULTS` count against the guest."""

    OK = "ok"
    GUEST_TRAP = "guest-trap"
    GUEST_TIMEOUT = "guest-timeout"
    CLIENT_GONE = "client-gone"
    CLIENT_SLOW = "client-slow"
    HOST_ERROR = "host-error"


GUEST_FAULTS = frozenset({CallOutcome.GUEST_TRAP, CallOutcome.GUEST_TIMEOUT})


class InstanceState(StrEnum):
    """State of an instance in the host."""

    RUNNING = "running"
    BACKOFF = "backoff"
    QUARANTINED = "quarantined"
    STOPPED = "stopped"


class AlertKind(StrEnum):
    """Security events of a device that are shown for a time."""

    THROTTLED = "throttled"  # over its budget: what is over is dropped
    SUSPENDED = "suspended"  # the broker refuses its messages for a time
    CLONED = "cloned"  # two machines seem to use its certificate


class Outcome(StrEnum):
    """Outcome of one device in one rollout."""

    PENDING = "pending"  # not offered yet, or the offer was withdrawn before the device began
    WAITING = "waiting"  # offered, nothing heard since
    DEFERRED = "deferred"  # later, by the device's own word, or online without progress
    IN_PROGRESS = "in-progress"
    SUCCEEDED = "succeeded"  # by a signed report that carries the assignment and the manifest
    FAILED = "failed"  # refused or reverted because of the version or its configuration, and the device signed that
    LOST = "lost"  # silent since it began to swap; the next signed report ends it
    UNPROVEN = "unproven"  # an agent too old to sign its state: in no count
    NOT_AFFECTED = "not-affected"  # pinned elsewhere, masked, incompatible, revoked: never offered, in no count
    REVERTED = "reverted"  # the rollout ended, and the device confirmed the previous version
    SUPERSEDED = "superseded"  # something else is offered to the device by now
    REFUSED = "refused"  # of earlier versions of wasmfleet: failed
    SKIPPED = "skipped"  # of earlier versions of wasmfleet: not-affected, reverted or superseded


class RolloutState(StrEnum):
    """State of a rollout as a whole."""

    SCHEDULED = "scheduled"  # begins at a time to come
    RUNNING = "running"
    PAUSED = "paused"  # see PauseCause
    SUCCEEDED = "succeeded"  # the last gate is open
    REVERTED = "reverted"  # a gate was breached: devices go back to the settled value
    ABORTED = "aborted"  # by an operator, with the same consequence
    REVOKED = "revoked"  # the release was withdrawn
    SUPERSEDED = "superseded"  # a newer rollout of the same instance and devices took over
    REFUSED = "refused"  # nothing was offered, since it would affect no device
    HALTED = "halted"  # of earlier versions of wasmfleet: reverted


class PauseCause(StrEnum):
    """Cause of a pause. A rollout goes on when none is left."""

    OPERATOR = "operator"
    LOST = "lost"  # more devices went silent in their swap than the gate allows
    BREACH = "breach"  # more devices failed than the gate allows, and the rollout says pause
    CANARY = "canary"  # no canary is left that can answer
    APPROVAL = "approval"  # the stage wants a second person
    UNDECIDED = "undecided"  # a gate on metrics had too few samples, and an operator decides
    FREEZE = "freeze"  # only the end of the freeze takes it away


class OnBreach(StrEnum):
    """Consequence of more failures than a gate allows."""

    ROLLBACK = "rollback"
    PAUSE = "pause"


OPEN_STATES: Final = frozenset({RolloutState.RUNNING, RolloutState.PAUSED})
"""States of a rollout that still changes devices."""

CODE_OUTCOMES: Final[dict[RejectCode, Outcome]] = {
    # the assignment, its metadata or the way here: the same version passes once server and network are in order
    RejectCode.MALFORMED: Outcome.DEFERRED,
    RejectCode.UNSUPPORTED_VERSION: Outcome.DEFERRED,
    RejectCode.UNSIGNED: Outcome.DEFERRED,
    RejectCode.ROLLBACK: Outcome.DEFERRED,
    RejectCode.FREEZE: Outcome.DEFERRED,
    RejectCode.EXPIRED: Outcome.DEFERRED,
    RejectCode.EQUIVOCATION: Outcome.DEFERRED,
    RejectCode.WRONG_FLEET: Outcome.DEFERRED,
    RejectCode.WRONG_DEVICE: Outcome.DEFERRED,
    RejectCode.UNKNOWN_TARGET: Outcome.DEFERRED,
    RejectCode.EMPTY: Outcome.DEFERRED,
    RejectCode.REPLAY: Outcome.DEFERRED,
    RejectCode.RATE_LIMITED: Outcome.DEFERRED,
    RejectCode.NOT_FOUND: Outcome.DEFERRED,
    RejectCode.UNREACHABLE: Outcome.DEFERRED,
    RejectCode.TOO_SLOW: Outcome.DEFERRED,
    # the device as it is today
    RejectCode.DEVELOPMENT: Outcome.DEFERRED,
    RejectCode.SECRET_MISSING: Outcome.DEFERRED,
    RejectCode.DATA_MISSING: Outcome.DEFERRED,
    RejectCode.SECRET_UNOPENED: Outcome.DEFERRED,
    RejectCode.NO_SPACE: Outcome.DEFERRED,
    RejectCode.NO_ENGINE: Outcome.DEFERRED,
    RejectCode.IMAGE_DAMAGED: Outcome.DEFERRED,
    RejectCode.CONTAINMENT: Outcome.DEFERRED,
    RejectCode.PORT_IN_USE: Outcome.DEFERRED,
    RejectCode.HOST_GONE: Outcome.DEFERRED,
    RejectCode.INTERRUPTED: Outcome.DEFERRED,  # after a swap: see `outcome_of`
    RejectCode.INTERNAL: Outcome.DEFERRED,  # a bug of the device's own software
    RejectCode.SET_FAILED: Outcome.DEFERRED,  # the member that failed by itself has the verdict
    # the version or its configuration
    RejectCode.TOO_LARGE: Outcome.FAILED,
    RejectCode.TARGET_MISMATCH: Outcome.FAILED,
    RejectCode.SECURITY_EPOCH: Outcome.FAILED,
    RejectCode.GRANT_DENIED: Outcome.FAILED,
    RejectCode.WRONG_ARCH: Outcome.FAILED,
    RejectCode.REVOKED: Outcome.FAILED,
    RejectCode.HASH_MISMATCH: Outcome.FAILED,
    RejectCode.LENGTH_MISMATCH: Outcome.FAILED,
    RejectCode.NOT_A_COMPONENT: Outcome.FAILED,
    RejectCode.COMPILE_FAILED: Outcome.FAILED,
    RejectCode.COMPILE_LIMIT: Outcome.FAILED,
    RejectCode.START_FAILED: Outcome.FAILED,
    RejectCode.HEALTH_FAILED: Outcome.FAILED,
    RejectCode.TRAPPED: Outcome.FAILED,
    RejectCode.RESTARTED: Outcome.FAILED,
    RejectCode.ERROR_RATE: Outcome.FAILED,
    RejectCode.TOO_LATE: Outcome.FAILED,
    RejectCode.TOO_MUCH_MEMORY: Outcome.FAILED,
    RejectCode.METRIC_GATE: Outcome.FAILED,
    RejectCode.STATE_FAILED: Outcome.FAILED,
    RejectCode.SUPERSEDED: Outcome.SUPERSEDED,
}
"""Outcome in a rollout of a device that refused or reverted with a code: a code that does not speak against the version
or its configuration defers the device and is no verdict."""


def outcome_of(code: RejectCode | str | None, phase: Phase | str) -> Outcome:
    """Return the outcome of a device that ended a change in `phase`, FAILED or ROLLED_BACK, with a code.

    Interruptions beyond their counter speak against the version only where it was running: then the device went back.
    Without a code, or with one of a later version, a device that went back has failed, and any other is deferred.
    """
    went_back = phase == Phase.ROLLED_BACK
    if code == RejectCode.INTERRUPTED and went_back:
        return Outcome.FAILED
    known = next((outcome for each, outcome in CODE_OUTCOMES.items() if each == code), None)
    return known or (Outcome.FAILED if went_back else Outcome.DEFERRED)


_ATTACK: Final = "if nobody in the team did this, treat the server or the network as hostile: see SECURITY.md"

REMEDIATION: Final[dict[RejectCode, str]] = {
    RejectCode.TOO_LARGE: "make it smaller, or split it over several instances",
    RejectCode.MALFORMED: _ATTACK,
    RejectCode.UNSUPPORTED_VERSION: "upgrade the agent on the device",
    RejectCode.UNSIGNED: _ATTACK,
    RejectCode.ROLLBACK: "the server offers older state than this device has seen: restore the newest backup of the "
    "server; " + _ATTACK,
    RejectCode.FREEZE: "sign the timestamp again (fleet status names the roles); check the device's clock",
    RejectCode.EXPIRED: "sign the expired role again (fleet sign renew; fleet status names it); what runs goes on, and "
    "the device retries by itself",
    RejectCode.EQUIVOCATION: _ATTACK,
    RejectCode.WRONG_FLEET: _ATTACK,
    RejectCode.WRONG_DEVICE: _ATTACK,
    RejectCode.UNKNOWN_TARGET: "publish the component, then deploy again",
    RejectCode.TARGET_MISMATCH: _ATTACK,
    RejectCode.SECURITY_EPOCH: "the device has run a version with a higher security epoch: deploy one not below it",
    RejectCode.GRANT_DENIED: "ask for fewer grants in component.toml, or have them allowed by the device's owner "
    "([policy] in agent.toml) and the namespace's ceiling",
    RejectCode.WRONG_ARCH: "publish a version for this CPU, or keep the device out of the group",
    RejectCode.EMPTY: _ATTACK,
    RejectCode.REVOKED: "this release was revoked: deploy another version",
    RejectCode.REPLAY: _ATTACK,
    RejectCode.RATE_LIMITED: "wait: the device limits how often it does this",
    RejectCode.NOT_FOUND: "upload the artifact again: fleet publish FILE",
    RejectCode.HASH_MISMATCH: "the artifact on the server or a cache was changed: upload it again; " + _ATTACK,
    RejectCode.LENGTH_MISMATCH: "the artifact on the server or a cache was changed: upload it again; " + _ATTACK,
    RejectCode.DATA_MISSING: "deploy the data package: fleet deploy NAME@VERSION; fleet data list names what is there",
    RejectCode.SECRET_MISSING: "set the secret: fleet secret set NAME; fleet secret list names devices that lack one",
    RejectCode.SECRET_UNOPENED: "set the secret again: fleet secret set NAME; " + _ATTACK,
    RejectCode.UNREACHABLE: "check the connection from the device to the server's port for devices: fleet-agent check "
    "names what cannot be reached; the device retries by itself",
    RejectCode.TOO_SLOW: "wait: the device resumes the download where it ended; its network is slow",
    RejectCode.NO_SPACE: "free space on the device, remove an instance or lower [disk] budget_bytes; the device "
    "retries by itself",
    RejectCode.NOT_A_COMPONENT: "build a WASI 0.2 component",
    RejectCode.COMPILE_FAILED: "the engine on this device cannot compile it: see the message, deploy another build",
    RejectCode.COMPILE_LIMIT: "compiling needs more memory or time than this device allows: make the component smaller",
    RejectCode.NO_ENGINE: "the device has no wasm engine (fleet-host check): keep it out of the group",
    RejectCode.IMAGE_DAMAGED: "the compiled image was changed on disk: check the device's storage, then fleet retry",
    RejectCode.START_FAILED: "see the message and the log; deploy a corrected version",
    RejectCode.HEALTH_FAILED: "the version's own health check failed: see the log, deploy a corrected version",
    RejectCode.TRAPPED: "the version trapped: see its log (fleet why DEVICE --log), deploy a corrected version",
    RejectCode.RESTARTED: "the version did not stay up: see the log, deploy a corrected version",
    RejectCode.ERROR_RATE: "the version answered too many calls with errors: see the log, deploy a corrected version",
    RejectCode.TOO_LATE: "the version is slower than the one it replaced: deploy a corrected version",
    RejectCode.TOO_MUCH_MEMORY: "the version needs far more memory than the replaced one: deploy a corrected version",
    RejectCode.METRIC_GATE: "a figure of the component is worse than with the version before (health.metrics): "
    "deploy a corrected version, or a wider gate",
    RejectCode.STATE_FAILED: "the old version's memory was not carried over, see the message: correct save-state or "
    "load-state, or deploy a version without them, which starts empty",
    RejectCode.SET_FAILED: "an instance that is swapped together with this one failed: see that one",
    RejectCode.DEVELOPMENT: "the device is in production and this fleet is for development: enrol it in a real one",
    RejectCode.CONTAINMENT: "the device's policy requires isolation layers that its kernel does not provide: see "
    "fleet-host check on the device",
    RejectCode.PORT_IN_USE: "another program uses that port: end it, and the device retries by itself, or deploy with "
    "another --port",
    RejectCode.HOST_GONE: "fleet-host does not run on the device: see systemctl status fleet-host; the device retries "
    "by itself",
    RejectCode.SUPERSEDED: "",
    RejectCode.INTERRUPTED: "power was lost too often, or memory ran out: check the device's power supply and "
    "free memory; the device retries by itself unless it went back, else fleet retry",
    RejectCode.INTERNAL: "report this fault of the agent with its log, then fleet retry",
}
"""Remedy for each code, for operators and devices' owners: one sentence, the same on the server and the device."""


def remediation(code: RejectCode | str | None) -> str:
    """Return what to do about a code; empty for nothing, or for a code of a later version."""
    return REMEDIATION.get(code, "") if isinstance(code, RejectCode) else ""
