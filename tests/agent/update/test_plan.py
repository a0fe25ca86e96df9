"""What is to be changed: removals first, one change per instance, and nothing is tried twice by itself."""

from agent.update.machine import Phase
from agent.update.plan import Act, Failure, InFlight, Step, Want, plan

NOW = 100.0


def want(instance="web", key="v1", **more):
    return Want(instance=instance, key=key, **more)


def steps(desired=(), committed=(), in_flight=(), failed=()):
    return plan(
        {each.instance: each for each in desired},
        {each.instance: each for each in committed},
        {each.instance: each for each in in_flight},
        {(each.instance, each.key, each.attempt): each for each in failed},
        NOW,
    )


def flying(key="v2", phase=Phase.FETCHING, instance="web", **more):
    return InFlight(instance=instance, key=key, phase=phase, **more)


def test_removals_come_first():
    found = steps([want("a", "v2"), want("b", "v1")], [want("a", "v1"), want("z", "v1")])
    assert found == (Step(Act.REMOVE, "z"), Step(Act.START, "a"), Step(Act.START, "b"))


def test_what_runs_already_is_left_alone():
    assert steps([want()], [want()]) == ()


def test_a_rollout_that_asks_for_what_runs_is_answered():
    assert steps([want(rollout="r2")], [want(rollout="r1")]) == (Step(Act.ADOPT, "web"),)
    assert steps([want(attempt=1)], [want(attempt=0)]) == (Step(Act.ADOPT, "web"),)


def test_a_failed_item_is_not_tried_again_until_its_attempt_is_raised():
    failed = [Failure(instance="web", key="v2", attempt=0, rollout="r1")]
    assert steps([want(key="v2", rollout="r1")], [want()], failed=failed) == ()
    assert steps([want(key="v2", rollout="r2")], [want()], failed=failed) == (Step(Act.REFUSE, "web"),)
    assert steps([want(key="v2", attempt=1)], [want()], failed=failed) == (Step(Act.START, "web"),)
    # Another configuration of the same target is another item.
    assert steps([want(key="v2 with other settings")], [want()], failed=failed) == (Step(Act.START, "web"),)


def test_a_passing_trouble_is_tried_again_when_its_time_has_come():
    waiting = Failure(instance="web", key="v2", attempt=0, retry_at=NOW + 1)
    due = Failure(instance="web", key="v2", attempt=0, retry_at=NOW)
    assert steps([want(key="v2")], failed=[waiting]) == ()
    assert steps([want(key="v2")], failed=[due]) == (Step(Act.START, "web"),)


def test_something_newer_supersedes_what_has_not_been_swapped_yet():
    for phase in (Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION):
        assert steps([want(key="v3")], in_flight=[flying(phase=phase)]) == (Step(Act.SUPERSEDE, "web"),)


def test_what_ends_within_moments_is_waited_for():
    for phase in (Phase.SWAPPING, Phase.ROLLING_BACK, Phase.COMMITTED, Phase.FAILED):
        assert steps([want(key="v3")], in_flight=[flying(phase=phase)]) == ()


def test_a_removal_supersedes_too_and_is_not_begun_twice():
    assert steps([], [want()], [flying()]) == (Step(Act.SUPERSEDE, "web"),)
    assert steps([], [], [flying(key="", phase=Phase.SWAPPING)]) == ()


def test_what_is_under_way_is_only_relabelled():
    assert steps([want(key="v2", rollout="r2")], in_flight=[flying(rollout="r1")]) == (Step(Act.RELABEL, "web"),)
    assert steps([want(key="v2", rollout="r1")], in_flight=[flying(rollout="r1")]) == ()
