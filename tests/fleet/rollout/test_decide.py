"""Gates of a rollout: rows of how its members stand, and the step that follows."""

import pytest
from msgspec.structs import replace

from fleet.protocol.codes import OnBreach, Outcome, PauseCause, RolloutState
from fleet.rollout.advance import advance, approve, end, pause, resume, unfreeze
from fleet.rollout.decide import (
    CANARY_AWAY_S,
    LOST_S,
    Gate,
    Limits,
    Mark,
    Pause,
    Promote,
    Replace,
    Revert,
    Rollout,
    Wait,
    Withdraw,
    decide,
)
from fleet.rollout.members import Amount
from fleet.rollout.model import Member, cancel, leave, overtaken, wants

NOW = 100_000.0
PENDING, WAITING, DEFERRED, AT_IT = Outcome.PENDING, Outcome.WAITING, Outcome.DEFERRED, Outcome.IN_PROGRESS
GOOD, BAD, LOST = Outcome.SUCCEEDED, Outcome.FAILED, Outcome.LOST


def rollout(waves=2, soak_s=0, **more):
    limits = Limits(**{name: more.pop(name) for name in tuple(more) if name in Limits.__dataclass_fields__})
    return Rollout(**{"state": RolloutState.RUNNING, "gates": (Gate(soak_s),) * waves, "limits": limits, **more})


def member(name, wave, outcome=PENDING, *, online=True, **more):
    times = {} if outcome is PENDING else {"offered_at": NOW, "moved_at": NOW}
    if outcome in {GOOD, BAD}:
        times |= {"began_at": NOW, "ended_at": NOW}
    return Member(name, wave, outcome, online_since=0.0 if online else None, heard_at=NOW, **{**times, **more})


def many(prefix, wave, count, outcome=PENDING, **more):
    return [member(f"{prefix}{number:03}", wave, outcome, **more) for number in range(count)]


def after(it, members, now=NOW):
    step = advance(it, members, now)
    return step, {each.device: each for each in step.members}


# -- the way through --------------------------------------------------------------------------------------------------


def test_the_first_wave_is_offered_to_its_members_alone():
    step, by = after(rollout(), [member("a", 1), member("b", 2)])
    assert (step.rollout.wave, by["a"].outcome, by["b"].outcome) == (1, WAITING, PENDING)
    assert step.changed == ("a",)
    assert step.wait.devices == ("a",)
    assert "wave 1 waits for a" in step.wait.reason


def test_the_second_wave_comes_when_the_first_has_succeeded():
    step, by = after(rollout(wave=1), [member("a", 1, GOOD), member("b", 2)])
    assert (step.rollout.wave, by["b"].outcome) == (2, WAITING)


def test_a_rollout_succeeds_when_the_last_gate_opens_and_names_its_stragglers():
    late = member("c", 2, WAITING, online=False)
    step, by = after(rollout(wave=2), [member("a", 1, GOOD), member("b", 2, GOOD), late])
    assert step.rollout.state is RolloutState.SUCCEEDED
    assert [action.stragglers for action in step.actions if hasattr(action, "stragglers")] == [("c",)]
    assert (by["c"].outcome, by["c"].arrival) == (PENDING, True), "it passes the catch-up queue when it comes"


@pytest.mark.parametrize("state", [state for state in RolloutState if state not in {"running", "paused", "succeeded"}])
def test_what_is_over_or_has_not_begun_decides_nothing(state):
    assert decide(rollout(state=state, wave=2), [member("a", 1, BAD), member("b", 2)], NOW) == ()


# -- gate 1: outcomes -------------------------------------------------------------------------------------------------


def test_an_online_device_under_way_holds_the_gate_and_an_offline_one_does_not():
    held, _ = after(rollout(wave=1), [member("a", 1, GOOD), member("b", 1, WAITING), member("c", 2)])
    assert (held.rollout.wave, held.wait.devices) == (1, ("b",))
    passed, _ = after(rollout(wave=1), [member("a", 1, GOOD), member("b", 1, WAITING, online=False), member("c", 2)])
    assert passed.rollout.wave == 2


def test_a_deferred_device_does_not_hold_the_gate():
    step, _ = after(rollout(wave=1), [member("a", 1, GOOD), member("b", 1, DEFERRED, reason="hold"), member("c", 2)])
    assert step.rollout.wave == 2


