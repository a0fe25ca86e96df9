"""Update machine: a table of transitions and a pure function that walks it.

One machine carries out one change of one instance. The machine decides nothing about bytes, sockets or clocks: an
`Event` comes in, an `Effect` goes out, and between them stands the state that is persisted *before* the effect is
carried out. Power may fail at any instant: the `INTERRUPTED` rows name the recovery of every stored state. Everything
before `SWAPPING` changes nothing that runs, and everything from `SWAPPING` on has a way back, so the old or the new
component answers. Every row that leads back to its own phase, or to an earlier one, counts, and every counter ends.

A bug of the agent's own is the event `FAULT`: retried like a delayed download, and never a verdict on the component.

`python -m agent.update.machine` prints the table and its diagram as Markdown for docs/update-machine.md.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from fleet.protocol.codes import Phase, RejectCode


class Event(StrEnum):
    """Event of a change."""

    BEGIN = "begin"  # run an item
    REMOVE = "remove"  # stop an instance
    DONE = "done"  # the effect succeeded
    STOPPED = "stopped"  # the instance to be removed no longer runs
    DELAYED = "delayed"  # the effect failed for a reason that may pass
    REFUSED = "refused"  # the effect failed permanently
    WELL = "well"  # probation ended well
    UNWELL = "unwell"  # the new version does worse than the replaced one
    HOST_LOST = "host-lost"  # the host connection was lost, or the host no longer runs the new version
    FAULT = "fault"  # the effect failed by a bug of the agent's own
    SUPERSEDED = "superseded"  # something else is wanted now
    INTERRUPTED = "interrupted"  # the agent starts and finds this state


class Effect(StrEnum):
    """Action to carry out once the new state is on disk."""

    FETCH = "fetch"
    VERIFY = "verify"
    COMPILE = "compile"
    STAGE = "stage"  # wait until an atomic set is complete
    SWAP = "swap"
    STOP = "stop"
    WATCH = "watch"
    COMMIT = "commit"
    REVERT = "revert"
    RETRY = "retry"  # fetch again, later
    REMEMBER = "remember"  # the failure is stored with the state; nothing else is left to do
    CLOSE = "close"


class Counter(StrEnum):
    """Counter over the whole life of a change."""

    DELAYS = "delays"
    RESUMPTIONS = "resumptions"  # restarts of the agent before anything had changed: harmless
    INTERRUPTIONS = "interruptions"  # restarts while compiling or later: maybe caused by the component
    LOSSES = "losses"  # of the host
    FAULTS = "faults"  # bugs of the agent's own in an effect


LIMITS: Final = {
    Counter.DELAYS: 12,
    Counter.RESUMPTIONS: 100,
    Counter.INTERRUPTIONS: 3,
    Counter.LOSSES: 3,
    Counter.FAULTS: 12,  # as delays: about half an hour with the same back-off
}


class Row(NamedTuple):
    """Line of the table. Beyond the counter's limit the change goes to `beyond` instead of `to`."""

    phase: Phase
    event: Event
    to: Phase
    effect: Effect
    counter: Counter | None = None
    beyond: Phase | None = None


