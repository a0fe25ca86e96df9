"""An atomic set is decided over the sum of its members: a board has all of them, or none."""

import pytest

from fleet.protocol.codes import Outcome
from fleet.rollout.decide import merge_set
from fleet.rollout.model import DeviceProgress


def standing(outcome, device="b1", **more):
    return DeviceProgress(device, 1, Outcome(outcome), **more)


@pytest.mark.parametrize(
    ("front", "back", "both"),
    [
        ("succeeded", "succeeded", "succeeded"),
        ("succeeded", "in-progress", "in-progress"),
        ("succeeded", "waiting", "waiting"),
        ("succeeded", "failed", "failed"),
        ("in-progress", "failed", "failed"),
        ("refused", "in-progress", "refused"),
        ("pending", "pending", "pending"),
        ("deferred", "waiting", "deferred"),
    ],
)
def test_a_board_stands_as_its_worst_member(front, back, both):
    assert [each.outcome for each in merge_set([[standing(front)], [standing(back)]])] == [both]
    assert [each.outcome for each in merge_set([[standing(back)], [standing(front)]])] == [both]


def test_the_member_that_failed_by_itself_says_why():
    dragged = standing("failed", code="set-failed", message="together with back")
    culprit = standing("failed", code="trapped", message="boom")
    assert merge_set([[dragged], [culprit]])[0].message == "boom"


def test_soaking_begins_when_the_last_member_has_succeeded():
    (both,) = merge_set([[standing("succeeded", ended_at=5.0)], [standing("succeeded", ended_at=9.0)]])
    assert both.ended_at == 9.0


def test_one_member_alone_stands_as_it_does():
    boards = [standing("failed"), standing("waiting", device="b2")]
    assert merge_set([boards]) == boards
