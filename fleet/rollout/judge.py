"""How a board's word changes its standing in a rollout: pure, and the same whether heard once or three times."""

from dataclasses import dataclass, replace

from fleet.rollout.model import DECIDED, Board, Outcome

COMMITTED = "committed"
ROLLED_BACK = "rolled-back"
FAILED = "failed"
SUPERSEDED = "superseded"

DEFERRALS = frozenset({"rate-limited"})
"""Codes with which a board says later, not no."""

TRIED = frozenset(
    {
        "start-failed", "health-failed", "trapped", "restarted", "error-rate", "too-late", "port-in-use", "host-gone",
        "interrupted", "internal", "too-much-memory", "set-failed", "compile-failed", "compile-limit", "image-damaged",
        "state-failed",
    }
)  # fmt: skip
"""Codes of something that was tried and did not do well; every other code is a refusal before anything was tried."""


@dataclass(frozen=True, slots=True)
class Word:
    """One report of a board about the instance of a rollout.

    Attributes:
        at: when the server heard it, seconds.
        retryable: whether the board tries again by itself after `code`.
    """

    at: float
    phase: str
    attempt: int = 0
    code: str = ""
    message: str = ""
    running: str = ""
    progress: int | None = None
    exercised: bool = True
    retryable: bool = False


def hear(board: Board, word: Word) -> Board:
    """The board's standing after a report. A decided board stays decided, unless by a later attempt or success.

    A report of an older attempt changes nothing. A failure that the board retries by itself decides nothing.
    """
    if word.attempt < board.attempt or board.outcome is Outcome.PENDING:
        return board
    again = board.outcome in {Outcome.FAILED, Outcome.REFUSED} and word.attempt > board.attempt
    heard = replace(
        board,
        attempt=word.attempt,
        acked_at=word.at if again or board.acked_at is None else board.acked_at,
        phase=word.phase,
        progress=word.progress,
        code=word.code,
        message=word.message,
        running=word.running or board.running,
        retrying=False,
    )
    if word.phase == COMMITTED:
        return replace(heard, outcome=Outcome.SUCCEEDED, ended_at=board.ended_at or word.at, exercised=word.exercised)
    if board.outcome in DECIDED and not again:
        return board
    outcome = _outcome(word)
    retrying = outcome is Outcome.IN_PROGRESS and word.phase == FAILED
    return replace(heard, outcome=outcome, retrying=retrying, ended_at=word.at if outcome in DECIDED else None)


def _outcome(word: Word) -> Outcome:
    """What a report other than a commit means."""
    if word.phase == ROLLED_BACK:
        return Outcome.FAILED
    if word.phase != FAILED or word.retryable:
        return Outcome.IN_PROGRESS
    if word.code == SUPERSEDED:
        return Outcome.SKIPPED
    if word.code in DEFERRALS:
        return Outcome.DEFERRED
    return Outcome.FAILED if word.code in TRIED or not word.code else Outcome.REFUSED


def relapse(board: Board, *, at: float, message: str) -> Board:
    """The board said later, while the rollout is still open, that what it had committed does not stay up."""
    if board.outcome is not Outcome.SUCCEEDED:
        return board
    return replace(board, outcome=Outcome.FAILED, code="restarted", message=message, ended_at=at)


def confirm(board: Board, *, at: float, running: str) -> Board:
    """The board said that it has committed the whole assignment that offered this: it has succeeded.

    This is the way for a board that had nothing to do, or whose reports were lost.
    """
    if board.outcome in DECIDED or board.outcome is Outcome.PENDING:
        return board
    return replace(
        board,
        outcome=Outcome.SUCCEEDED,
        acked_at=board.acked_at or at,
        ended_at=at,
        phase=COMMITTED,
        progress=None,
        code="",
        message="",
        running=running,
        retrying=False,
    )