def test_an_online_device_without_progress_is_deferred_as_stuck_and_never_failed():
    stuck = member("a", 1, AT_IT, phase="fetching", began_at=NOW)
    step, by = after(rollout(wave=1, timeout_s=900), [stuck, member("b", 2)], NOW + 899)
    assert step.wait.until == NOW + 900
    step, by = after(rollout(wave=1, timeout_s=900), [stuck, member("b", 2)], NOW + 900)
    assert (by["a"].outcome, by["a"].reason, step.rollout.state) == (DEFERRED, "stuck", RolloutState.RUNNING)


def test_the_time_for_progress_begins_anew_when_a_device_comes_back():
    back = replace(member("a", 1, WAITING), offered_at=0.0, moved_at=0.0, online_since=NOW)
    _, by = after(rollout(wave=1), [back, member("b", 2)], NOW + 10)
    assert by["a"].outcome is WAITING


# -- gate 2: successes ------------------------------------------------------------------------------------------------


def test_one_success_of_a_hundred_opens_nothing():
    wave = [member("a", 1, GOOD), *many("b", 2, 1, GOOD), *many("c", 2, 99, WAITING, online=False)]
    step, by = after(rollout(waves=3, wave=2), [*wave, *many("d", 3, 900)])
    assert (step.rollout.wave, by["d000"].outcome) == (2, PENDING)
    assert "wave 2 needs 10 successes and has 1; it waits for c000 (offline)" in step.wait.reason
    assert len(step.wait.devices) == 99


@pytest.mark.parametrize(
    ("least", "size", "need"),
    [("10%", 100, 10), ("10%", 11, 2), ("10%", 3, 1), ("0%", 5, 1), ("3", 10, 3), ("50", 10, 10), ("100%", 7, 7)],
)
def test_a_wave_needs_so_many_successes(least, size, need):
    def opened(good):
        wave = [*many("a", 1, good, GOOD), *many("b", 1, size - good, WAITING, online=False)]
        it = rollout(wave=1, min_success=Amount.parse(least))
        return after(it, [*wave, member("z", 2)])[0].rollout.wave == 2

    assert [opened(need - 1), opened(need)] == [False, True]


def test_devices_that_are_not_affected_or_unproven_are_in_no_count():
    wave = [*many("a", 1, 1, GOOD), *many("b", 1, 50, Outcome.NOT_AFFECTED), *many("c", 1, 50, Outcome.UNPROVEN)]
    step, _ = after(rollout(wave=1), [*wave, member("z", 2)])
    assert step.rollout.wave == 2


# -- gate 3: failures -------------------------------------------------------------------------------------------------


def test_a_failed_canary_reverts_the_rollout():
    step, by = after(rollout(wave=1), [member("a", 1, BAD, code="trapped", message="unreachable"), member("b", 2)])
    assert step.rollout.state is RolloutState.REVERTED
    assert step.actions == (Revert("a failed (trapped): unreachable"),)
    assert by["b"].outcome is Outcome.NOT_AFFECTED


@pytest.mark.parametrize(
    ("limit", "size", "allowed"),
    [(None, 100, 1), (None, 99, 0), (None, 250, 2), ("0", 100, 0), ("3", 100, 3), ("10%", 25, 2)],
)
def test_later_waves_allow_a_share_of_failures(limit, size, allowed):
    def state(bad):
        wave = [*many("a", 2, bad, BAD), *many("b", 2, size - bad, GOOD)]
        it = rollout(wave=2, failures=None if limit is None else Amount.parse(limit))
        return after(it, [member("z", 1, GOOD), *wave])[0].rollout.state

    assert state(allowed) is RolloutState.SUCCEEDED
    assert state(allowed + 1) is RolloutState.REVERTED


def test_a_breach_pauses_where_the_rollout_says_so():
    step, by = after(rollout(wave=1, on_breach=OnBreach.PAUSE), [member("a", 1, BAD), member("b", 2)])
    assert (step.rollout.state, step.rollout.causes) == (RolloutState.PAUSED, {PauseCause.BREACH})
    assert by["b"].outcome is PENDING


def test_a_wave_in_which_nobody_can_succeed_any_more_is_a_breach():
    step, _ = after(rollout(wave=1, failures=Amount(5)), [*many("a", 1, 2, BAD), member("z", 2)])
    assert step.rollout.state is RolloutState.REVERTED


def test_a_straggler_of_an_earlier_wave_that_fails_counts_in_its_own_wave():
    step, _ = after(rollout(wave=2), [member("a", 1, GOOD), member("s", 1, BAD), *many("b", 2, 100, WAITING)])
    assert step.rollout.state is RolloutState.REVERTED


