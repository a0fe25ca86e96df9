"""Reference time of a device: the system clock, but never before the proven floor."""

from datetime import UTC, datetime, timedelta

import pytest

from agent import clock
from agent.clock import ReferenceClock


def test_the_floor_only_rises():
    floor = datetime(2026, 5, 1, tzinfo=UTC)
    reference = ReferenceClock(floor)
    reference.raise_floor(floor - timedelta(days=1))
    assert reference.floor == floor
    reference.raise_floor(floor + timedelta(days=1))
    assert reference.floor == floor + timedelta(days=1)


def test_a_clock_behind_the_floor_is_replaced_by_the_floor():
    floor = datetime.now(UTC) + timedelta(days=400)
    reference = ReferenceClock(floor)
    assert reference.behind
    assert reference.now() == floor
    assert not ReferenceClock(datetime(2020, 1, 1, tzinfo=UTC)).behind


@pytest.mark.parametrize(("synchronised", "trusted"), [(True, True), (None, True), (False, False)])
@pytest.mark.parametrize("behind", [False, True])
def test_which_clock_is_trustworthy(monkeypatch, synchronised, trusted, behind):
    monkeypatch.setattr(clock, "clock_synchronised", lambda: synchronised)
    floor = datetime.now(UTC) + timedelta(days=400 if behind else -400)
    assert ReferenceClock(floor).is_trustworthy() is (trusted and not behind)
