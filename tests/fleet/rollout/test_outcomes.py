"""Outcome of one device: the effect of each report, in any order, and of the end of the rollout."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fleet.protocol.codes import CODE_OUTCOMES, Outcome, Phase, RejectCode, RolloutState
from fleet.rollout.model import (
    Expected,
    Member,
    Observation,
    after_end,
    cancel,
    leave,
    observe,
    overtaken,
    returned,
    wants,
)

EXPECTED = Expected(frozenset({"a1", "a2"}), "m2")
PREVIOUS = Expected(frozenset({"a0", "a3"}), "m1")
WAITING = Member("a", 1, Outcome.WAITING, offered_at=0.0)


def report(phase, sequence=1, **more):
    proof = {"assignment_sha256": "a1", "manifest_sha256": "m2", "generation": 4}
    return Observation(**{"at": float(sequence), "sequence": sequence, "phase": phase, **proof, **more})


def heard(*reports, member=WAITING, expected=EXPECTED):
    for each in reports:
        member = observe(member, each, expected)
    return member


def test_a_signed_commit_that_carries_the_assignment_and_the_manifest_succeeds():
    done = heard(report(Phase.FETCHING), report(Phase.COMMITTED, 2))
    assert (done.outcome, done.began_at, done.ended_at) == (Outcome.SUCCEEDED, 1, 2)


def test_a_later_assignment_with_the_same_item_proves_as_well():
    assert heard(report(Phase.COMMITTED, assignment_sha256="a2")).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    "lie",
    [{"assignment_sha256": "other"}, {"manifest_sha256": "m1"}, {"assignment_sha256": ""}, {"manifest_sha256": ""}],
)
def test_a_commit_of_something_else_decides_nothing(lie):
    assert heard(report(Phase.COMMITTED, generation=9, **lie)) is WAITING


@pytest.mark.parametrize(
    "old", [{"generation": None}, {"signed": False}, {"generation": None, "assignment_sha256": ""}]
)
def test_an_agent_that_does_not_sign_its_state_is_unproven(old):
    assert heard(report(Phase.COMMITTED, **old)).outcome is Outcome.UNPROVEN


def test_an_unsigned_refusal_is_no_failure():
    assert heard(report(Phase.FAILED, code="trapped", signed=False)).outcome is Outcome.UNPROVEN


def test_a_removal_is_proven_by_its_assignment():
    gone = report(Phase.COMMITTED, manifest_sha256="", generation=None)
    assert heard(gone, expected=Expected(frozenset({"a1"}), "")).outcome is Outcome.SUCCEEDED
    assert heard(gone, expected=Expected(frozenset({"a9"}), "")).outcome is Outcome.WAITING


@pytest.mark.parametrize("code", RejectCode)
def test_every_code_has_its_outcome_in_a_rollout(code):
    assert heard(report(Phase.FAILED, code=code)).outcome is CODE_OUTCOMES[code]


def test_a_deferred_device_names_reason_and_time_and_goes_on():
    later = heard(report(Phase.FAILED, code="no-space", until=77.0))
    assert (later.outcome, later.reason, later.until) == (Outcome.DEFERRED, "no-space", 77.0)
    assert heard(report(Phase.FETCHING, 2), member=later).outcome is Outcome.IN_PROGRESS


def test_interruptions_are_a_verdict_only_after_the_swap():
    assert heard(report(Phase.FAILED, code="interrupted")).outcome is Outcome.DEFERRED
    assert heard(report(Phase.ROLLED_BACK, code="interrupted")).outcome is Outcome.FAILED


@pytest.mark.parametrize("outcome", [Outcome.PENDING, Outcome.NOT_AFFECTED])
def test_who_was_never_offered_it_decides_nothing(outcome):
    never = Member("a", 1, outcome)
    assert heard(report(Phase.COMMITTED), member=never) is never


def test_a_device_that_was_lost_is_found_by_its_next_signed_report():
    lost = replace(WAITING, outcome=Outcome.LOST, phase=Phase.SWAPPING, sequence=3)
    assert heard(report(Phase.COMMITTED, 4), member=lost).outcome is Outcome.SUCCEEDED
    assert heard(report(Phase.ROLLED_BACK, 4, code="trapped"), member=lost).outcome is Outcome.FAILED
    assert heard(report(Phase.PROBATION, 4), member=lost).outcome is Outcome.IN_PROGRESS
    assert heard(report(Phase.SWAPPING, 3), member=lost).outcome is Outcome.LOST, "that one is doubled"


def test_a_device_that_does_not_stay_up_while_it_soaks_has_failed():
    done = heard(report(Phase.COMMITTED, 5))
    assert heard(report(Phase.FAILED, 6, code="restarted"), member=done).outcome is Outcome.FAILED


def test_a_later_attempt_begins_anew_and_an_older_one_changes_nothing():
    failed = heard(report(Phase.ROLLED_BACK, 5, code="trapped"))
    again = heard(report(Phase.FETCHING, 6, attempt=1), member=failed)
    assert (again.outcome, again.attempt, again.ended_at) == (Outcome.IN_PROGRESS, 1, None)
    assert heard(report(Phase.COMMITTED, 7, attempt=1), member=again).outcome is Outcome.SUCCEEDED
    assert heard(report(Phase.COMMITTED, 9), member=again) is again


def test_progress_that_repeats_itself_is_no_progress():
    one = heard(report(Phase.FETCHING, 1, progress=10))
    same = heard(report(Phase.FETCHING, 9, progress=10), member=one)
    assert (same.moved_at, same.heard_at) == (1, 9)
    assert heard(report(Phase.FETCHING, 10, progress=11), member=same).moved_at == 10


CHOICES = [
    report(Phase.FETCHING, 1),
    report(Phase.FAILED, 2, code="no-space"),
    report(Phase.FETCHING, 3),
    report(Phase.SWAPPING, 4),
    report(Phase.COMMITTED, 5, assignment_sha256="stale"),
    report(Phase.COMMITTED, 6),
    report(Phase.ROLLED_BACK, 7, code="trapped"),
    report(Phase.FETCHING, 8, attempt=1),
    report(Phase.COMMITTED, 9, attempt=1),
]


@given(st.lists(st.sampled_from(CHOICES), max_size=8), st.randoms(use_true_random=False))
def test_reports_lead_to_one_outcome_in_whichever_order_and_number_they_come(reports, rng):
    in_order = sorted(reports, key=lambda each: each.sequence)
    mixed = [*reports, *reports]
    rng.shuffle(mixed)
    assert heard(*mixed).outcome is heard(*in_order).outcome


@given(st.lists(st.sampled_from(CHOICES[:7]), max_size=5))
def test_lost_progress_changes_no_final_outcome(reports):
    final = [each for each in reports if each.phase in {Phase.COMMITTED, Phase.ROLLED_BACK}]
    decided = {Outcome.SUCCEEDED, Outcome.FAILED}
    whole, part = heard(*sorted(reports, key=lambda each: each.sequence)).outcome, heard(*final).outcome
    assert whole is part or not {whole, part} & decided


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.REVOKED])
def test_devices_of_an_ended_rollout_are_reverted_once_they_confirm_what_they_had(state):
    taken = replace(WAITING, outcome=Outcome.SUCCEEDED, ended_at=5.6)
    (back,) = after_end(state, [taken])
    assert (back.outcome, back.returning, wants(state, back)) == (Outcome.WAITING, True, False)
    assert returned(back, report(Phase.COMMITTED, 9), PREVIOUS) is back, "that is the new version again"
    assert returned(back, report(Phase.PROBATION, 9, assignment_sha256="a3", manifest_sha256="m1"), PREVIOUS) is back
    confirms = report(Phase.COMMITTED, 10, assignment_sha256="a3", manifest_sha256="m1")
    assert returned(back, replace(confirms, signed=False), PREVIOUS) is back
    assert returned(back, confirms, PREVIOUS).outcome is Outcome.REVERTED


@pytest.mark.parametrize(
    ("outcome", "offered", "then"),
    [("pending", None, "not-affected"), ("pending", 3.0, "waiting"), ("waiting", 3.0, "waiting"),
     ("in-progress", 3.0, "waiting"), ("lost", 3.0, "waiting"), ("deferred", 3.0, "waiting"),
     ("succeeded", 3.0, "waiting"), ("failed", 3.0, "failed"), ("unproven", 3.0, "unproven"),
     ("not-affected", None, "not-affected")],
)  # fmt: skip
def test_each_outcome_has_its_own_after_an_abort(outcome, offered, then):
    (after,) = after_end(RolloutState.ABORTED, [Member("a", 1, Outcome(outcome), offered_at=offered)])
    assert after.outcome is Outcome(then)
    assert not wants(RolloutState.ABORTED, after)


@pytest.mark.parametrize("outcome", ["pending", "waiting", "in-progress", "deferred", "lost"])
def test_what_was_open_in_a_superseded_rollout_is_superseded(outcome):
    (after,) = after_end(RolloutState.SUPERSEDED, [Member("a", 1, Outcome(outcome), offered_at=1.0)])
    assert after.outcome is Outcome.SUPERSEDED


def test_a_superseded_rollout_keeps_the_failure_of_a_device():
    failed = replace(WAITING, outcome=Outcome.FAILED)
    (after,) = after_end(RolloutState.SUPERSEDED, [failed])
    assert after.outcome is Outcome.FAILED
    assert overtaken(failed, "pinned") is failed
    assert heard(report(Phase.COMMITTED, 9, assignment_sha256="of-the-next-rollout"), member=after) is after


def test_a_revoked_device_leaves_the_count_for_ever():
    gone = leave(replace(WAITING, outcome=Outcome.IN_PROGRESS), "revoked")
    assert (gone.outcome, gone.counted, gone.reason) == (Outcome.NOT_AFFECTED, False, "revoked")
    assert leave(gone, "again") is gone


RUNNING, DONE = RolloutState.RUNNING, RolloutState.SUCCEEDED


@pytest.mark.parametrize(
    ("state", "outcome", "more", "offered"),
    [
        (RUNNING, "pending", {}, False), (RUNNING, "waiting", {}, True), (RUNNING, "failed", {}, True),
        (RUNNING, "lost", {}, True), (RUNNING, "not-affected", {}, False), (RUNNING, "superseded", {}, False),
        (RolloutState.PAUSED, "succeeded", {}, True), (RolloutState.SUPERSEDED, "succeeded", {}, True),
        (DONE, "pending", {"arrival": True}, False), (DONE, "pending", {"arrival": True, "new": True}, True),
        (DONE, "succeeded", {}, True), (RolloutState.SCHEDULED, "pending", {}, False),
        *((state, outcome, {}, False) for state, outcome in itertools.product(
            (RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.REVOKED, RolloutState.REFUSED),
            ("failed", "waiting", "succeeded"))),
    ],
)  # fmt: skip
def test_who_is_to_run_what_the_rollout_offers(state, outcome, more, offered):
    assert wants(state, Member("a", 1, Outcome(outcome), **more)) is offered


def test_a_cancelled_device_keeps_what_it_had_when_the_rollout_succeeds():
    assert not wants(DONE, cancel(WAITING, "ada"))
