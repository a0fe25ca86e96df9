"""Plan of changes: removals first, a single change per instance, and no retry of a final failure."""

import pytest

from agent.update.plan import (
    Act,
    Failure,
    Gate,
    InFlight,
    Member,
    Step,
    Want,
    may_report_committed,
    plan,
    set_gate,
    swap_set,
)
from fleet.protocol.codes import Phase

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


def test_a_running_item_is_not_changed():
    assert steps([want()], [want()]) == ()


def test_a_rollout_of_the_running_item_gets_a_report():
    assert steps([want(rollout="r2")], [want(rollout="r1")]) == (Step(Act.ADOPT, "web"),)
    assert steps([want(attempt=1)], [want(attempt=0)]) == (Step(Act.ADOPT, "web"),)


def test_a_failed_item_is_not_retried_until_its_attempt_is_raised():
    failed = [Failure(instance="web", key="v2", attempt=0, rollout="r1")]
    assert steps([want(key="v2", rollout="r1")], [want()], failed=failed) == ()
    assert steps([want(key="v2", rollout="r2")], [want()], failed=failed) == (Step(Act.REFUSE, "web"),)
    assert steps([want(key="v2", attempt=1)], [want()], failed=failed) == (Step(Act.START, "web"),)
    # Another configuration of the same target is another item.
    assert steps([want(key="v2 with other settings")], [want()], failed=failed) == (Step(Act.START, "web"),)


def test_a_temporary_failure_is_retried_when_due():
    waiting = Failure(instance="web", key="v2", attempt=0, retry_at=NOW + 1)
    due = Failure(instance="web", key="v2", attempt=0, retry_at=NOW)
    assert steps([want(key="v2")], failed=[waiting]) == ()
    assert steps([want(key="v2")], failed=[due]) == (Step(Act.START, "web"),)


def of_a_set(instance, **failure):
    return Failure(instance=instance, key="v2", attempt=0, **failure)


IN_FORCE, DUE, FOR_ANOTHER = {"retry_at": NOW + 1}, {"retry_at": NOW}, {"by_set": True}
FINAL = {}


@pytest.mark.parametrize(
    ("a", "b", "in_flight", "started"),
    [
        (DUE, FOR_ANOTHER, (), {"a", "b"}),
        (IN_FORCE, FOR_ANOTHER, (), set()),
        (FINAL, FOR_ANOTHER, (), set()),
        (DUE, IN_FORCE, (), set()),  # otherwise each would fail because of the other, in turns
        (DUE, DUE, (), {"a", "b"}),
        (DUE, FINAL, (), set()),
        (FOR_ANOTHER, FOR_ANOTHER, (), set()),  # because of an unknown member
        (None, FOR_ANOTHER, (), {"a", "b"}),  # the failed member was replaced
        (None, FOR_ANOTHER, (flying(instance="a", phase=Phase.FETCHING),), {"b"}),
        (None, FOR_ANOTHER, (flying(instance="a", phase=Phase.ROLLING_BACK),), set()),  # its failure is not stored yet
    ],
)
def test_a_failed_set_is_retried_as_a_whole(a, b, in_flight, started):
    failed = [of_a_set(name, **each) for name, each in (("a", a), ("b", b)) if each is not None]
    desired = [want(name, "v2", atomic="pair") for name in ("a", "b")]
    found = steps(desired, [want("a"), want("b")], in_flight, failed)
    assert {step.instance for step in found if step.act is Act.START} == started


def test_a_member_that_failed_for_another_is_retried_once_it_is_alone():
    assert steps([want("b", "v2")], failed=[of_a_set("b", **FOR_ANOTHER)]) == (Step(Act.START, "b"),)
    runs = [want("a", "v2")]
    pair = [want(name, "v2", atomic="pair") for name in ("a", "b")]
    assert steps(pair, runs, failed=[of_a_set("b", **FOR_ANOTHER)]) == ()


def test_a_failure_that_is_no_verdict_is_tried_again_by_another_rollout():
    full = [Failure(instance="web", key="v2", attempt=0, rollout="r1", retry_at=NOW + 1, is_verdict=False)]
    assert steps([want(key="v2", rollout="r1")], [want()], failed=full) == ()
    assert steps([want(key="v2", rollout="r2")], [want()], failed=full) == (Step(Act.START, "web"),)


def test_an_attempt_that_failed_is_not_asked_of_what_runs_again():
    failed = [Failure(instance="web", key="v1", attempt=1, rollout="r1")]
    assert steps([want(attempt=1, rollout="r1")], [want(rollout="r1")], failed=failed) == ()
    assert steps([want(attempt=1, rollout="r2")], [want(rollout="r1")], failed=failed) == (Step(Act.REFUSE, "web"),)
    assert steps([want(attempt=2, rollout="r2")], [want(rollout="r1")], failed=failed) == (Step(Act.ADOPT, "web"),)


def test_another_attempt_of_what_is_under_way_is_a_new_label():
    for phase in (Phase.FETCHING, Phase.COMPILING, Phase.STAGED, Phase.SWAPPING, Phase.PROBATION):
        assert steps([want(key="v2", attempt=1)], in_flight=[flying(phase=phase)]) == (Step(Act.RELABEL, "web"),)
    for phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.FAILED, Phase.COMMITTED):
        assert steps([want(key="v2", attempt=1)], in_flight=[flying(phase=phase)]) == ()


