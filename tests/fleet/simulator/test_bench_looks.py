"""Cost of `fleet rollout simulate` over ten thousand devices: printed, and never timed to pass."""

import time

import pytest

from fleet.rollout.decide import Limits
from fleet.rollout.members import parse_waves
from fleet.simulator import forecast
from fleet.simulator.forecast import Place, Plan
from fleet.simulator.simulation import Simulation

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]
FLEET = {f"d{number:05}": Place(online=number % 10 != 0) for number in range(10_000)}
PLAN = Plan(parse_waves("1, 1%, 10%, 100%"), Limits())


def test_one_run():
    began = time.process_time()
    found = Simulation(forecast._scenario(FLEET, PLAN, 0.01, 1)).run()
    spent, looks = time.process_time() - began, len(found.steps)
    print(
        f"\none run over {len(FLEET)} devices: {spent:.1f} s of processor time, {looks} looks, which read "
        f"{found.members.read / looks:.1f} members each; {found.rollout.state}"
    )


def test_the_whole_command():
    began = time.monotonic()
    found = forecast.forecast(FLEET, PLAN, seed=1, runs=20, processes=2)
    print(f"\n20 runs for each of {len(found)} rates in two processes: {time.monotonic() - began:.0f} s")