# fmt: off
TABLE: Final = (
    Row(Phase.IDLE,         Event.BEGIN,       Phase.FETCHING,     Effect.FETCH),
    Row(Phase.IDLE,         Event.REMOVE,      Phase.SWAPPING,     Effect.STOP),
    Row(Phase.IDLE,         Event.INTERRUPTED, Phase.IDLE,         Effect.CLOSE),

    Row(Phase.FETCHING,     Event.DONE,        Phase.VERIFYING,    Effect.VERIFY),
    Row(Phase.FETCHING,     Event.DELAYED,     Phase.FETCHING,     Effect.RETRY, Counter.DELAYS, Phase.FAILED),
    Row(Phase.FETCHING,     Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.FETCHING,     Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.FETCHING,     Event.FAULT,       Phase.FETCHING,     Effect.RETRY, Counter.FAULTS, Phase.FAILED),
    Row(Phase.FETCHING,     Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.RESUMPTIONS, Phase.FAILED),

    Row(Phase.VERIFYING,    Event.DONE,        Phase.COMPILING,    Effect.COMPILE),
    Row(Phase.VERIFYING,    Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.VERIFYING,    Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.VERIFYING,    Event.FAULT,       Phase.FETCHING,     Effect.RETRY, Counter.FAULTS, Phase.FAILED),
    Row(Phase.VERIFYING,    Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.RESUMPTIONS, Phase.FAILED),

    Row(Phase.COMPILING,    Event.DONE,        Phase.STAGED,       Effect.STAGE),
    Row(Phase.COMPILING,    Event.DELAYED,     Phase.FETCHING,     Effect.RETRY, Counter.DELAYS, Phase.FAILED),
    Row(Phase.COMPILING,    Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.COMPILING,    Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.COMPILING,    Event.FAULT,       Phase.FETCHING,     Effect.RETRY, Counter.FAULTS, Phase.FAILED),
    Row(Phase.COMPILING,    Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.INTERRUPTIONS, Phase.FAILED),

    Row(Phase.STAGED,       Event.DONE,        Phase.SWAPPING,     Effect.SWAP),
    Row(Phase.STAGED,       Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.STAGED,       Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.STAGED,       Event.FAULT,       Phase.FETCHING,     Effect.RETRY, Counter.FAULTS, Phase.FAILED),
    Row(Phase.STAGED,       Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.RESUMPTIONS, Phase.FAILED),

    Row(Phase.SWAPPING,     Event.DONE,        Phase.PROBATION,    Effect.WATCH),
    Row(Phase.SWAPPING,     Event.STOPPED,     Phase.COMMITTED,    Effect.COMMIT),
    Row(Phase.SWAPPING,     Event.REFUSED,     Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.SWAPPING,     Event.HOST_LOST,   Phase.SWAPPING,     Effect.SWAP, Counter.LOSSES, Phase.ROLLING_BACK),
    Row(Phase.SWAPPING,     Event.FAULT,       Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.SWAPPING,     Event.INTERRUPTED, Phase.SWAPPING,     Effect.SWAP, Counter.INTERRUPTIONS,
        Phase.ROLLING_BACK),

    Row(Phase.PROBATION,    Event.WELL,        Phase.COMMITTED,    Effect.COMMIT),
    Row(Phase.PROBATION,    Event.UNWELL,      Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.PROBATION,    Event.SUPERSEDED,  Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.PROBATION,    Event.HOST_LOST,   Phase.SWAPPING,     Effect.SWAP, Counter.LOSSES, Phase.ROLLING_BACK),
    Row(Phase.PROBATION,    Event.FAULT,       Phase.PROBATION,    Effect.WATCH, Counter.FAULTS, Phase.ROLLING_BACK),
    Row(Phase.PROBATION,    Event.INTERRUPTED, Phase.PROBATION,    Effect.WATCH, Counter.INTERRUPTIONS,
        Phase.ROLLING_BACK),

    Row(Phase.ROLLING_BACK, Event.DONE,        Phase.ROLLED_BACK,  Effect.REMEMBER),
    Row(Phase.ROLLING_BACK, Event.HOST_LOST,   Phase.ROLLING_BACK, Effect.REVERT, Counter.LOSSES, Phase.ROLLED_BACK),
    Row(Phase.ROLLING_BACK, Event.FAULT,       Phase.ROLLING_BACK, Effect.REVERT, Counter.FAULTS, Phase.ROLLED_BACK),
    Row(Phase.ROLLING_BACK, Event.INTERRUPTED, Phase.ROLLING_BACK, Effect.REVERT, Counter.INTERRUPTIONS,
        Phase.ROLLED_BACK),

    Row(Phase.COMMITTED,    Event.DONE,        Phase.IDLE,         Effect.CLOSE),
    Row(Phase.COMMITTED,    Event.FAULT,       Phase.IDLE,         Effect.CLOSE),
    Row(Phase.COMMITTED,    Event.INTERRUPTED, Phase.COMMITTED,    Effect.COMMIT, Counter.RESUMPTIONS, Phase.IDLE),
    Row(Phase.FAILED,       Event.DONE,        Phase.IDLE,         Effect.CLOSE),
    Row(Phase.FAILED,       Event.FAULT,       Phase.IDLE,         Effect.CLOSE),
    Row(Phase.FAILED,       Event.INTERRUPTED, Phase.FAILED,       Effect.REMEMBER, Counter.RESUMPTIONS, Phase.IDLE),
    Row(Phase.ROLLED_BACK,  Event.DONE,        Phase.IDLE,         Effect.CLOSE),
    Row(Phase.ROLLED_BACK,  Event.FAULT,       Phase.IDLE,         Effect.CLOSE),
    Row(Phase.ROLLED_BACK,  Event.INTERRUPTED, Phase.ROLLED_BACK,  Effect.REMEMBER, Counter.RESUMPTIONS, Phase.IDLE),
)

