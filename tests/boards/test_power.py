"""Power that goes at any moment, a clock that starts in 1970, an agent that never comes back: the board answers."""

import os
import random
import time
from collections.abc import Callable

import pytest
from conftest import Joined
from stages import budget

from deploy.riscv64 import build as riscv64

ARCHITECTURES = ["arm64", *(["riscv64"] if os.environ.get("FULL") and riscv64.finished() else [])]
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1 << 30)
# seconds after the push began: while it is offered, fetched, compiled, swapped, on probation, committed
FIXED = [0.5, 2.0, 4.0, 7.0, 11.0, 16.0]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scene(request: pytest.FixtureRequest, joined: Callable[[str, str], Joined]) -> Joined:
    return joined(str(request.param), f"power-{request.param}")


def moment(number: int) -> float:
    """The fixed ones, then random ones of this run (two workers must collect the same names)."""
    return FIXED[number] if number < len(FIXED) else round(random.Random(SEED + number).uniform(0.5, 20.0), 1)


@pytest.mark.parametrize("number", range(len(FIXED) + 2))
def test_the_plug_is_pulled_during_an_update(scene: Joined, number: int) -> None:
    component, answer = (("v2.wasm", "2"), ("v1.wasm", "1"))[number % 2]
    fresh, moment_s = scene.operator.variant(component, 100 + number), moment(number)
    seed = f", SEED={SEED}" if number >= len(FIXED) else ""
    with budget(f"plug pulled {moment_s} s into an update{seed}", 100):
        code, said = scene.operator.push(fresh, "--version", f"3.0.{number}", "--detach", group=scene.group)
        assert code == 0, said
        time.sleep(moment_s)  # the moment is the point
        scene.board.pull_the_plug()
        scene.board.start()
        # either the old one or the new one, never neither
        deadline = time.monotonic() + 300
        while scene.operator.version(scene.board.port) not in {"1", "2"}:
            assert time.monotonic() < deadline, "nothing answers after the power cut"
            time.sleep(0.5)  # it boots on the cores that would ask
        # and then the update comes to its end: here the new one is sound, so it is the one that stays, and is reported
        scene.operator.succeeded(group=scene.group)
        scene.answers(answer)
    scene.operator.runs(scene.device, f"3.0.{number}")


def test_a_clock_at_1970_keeps_nobody_from_an_update(scene: Joined) -> None:
    # a board without a battery behind its clock, in a network without a time server
    scene.board.pull_the_plug()
    scene.board.sets_clock, scene.board.options = False, ("-rtc", "base=1970-01-01T00:00:00")
    try:
        with budget("boot in 1970 and an update", 150):
            scene.board.start()
            scene.board.ok("date -s @60")  # systemd has put it at its own date of birth
            scene.answers("1")
            scene.operator.online(scene.device)
            assert scene.board.ok("date +%Y") == "1970"
            scene.operator.pushed(scene.operator.variant("v2.wasm", 1970), "--version", "3.1.0", group=scene.group)
            scene.answers("2")
            assert scene.board.ok("date +%Y") == "1970", "an agent does not set clocks"
    finally:
        scene.board.sets_clock, scene.board.options = True, ()


def test_a_board_whose_agent_is_disabled_still_runs_after_a_power_cut(scene: Joined) -> None:
    scene.board.ok("systemctl disable --now fleet-agent.service fleet-agent.path && sync", timeout_s=120)
    scene.board.pull_the_plug()
    with budget("boot without the agent", 90):
        scene.board.start()
        scene.answers("2")
    assert scene.board.run("systemctl is-active fleet-agent").text == "inactive"
    scene.board.ok("systemctl enable --now fleet-agent.path fleet-agent.service", timeout_s=180)
    scene.operator.online(scene.device)
