"""Looks of the simulated server at its members: by counts, so that large fleets can be played."""

from dataclasses import replace

import pytest

from fleet.protocol.codes import RolloutState
from fleet.rollout.decide import Limits
from fleet.rollout.members import parse_waves
from fleet.simulator import forecast
from fleet.simulator.devices import Traits
from fleet.simulator.forecast import Place, Plan
from fleet.simulator.invariants import check_end
from fleet.simulator.scenarios import scenario
from fleet.simulator.simulation import Scenario, Simulation


def played(size, *, rate=0.0):
    fleet = {f"d{number:04}": Place(online=number % 10 != 0) for number in range(size)}
    plan = Plan(parse_waves("1, 1%, 10%, 100%"), Limits())
    return Simulation(forecast._scenario(fleet, plan, rate, 1)).run()


@pytest.mark.parametrize("size", [100, 400])
def test_a_device_brings_about_less_than_one_look(size):
    found = played(size)
    assert found.rollout.state is RolloutState.SUCCEEDED
    assert len(found.steps) < size


@pytest.mark.parametrize("size", [200, 1600])
def test_a_look_reads_what_changed_however_large_the_fleet(size):
    found = played(size)
    assert len(found.steps) > size // 2
    # those that are silent for too long, offers taken back, and the three that a sentence names
    assert found.members.read < 8 * len(found.steps)
    assert sum(each.counted for each in found.members.values()) == size


def test_once_it_succeeded_only_late_devices_are_looked_at():
    found = played(400)
    settled = [each for each in found.steps if each.rollout.state is RolloutState.SUCCEEDED]
    assert len(settled) > 50
    assert max(len(each.wait.devices) for each in settled) < 100


def test_of_a_rollout_that_ended_nothing_is_decided():
    found = played(400, rate=1.0)
    assert found.rollout.state is RolloutState.REVERTED
    assert found.steps[-1] is next(each for each in found.steps if each.rollout.state is RolloutState.REVERTED)


def test_reports_in_time_put_off_the_look_at_a_silent_device():
    # slow enough that each step takes most of the time after which a device counts as stuck
    slow = {f"d{number:02}": Traits(pace=20) for number in range(50)}
    found = Simulation(Scenario(3, slow, parse_waves("100%"), Limits(timeout_s=900), tick_s=5)).run()
    assert found.rollout.state is RolloutState.SUCCEEDED
    later = found.steps[1:]
    assert len(later) <= 50, "one look for each device that ended, and none for its deadline"


@pytest.mark.parametrize("seed", range(60))
def test_what_holds_at_the_end_holds_with_a_tick_too(seed):
    check_end(Simulation(replace(scenario(seed), tick_s=5)).run())
