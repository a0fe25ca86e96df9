"""An atomic set: rollouts of several instances that boards swap as one, decided as one.

Each member keeps its own standing on each board. What is decided is decided over their sum: a board has succeeded when
every member has, and has failed as soon as one did.
"""

from collections.abc import Sequence
from dataclasses import replace

from fleet.rollout.model import BREACHES, Board, Outcome

SET_FAILED = "set-failed"
_ORDER = (Outcome.IN_PROGRESS, Outcome.DEFERRED, Outcome.WAITING, Outcome.PENDING, Outcome.SKIPPED, Outcome.SUCCEEDED)


def merge(members: Sequence[Sequence[Board]]) -> list[Board]:
    """How the boards stand in a set, from how they stand in each of its members; of one member, as they are."""
    first, *rest = members
    if not rest:
        return list(first)
    others = [{board.device: board for board in member} for member in rest]
    return [_worst([board, *(other[board.device] for other in others if board.device in other)]) for board in first]


def _worst(boards: Sequence[Board]) -> Board:
    breached = [board for board in boards if board.outcome in BREACHES]
    if breached:
        # the one that went wrong by itself says why, not those that went back with it
        return next((board for board in breached if board.code != SET_FAILED), breached[0])
    worst = min(boards, key=lambda board: _ORDER.index(board.outcome))
    ends = [board.ended_at for board in boards if board.ended_at is not None]
    return replace(worst, ended_at=max(ends, default=None))
