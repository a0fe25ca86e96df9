"""Table of transitions (pure); prints its diagram.

The board's update machine: one table of transitions, and a pure function that walks it.

One machine carries out one change of one instance. It decides nothing about bytes, sockets or clocks: what happened
comes in as an `Event`, what is to be done goes out as an `Effect`, and in between stands the state that is persisted
*before* the effect is carried out. So power may go at any instant: what is found afterwards names its own recovery (the
`INTERRUPTED` rows), and since everything before `SWAPPING` changes nothing that runs, and everything from it on has a
way back, either the old or the new component answers.

Every row that leads back to its own phase, or to an earlier one, counts, and every counter has an end.

The update machine's table as Markdown and as a Mermaid diagram, made from the table and from nothing else.

`python -m agent.update.machine`: print the update machine's table and diagram as Markdown.
"""

import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple


class Phase(StrEnum):
    """Where a change stands; the same words as `fleet.protocol.codes.Phase`, which this package may not import."""

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


class Event(StrEnum):
    """What can happen to a change."""

    BEGIN = "begin"  # run this
    REMOVE = "remove"  # stop this
    DONE = "done"  # the effect succeeded
    STOPPED = "stopped"  # the instance to be removed runs no more
    DELAYED = "delayed"  # it could not be done now and may be later
    REFUSED = "refused"  # it can never be done
    WELL = "well"  # probation ended well
    UNWELL = "unwell"  # it does worse than what it replaced
    HOST_LOST = "host-lost"  # the host went away, or no longer runs what it was told
    SUPERSEDED = "superseded"  # something else is wanted now
    INTERRUPTED = "interrupted"  # the agent starts and finds this state


class Effect(StrEnum):
    """What the rim has to carry out, after the new state is on disk."""

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
    REMEMBER = "remember"  # never try this item again by itself
    CLOSE = "close"


class Counter(StrEnum):
    """What is counted, over the whole life of a change."""

    DELAYS = "delays"
    RESUMPTIONS = "resumptions"  # found while nothing had changed yet: harmless
    INTERRUPTIONS = "interruptions"  # found while compiling or later: maybe its own doing
    LOSSES = "losses"  # of the host


LIMITS: Final = {Counter.DELAYS: 12, Counter.RESUMPTIONS: 100, Counter.INTERRUPTIONS: 3, Counter.LOSSES: 3}


