"""What can go wrong with a component, and how it is told to people: by its cause, with the backtrace below.

`EngineError` is for what cannot be compiled, loaded or offered; `GuestError` for what a guest did.
"""

from typing import Final

from fleet.protocol.codes import CallOutcome, RejectCode
from fleet.protocol.manifest import NATIVE_ANSWER_MAX_BYTES

_MAX_BACKTRACE_CHARS: Final = 4096


class EngineError(Exception):
    """Something cannot be compiled, loaded or offered; `code` says which."""

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class GuestError(Exception):
    """A call of the guest ended in a trap or a limit; its store is gone."""

    def __init__(self, outcome: CallOutcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def guest_error(text: str) -> GuestError:
    """Say what a failed call was: a limit of time or fuel, or a trap with its wasm backtrace."""
    outcome, why = CallOutcome.GUEST_TRAP, _reason(text)
    if "wasm trap: interrupt" in text:
        outcome, why = CallOutcome.GUEST_TIMEOUT, "it used up its time for one call"
    elif "all fuel consumed" in text:
        outcome, why = CallOutcome.GUEST_TIMEOUT, "it used up its fuel for one call"
    elif "too much data is being copied" in text:
        why = (
            f"its answer is larger than {NATIVE_ANSWER_MAX_BYTES} bytes, all that fits in one of wasmfleet:http; "
            "one of wasi:http/incoming-handler has no such limit"
        )
    return GuestError(outcome, f"{why}\n{text}"[:_MAX_BACKTRACE_CHARS])


def _reason(text: str) -> str:
    """The cause alone: it stands last, below a backtrace that may be cut off."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it failed without saying why"


def first_lines(text: str) -> str:
    """What the engine says, in one line."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:1000]
