"""What to do about each thing that a board may refuse: one sentence per code, for timelines and `fleet why`."""

from typing import Final

from fleet.protocol.codes import RejectCode

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
