"""Decisions over a standing that is kept equal those that pass over all members, in every look of seeded fleets."""

from dataclasses import replace as with_fields

import pytest
from msgspec.structs import replace

from fleet.protocol.codes import Outcome, RolloutState
from fleet.rollout import advance, decide
from fleet.rollout.model import Member
from fleet.rollout.standing import Standing
from fleet.simulator.scenarios import scenario
from fleet.simulator.simulation import Simulation
from tests.fleet.rollout import plain_decide


@pytest.fixture
def compared(monkeypatch):
    """Decide in both ways at each look; the list grows by the states in which something was decided."""
    looks = []

    def both(rollout, members, now, *, besides=0):
        found = decide.decide(rollout, members, now, besides=besides)
        assert found == plain_decide.decide(rollout, tuple(members.values()), now, besides=besides)
        looks.append(rollout.state)
        return found

    monkeypatch.setattr(advance, "decide", both)
    return looks


def compare(seeds):
    for seed in seeds:
        Simulation(with_fields(scenario(seed), tick_s=5 * (seed % 2))).run()


def test_decisions_equal_plain_ones_in_three_hundred_fleets(compared):
    compare(range(20_000, 20_300))
    assert {RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.SUCCEEDED} <= set(compared)
    assert len(compared) > 5_000


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(30_000, 40_000, 1000))
def test_decisions_equal_plain_ones_in_ten_thousand_fleets(compared, first):
    compare(range(first, first + 1000))


# -- the standing itself ----------------------------------------------------------------------------------------------


def members():
    return [
        Member("a", 1, Outcome.SUCCEEDED, ended_at=7.0, site="x", online_since=0.0),
        Member("b", 2, Outcome.WAITING, heard_at=5.0, site="y", online_since=0.0),
        Member("c", 2, Outcome.WAITING, heard_at=3.0, site="x", online_since=0.0),
    ]


def waiting(kind):
    return kind.outcome is Outcome.WAITING


def heard_at(member):
    return member.heard_at or 0


def test_members_that_stand_alike_are_asked_for_at_once_and_given_in_order():
    standing = Standing(members())
    assert (standing.count(waiting), standing.devices(waiting)) == (2, ("b", "c"))
    standing["a"] = replace(standing["a"], outcome=Outcome.WAITING)
    assert standing.devices(waiting) == ("a", "b", "c")
    assert [each.device for each in standing.select(waiting)] == ["a", "b", "c"]


def test_times_follow_a_member_that_changes():
    standing = Standing(members())
    assert standing.next(waiting, heard_at, 0) == 3.0
    standing["c"] = replace(standing["c"], heard_at=9.0)
    assert (standing.next(waiting, heard_at, 0), standing.next(waiting, heard_at, 5.0)) == (5.0, 9.0)
    assert [each.device for each in standing.due(waiting, heard_at, 9.0)] == ["b", "c"]
    standing["b"] = replace(standing["b"], outcome=Outcome.SUCCEEDED)
    assert standing.next(waiting, heard_at, 0) == 9.0
    assert standing.later(waiting, heard_at, 9.0) == 0


def test_a_site_counts_those_that_are_there_and_at_nothing():
    standing = Standing(members())
    assert standing.available() == {"x": 1, "y": 0}
    standing["b"] = replace(standing["b"], outcome=Outcome.SUCCEEDED)
    standing["a"] = replace(standing["a"], online_since=None)
    assert standing.available() == {"x": 0, "y": 1}


def test_what_changed_is_told_in_order_and_not_what_was_put_back():
    standing = Standing(members())
    before = standing["b"]
    standing["c"] = replace(standing["c"], heard_at=9.0)
    standing["b"] = replace(before, heard_at=9.0)
    standing["b"] = before
    standing["a"] = replace(standing["a"], heard_at=9.0)
    assert standing.changed() == ("a", "c")
    standing.settle()
    assert standing.changed() == ()
    with pytest.raises(TypeError, match="stays one"):
        del standing["a"]