# -- gate 4: silence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["fetching", "verifying", "compiling", "staged"])
def test_a_device_that_goes_away_before_its_swap_waits(phase):
    gone = member("a", 1, AT_IT, online=False, phase=phase, began_at=NOW)
    step, by = after(rollout(waves=1, wave=1), [gone, *many("b", 1, 99, GOOD)], NOW + 15 * 60)
    assert by["a"].outcome is not LOST
    assert step.rollout.state is RolloutState.SUCCEEDED
    assert not [each for each in step.actions if isinstance(each, Revert | Pause)]


@pytest.mark.parametrize("phase", ["swapping", "probation", "rolling-back"])
def test_a_device_that_is_silent_from_its_swap_on_is_lost_and_pauses_the_rollout(phase):
    silent = member("a", 1, AT_IT, online=False, phase=phase, began_at=NOW)
    it, members = rollout(wave=1), [silent, member("b", 2)]
    step, by = after(it, members, NOW + LOST_S - 1)
    assert (by["a"].outcome, step.wait.until) == (AT_IT, NOW + LOST_S)
    step, by = after(it, members, NOW + LOST_S)
    assert (by["a"].outcome, step.rollout.causes) == (LOST, {PauseCause.LOST})
    assert by["b"].outcome is PENDING, "nobody is taken back, and nobody new is offered it"


@pytest.mark.parametrize(("limit", "size", "allowed"), [(None, 100, 5), (None, 19, 0), ("1", 50, 1), ("10%", 50, 5)])
def test_later_waves_allow_a_share_of_lost_devices(limit, size, allowed):
    def state(lost):
        wave = [*many("a", 2, lost, LOST), *many("b", 2, size - lost, GOOD)]
        it = rollout(wave=2, lost=None if limit is None else Amount.parse(limit))
        return after(it, [member("z", 1, GOOD), *wave])[0].rollout.state

    assert state(allowed) is RolloutState.SUCCEEDED
    assert state(allowed + 1) is RolloutState.PAUSED


def test_a_device_that_a_gate_on_metrics_left_undecided_is_no_success_before_an_operator_says_so():
    unsure = member("a", 1, GOOD, reason="errors: 12 of 50 calls")
    it, members = rollout(), [unsure, member("b", 2)]
    step, by = after(replace(it, wave=1), members)
    assert (step.rollout.state, step.rollout.causes) == (RolloutState.PAUSED, {PauseCause.UNDECIDED})
    assert by["b"].outcome is PENDING
    (paused,) = [each for each in step.actions if isinstance(each, Pause)]
    assert paused.reason == "a ran too little for a gate on metrics: errors: 12 of 50 calls"
    resumed, members, accepted = resume(step.rollout, step.members)
    assert [each.device for each in accepted] == ["a"]
    step, by = after(resumed, members)
    assert (step.rollout.wave, by["b"].outcome) == (2, WAITING)


def test_absence_alone_never_ends_a_rollout():
    outage = [member("a", 1, GOOD), *many("b", 2, 50, AT_IT, online=False, phase="swapping")]
    step, by = after(rollout(wave=2), [*outage, *many("c", 2, 50, AT_IT, online=False, phase="fetching")], NOW + 9e4)
    assert step.rollout.state is RolloutState.PAUSED
    assert {by["b000"].outcome, by["c000"].outcome} == {LOST, PENDING}


# -- gate 5: soak -----------------------------------------------------------------------------------------------------


def test_a_soak_runs_from_the_success_that_met_the_gate():
    wave = [member(f"a{number}", 1, GOOD, ended_at=NOW + 60 * number) for number in range(5)]
    it = rollout(wave=1, soak_s=300, min_success=Amount(2))
    step, _ = after(it, [*wave, member("z", 2)], NOW + 359)
    assert (step.rollout.wave, step.wait.until) == (1, NOW + 360)
    assert after(it, [*wave, member("z", 2)], NOW + 360)[0].rollout.wave == 2


def test_stragglers_that_return_restart_nobodys_soak():
    # each of ten returns 50 minutes after the other; the soak is an hour, and the gate opens after an hour
    hour, back = 3600.0, 50 * 60.0
    for late in range(1, 10):
        wave = [member(f"a{number}", 1, GOOD, ended_at=NOW + back * number) for number in range(late)]
        away = many("b", 1, 10 - late, WAITING, online=False)
        step, _ = after(rollout(wave=1, soak_s=hour), [*wave, *away, member("z", 2)], NOW + hour)
        assert step.rollout.wave == 2


