"""What a rollout is, as frozen data: the values that boards should run, the waves, and how each board stands.

Nothing here knows of a clock, a database or a message; times are seconds on whatever clock the caller uses, and every
decision over this data (`decide`, `effective`, `judge`, `plan`) is a pure function of it.
"""

from dataclasses import dataclass, replace
from enum import StrEnum


class Outcome(StrEnum):
    """How a rollout stands on one board."""

    PENDING = "pending"  # its wave has not come
    WAITING = "waiting"  # offered; the board is offline or has not answered
    DEFERRED = "deferred"  # the board's own window or policy says later
    IN_PROGRESS = "in-progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUSED = "refused"
    SKIPPED = "skipped"


class State(StrEnum):
    """How a rollout stands."""

    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    HALTED = "halted"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"


OPEN = frozenset({State.RUNNING, State.PAUSED})
DECIDED = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.REFUSED, Outcome.SKIPPED})
BREACHES = frozenset({Outcome.FAILED, Outcome.REFUSED})
COMPLETED = BREACHES | {Outcome.SUCCEEDED}


@dataclass(frozen=True, slots=True)
class Value:
    """What an instance should be.

    Attributes:
        target: TUF target path; None for "not there", which a removal leaves behind.
        config: pairs of key and value, sorted by key.
        grants: narrowed grants as canonical JSON, empty for all that the manifest asks.
        port: a port of its own, None for the shared one.
        share_lane: whether it may share a lane with other instances of its publisher.
        keep_data: of an absent instance, whether its data stays on the board.
        attempt: raised to make a board try again what failed there.
        atomic: the word that it shares with what is swapped together with it; empty for what is swapped alone.
    """

    target: str | None
    config: tuple[tuple[str, str], ...] = ()
    grants: str = ""
    port: int | None = None
    keep_data: bool = False
    attempt: int = 0
    share_lane: bool = False
    atomic: str = ""

    def same(self, other: "Value") -> bool:
        """Whether a board would run the same by both."""
        return replace(self, attempt=0, atomic="") == replace(other, attempt=0, atomic="")


@dataclass(frozen=True, slots=True)
class Board:
    """One board in a rollout.

    Attributes:
        wave: from 1.
        online: as far as the server knows.
        offered_at, acked_at, ended_at: seconds; None until it happened. The clock of a time-out starts at `acked_at`.
        attempt: of the item as offered; older reports do not count.
        retrying: its last failure is one that the board tries again by itself.
    """

    device: str
    wave: int
    outcome: Outcome = Outcome.PENDING
    online: bool = False
    offered_at: float | None = None
    acked_at: float | None = None
    ended_at: float | None = None
    attempt: int = 0
    phase: str = ""
    progress: int | None = None
    code: str = ""
    message: str = ""
    running: str = ""
    exercised: bool = True
    retrying: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """A change on its way.

    Attributes:
        sizes: how many boards have been reached when each wave is out, ascending; the last is all of them.
        wave: how many waves have been offered.
        failures: boards that may fail or refuse before it halts.
        soak_s: how long the boards of a wave must have run well before the next is offered.
        timeout_s: how long a board may take from its first word on.
        answer_s: how long an online board that says nothing holds up the next wave.
        minimum: boards that must have completed, well or not, before the next wave.
    """

    id: str
    state: State
    sizes: tuple[int, ...]
    wave: int = 0
    failures: int = 0
    soak_s: float = 0
    timeout_s: float = 900
    answer_s: float = 60
    minimum: int = 1