# fmt: on

_ROWS: Final = {(row.phase, row.event): row for row in TABLE}

_FAULT_IN_REMOVAL: Final = Row(
    Phase.SWAPPING, Event.FAULT, Phase.SWAPPING, Effect.STOP, Counter.FAULTS, Phase.COMMITTED
)
"""A removal has no way back: the stop is repeated."""

_BEYOND: Final = {
    Phase.FAILED: Effect.REMEMBER,
    Phase.ROLLING_BACK: Effect.REVERT,
    Phase.ROLLED_BACK: Effect.REMEMBER,
    Phase.COMMITTED: Effect.COMMIT,
    Phase.IDLE: Effect.CLOSE,
}
RETRY_FIRST_S: Final = 2.0
RETRY_MAX_S: Final = 300.0
_ENDED: Final[Mapping[Counter, tuple[str, str]]] = {
    Counter.DELAYS: (
        RejectCode.UNREACHABLE,
        "the download or the compiler did not succeed in the allowed number of attempts",
    ),
    Counter.RESUMPTIONS: (RejectCode.INTERRUPTED, "the agent was restarted too often during this deployment"),
    Counter.INTERRUPTIONS: (
        RejectCode.INTERRUPTED,
        "power or the agent was lost too often while this was compiled, started or on probation",
    ),
    Counter.LOSSES: (RejectCode.HOST_GONE, "the host was lost too often while this was started or on probation"),
    Counter.FAULTS: (RejectCode.INTERNAL, "the agent failed too often by a bug of its own; see its journal"),
}
"""Code and message of a change whose counter has ended, where the last event brings none of its own."""

_CLEARS: Final = frozenset({Phase.VERIFYING, Phase.PROBATION, Phase.COMMITTED})
"""Entering one of these phases ends an earlier trouble: a delayed download, a lost host."""

_DECIDED: Final = frozenset({Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})
"""Phases whose code is the reason for going back; a trouble on the way back does not replace that reason."""


class IllegalEventError(Exception):
    """The table has no row for this event in this phase: a bug of the agent's own. Nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Persisted state of a change.

    Attributes:
        entered: time at which the phase was entered, in seconds of the clock given to `advance`.
        code, message: reason of a failure or of going back, as in a report; empty while all is well.
        exercised: whether probation saw enough calls to mean something.
        undecided: which gates on metrics had too few samples; empty for none.
    """

    phase: Phase = Phase.IDLE
    entered: float = 0.0
    removal: bool = False
    delays: int = 0
    resumptions: int = 0
    interruptions: int = 0
    losses: int = 0
    faults: int = 0
    code: str = ""
    message: str = ""
    exercised: bool = True
    undecided: str = ""


@dataclass(frozen=True, slots=True)
class Happened:
    """Event with its code and message, if it reports a failure."""

    event: Event
    code: str = ""
    message: str = ""
    exercised: bool = True
    undecided: str = ""


def phase_of(stored: str) -> Phase:
    """Return the phase by its stored name; a name that this version does not know rolls back."""
    try:
        return Phase(stored)
    except ValueError:
        return Phase.ROLLING_BACK


def is_legal(phase: Phase, event: Event) -> bool:
    """Tell whether the table has a row for this event in this phase."""
    return (phase, event) in _ROWS