# -- gate 6: approval -------------------------------------------------------------------------------------------------


def test_a_stage_may_want_an_approval_before_the_next_one():
    it = replace(rollout(wave=1), gates=(Gate(approval=True), Gate()))
    members = [member("a", 1, GOOD), member("b", 2)]
    step, by = after(it, members)
    assert (step.rollout.causes, by["b"].outcome) == ({PauseCause.APPROVAL}, PENDING)
    step, by = after(approve(step.rollout), members)
    assert (step.rollout.wave, by["b"].outcome) == (2, WAITING)


# -- canaries ---------------------------------------------------------------------------------------------------------


def test_a_canary_that_goes_offline_before_it_answers_is_replaced_twice_at_most():
    it, members = rollout(wave=1), [member("a", 1, WAITING, online=False), *many("b", 2, 5)]
    step, _ = after(it, members, NOW + CANARY_AWAY_S - 1)
    assert (step.rollout.replaced, step.wait.until) == (0, NOW + CANARY_AWAY_S)
    step, by = after(it, members, NOW + CANARY_AWAY_S)
    assert [each for each in step.actions if isinstance(each, Replace)] == [Replace("a", "b000")]
    assert (by["a"].outcome, by["b000"].wave, by["b000"].outcome) == (PENDING, 1, WAITING)

    def gone(step, name):
        at = step.members
        return [replace(each, online_since=None, heard_at=NOW) if each.device == name else each for each in at]

    step, by = after(step.rollout, gone(step, "b000"), NOW + 1000)
    assert by["b001"].wave == 1
    step, by = after(step.rollout, gone(step, "b001"), NOW + 2000)
    assert (by["b002"].wave, step.rollout.wave) == (2, 1)
    assert "it waits for b001 (offline)" in step.wait.reason


def test_a_canary_that_is_revoked_or_pinned_under_way_leaves_the_count_and_is_replaced():
    for gone in (leave(member("a", 1, AT_IT), "revoked"), overtaken(member("a", 1, AT_IT), "pinned")):
        step, by = after(rollout(wave=1), [gone, *many("b", 2, 2)])
        assert by["b000"].outcome is WAITING
        assert (step.rollout.wave, step.rollout.state) == (1, RolloutState.RUNNING)


def test_a_rollout_whose_last_device_leaves_ends():
    step, _ = after(rollout(waves=1, wave=1), [leave(member("a", 1, AT_IT), "revoked")])
    assert step.rollout.state is RolloutState.REVERTED


def test_canaries_that_cannot_prove_anything_pause_the_rollout():
    old = many("a", 1, 1, Outcome.UNPROVEN) + [replace(each, replaced=True) for each in many("b", 1, 2)]
    it = rollout(wave=1, replaced=2)
    step, _ = after(it, [*old, *many("c", 2, 20)])
    assert (step.rollout.causes, step.rollout.wave) == ({PauseCause.CANARY}, 1)
    again, members, accepted = resume(step.rollout, step.members)
    assert {each.device for each in accepted} == {"a000"}
    assert after(again, members)[0].rollout.wave == 2, "the operator accepted that nobody answers"


def test_with_nobody_online_the_first_that_come_are_the_canaries():
    it, away = rollout(vacancies=2), many("a", 2, 5, online=False)
    step, by = after(it, away)
    assert {each.outcome for each in by.values()} == {PENDING}
    assert "waits for the first device that comes online" in step.wait.reason
    back = [replace(each, online_since=NOW) if each.device == "a003" else each for each in step.members]
    step, by = after(step.rollout, back)
    assert [each for each in step.actions if isinstance(each, Promote)] == [Promote(("a003",))]
    assert (by["a003"].wave, by["a003"].outcome, step.rollout.vacancies) == (1, WAITING, 1)


# -- limits at once ---------------------------------------------------------------------------------------------------


def test_at_most_so_many_are_in_progress_at_once():
    it = rollout(waves=1, at_once=2)
    step, by = after(it, many("a", 1, 5))
    assert [each.outcome for each in by.values()] == [WAITING, WAITING, PENDING, PENDING, PENDING]
    done = [replace(each, outcome=GOOD, ended_at=NOW) if each.device == "a000" else each for each in step.members]
    _, by = after(step.rollout, done)
    assert [each.outcome for each in by.values()] == [GOOD, WAITING, WAITING, PENDING, PENDING]


