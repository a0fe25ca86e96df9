"""Which rollout an undo takes back, and to what: the history of one scope read as a stack."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet.rollout.model import State, Value


class NothingToUndoError(ValueError):
    """No rollout can be taken back; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Past:
    """A rollout as history sees it.

    Attributes:
        before: the settled value when it began, None when the instance was not there at all.
        undoes: id of the rollout that it took back, empty for none.
    """

    id: str
    number: int
    state: State
    before: Value | None
    undoes: str = ""


_UNDOABLE = frozenset({State.RUNNING, State.PAUSED, State.SUCCEEDED})


def choose(history: Sequence[Past]) -> Past:
    """The newest rollout that changed something and has not been taken back, undos themselves left out.

    So one undo after the other walks back through history.

    Raises:
        NothingToUndoError: there is none.
    """
    undone = {past.undoes for past in history if past.undoes and past.state in _UNDOABLE}
    for past in sorted(history, key=lambda past: -past.number):
        if past.state in _UNDOABLE and not past.undoes and past.id not in undone:
            return past
    raise NothingToUndoError("there is nothing to undo: no rollout changed anything that is still in force")


def target_of(past: Past) -> Value:
    """What boards are offered when `past` is taken back.

    Raises:
        NothingToUndoError: it ended without lasting effect.
    """
    if past.state not in _UNDOABLE:
        raise NothingToUndoError(
            f"rollout {past.number} was {past.state}: its boards have their previous state already"
        )
    return past.before if past.before is not None else Value(None)
