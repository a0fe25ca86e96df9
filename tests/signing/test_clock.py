"""A clock that is set forward: what seems to have ended is refused, and nothing of the false time is remembered."""

from datetime import timedelta

import pytest

from fleet.protocol.codes import RejectCode
from signing.errors import Rejected
from tests.simulator.repository import START, Board, Repository


@pytest.mark.parametrize("days", [3, 15, 400, 4000], ids=["timestamp", "snapshot", "targets", "root"])
def test_a_clock_set_forward_stops_updates_and_poisons_nothing(days: int) -> None:
    repo = Repository()
    board = Board(repo)
    board.accept(repo.assign(repo.publish()))
    before = board.state

    next_one = repo.assign(repo.publish("1.0.1"))

    # Somebody spoofs the time that the board is told: whatever ends before then counts for nothing.
    repo.now = START + timedelta(days=days)
    with pytest.raises(Rejected) as verdict:
        board.accept(next_one)
    assert verdict.value.code is RejectCode.EXPIRED
    assert board.state.floor == before.floor, "the floor rises with what is accepted, and not with a clock"

    # The right time comes back: the same documents count, and the board is where it was.
    repo.now = START + timedelta(hours=1)
    board.accept(next_one)
    assert board.state.floor < START + timedelta(days=1)
