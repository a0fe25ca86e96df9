"""What a rollout does next: rows of how boards stand, and for any fleet a simulation that must come to rest."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.protocol.codes import Outcome
from fleet.rollout import model
from fleet.rollout.decide import Complete, Expire, Halt, Offer, Wait, decide
from fleet.rollout.model import (
    BREACHES,
    DeviceProgress,
    Expected,
    Observation,
    Rollout,
    RolloutState,
    apply_report,
)

NOW = 1000.0
OFFER = Expected(frozenset({"a1", "a2"}), "m1")


def word(**more):
    """A signed report that carries the proof of a commit."""
    return Observation(
        **{"signed": True, "assignment_sha256": "a1", "manifest_sha256": "m1", "generation": 1, "at": 5.0, **more}
    )


def told(board, **more):
    return apply_report(board, word(**more), OFFER)


def rollout(**more):
    return Rollout(**{"id": "r", "state": RolloutState.RUNNING, "sizes": (1, 3), **more})


def board(name, wave, outcome=Outcome.PENDING, **more):
    times = {} if outcome is Outcome.PENDING else {"offered_at": NOW, "acked_at": NOW}
    return DeviceProgress(name, wave, outcome, online=True, **{**times, **more})


def fleet(*outcomes):
    return [board(name, 1 if name == "a" else 2, outcome) for name, outcome in zip("abc", outcomes, strict=True)]


PENDING, WAITING, BUSY, GOOD, BAD, NO, LATER, UNPROVEN = (
    Outcome.PENDING, Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.SUCCEEDED, Outcome.FAILED, Outcome.REFUSED,
    Outcome.DEFERRED, Outcome.UNPROVEN,
)  # fmt: skip


def test_it_begins_with_the_first_wave():
    assert decide(rollout(), fleet(PENDING, PENDING, PENDING), NOW) == (Offer(1, ("a",)),)


def test_the_second_wave_comes_when_the_first_has_succeeded():
    assert decide(rollout(wave=1), fleet(GOOD, PENDING, PENDING), NOW) == (Offer(2, ("b", "c")),)


def test_the_second_wave_waits_while_the_canary_is_at_it():
    (wait,) = decide(rollout(wave=1, timeout_s=60), fleet(BUSY, PENDING, PENDING), NOW)
    assert wait == Wait("", NOW + 60)


@pytest.mark.parametrize("outcome", [BAD, NO])
def test_a_failed_or_refusing_canary_halts_it(outcome):
    (halt,) = decide(rollout(wave=1), fleet(outcome, PENDING, PENDING), NOW)
    assert isinstance(halt, Halt)
    assert halt.reason.startswith(f"a {outcome}")


def test_a_failure_in_the_last_wave_halts_it_too():
    (halt,) = decide(rollout(wave=2), fleet(GOOD, GOOD, BAD), NOW)
    assert isinstance(halt, Halt)


def test_failures_within_the_allowance_do_not_halt_it():
    assert decide(rollout(wave=2, failures=1), fleet(GOOD, GOOD, BAD), NOW) == (Complete(),)


def test_a_rollout_that_no_board_took_never_counts_as_done():
    (halt,) = decide(rollout(wave=2, failures=3), fleet(BAD, BAD, NO), NOW)
    assert isinstance(halt, Halt)


def test_a_paused_rollout_offers_nothing_but_still_halts():
    paused = rollout(wave=1, state=RolloutState.PAUSED)
    assert isinstance(decide(paused, fleet(GOOD, PENDING, PENDING), NOW)[0], Wait)
    assert isinstance(decide(paused, fleet(BAD, PENDING, PENDING), NOW)[0], Halt)


def test_what_is_over_stays_over():
    for state in (RolloutState.HALTED, RolloutState.ABORTED, RolloutState.SUCCEEDED, RolloutState.SUPERSEDED):
        assert decide(rollout(state=state, wave=2), fleet(BAD, GOOD, GOOD), NOW) == ()


def test_a_board_that_takes_too_long_after_its_first_word_has_failed():
    late = [board("a", 1, BUSY, acked_at=NOW - 901), *fleet(GOOD, PENDING, PENDING)[1:]]
    (expire,) = decide(rollout(wave=1), late, NOW)
    assert isinstance(expire, Expire)
    assert expire.device == "a"


def test_the_clock_of_the_time_out_does_not_run_for_a_board_that_said_nothing():
    silent = [DeviceProgress("a", 1, WAITING, online=False, offered_at=0.0)]
    (wait,) = decide(rollout(wave=1, sizes=(1,)), silent, NOW * 1000)
    assert isinstance(wait, Wait)
    assert "a" in wait.reason


def test_an_online_board_that_says_nothing_holds_up_the_rest_only_for_a_while():
    boards = [board("a", 1, GOOD), board("b", 1, WAITING, acked_at=None)]
    assert decide(rollout(wave=1, sizes=(2,)), boards, NOW + 59) == (Wait("", NOW + 60),)
    assert decide(rollout(wave=1, sizes=(2,)), boards, NOW + 60) == (Complete(),)


def test_boards_that_are_offline_are_in_no_denominator():
    boards = [board("a", 1, GOOD), board("b", 2, WAITING), board("c", 2, WAITING)]
    boards = [replace(each, online=each.device == "a") for each in boards]
    assert decide(rollout(wave=2), boards, NOW) == (Complete(),)


def test_a_soak_is_counted_from_the_last_success():
    boards = [board("a", 1, GOOD, ended_at=NOW), *fleet(PENDING, PENDING, PENDING)[1:]]
    (wait,) = decide(rollout(wave=1, soak_s=300), boards, NOW + 299)
    assert wait.until == NOW + 300
    assert decide(rollout(wave=1, soak_s=300), boards, NOW + 300) == (Offer(2, ("b", "c")),)


def test_a_group_without_boards_is_settled_at_once():
    assert decide(rollout(sizes=(0, 0), wave=2), [], NOW) == (Complete(),)


# Any fleet: each board behaves in its own way, some are away. Whatever happens, the rollout rests, and rests rightly.

BEHAVIOURS = {
    "good": [("fetching", ""), ("committed", "")],
    "bad": [("fetching", ""), ("rolled-back", "trapped")],
    "refuses": [("failed", "grant-denied")],
    "retries": [("failed", "unreachable"), ("committed", "")],
    "hangs": [("fetching", "")],
    "silent": [],
}


class Simulation:
    """Carries out what is decided, on boards that behave as they were told, with a clock of its own."""

    def __init__(self, acts, online, text, failures):
        self.acts, self.online, self.now, self.offered = acts, online, 0.0, set()
        order = model.order(online)
        reached = model.sizes(model.parse(text), len(order))
        self.boards = {
            name: DeviceProgress(name, model.wave_of(index, reached), online=online[name])
            for index, name in enumerate(order)
        }
        self.rollout = rollout(sizes=reached, failures=failures, timeout_s=100)

    def run(self):
        for _ in range(500):
            actions = decide(self.rollout, list(self.boards.values()), self.now)
            if not actions or not all(self.carry_out(action) for action in actions):
                return
        raise AssertionError("it does not come to rest")

    def carry_out(self, action):
        """Whether there is something to decide again."""
        match action:
            case Offer(wave, devices):
                assert wave == self.rollout.wave + 1
                assert self.count(*BREACHES) <= self.rollout.failures
                self.rollout = replace(self.rollout, wave=wave)
                for device in devices:
                    self.offer(device)
            case Expire(device, _):
                self.boards[device] = replace(self.boards[device], outcome=BAD, ended_at=self.now)
            case Halt(_):
                self.rollout = replace(self.rollout, state=RolloutState.HALTED)
            case Complete():
                self.rollout = replace(self.rollout, state=RolloutState.SUCCEEDED)
            case Wait(_, until):
                assert until is None or until > self.now
                self.now = until
                return until is not None
        return True

    def offer(self, device):
        assert device not in self.offered
        self.offered.add(device)
        it = replace(self.boards[device], outcome=WAITING, offered_at=self.now)
        for phase, code in BEHAVIOURS[self.acts[device]] if self.online[device] else []:
            said = word(at=self.now, phase=phase, code=code, retryable=code == "unreachable")
            it = apply_report(apply_report(it, said, OFFER), said, OFFER)
        self.boards[device] = it

    def count(self, *outcomes):
        return sum(each.outcome in outcomes for each in self.boards.values())


@settings(max_examples=300)
@given(
    behaviours=st.lists(st.sampled_from(sorted(BEHAVIOURS)), max_size=12),
    away=st.lists(st.booleans(), min_size=12, max_size=12),
    text=st.sampled_from(["100%", "1, 100%", "1, 25%, 100%", "2, 4, 100%"]),
    failures=st.integers(0, 3),
)
def test_every_rollout_comes_to_rest_and_never_passes_a_breach(behaviours, away, text, failures):
    names = [f"b{index:02}" for index in range(len(behaviours))]
    online = {name: not away[index] for index, name in enumerate(names)}
    it = Simulation(dict(zip(names, behaviours, strict=True)), online, text, failures)
    it.run()
    breached, succeeded = it.count(*BREACHES), it.count(GOOD)
    match it.rollout.state:
        case RolloutState.HALTED:
            assert breached > failures or (breached and not succeeded)
        case RolloutState.SUCCEEDED:
            assert breached <= failures
            assert succeeded or not names
            assert it.offered == set(names)
        case _:
            # it rests open only for boards that are away or say nothing
            assert it.count(WAITING)
            assert not succeeded or it.rollout.wave < len(it.rollout.sizes)


# How a board's word counts


def test_a_report_heard_twice_counts_once():
    waiting = board("a", 1, WAITING, acked_at=None)
    once = told(waiting, phase="committed", running="x")
    assert once.outcome is GOOD
    assert told(once, phase="committed", running="x", at=9) == once


def test_an_older_attempt_changes_nothing():
    waiting = board("a", 1, WAITING, attempt=2)
    assert told(waiting, phase="rolled-back", attempt=1) == waiting


def test_a_late_progress_report_does_not_undo_an_outcome():
    done = told(board("a", 1, WAITING), phase="committed")
    assert told(done, phase="fetching", at=6).outcome is GOOD
    failed = told(board("a", 1, WAITING), phase="rolled-back")
    assert told(failed, phase="failed", code="unsigned", at=6).outcome is BAD
    assert told(failed, phase="probation", at=6).outcome is BAD
    old = told(board("a", 1, WAITING), phase="committed", generation=None)
    assert told(old, phase="probation", generation=None).outcome is UNPROVEN


def test_a_retry_after_a_failure_counts_anew():
    failed = told(board("a", 1, WAITING), phase="rolled-back", code="trapped")
    trying = told(failed, phase="fetching", attempt=1, at=9)
    assert (trying.outcome, trying.acked_at, trying.ended_at) == (BUSY, 9, None)
    assert told(trying, phase="committed", attempt=1, at=10).outcome is GOOD


def test_what_the_board_retries_by_itself_is_not_decided():
    trying = told(board("a", 1, WAITING), phase="failed", code="unreachable", retryable=True)
    assert (trying.outcome, trying.retrying) == (LATER, True)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [("unsigned", "deferred"), ("grant-denied", "failed"), ("no-such-code-yet", "deferred"), ("trapped", "failed"),
     ("compile-failed", "failed"), ("superseded", "superseded"), ("rate-limited", "deferred"), ("no-space", "deferred"),
     ("port-in-use", "deferred"), ("internal", "deferred"), ("interrupted", "deferred")],
)  # fmt: skip
def test_a_failure_is_named_by_its_code(code, outcome):
    assert told(board("a", 1, WAITING), phase="failed", code=code).outcome is Outcome(outcome)


def test_going_back_by_interruptions_is_a_failure_and_without_a_code_too():
    assert told(board("a", 1, WAITING), phase="rolled-back", code="interrupted").outcome is BAD
    assert told(board("a", 1, WAITING), phase="rolled-back").outcome is BAD


@pytest.mark.parametrize("lacks", [{"assignment_sha256": "another"}, {"assignment_sha256": ""},
                                   {"manifest_sha256": "another"}])  # fmt: skip
def test_a_commit_of_something_else_decides_nothing(lacks):
    waiting = board("a", 1, WAITING)
    assert told(waiting, phase="committed", **lacks) == waiting
    busy = told(waiting, phase="probation")
    assert told(busy, phase="committed", **lacks) == busy


@pytest.mark.parametrize("phase", ["committed", "failed", "rolled-back"])
def test_an_unsigned_report_decides_nothing(phase):
    unproven = told(board("a", 1, WAITING), phase=phase, signed=False)
    assert unproven.outcome is UNPROVEN
    assert unproven.ended_at is None
    assert told(unproven, phase="committed").outcome is GOOD


def test_an_agent_that_does_not_say_which_generation_committed_is_unproven():
    unproven = told(board("a", 1, WAITING), phase="committed", generation=None)
    assert (unproven.outcome, unproven.message) == (UNPROVEN, "its agent is too old to sign its state")
    assert told(board("a", 1, WAITING), phase="committed", generation=0).outcome is GOOD  # a removal


def test_an_unproven_board_is_in_no_count():
    boards = [board("a", 1, UNPROVEN), board("b", 1, GOOD), board("c", 2, PENDING)]
    assert decide(rollout(wave=1, sizes=(2, 3)), boards, NOW) == (Offer(2, ("c",)),)
    (wait,) = decide(rollout(wave=1, sizes=(1,)), [board("a", 1, UNPROVEN)], NOW)
    assert isinstance(wait, Wait)


def test_a_board_that_does_not_stay_up_while_it_soaks_has_failed():
    good = told(board("a", 1, WAITING), phase="committed")
    fallen = told(good, phase="failed", code="restarted", message="in quarantine", at=NOW + 5)
    assert (fallen.outcome, fallen.ended_at) == (BAD, NOW + 5)
    (halt,) = decide(rollout(wave=1, soak_s=300), [fallen, *fleet(GOOD, PENDING, PENDING)[1:]], NOW + 6)
    assert isinstance(halt, Halt)
    # a trouble that says nothing of the version takes no success away, nor does an unsigned word
    assert told(good, phase="failed", code="no-space", at=NOW + 5) == good
    assert told(good, phase="failed", code="restarted", signed=False, at=NOW + 5) == good


def test_a_report_without_a_phase_is_no_news():
    waiting = board("a", 1, WAITING)
    assert told(waiting, phase="idle", code="revoked", message="goes on running") == waiting
