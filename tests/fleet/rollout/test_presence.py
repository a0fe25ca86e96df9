"""Devices that only poll: present for as long as the next poll may take, and no longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.rollout.presence import POLL_LEAST_S, POLL_MOST_S, Polls, by_polls, polled


def after(*times):
    polls = None
    for time in times:
        polls = polled(polls, time)
    return polls


@pytest.mark.parametrize(
    ("times", "until"),
    [
        ((0,), POLL_LEAST_S),
        ((0, 150), 150 + POLL_LEAST_S),  # half of 300 s, by chance; the next may take 450 s
        ((0, 300), 300 + 900),
        ((0, 300, 450), 450 + POLL_LEAST_S),
        ((0, 3000), 3000 + POLL_MOST_S),
        ((0, 900_000), 900_000 + POLL_MOST_S),
    ],
)
def test_a_device_is_present_until_its_next_poll_is_overdue(times, until):
    assert after(*times).until == until


@given(st.floats(60, POLL_MOST_S / 1.5), st.lists(st.floats(0.5, 1.5), min_size=2, max_size=20))
def test_an_agent_that_polls_regularly_is_present_from_its_second_poll_on(interval_s, jitters):
    now, polls = 0.0, polled(None, 0.0)
    for number, jitter in enumerate(jitters):
        now += interval_s * jitter
        assert number == 0 or now <= polls.until + 1e-6
        polls = polled(polls, now)


def test_polls_that_follow_each_other_have_one_beginning():
    assert after(0, 300, 600).since == 0
    assert after(0, 10_000).since == 10_000


def test_what_the_broker_knows_better_counts_for_nothing():
    polls = {"polls": Polls(0, 0), "silent": Polls(-5000, -5000), "connected": Polls(0, 0)}
    assert set(by_polls(polls, ["connected"], 100)) == {"polls"}
