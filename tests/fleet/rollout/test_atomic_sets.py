"""An atomic set is decided over the sum of its members: a device has all of them, or none."""

import pytest

from fleet.protocol.codes import Outcome, RolloutState
from fleet.rollout.advance import advance_set, merge_set
from fleet.rollout.decide import Gate, Rollout
from fleet.rollout.model import Member


def standing(outcome, device="b1", **more):
    return Member(device, 1, Outcome(outcome), online_since=0.0, offered_at=0.0, **more)


@pytest.mark.parametrize(
    ("front", "back", "both"),
    [
        ("succeeded", "succeeded", "succeeded"),
        ("succeeded", "in-progress", "in-progress"),
        ("succeeded", "waiting", "waiting"),
        ("succeeded", "failed", "failed"),
        ("in-progress", "failed", "failed"),
        ("lost", "in-progress", "lost"),
        ("pending", "pending", "pending"),
        ("deferred", "waiting", "deferred"),
        ("unproven", "succeeded", "unproven"),
    ],
)
def test_a_device_stands_as_its_worst_member(front, back, both):
    assert [each.outcome for each in merge_set([(standing(front),), (standing(back),)])] == [both]
    assert [each.outcome for each in merge_set([(standing(back),), (standing(front),)])] == [both]


def test_the_member_that_failed_by_itself_says_why():
    dragged = standing("deferred", code="set-failed", message="together with back")
    culprit = standing("failed", code="trapped", message="boom")
    assert merge_set([(dragged,), (culprit,)])[0].message == "boom"


def test_soaking_begins_when_the_last_member_has_succeeded():
    (both,) = merge_set([(standing("succeeded", ended_at=5.0),), (standing("succeeded", ended_at=9.0),)])
    assert both.ended_at == 9.0


def test_a_rollout_alone_stands_as_it_does():
    members = (standing("failed"), standing("waiting", device="b2"))
    assert merge_set([members]) is members


def test_a_set_is_offered_and_ends_as_one():
    begin = Rollout(RolloutState.RUNNING, (Gate(),))
    pending = [Member("b1", 1, online_since=0.0), Member("b2", 1, online_since=0.0)]
    step = advance_set(begin, [pending, pending], 5.0)
    assert [[each.outcome for each in members] for members in step.sets] == [["waiting"] * 2] * 2
    assert step.changed == ("b1", "b2")
    front = [standing("succeeded", ended_at=6.0), standing("succeeded", "b2", ended_at=6.0)]
    back = [standing("failed", code="trapped", ended_at=7.0), standing("succeeded", "b2", ended_at=6.0)]
    step = advance_set(step.rollout, [front, back], 7.0)
    assert step.rollout.state is RolloutState.REVERTED
    assert [[each.returning for each in members] for members in step.sets] == [[True, True], [False, True]]
    assert step.changed == ("b1", "b2")


def test_silence_of_one_member_leaves_the_outcome_of_the_other():
    open_set = Rollout(RolloutState.RUNNING, (Gate(), Gate()), wave=1)
    away = Member("b1", 1, Outcome.IN_PROGRESS, offered_at=0.0, began_at=0.0, phase="fetching")
    done = Member("b1", 1, Outcome.SUCCEEDED, offered_at=0.0, ended_at=1.0)
    step = advance_set(open_set, [[away], [done]], 5.0)
    assert [members[0].outcome for members in step.sets] == ["waiting", "succeeded"]
