"""Crash policy: decisions by uptime and blame."""

import itertools

import pytest

from agent.host.supervisor.crash_policy import CRASHES_MAX, MIN_UPTIME_S, CrashPolicy, Quarantine, Replace, Restart
from agent.host.supervisor.instance import TRANSITIONS
from fleet.protocol.codes import InstanceState

SHORT_S, LONG_S = MIN_UPTIME_S, MIN_UPTIME_S + 0.1


@pytest.mark.parametrize(
    ("ends", "decision", "count"),
    [
        ([(SHORT_S, True)], Restart(0.1), 1),
        ([(SHORT_S, True)] * 2, Restart(0.4), 2),
        ([(SHORT_S, True)] * 3, Restart(1.6), 3),
        ([(SHORT_S, True)] * 4, Restart(6.4), 4),
        ([(SHORT_S, True)] * 5, Quarantine("5 crashes in a row"), 5),
        ([(SHORT_S, True)] * 4 + [(LONG_S, True)], Restart(0.1), 1),
        ([(LONG_S, True)] * 9, Restart(0.1), 1),
        ([(SHORT_S, False)], Replace(0.025), 0),
        ([(SHORT_S, True)] * 2 + [(LONG_S, False)], Replace(0.4), 2),
        ([(SHORT_S, False)] * 9 + [(SHORT_S, True)], Restart(0.1), 1),
        ([(SHORT_S, True)] * 4 + [(SHORT_S, False)], Replace(6.4), 4),
    ],
)
def test_the_end_of_a_worker_is_followed_by(ends, decision, count):
    policy = CrashPolicy()
    for uptime_s, at_fault in ends:
        last = policy.on_exit(uptime_s, at_fault=at_fault)
    assert type(last) is type(decision)
    if isinstance(decision, Quarantine):
        assert last == decision
    else:
        assert last.after_s == pytest.approx(decision.after_s)
    assert policy.count == count


@pytest.mark.parametrize(
    ("count", "uptime_s", "changed", "left"), [(3, SHORT_S, False, 3), (3, LONG_S, True, 0), (0, LONG_S, False, 0)]
)
def test_a_worker_that_lives_on_makes_earlier_crashes_forgotten(count, uptime_s, changed, left):
    policy = CrashPolicy(count)
    assert policy.on_steady(uptime_s) is changed
    assert policy.count == left


@pytest.mark.parametrize(("remembered", "count"), [(0, 0), (3, 3), (CRASHES_MAX - 1, 4), (CRASHES_MAX, 4), (99, 4)])
def test_a_generation_begins_with_the_crashes_of_its_target_and_one_more_chance(remembered, count):
    policy = CrashPolicy()
    policy.on_start(remembered)
    assert policy.count == count
    assert isinstance(policy.on_exit(0.0, at_fault=True), Quarantine) is (count == CRASHES_MAX - 1)


def test_pauses_grow_and_end_within_a_minute():
    pauses = [CrashPolicy(count).on_exit(0.0, at_fault=False).after_s for count in range(1, 50)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60.0


def test_a_requested_restart_begins_again():
    policy = CrashPolicy(4)
    policy.on_request()
    assert policy.on_exit(0.0, at_fault=True) == Restart(0.1)


def test_every_state_can_be_left_and_only_a_running_instance_crashes():
    assert set(TRANSITIONS) == set(InstanceState)
    allowed = {(before, after) for before in TRANSITIONS for after in TRANSITIONS[before]}
    assert (InstanceState.QUARANTINED, InstanceState.BACKOFF) not in allowed
    assert (InstanceState.STOPPED, InstanceState.QUARANTINED) not in allowed
    every = set(itertools.product(InstanceState, repeat=2))
    assert {after for _, after in every & allowed} == set(InstanceState)
