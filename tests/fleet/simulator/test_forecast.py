"""Forecast of a plan over the fleet as it is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.rollout.decide import Limits
from fleet.rollout.members import Amount, parse_waves
from fleet.simulator.forecast import Place, Plan, forecast

FLEET = {f"d{number:02}": Place(online=number % 10 != 0) for number in range(40)}
WAVES = Plan(parse_waves("1, 10%, 100%"), Limits())


def test_a_version_that_fails_everywhere_hurts_the_canary_alone():
    (bad,) = forecast(FLEET, WAVES, seed=1, rates=[1.0], runs=8)
    assert (bad.halted, bad.wave, bad.hurt, bad.hurt_most) == (8, 1, 1, 1)


def test_waves_hurt_fewer_devices_than_everybody_at_once():
    no_limit = Amount(100, percent=True)
    everybody = Plan(parse_waves("100%"), Limits(failures=no_limit, lost=no_limit))
    (waves,) = forecast(FLEET, WAVES, seed=1, rates=[0.2], runs=8)
    (at_once,) = forecast(FLEET, everybody, seed=1, rates=[0.2], runs=8)
    assert at_once.hurt > 2 * waves.hurt_most
    assert at_once.halted == 0


def test_a_good_version_reaches_everybody_who_comes():
    (good,) = forecast(FLEET, WAVES, seed=1, rates=[0.0], runs=8)
    assert (good.hurt_most, good.met) == (0, 40)


def test_a_forecast_is_made_again_from_its_seed():
    assert forecast(FLEET, WAVES, seed=5, rates=[0.05], runs=5) == forecast(FLEET, WAVES, seed=5, rates=[0.05], runs=5)


def test_several_processes_make_the_same_forecast():
    alone = forecast(FLEET, WAVES, seed=5, rates=[0.0, 0.05], runs=3)
    assert forecast(FLEET, WAVES, seed=5, rates=[0.0, 0.05], runs=3, processes=2) == alone


ENDLESS = """
import signal
import sys
import threading
from fleet.rollout.decide import Limits
from fleet.rollout.members import parse_waves
from fleet.simulator.forecast import Plan, forecast

class Endless:
    def items(self):
        print("at it\\n", end="", flush=True)  # in one piece, unbuffered too
        threading.Event().wait()

if __name__ == "__mp_main__" and sys.argv[1] == "starts":
    print("starts\\n", end="", flush=True)
    sys.stdin.read()  # until it is closed, after Ctrl-C

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell leaves ignored in the background
    forecast(Endless(), Plan(parse_waves("1, 100%"), Limits()), seed=5, processes=2)
"""


@pytest.mark.parametrize("moment", ["starts", "at it"])
def test_ctrl_c_ends_the_runs_under_way_in_every_process(tmp_path, moment):
    script = tmp_path / "simulate.py"
    script.write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = (sys.executable, str(script), moment)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, **pipes, text=True, start_new_session=True) as main:
        try:
            assert [main.stdout.readline() for _ in range(2)] == [f"{moment}\n"] * 2
            os.killpg(main.pid, signal.SIGINT)
            _, said = main.communicate(timeout=60)
        except BaseException:
            os.killpg(main.pid, signal.SIGKILL)
            raise
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert said.count("most recent call last") == 1, "that of the command, which says `interrupted` in its place"