def test_an_absent_device_holds_no_place_under_a_limit():
    _, by = after(rollout(waves=1, wave=1, at_once=1), [member("a", 1, WAITING, online=False), member("b", 1)])
    assert (by["a"].outcome, by["b"].outcome) == (PENDING, WAITING)


def test_no_offer_takes_a_site_below_its_budget():
    north = [member(f"n{number}", 1, site="north") for number in range(4)]
    south = [member("s0", 1, site="south"), member("s1", 1, site="south", online=False), member("s2", 1, site="south")]
    _, by = after(rollout(waves=1, min_available=2), [*north, *south])
    assert [by[name].outcome for name in ("n0", "n1", "n2", "n3")] == [WAITING, WAITING, PENDING, PENDING]
    assert [by[name].outcome for name in ("s0", "s1", "s2")] == [PENDING] * 3


def test_devices_that_the_rollout_does_not_concern_count_for_their_site():
    other = [member(f"x{number}", 0, Outcome.NOT_AFFECTED, site="north") for number in range(2)]
    _, by = after(rollout(waves=1, min_available=2), [*other, member("n0", 1, site="north")])
    assert by["n0"].outcome is WAITING


# -- pause, resume, abort ---------------------------------------------------------------------------------------------


def test_a_pause_withdraws_what_no_device_has_begun_and_waits_for_nobody():
    members = [member("a", 1, AT_IT, phase="fetching", began_at=NOW), member("b", 1, WAITING), member("c", 2)]
    step, by = after(pause(rollout(wave=1)), members)
    assert [each for each in step.actions if isinstance(each, Withdraw)] == [Withdraw(("b",))]
    assert (by["a"].outcome, by["b"].outcome, by["c"].outcome) == (AT_IT, PENDING, PENDING)
    again, members, _ = resume(step.rollout, step.members)
    assert after(again, members)[1]["b"].outcome is WAITING


def test_a_paused_rollout_still_reverts_for_a_breach():
    step, _ = after(pause(rollout(wave=1)), [member("a", 1, BAD), member("b", 2)])
    assert step.rollout.state is RolloutState.REVERTED


def test_resume_accepts_by_name_and_counts_only_what_is_new():
    it = rollout(wave=1, on_breach=OnBreach.PAUSE)
    members = [member("a", 1, BAD), member("b", 1, LOST, phase="swapping"), member("c", 1, GOOD), member("d", 1)]
    step, _ = after(it, members)
    assert step.rollout.state is RolloutState.PAUSED
    again, members, accepted = resume(step.rollout, step.members)
    assert [each.device for each in accepted] == ["a", "b"]
    assert (again.state, again.wave) == (RolloutState.RUNNING, 1)
    step, by = after(again, members)
    assert (step.rollout.state, by["d"].outcome) == (RolloutState.RUNNING, WAITING)
    worse = [replace(each, outcome=BAD, ended_at=NOW) if each.device == "d" else each for each in step.members]
    assert after(step.rollout, worse)[0].rollout.causes == {PauseCause.BREACH}


def test_a_lost_device_that_was_accepted_and_then_fails_is_a_new_failure():
    it = replace(rollout(wave=1), state=RolloutState.PAUSED, causes=frozenset({PauseCause.LOST}))
    again, members, _ = resume(it, [member("a", 1, LOST, phase="swapping"), member("b", 2)])
    failed = [replace(each, outcome=BAD, ended_at=NOW) if each.device == "a" else each for each in members]
    assert after(again, failed)[0].rollout.state is RolloutState.REVERTED


def test_an_abort_waits_for_nobody():
    it, members = rollout(wave=2), {each.device: each for each in [member("a", 1, GOOD), member("b", 2, WAITING)]}
    over = end(it, members, RolloutState.ABORTED)
    assert not any(wants(over.state, each) for each in members.values())
    assert all(each.returning for each in members.values())


def test_an_abort_that_keeps_leaves_devices_with_the_version_where_they_are():
    names = {"a": GOOD, "b": WAITING, "c": PENDING}
    members = {name: member(name, 1, outcome) for name, outcome in names.items()}
    end(rollout(wave=1), members, RolloutState.ABORTED, keep=True)
    assert [members[name].outcome for name in "abc"] == [GOOD, WAITING, Outcome.NOT_AFFECTED]
    assert [members[name].returning for name in "abc"] == [False, True, False]