class Row(NamedTuple):
    """One line of the table. Beyond the counter's limit the change goes to `beyond` instead."""

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
    Row(Phase.FETCHING,     Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.RESUMPTIONS, Phase.FAILED),

    Row(Phase.VERIFYING,    Event.DONE,        Phase.COMPILING,    Effect.COMPILE),
    Row(Phase.VERIFYING,    Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.VERIFYING,    Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.VERIFYING,    Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.RESUMPTIONS, Phase.FAILED),

    Row(Phase.COMPILING,    Event.DONE,        Phase.STAGED,       Effect.STAGE),
    Row(Phase.COMPILING,    Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.COMPILING,    Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.COMPILING,    Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.INTERRUPTIONS, Phase.FAILED),

    Row(Phase.STAGED,       Event.DONE,        Phase.SWAPPING,     Effect.SWAP),
    Row(Phase.STAGED,       Event.REFUSED,     Phase.FAILED,       Effect.REMEMBER),
    Row(Phase.STAGED,       Event.SUPERSEDED,  Phase.FAILED,       Effect.CLOSE),
    Row(Phase.STAGED,       Event.INTERRUPTED, Phase.FETCHING,     Effect.FETCH, Counter.RESUMPTIONS, Phase.FAILED),

    Row(Phase.SWAPPING,     Event.DONE,        Phase.PROBATION,    Effect.WATCH),
    Row(Phase.SWAPPING,     Event.STOPPED,     Phase.COMMITTED,    Effect.COMMIT),
    Row(Phase.SWAPPING,     Event.REFUSED,     Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.SWAPPING,     Event.HOST_LOST,   Phase.SWAPPING,     Effect.SWAP, Counter.LOSSES, Phase.ROLLING_BACK),
    Row(Phase.SWAPPING,     Event.INTERRUPTED, Phase.SWAPPING,     Effect.SWAP, Counter.INTERRUPTIONS,
        Phase.ROLLING_BACK),

    Row(Phase.PROBATION,    Event.WELL,        Phase.COMMITTED,    Effect.COMMIT),
    Row(Phase.PROBATION,    Event.UNWELL,      Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.PROBATION,    Event.SUPERSEDED,  Phase.ROLLING_BACK, Effect.REVERT),
    Row(Phase.PROBATION,    Event.HOST_LOST,   Phase.SWAPPING,     Effect.SWAP, Counter.LOSSES, Phase.ROLLING_BACK),
    Row(Phase.PROBATION,    Event.INTERRUPTED, Phase.PROBATION,    Effect.WATCH, Counter.INTERRUPTIONS,
        Phase.ROLLING_BACK),

    Row(Phase.ROLLING_BACK, Event.DONE,        Phase.ROLLED_BACK,  Effect.REMEMBER),
    Row(Phase.ROLLING_BACK, Event.HOST_LOST,   Phase.ROLLING_BACK, Effect.REVERT, Counter.LOSSES, Phase.ROLLED_BACK),
    Row(Phase.ROLLING_BACK, Event.INTERRUPTED, Phase.ROLLING_BACK, Effect.REVERT, Counter.INTERRUPTIONS,
        Phase.ROLLED_BACK),

    Row(Phase.COMMITTED,    Event.DONE,        Phase.IDLE,         Effect.CLOSE),
    Row(Phase.COMMITTED,    Event.INTERRUPTED, Phase.COMMITTED,    Effect.COMMIT, Counter.RESUMPTIONS, Phase.IDLE),
    Row(Phase.FAILED,       Event.DONE,        Phase.IDLE,         Effect.CLOSE),
    Row(Phase.FAILED,       Event.INTERRUPTED, Phase.FAILED,       Effect.REMEMBER, Counter.RESUMPTIONS, Phase.IDLE),
    Row(Phase.ROLLED_BACK,  Event.DONE,        Phase.IDLE,         Effect.CLOSE),
    Row(Phase.ROLLED_BACK,  Event.INTERRUPTED, Phase.ROLLED_BACK,  Effect.REMEMBER, Counter.RESUMPTIONS, Phase.IDLE),
)

# fmt: on

_ROWS: Final = {(row.phase, row.event): row for row in TABLE}

_BEYOND: Final = {
    Phase.FAILED: Effect.REMEMBER,
    Phase.ROLLING_BACK: Effect.REVERT,
    Phase.ROLLED_BACK: Effect.REMEMBER,
    Phase.COMMITTED: Effect.COMMIT,
    Phase.IDLE: Effect.CLOSE,
}

RETRY_FIRST_S: Final = 2.0

RETRY_MAX_S: Final = 300.0

_ENDED: Final = {
    Counter.DELAYS: "the download did not succeed in the allowed number of attempts",
    Counter.RESUMPTIONS: "the agent was restarted too often during this deployment",
    Counter.INTERRUPTIONS: "power or the agent was lost too often while this was compiled, started or on probation",
    Counter.LOSSES: "the host was lost too often while this was started or on probation",
}

_ALL_IS_WELL: Final = frozenset({Phase.VERIFYING, Phase.PROBATION, Phase.COMMITTED})
"""Entering one of these ends whatever was wrong before: a delayed download, a lost host."""


class IllegalEventError(Exception):
    """An event that the table does not know in this phase: our own fault, and nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What is persisted of a change.

    Attributes:
        entered: when the phase was entered, in seconds of the clock that `advance` was given.
        code, message: why it failed or goes back, as in a report; empty while all is well.
        exercised: whether probation saw enough calls to mean something.
    """

    phase: Phase = Phase.IDLE
    entered: float = 0.0
    removal: bool = False
    delays: int = 0
    resumptions: int = 0
    interruptions: int = 0
    losses: int = 0
    code: str = ""
    message: str = ""
    exercised: bool = True