def test_a_newer_item_supersedes_a_change_before_its_swap():
    for phase in (Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION):
        assert steps([want(key="v3")], in_flight=[flying(phase=phase)]) == (Step(Act.SUPERSEDE, "web"),)


def test_changes_that_end_within_moments_are_awaited():
    for phase in (Phase.SWAPPING, Phase.ROLLING_BACK, Phase.COMMITTED, Phase.FAILED):
        assert steps([want(key="v3")], in_flight=[flying(phase=phase)]) == ()


def test_a_removal_supersedes_and_is_not_started_twice():
    assert steps([], [want()], [flying()]) == (Step(Act.SUPERSEDE, "web"),)
    assert steps([], [], [flying(key="", phase=Phase.SWAPPING)]) == ()


def test_a_change_under_way_is_only_relabelled():
    assert steps([want(key="v2", rollout="r2")], in_flight=[flying(rollout="r1")]) == (Step(Act.RELABEL, "web"),)
    assert steps([want(key="v2", rollout="r1")], in_flight=[flying(rollout="r1")]) == ()


def items(**keys):
    return {instance: Want(instance=instance, key=key) for instance, key in keys.items()}


@pytest.mark.parametrize(
    ("desired", "committed", "changing", "may"),
    [
        (items(web="v2"), items(web="v2"), (), True),
        (items(), items(), (), True),
        (items(web="v2"), items(web="v2"), ("web",), False),  # under way again
        (items(web="v2"), items(web="v2"), ("other",), False),  # still being removed
        (items(web="v2"), items(web="v1"), (), False),  # rolled back
        (items(web="v2", other="v3"), items(other="v3"), (), False),  # failed, without a previous version
        (items(web="v2"), items(web="v2", other="v1"), (), False),  # not removed yet
        (items(), items(web="v1"), (), False),
    ],
)
def test_an_assignment_is_committed_once_nothing_changes_and_all_items_are_committed(desired, committed, changing, may):
    in_flight = {name: InFlight(instance=name, key="", phase=Phase.SWAPPING) for name in changing}
    assert may_report_committed(desired, committed, in_flight) is may


def member(phase=None, **more):
    return Member(instance="back", phase=phase, **more)


READY, WAITING, FAILED = Gate.READY, Gate.WAITING, Gate.FAILED


@pytest.mark.parametrize(
    ("phase", "other", "gate"),
    [
        (Phase.STAGED, member(), WAITING),  # not started
        (Phase.STAGED, member(is_committed=True), READY),  # already runs
        (Phase.STAGED, member(is_committed=True, is_busy=True), WAITING),  # another change is still under way for it
        (Phase.STAGED, member(has_failed=True), FAILED),
        (Phase.STAGED, member(Phase.IDLE), WAITING),
        (Phase.STAGED, member(Phase.FETCHING), WAITING),
        (Phase.STAGED, member(Phase.FETCHING, has_failed=True), WAITING),  # failed before, and is retried
        (Phase.STAGED, member(Phase.VERIFYING), WAITING),
        (Phase.STAGED, member(Phase.COMPILING), WAITING),
        (Phase.STAGED, member(Phase.STAGED), READY),
        (Phase.STAGED, member(Phase.SWAPPING), READY),
        (Phase.STAGED, member(Phase.PROBATION), READY),
        (Phase.STAGED, member(Phase.COMMITTED), READY),
        (Phase.STAGED, member(Phase.FAILED), FAILED),
        (Phase.STAGED, member(Phase.ROLLING_BACK), FAILED),
        (Phase.STAGED, member(Phase.ROLLED_BACK), FAILED),
        (Phase.PROBATION, member(), WAITING),
        (Phase.PROBATION, member(is_committed=True, is_busy=True), READY),
        (Phase.PROBATION, member(has_failed=True), FAILED),
        (Phase.PROBATION, member(Phase.STAGED), WAITING),
        (Phase.PROBATION, member(Phase.SWAPPING), WAITING),
        (Phase.PROBATION, member(Phase.PROBATION), WAITING),
        (Phase.PROBATION, member(Phase.PROBATION, well=True), READY),
        (Phase.PROBATION, member(Phase.SWAPPING, well=True), READY),  # passed probation before the host was lost
        (Phase.PROBATION, member(Phase.COMMITTED), READY),
        (Phase.PROBATION, member(Phase.ROLLING_BACK, well=True), FAILED),
    ],
)
def test_the_barrier_of_an_atomic_set(phase, other, gate):
    sibling = "back" if gate is FAILED else ""
    assert set_gate(phase, [other]) == (gate, sibling)
    passed = Member(instance="side", phase=Phase.PROBATION, well=True)
    assert set_gate(phase, [passed, other]) == (gate, sibling), "one that passed changes nothing"
    assert set_gate(phase, [other, member(Phase.FAILED)]).gate is FAILED


def test_an_instance_without_a_set_waits_for_no_other():
    assert set_gate(Phase.STAGED, []) == set_gate(Phase.PROBATION, []) == (Gate.READY, "")


def test_staged_and_swapping_members_switch_in_the_same_moment():
    members = [Member(instance=phase.value, phase=phase) for phase in Phase] + [member()]
    assert swap_set(members) == ("staged", "swapping")