def test_a_freeze_is_ended_by_unfreeze_alone_and_resumes_only_what_it_paused():
    frozen = pause(rollout(wave=1), PauseCause.FREEZE)
    both = pause(frozen)
    assert resume(frozen, [])[0].state is RolloutState.PAUSED
    assert unfreeze(frozen).state is RolloutState.RUNNING
    assert (unfreeze(both).state, unfreeze(both).causes) == (RolloutState.PAUSED, {PauseCause.OPERATOR})


def test_one_device_is_cancelled_and_the_rest_goes_on():
    step, by = after(rollout(wave=1), [member("a", 1, GOOD), cancel(member("b", 1, WAITING), "ada"), member("c", 2)])
    assert (step.rollout.wave, by["b"].outcome) == (2, Outcome.NOT_AFFECTED)
    assert not wants(RolloutState.RUNNING, by["b"])
    assert not wants(RolloutState.SUCCEEDED, by["b"])


# -- catch-up queue ---------------------------------------------------------------------------------------------------


def settled(**more):
    return rollout(waves=2, wave=2, state=RolloutState.SUCCEEDED, **more)


def test_a_thousand_that_return_at_once_to_a_bad_release_meet_a_queue():
    fleet = [*many("a", 2, 200, GOOD), *many("b", 2, 800, arrival=True)]
    step, by = after(settled(), fleet)
    out = [name for name, each in by.items() if each.outcome is WAITING]
    assert len(out) == 50
    failed = [
        replace(each, outcome=BAD, ended_at=NOW, code="trapped") if each.device in out[:3] else each
        for each in step.members
    ]
    step, by = after(step.rollout, failed)
    assert step.rollout.closed == "b000 and 2 more failed (trapped)"
    assert sum(each.outcome is WAITING for each in by.values()) == 0, "what nobody began is withdrawn"
    assert "the catch-up queue is closed" in step.wait.reason
    again, members, accepted = resume(step.rollout, step.members)
    assert len(accepted) == 3
    assert sum(each.outcome is WAITING for each in after(again, members)[1].values()) == 50


def test_the_queue_takes_one_at_least_and_only_who_is_online():
    fleet = [member("a", 2, GOOD), member("b", 2, arrival=True, online=False), *many("c", 2, 2, arrival=True)]
    _, by = after(settled(), fleet)
    assert [by[name].outcome for name in ("b", "c000", "c001")] == [PENDING, WAITING, PENDING]


def test_a_new_device_does_not_wait_in_the_queue_and_counts_in_its_limits():
    fleet = [*many("a", 2, 10, GOOD), member("n", 2, arrival=True, new=True), *many("c", 2, 2, arrival=True)]
    step, by = after(settled(closed="it is"), fleet)
    assert (by["n"].outcome, by["c000"].outcome) == (WAITING, PENDING)
    failed = [replace(each, outcome=BAD, ended_at=NOW) if each.device == "n" else each for each in step.members]
    assert after(replace(step.rollout, closed=""), failed)[0].rollout.closed.startswith("n failed")


def test_the_limits_of_the_queue_count_over_seven_days():
    week = 7 * 86_400.0
    old = member("o", 2, BAD, arrival=True)
    assert after(settled(), [old, *many("a", 2, 9, GOOD)], NOW + week - 1)[0].rollout.closed
    assert not after(settled(), [old, *many("a", 2, 9, GOOD)], NOW + week)[0].rollout.closed


def test_a_frozen_queue_admits_nobody():
    fleet = [member("a", 2, GOOD), member("b", 2, arrival=True), member("n", 2, arrival=True, new=True)]
    frozen = pause(settled(), PauseCause.FREEZE)
    assert frozen.state is RolloutState.SUCCEEDED
    assert after(frozen, fleet)[1]["b"].outcome is PENDING
    assert after(unfreeze(frozen), fleet)[1]["b"].outcome is WAITING


def test_a_straggler_that_fails_after_the_rollout_succeeded_counts_in_the_queue():
    late = member("b", 2, BAD, arrival=True, code="trapped")
    step, _ = after(settled(), [member("a", 1, GOOD), late])
    assert (step.rollout.state, step.rollout.closed) == (RolloutState.SUCCEEDED, "b failed (trapped)")


def test_marks_are_no_verdicts():
    outcomes = {Mark(outcome, ()).outcome for outcome in (WAITING, LOST, DEFERRED)}
    assert not outcomes & {BAD, GOOD}
    assert Wait("").until is None