def advance(state: State, happened: Happened, now: float) -> tuple[State, Effect]:
    """Take one step.

    Args:
        state: as persisted.
        happened: the event, with code and message if it reports a failure.
        now: seconds, of any clock that does not jump (boot time).

    Returns:
        The state to persist, and then the effect to carry out.

    Raises:
        IllegalEventError: the table has no such row; the state stays as it is.
    """
    row = _row(state, happened.event)
    stays = row.event in {Event.INTERRUPTED, Event.FAULT} and row.to is state.phase
    clears = row.to in _CLEARS and row.event is not Event.FAULT
    code, message = _reason(state, happened)
    following = replace(
        state,
        phase=row.to,
        entered=state.entered if stays else now,
        removal=state.removal or row.event is Event.REMOVE,
        code="" if clears else code,
        message="" if clears else message,
        exercised=happened.exercised if row.event is Event.WELL else state.exercised,
        undecided=happened.undecided if row.event is Event.WELL else state.undecided,
    )
    effect = row.effect
    if row.counter is not None and row.beyond is not None:
        count = int(getattr(state, row.counter)) + 1
        following = _counted(following, row.counter, count)
        if count > LIMITS[row.counter]:
            following = _give_up(state, following, happened, row, now)
            effect = _BEYOND[following.phase]
    if following.removal and effect in {Effect.SWAP, Effect.REVERT}:
        return replace(following, phase=Phase.SWAPPING), Effect.STOP
    return following, effect


def _row(state: State, event: Event) -> Row:
    if state.removal and (state.phase, event) == (Phase.SWAPPING, Event.FAULT):
        return _FAULT_IN_REMOVAL
    row = _ROWS.get((state.phase, event))
    if row is None:
        raise IllegalEventError(f"{event} cannot happen in {state.phase}")
    return row


def _reason(state: State, happened: Happened) -> tuple[str, str]:
    if state.phase in _DECIDED and state.code:
        return state.code, state.message
    return happened.code or state.code, happened.message or state.message


def _counted(state: State, counter: Counter, count: int) -> State:
    match counter:
        case Counter.DELAYS:
            return replace(state, delays=count)
        case Counter.RESUMPTIONS:
            return replace(state, resumptions=count)
        case Counter.INTERRUPTIONS:
            return replace(state, interruptions=count)
        case Counter.LOSSES:
            return replace(state, losses=count)
        case Counter.FAULTS:
            return replace(state, faults=count)


def _give_up(state: State, following: State, happened: Happened, row: Row, now: float) -> State:
    """End a change whose counter has ended. A removal counts as done, as the instance is not started again."""
    assert row.counter is not None
    assert row.beyond is not None
    if following.removal:
        return replace(following, phase=Phase.COMMITTED, entered=now, code="", message="")
    code, message = _ENDED[row.counter]
    if state.phase in _DECIDED:
        code, message = following.code or code, following.message or message
    else:
        code, message = happened.code or code, happened.message or message
    return replace(following, phase=row.beyond, entered=now, code=code, message=message)


def retry_delay_s(state: State) -> float:
    """Return the longest wait before an effect that did not succeed is repeated: doubling, up to five minutes."""
    return float(min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** max(0, state.delays + state.faults + state.losses - 1)))


def _name(phase: Phase) -> str:
    return phase.value.replace("-", "_")


def mermaid() -> str:
    """Draw the way forward and the ways back; recoveries and faults stand in the table."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    lines += [
        f"    {_name(row.phase)} --> {_name(row.to)}: {row.event}"
        for row in TABLE
        if row.event not in {Event.INTERRUPTED, Event.FAULT}
    ]
    seen: set[tuple[Phase, Phase]] = set()
    for row in TABLE:
        if row.beyond is None or row.event in {Event.INTERRUPTED, Event.FAULT} or (row.phase, row.beyond) in seen:
            continue
        seen.add((row.phase, row.beyond))
        lines.append(f"    {_name(row.phase)} --> {_name(row.beyond)}: {row.counter} used up")
    return "\n".join(lines)


def table() -> str:
    """Print every row of the table as Markdown."""
    lines = ["| in | when | goes to | and does | at most | then |", "|---|---|---|---|---|---|"]
    for row in TABLE:
        limit = f"{LIMITS[row.counter]} {row.counter}" if row.counter else ""
        beyond = row.beyond.value if row.beyond is not None else ""
        lines.append(f"| {row.phase} | {row.event} | {row.to} | {row.effect} | {limit} | {beyond} |")
    return "\n".join(lines)


def markdown() -> str:
    """Return the generated part of docs/update-machine.md."""
    return f"```mermaid\n{mermaid()}\n```\n\n{table()}\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
