"""Invariants of rollouts over seeded fleets, and for each of them a broken decision that it finds.

`make nightly` plays 10,000 fleets. A failure names its seed:
`Simulation(scenario(SEED), [check]).run()` plays it again.
"""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fleet.protocol.codes import Outcome, RolloutState
from fleet.rollout import advance
from fleet.rollout import decide as gates
from fleet.rollout import model as progress
from fleet.simulator import devices, simulation
from fleet.simulator.invariants import BrokenInvariantError, check, check_end
from fleet.simulator.scenarios import scenario
from fleet.simulator.simulation import Simulation


def play(seed):
    played = Simulation(scenario(seed), [check]).run()
    check_end(played)
    return played


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_invariants_hold_in_every_fleet(first):
    for seed in range(first, first + 50):
        play(seed)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, 10_000, 1000))
def test_invariants_hold_in_ten_thousand_fleets(first):
    ends = Counter(play(seed).rollout.state for seed in range(first, first + 1000))
    print(f"fleets {first} to {first + 999}: " + ", ".join(f"{count} {state}" for state, count in sorted(ends.items())))


@settings(max_examples=50)
@given(st.integers(10_000, 1 << 40))
def test_invariants_hold_in_fleets_of_any_seed(seed):
    play(seed)


def test_fleets_come_to_every_end_and_show_every_outcome():
    played = [play(seed) for seed in range(300)]
    states = {each.rollout.state for each in played}
    assert states >= {
        RolloutState.SUCCEEDED, RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.REVOKED, RolloutState.PAUSED,
        RolloutState.REFUSED,
    }  # fmt: skip
    shown = {member.outcome for each in played for step in each.steps for member in step.members}
    assert shown >= set(Outcome) - {Outcome.REFUSED, Outcome.SKIPPED, Outcome.SUPERSEDED}


def test_a_fleet_is_played_again_from_its_seed():
    once, again = play(7), play(7)
    assert [step.actions for step in once.steps] == [step.actions for step in again.steps]
    assert (once.now, once.members) == (again.now, again.members)


# -- each invariant finds a decision that is broken -------------------------------------------------------------------


def faults(seeds):
    for seed in seeds:
        try:
            play(seed)
        except BrokenInvariantError as broken:
            yield str(broken)


def broken_by(text):
    """Play fleets until the invariant that is meant is broken."""
    found = []
    for fault in faults(range(300)):
        if text in fault:
            return
        found.append(fault)
    pytest.fail(f"no fleet of 300 found: {text}; found were {found[:5]}")


def test_a_gate_that_overlooks_failures_is_found(monkeypatch):
    monkeypatch.setattr(gates, "_judge", lambda rollout, members: ())
    broken_by("goes on after the failures of")


def test_a_gate_that_asks_for_no_success_is_found(monkeypatch):
    monkeypatch.setattr(gates, "_held", lambda rollout, members, inside, now: None)
    broken_by("successes")


def test_a_gate_without_soak_is_found(monkeypatch):
    held = gates._held

    def hasty(rollout, members, inside, now):
        return held(replace(rollout, gates=tuple(gates.Gate() for _ in rollout.gates)), members, inside, now)

    monkeypatch.setattr(gates, "_held", hasty)
    broken_by("before its soak was over")


def test_a_success_that_needs_no_proof_is_found(monkeypatch):
    monkeypatch.setattr(progress.Expected, "proven_by", lambda self, seen: True)
    broken_by("succeeded and runs")


def test_a_budget_that_is_not_kept_is_found(monkeypatch):
    monkeypatch.setattr(gates, "_spare", lambda limits, members: None)
    broken_by("is left with")


def test_a_limit_at_once_that_is_not_kept_is_found(monkeypatch):
    monkeypatch.setattr(gates, "_under_way", lambda members: 0)
    broken_by("are at it")


def test_a_pause_that_leaves_offers_standing_is_found(monkeypatch):
    monkeypatch.setattr(gates, "_paused", lambda rollout, members, now: (gates.Wait(""),) if rollout.causes else ())
    broken_by("still have the offer")


def test_an_abort_that_waits_for_devices_is_found(monkeypatch):
    def patient(state, member):
        busy = member.outcome is Outcome.WAITING and member.returning
        return busy or progress_wants(state, member)

    progress_wants = progress.wants
    monkeypatch.setattr(simulation, "wants", patient)
    broken_by("are still to run it")


def test_a_report_that_counts_by_its_arrival_is_found(monkeypatch):
    from fleet.simulator import invariants

    def newest_arrival(member, seen, expected):
        after = progress.observe(replace(member, sequence=0, decided=0), seen, expected)
        return after if after.outcome is not member.outcome or after.sequence != seen.sequence else member

    monkeypatch.setattr(invariants, "observe", newest_arrival)
    broken_by("with its reports in another order")


def test_an_outcome_without_a_name_is_found(monkeypatch):
    monkeypatch.setattr(advance, "withdrawn", lambda member: replace(member, outcome=Outcome.SKIPPED))
    broken_by("is skipped")


def test_an_assignment_that_does_not_follow_the_outcome_is_found(monkeypatch):
    monkeypatch.setattr(
        simulation,
        "advance_standing",
        lambda *given, **more: dataclasses.replace(advance.advance_standing(*given, **more), changed=()),
    )
    broken_by("and assigned")


def test_a_device_that_keeps_a_withdrawn_version_is_found(monkeypatch):
    def careless(self, order, at):
        if self.order is not None and order.number <= self.order.number:
            return []
        self.order = order
        self.sequence += 1
        return [
            progress.Observation(
                at, self.sequence, "committed", assignment_sha256=order.sha256,
                manifest_sha256=order.version or "", generation=1,
            )
        ]  # fmt: skip

    due = devices.Device.due
    monkeypatch.setattr(devices.Device, "accept", careless)
    monkeypatch.setattr(devices.Device, "due", lambda self: due(self) if self.order.version == "new" else None)
    monkeypatch.setattr(Simulation, "_show", lambda self: None)
    broken_by("runs the withdrawn version")


def test_a_rollout_without_waves_is_found(monkeypatch):
    begin = Simulation._begin

    def at_once(self):
        rollout, members = begin(self)
        return replace(rollout, wave=len(rollout.gates)), members

    monkeypatch.setattr(Simulation, "_begin", at_once)
    monkeypatch.setattr(gates, "_canaries", lambda rollout, members, now: ())
    broken_by("met a version that fails everywhere")