@dataclass(frozen=True, slots=True)
class Happened:
    """An event and what is known of it."""

    event: Event
    code: str = ""
    message: str = ""
    exercised: bool = True


def phase_of(stored: str) -> Phase:
    """The phase by its stored name; a name that this version does not know rolls back."""
    try:
        return Phase(stored)
    except ValueError:
        return Phase.ROLLING_BACK


def advance(state: State, happened: Happened, now: float) -> tuple[State, Effect]:
    """One step.

    Args:
        state: as persisted.
        happened: the event, with code and message where it tells of a failure.
        now: seconds, of any clock that does not jump (boot time).

    Returns:
        The state to persist, and then the effect to carry out.

    Raises:
        IllegalEventError: the table has no such row; the state stays as it is.
    """
    row = _ROWS.get((state.phase, happened.event))
    if row is None:
        raise IllegalEventError(f"{happened.event} cannot happen in {state.phase}")
    resumed = row.event is Event.INTERRUPTED and row.to is state.phase
    well = row.to in _ALL_IS_WELL
    following = replace(
        state,
        phase=row.to,
        entered=state.entered if resumed else now,
        removal=state.removal or row.event is Event.REMOVE,
        code="" if well else happened.code or state.code,
        message="" if well else happened.message or state.message,
        exercised=happened.exercised if row.event is Event.WELL else state.exercised,
    )
    effect = row.effect
    if row.counter is not None and row.beyond is not None:
        count = int(getattr(state, row.counter)) + 1
        following = _counted(following, row.counter, count)
        if count > LIMITS[row.counter]:
            following = _give_up(following, happened, row.counter, row.beyond, now)
            effect = _BEYOND[following.phase]
    if following.removal and effect in {Effect.SWAP, Effect.REVERT}:
        effect = Effect.STOP
    return following, effect


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


def _give_up(state: State, happened: Happened, counter: Counter, beyond: Phase, now: float) -> State:
    """The counter has ended. A removal is then done: what is to be removed is not started again by anyone."""
    if state.removal:
        return replace(state, phase=Phase.COMMITTED, entered=now, code="", message="")
    return replace(
        state,
        phase=beyond,
        entered=now,
        code=happened.code or state.code or ("host-gone" if counter is Counter.LOSSES else "interrupted"),
        message=happened.message or state.message or _ENDED[counter],
    )


def retry_delay_s(state: State) -> float:
    """How long to wait, at the most, before a delayed download is tried again: doubling, up to five minutes."""
    return float(min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** max(0, state.delays - 1)))


def _name(phase: Phase) -> str:
    return phase.value.replace("-", "_")


def mermaid() -> str:
    """The way forward and the ways back; recoveries stand in the table."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    lines += [
        f"    {_name(row.phase)} --> {_name(row.to)}: {row.event}"
        for row in TABLE
        if row.event is not Event.INTERRUPTED
    ]
    seen: set[tuple[Phase, Phase]] = set()
    for row in TABLE:
        if row.beyond is None or row.event is Event.INTERRUPTED or (row.phase, row.beyond) in seen:
            continue
        seen.add((row.phase, row.beyond))
        lines.append(f"    {_name(row.phase)} --> {_name(row.beyond)}: {row.counter} used up")
    return "\n".join(lines)


def table() -> str:
    """Every row of the table, as Markdown."""
    lines = ["| in | when | goes to | and does | at most | then |", "|---|---|---|---|---|---|"]
    for row in TABLE:
        limit = f"{LIMITS[row.counter]} {row.counter}" if row.counter else ""
        beyond = row.beyond.value if row.beyond is not None else ""
        lines.append(f"| {row.phase} | {row.event} | {row.to} | {row.effect} | {limit} | {beyond} |")
    return "\n".join(lines)


def markdown() -> str:
    """The generated part of docs/update-machine.md."""
    return f"```mermaid\n{mermaid()}\n```\n\n{table()}\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
